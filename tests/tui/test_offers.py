"""Offers: which are best, which are shown in what order, and what else could be done on a machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetui.planner.errors import RecipeError
from finetui.planner.plan import Plan
from finetui.tui.form import get
from finetui.tui.offers import (
    OfferRow,
    alternatives,
    arranged,
    compared,
    money,
    on_machine,
    over_limit,
    with_frontier,
)

DRAFT: dict[str, Any] = {"model": "Qwen/Qwen3-8B", "tuning": "lora"}


def names(rows: list[OfferRow]) -> list[str]:
    return [f"{row.provider} {row.count}x{row.gpu}" for row in rows]


def test_nothing_beats_the_best_in_both_time_and_money(offers: list[OfferRow]) -> None:
    fitting = [row for row in offers if row.plan.fits]
    for row in fitting:
        beaten = any(
            other.plan.time_s <= row.plan.time_s
            and other.usd <= row.usd
            and (other.plan.time_s, other.usd) != (row.plan.time_s, row.usd)
            for other in fitting
        )
        assert row.best is not beaten, row.key
    assert not any(row.best for row in offers if not row.plan.fits)


def test_this_machine_is_never_compared_with_what_is_for_rent(offers: list[OfferRow]) -> None:
    plan = offers[0].plan
    here = replace(offers[0], provider="this machine", plan=replace(plan, hardware=replace(plan.hardware, local=True)))
    free = replace(here, usd=0.0, usd_per_h=0.0)
    marked = with_frontier([free, *offers])
    assert not marked[0].best
    assert [row.best for row in marked[1:]] == [row.best for row in offers]


def test_what_does_not_fit_comes_last_and_only_when_asked_for(offers: list[OfferRow]) -> None:
    shown = arranged(offers, sort="$ run", everything=False)
    assert all(row.plan.fits for row in shown)
    assert [row.usd for row in shown] == sorted(row.usd for row in shown)
    everything = arranged(offers, sort="$ run", everything=True)
    assert names(everything)[-1] == "aws 1xT4"
    assert len(everything) == len(offers)


def test_each_order_and_filter(offers: list[OfferRow]) -> None:
    assert names(arranged(offers, sort="time", everything=False))[0] == "lambda 8xH100 SXM"
    assert names(arranged(offers, sort="$/h", everything=False))[0] == "vast-ai 1xRTX 4090"
    assert names(arranged(offers, sort="time", everything=True, words="RUNPOD h100")) == ["runpod 2xH100 SXM"]


def test_a_draft_moves_to_a_machine(offers: list[OfferRow]) -> None:
    row = next(row for row in offers if row.count == 2)
    moved = on_machine(DRAFT, row)
    assert (get(moved, "hardware.gpu"), get(moved, "hardware.gpus")) == ("H100 SXM", "2")
    assert "hardware" not in DRAFT


def planned(offers: list[OfferRow], tree: dict[str, Any]) -> Plan:
    """A T4 on which only QLoRA fits, and only below 4,096 tokens."""
    base = next(row for row in offers if row.gpu == "T4").plan
    length = int(get(tree, "sequence_length")) if get(tree, "sequence_length") != "auto" else 2048
    if length < 1024:
        raise RecipeError("too short for this data")
    return replace(base, fits=get(tree, "tuning.type") == "qlora" and length < 4096)


def test_alternatives_where_it_does_not_fit(offers: list[OfferRow]) -> None:
    row = next(row for row in offers if row.gpu == "T4")
    found = alternatives(DRAFT, row, lambda tree: planned(offers, tree))
    assert [other.change for other in found] == ["tuning.type: qlora"]


def test_alternatives_where_it_fits(offers: list[OfferRow]) -> None:
    row = next(row for row in offers if row.provider == "runpod" and row.count == 1)

    def plan_of(tree: dict[str, Any]) -> Plan:
        faster = replace(row.plan.speed, tokens_per_s=row.plan.speed.tokens_per_s * 2)
        return replace(row.plan, speed=faster) if get(tree, "tuning.type") == "qlora" else row.plan

    found = alternatives(DRAFT, row, plan_of)
    assert [other.change for other in found] == ["tuning.type: qlora", "sequence_length: 4096"]


def test_what_breaks_a_limit_comes_after_what_does_not(offers: list[OfferRow]) -> None:
    free = replace(offers[0], provider="kaggle", usd=0.0, usd_per_h=0.0, quota="12 h a session, 30 h a week")
    over = replace(free, provider="colab", over="quota")
    dear = replace(offers[0], provider="dear", usd=9.0, over="cost_usd")
    rows = with_frontier([over, dear, free, *offers])
    assert {row.provider: row.best for row in rows if row.provider in ("kaggle", "colab")} == {
        "kaggle": True,
        "colab": False,
    }
    shown = arranged(rows, sort="$ run", everything=False)
    assert shown[0].provider == "kaggle"
    assert [row.provider for row in shown[-2:]] == ["colab", "dear"]
    assert money(free, free.usd) == "free"
    assert over_limit(over) == "the run takes 22 min, longer than one free session"
    assert over_limit(dear) == "the run costs $9.00, more than limits.cost_usd allows"
    assert not over_limit(free)
    assert [figure.values for figure in compared([free, offers[0]], 0.0) if figure.label == "free"] == [
        ("12 h a session, 30 h a week", "–")
    ]
