"""Where a job runs, and for how much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.cluster import machine
from finetui.engine.cluster.machine import choose
from finetui.planner import hardware
from finetui.planner.errors import HardwareError, RecipeError
from finetui.planner.hardware import Offer, cpu_node
from finetui.planner.recipe import Recipe


def offer(provider: str, gpu: str, count: int, usd: float | None, spot: float | None = None) -> Offer:
    return Offer(provider, gpu, count, usd, spot, "", "2026-11-01", "test")


OFFERS = (
    offer("aws", "H100", 8, 56.0, 30.0),
    offer("aws", "L4", 1, 0.8, 0.3),
    offer("runpod", "H100", 1, 2.0),
    offer("runpod (secure)", "H100", 1, 3.0, 1.5),
    offer("lambda", "H100", 1, 4.0),
    offer("salad", "H100", 1, 0.5),
    offer("modal", "L4", 1, 0.9),
)


@pytest.fixture(autouse=True)
def _offers(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetui.engine.cluster import clouds

    monkeypatch.setattr(clouds, "load_offers", lambda: OFFERS)


@pytest.fixture
def recipe(rows: Callable[..., Path]) -> Callable[..., Recipe]:
    def make(**hardware: Any) -> Recipe:
        tree = {"model": "Qwen/Qwen3-8B", "tuning": "qlora", "data": str(rows()), "hardware": hardware}
        return Recipe.build(tree)

    return make


def test_the_cheapest_that_the_system_rents(recipe: Callable[..., Recipe]) -> None:
    found = choose(recipe(gpu="H100"), "skypilot")
    assert found.cloud is not None
    assert (found.cloud.name, found.gpu_name, found.usd_per_h) == ("runpod", "H100-SXM", 3.0)
    assert found.usd == pytest.approx(3.0 * found.plan.time_s / 3600)
    assert choose(recipe(gpu="H100"), "skypilot", provider="lambda").usd_per_h == 4.0


def test_several_cost_as_many_single_ones_where_nobody_lists_so_many(recipe: Callable[..., Recipe]) -> None:
    assert choose(recipe(gpu="H100", gpus=2), "skypilot").usd_per_h == 6.0
    assert choose(recipe(gpu="H100", gpus=8), "skypilot").usd_per_h == 56.0


def test_spot_machines(recipe: Callable[..., Recipe]) -> None:
    on_demand, spot = (choose(recipe(gpu="H100"), "skypilot", provider="runpod", spot=s) for s in (False, True))
    assert spot.usd_per_h == 1.5
    assert spot.time_s > on_demand.time_s  # interruptions take time
    with pytest.raises(HardwareError, match="lambda has no spot machines"):
        choose(recipe(gpu="H100"), "skypilot", provider="lambda", spot=True)
    with pytest.raises(HardwareError, match="slurm has no spot machines"):
        choose(recipe(gpu="H100"), "slurm", spot=True)


def test_without_a_gpu_the_offer_on_which_the_run_costs_least(recipe: Callable[..., Recipe]) -> None:
    found = choose(recipe(), "modal")
    assert (found.gpu_name, found.count, found.recipe.hardware.gpu) == ("L4", 1, "L4")
    assert choose(recipe(gpus=8), "skypilot").usd_per_h == 56.0
    with pytest.raises(HardwareError, match="no offer that modal can rent fits"):
        choose(recipe(gpus=4), "modal")


def test_a_price_by_the_users_word(recipe: Callable[..., Recipe]) -> None:
    found = choose(recipe(gpu="H100", usd_per_h=1.25), "skypilot")
    assert (found.usd_per_h, found.as_of) == (1.25, "")


def test_a_provider_that_has_the_gpu_but_no_price(recipe: Callable[..., Recipe]) -> None:
    assert choose(recipe(gpu="A40"), "skypilot", provider="runpod").usd_per_h == 0.0
    with pytest.raises(HardwareError, match="no offer of 1 × A40"):
        choose(recipe(gpu="A40"), "skypilot")


def test_slurm_is_told_the_gpu(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(recipe(gpu="H100", gpus=4), "slurm").gpu_name == "h100"
    monkeypatch.setattr(hardware, "this_machine", cpu_node)
    with pytest.raises(HardwareError, match="which GPU do the nodes have"):
        choose(recipe(), "slurm")
    assert choose(recipe(device="cpu"), "slurm").gpu_name == ""


def test_what_does_not_fit_is_not_sent_anywhere(recipe: Callable[..., Recipe]) -> None:
    large = recipe(gpu="L4").with_overrides({"tuning": "full"})
    with pytest.raises(HardwareError, match="does not fit on L4"):
        choose(large, "modal")


def test_stages_need_a_gpu_by_name(recipe: Callable[..., Recipe]) -> None:
    staged = recipe().with_overrides({"stages": [{"method": "sft"}, {"do": "evaluate"}]})
    with pytest.raises(RecipeError, match="which GPU is to be rented"):
        choose(staged, "skypilot")
    assert machine.choose(staged.with_overrides({"hardware.gpu": "H100"}), "skypilot").gpu_name == "H100-SXM"
