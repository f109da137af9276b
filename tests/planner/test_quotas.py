"""What is lent for nothing, and for how long."""

from __future__ import annotations

from dataclasses import replace

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import load_offers
from finetui.planner.hub import find_config
from finetui.planner.quotas import quota_of
from finetui.planner.ranking import RankedOffer, rank_offers
from finetui.planner.recipe import Recipe

FREE = [offer for offer in load_offers() if offer.usd_per_h == 0]


def ranked(epochs: float) -> list[RankedOffer]:
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "qlora", "epochs": epochs})
    name, config, _ = find_config(recipe.model)
    paid = [offer for offer in load_offers() if offer.gpu == "RTX-4090"]
    return rank_offers(recipe, Architecture.from_config(config, name), offers=[*FREE, *paid])


def test_each_free_offer_has_a_quota_and_no_other() -> None:
    assert FREE
    assert all(quota_of(offer) for offer in FREE)
    assert quota_of(replace(FREE[0], usd_per_h=0.5)) is None
    assert str(quota_of(FREE[0])) == "12 h a session, 30 h a week"


def test_a_free_session_leads_only_where_the_run_ends_within_it() -> None:
    short, long = ranked(1), ranked(60)
    assert (short[0].usd, short[0].over) == (0.0, "")
    assert short[0].quota in {quota_of(offer) for offer in FREE}
    assert long[0].usd > 0
    assert {entry.over for entry in long if entry.quota} == {"quota"}
    assert [entry.over for entry in long] == sorted(entry.over for entry in long)
