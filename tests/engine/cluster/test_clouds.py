"""What systems call GPUs, and who they rent from."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import finetui
from finetui.engine.cluster.clouds import clouds_of, find_cloud, name_of, offers_of
from finetui.planner.errors import HardwareError
from finetui.planner.hardware import all_offers, load_catalog

PRESETS = Path(finetui.__file__).parent / "presets"


def table(name: str) -> list[dict[str, str]]:
    with (PRESETS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_name_belongs_to_a_gpu_and_a_cloud_that_there_are() -> None:
    known = {(system, cloud.provider) for system in ("skypilot", "modal") for cloud in clouds_of(system)}
    sellers = {offer.provider for offer in all_offers()}
    for row in table("cluster_gpus.csv"):
        assert row["gpu"] in load_catalog()
        assert row["system"] == "slurm" or (row["system"], row["provider"]) in known
        assert row["source"]
        assert row["as_of"]
    for row in table("cluster_clouds.csv"):
        assert set(row["prices"].split(";")) <= sellers
        assert row["source"]


@pytest.mark.parametrize(
    ("system", "provider", "gpu", "count", "name"),
    [
        ("skypilot", "runpod", "H100", 1, "H100-SXM"),
        ("skypilot", "runpod", "H100-PCIe", 1, "H100"),
        ("skypilot", "aws", "A100-40GB", 8, "A100"),
        ("skypilot", "lambda", "RTX-A6000", 2, "A6000"),
        ("modal", "modal", "A100-80GB-PCIe", 2, "A100-80GB"),
        ("slurm", "", "A100-80GB", 4, "a100"),
    ],
)
def test_a_gpu_has_the_name_of_that_system(system: str, provider: str, gpu: str, count: int, name: str) -> None:
    assert name_of(system, provider, gpu, count) == name


def test_a_name_that_is_not_known_is_asked_for() -> None:
    with pytest.raises(HardwareError, match="does not know what skypilot calls a GH200 at aws") as caught:
        name_of("skypilot", "aws", "GH200", 1)
    assert "lambda" in caught.value.do
    assert "--gpu-name" in caught.value.do
    with pytest.raises(HardwareError, match="at most 4 × A10"):
        name_of("modal", "modal", "A10", 8)
    assert name_of("skypilot", "aws", "GH200", 1, "GH200-96GB") == "GH200-96GB"


@pytest.mark.parametrize("given", ["", "h100 --uid=0", "a\nb", "$(id)", "x" * 65, "h100:2"])
def test_a_name_by_the_users_word_is_one_word(given: str) -> None:
    with pytest.raises(HardwareError, match="can't be the name"):
        name_of("slurm", "", "H100", 1, given)


def test_clouds_go_by_either_name() -> None:
    assert find_cloud("skypilot", "vast") is find_cloud("skypilot", "vast-ai")
    with pytest.raises(HardwareError, match="rents no machines") as caught:
        find_cloud("skypilot", "hyperscaler")
    assert "runpod" in caught.value.do


def test_the_kind_of_offer_that_the_system_rents_counts() -> None:
    """RunPod has a secure cloud and a community one; SkyPilot rents the secure one."""
    prices = {o.provider for o in offers_of("skypilot", find_cloud("skypilot", "runpod")) if o.gpu == "H100"}
    assert prices == {"runpod (secure)"}
