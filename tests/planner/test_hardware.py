"""The catalogs are well-formed, GPUs are found by any of their names, and NVML's answers are read right."""

from __future__ import annotations

import csv
import sys
from datetime import date

import pytest

from finetui.planner import hardware
from finetui.planner.architecture import Architecture
from finetui.planner.cgroup import MemoryLimit
from finetui.planner.cost import cheapest_offers, cost_of
from finetui.planner.errors import HardwareError
from finetui.planner.hardware import (
    PRESETS,
    Node,
    Offer,
    find_gpu,
    known_or_assumed,
    load_catalog,
    load_offers,
    node_for,
)
from finetui.planner.hub import find_config
from finetui.planner.limits import HardwareRequest
from finetui.planner.ranking import rank_offers
from finetui.planner.recipe import Recipe


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a100", "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("4090", "RTX-4090"),
        ("rtx3060", "RTX-3060-12GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"),
    ],
)
def test_gpus_are_found_by_the_names_people_and_drivers_use(name, found):
    assert find_gpu(name).name == found


def test_an_unknown_gpu_is_refused_with_the_nearest():
    with pytest.raises(HardwareError, match=r"no GPU named 'RTX 4099'.*RTX-4090"):
        find_gpu("RTX 4099")


def test_the_gpu_catalog_is_well_formed():
    owners: dict[str, set[str]] = {}
    for gpu in load_catalog().values():
        for alias in (gpu.name, *gpu.aliases):
            owners.setdefault(hardware._plain(alias), set()).add(gpu.name)
    assert [names for names in owners.values() if len(names) > 1] == []
    with (PRESETS / "gpus.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["source"], row
            assert date.fromisoformat(row["as_of"]), row
            assert row["memory_basis"] in ("seen", "derived"), row
            assert 0.85 < float(row["memory_gib"]) / float(row["memory_gb"]) <= 1, row
            assert 0.3 < float(row["achievable"]) <= 1, row
            assert float(row["bandwidth_gb_s"]) > 100, row
            assert float(row["fp32_tflops"]) > 1, row


def test_every_offer_has_a_gpu_a_price_a_date_and_a_source():
    offers = load_offers()
    assert len(offers) > 250
    for offer in offers:
        assert offer.gpu in load_catalog(), offer
        assert offer.source, offer
        assert offer.usd_per_h is not None or offer.usd_per_h_spot, offer
        assert offer.as_of == "unknown" or date.fromisoformat(offer.as_of) <= date.today(), offer
        assert 1 <= offer.count <= 16, offer
        if offer.usd_per_h and offer.usd_per_h_spot:
            assert offer.usd_per_h_spot < offer.usd_per_h, offer
        if offer.provider in ("aws", "gcp", "azure"):
            assert offer.usd_per_h_spot is None, "spot prices of the source are stale"
    per_gpu = [offer.usd_per_h / offer.count for offer in offers if offer.gpu == "H100" and offer.usd_per_h]
    assert 1.0 < min(per_gpu) <= max(per_gpu) < 13.0


def test_old_prices_are_marked():
    offer = Offer("x", "H100", 1, 2.0, None, "", "2026-01-01", "s")
    assert not offer.is_stale(date(2026, 3, 1))
    assert offer.is_stale(date(2026, 6, 1))
    assert Offer("x", "H100", 1, 2.0, None, "", "unknown", "s").is_stale()


def test_nvml_names_take_the_catalog_speed_and_the_driver_memory():
    gpu = known_or_assumed("NVIDIA H200", 140.4, "9.0")
    assert (gpu.name, gpu.bandwidth_gb_s) == ("H200", 4800.0)
    assert gpu.memory_gib == pytest.approx(139.0, abs=0.3)
    stranger = known_or_assumed("NVIDIA FooBar 9000", 50.0, "7.5")
    assert (stranger.name, stranger.bf16) == ("FooBar 9000", False)
    assert "not in the catalog" in stranger.source


class _Nvml:
    """As much of pynvml as is asked for: two equal GPUs and another."""

    class NVMLError(Exception):
        pass

    names = ("NVIDIA A100-SXM4-80GB", "Tesla T4", "NVIDIA A100-SXM4-80GB")

    def __init__(self, *, driver: bool = True, lost: bool = False) -> None:
        self.driver, self.lost = driver, lost

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("driver not loaded")

    def nvmlShutdown(self):
        pass

    def nvmlDeviceGetCount(self):
        if self.lost:
            raise self.NVMLError("GPU is lost")
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return self.names[handle]

    def nvmlDeviceGetUUID(self, handle):
        return ("GPU-aa11", "GPU-ab22", "GPU-cc33")[handle]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return type("Memory", (), {"total": 80 * 2**30})

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return (8, 0)


def _install(monkeypatch: pytest.MonkeyPatch, driver: object) -> None:
    monkeypatch.setattr(hardware, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", driver)


def test_this_machine_through_nvml(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _install(monkeypatch, _Nvml())
    node = hardware.this_machine()
    assert (node.gpu.name, node.count, node.indices, node.local) == ("A100-80GB", 2, (0, 2), True)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("0,1,2", (0, 2)), ("2", (2,)), ("2,0", (2, 0)), ("GPU-cc", (2,)), ("0,9,2", (0,)), ("0,-1,2", (0,))],
)
def test_only_visible_gpus_are_planned_for(monkeypatch, visible, indices):
    _install(monkeypatch, _Nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.this_machine().indices == indices


def test_nothing_visible_is_a_cpu_and_slices_are_refused(monkeypatch):
    _install(monkeypatch, _Nvml())
    for visible in ("", "GPU-a", "7"):  # none, an ambiguous UUID, and an index too many
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert hardware.this_machine().gpu.kind == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    with pytest.raises(HardwareError, match="MIG"):
        hardware.this_machine()


def test_the_kernel_and_psutil_agree_about_the_host():
    import psutil

    from finetui.planner import host

    total, free = host._memory()
    assert total == psutil.virtual_memory().total
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    assert 1 <= host.cores() <= (psutil.cpu_count(logical=False) or 1)


def test_a_container_is_as_large_as_its_limit(monkeypatch):
    limit = MemoryLimit(limit=3 * hardware.GIB, used=1 * hardware.GIB)
    monkeypatch.setattr("finetui.planner.host.memory_limit", lambda: limit)
    monkeypatch.setattr("finetui.planner.host.usable_cpus", lambda: 1)
    node = hardware.cpu_node()
    assert node.host_memory_gib == 3.0
    assert node.gpu.memory_gib <= 2.0
    assert node.gpu.name == "CPU (1 core)"


def test_no_driver_is_a_cpu_and_a_lost_gpu_is_said(monkeypatch):
    _install(monkeypatch, _Nvml(driver=False))
    node = hardware.this_machine()
    assert (node.gpu.kind, node.count) == ("cpu", 1)
    assert node.gpu.memory_gib > 0
    with pytest.raises(HardwareError, match="no CUDA GPU"):
        node_for(HardwareRequest(device="cuda"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _install(monkeypatch, _Nvml(lost=True))
    with pytest.raises(HardwareError, match="GPU is lost"):
        hardware.this_machine()


def test_node_for_what_a_recipe_asks():
    assert node_for(HardwareRequest(gpu="h100", gpus=4)).count == 4
    assert node_for(HardwareRequest(gpu="h100", gpus=[1, 3])).devices == (1, 3)
    assert node_for(HardwareRequest(device="cpu")).gpu.kind == "cpu"


def test_offers_are_ranked_by_what_this_run_costs():
    architecture = Architecture.from_config(find_config("meta-llama/Llama-3.1-70B")[1], "70B")
    ranked = rank_offers(Recipe(model="70B", tuning="qlora", sequence_length=1024), architecture)
    assert ranked
    assert all(entry.plan.fits for entry in ranked)
    assert [entry.usd for entry in ranked] == sorted(entry.usd for entry in ranked)
    assert not any(entry.offer.gpu in ("T4", "RTX-4090") for entry in ranked)


def test_the_cheapest_offer_is_a_dated_one_where_there_is_one():
    dated, undated = (
        Offer("x", "H100", 1, price, None, "", day, "s") for price, day in ((2.0, "2026-01-01"), (1.0, "unknown"))
    )
    free = Offer("x", "H100", 1, 0.0, None, "", "2026-01-01", "s")
    assert cheapest_offers([undated, dated, free]) == {("H100", 1): dated}
    assert cheapest_offers([undated]) == {("H100", 1): undated}
    two = cost_of(3600, Node(find_gpu("H100"), 2), [dated])
    assert (two.usd, two.provider) == (4.0, "x")
