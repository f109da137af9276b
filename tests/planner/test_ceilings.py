"""Measured ceilings: kept per device and driver, found again, and put in place of the catalog's figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.ceilings import Ceilings, for_gpu, load, store
from finetui.planner.errors import FinetuiError
from finetui.planner.hardware import Gpu, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.settings import Settings
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS

MEASURED = Ceilings(
    "H200", "570.1", "2026-11-20", bf16_tflops=720.0, copy_gb_s=4224.0, to_device_gb_s=55.0, to_host_gb_s=52.2
)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_nothing_is_known_before_it_is_measured() -> None:
    assert load() == []
    assert for_gpu("H200") is None


def test_a_measurement_replaces_the_one_of_the_same_driver_and_the_latest_counts() -> None:
    newer = Ceilings("H200", "580.2", "2026-11-22", bf16_tflops=730.0)
    for ceilings in (MEASURED, newer, Ceilings("L4", "570.1", "2026-11-23"), MEASURED):
        store(ceilings)
    assert len(load()) == 3
    assert for_gpu("H200") == newer


def test_a_gpu_keeps_its_peak_and_changes_what_is_achieved_of_it() -> None:
    gpu = find_gpu("H200")
    tuned = MEASURED.on(gpu)
    assert tuned.bf16_tflops == gpu.bf16_tflops
    assert tuned.achievable == pytest.approx(720 / gpu.bf16_tflops)
    assert tuned.bandwidth_gb_s == pytest.approx(4800)
    assert tuned.pcie_gb_s == pytest.approx(60)
    assert tuned.link_gb_s == gpu.link_gb_s, "what was not measured stays"
    assert "2026-11-22" not in tuned.source
    assert "measured" in tuned.source


def test_a_slow_host_makes_small_batches_slow_and_large_ones_not() -> None:
    """What ``finetui bench`` measured of launches is what layers wait for where Python starts their kernels."""
    model = Architecture.from_config(find_config("Qwen/Qwen3-0.6B")[1], "Qwen3-0.6B")
    gpu = find_gpu("H200")
    slow = Ceilings("H200", launch_us=64.0).on(gpu)
    for name, few, many in (("trl", 128, 65536), ("finetui", 128, 65536)):
        for tokens, times in ((few, 1.25), (many, 1.0)):
            settings = Settings("lora", tokens)
            usual, now = (step_speed(model, settings, STACKS[name], one).step_s for one in (gpu, slow))
            assert now >= 1.2 * usual if times > 1 else now == pytest.approx(usual, rel=0.05), (name, tokens)


def test_a_cpu_has_no_peak_to_keep() -> None:
    cpu = Gpu("CPU (2 cores)", 8.0, 20.0, bf16_tflops=0.08, fp32_tflops=0.08, kind="cpu")
    tuned = Ceilings(cpu.name, fp32_tflops=0.1).on(cpu)
    assert tuned.fp32_tflops * tuned.achievable == pytest.approx(0.1)
    assert tuned.bf16_tflops == cpu.bf16_tflops


def test_a_spoilt_file_is_named(tmp_path: Path) -> None:
    store(MEASURED)
    path = tmp_path / "finetui" / "ceilings.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(FinetuiError, match=r"ceilings\.json.*finetui bench"):
        load()
