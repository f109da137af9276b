"""Managed fine-tuning: prices are well-formed, closed services are not offered, minimums and ages count."""

from __future__ import annotations

from datetime import date

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.managed import ManagedOffer, load_managed, managed_costs
from finetui.planner.plan import Workload
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

QWEN = Architecture.from_config(find_config("Qwen/Qwen3-8B")[1], "Qwen/Qwen3-8B")
DATA = Workload(10_000, 10_000_000, 2000, basis="counted")


def costs(data: Workload = DATA, **keys):
    return managed_costs(Recipe.build({"model": "Qwen/Qwen3-8B", **keys}), QWEN, data)


def test_every_price_has_a_source_and_a_date_or_says_that_it_has_none():
    assert len(load_managed()) > 25
    for offer in load_managed():
        assert offer.source, offer
        assert offer.as_of == "unknown" or date.fromisoformat(offer.as_of), offer
        assert 0.1 < offer.usd_per_million_tokens < 100, offer
        assert bool(offer.model) != bool(offer.max_billion), offer
        assert offer.method in ("sft", "dpo"), offer


def test_the_same_data_is_priced_by_each_that_sells_it():
    found = {cost.offer.provider: cost for cost in costs()}
    assert set(found) == {"together", "fireworks", "tinker"}
    assert found["tinker"].usd == pytest.approx(10 * 0.44)
    assert costs(epochs=3)[0].usd == pytest.approx(3 * costs()[0].usd)
    assert [cost.usd for cost in costs()] == sorted(cost.usd for cost in costs())
    assert costs(tuning="qlora") == costs()
    assert {cost.offer.provider for cost in costs(method="dpo")} == {"together", "fireworks"}
    assert costs(method="kto") == []


def test_a_small_job_costs_the_minimum_and_closed_services_nothing_at_all():
    small = {cost.offer.provider: cost.usd for cost in costs(Workload(10, 1000, 100, basis="counted"))}
    assert small["together"] == 4.0
    assert small["tinker"] < 0.01
    closed = ManagedOffer("x", "", 0, 100, "sft", "lora", 1.0, 0, False, "", "2026-01-01", "s")
    assert not closed.covers("any", 8_000_000_000, "sft", "lora")


def test_old_prices_are_marked_in_plans_too():
    offer = ManagedOffer("x", "", 0, 100, "sft", "lora", 1.0, 0, True, "", "2026-01-01", "s")
    assert not offer.is_stale(date(2026, 4, 1))
    assert offer.is_stale(date(2026, 4, 2))
    plan = make_plan(Recipe(model="m"), QWEN, Node(find_gpu("H100")))
    assert plan.cost.stale == any(reason.setting == "price" for reason in plan.reasons)
