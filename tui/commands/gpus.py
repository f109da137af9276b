"""``finetui gpus``: the catalog; with a recipe or model, the offers ranked by what this plan costs there."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from ...engine.planning import workload_of
from ...planner.architecture import Architecture
from ...planner.hardware import load_catalog
from ...planner.hub import find_config
from ...planner.managed import managed_costs
from ...planner.preferences import load
from ...planner.ranking import rank_offers
from ...planner.recipe import Recipe
from .options import JsonFlag, takes_recipe

SpotFlag = Annotated[
    bool | None,
    typer.Option("--spot/--on-demand", help="Interruptible prices, or those on demand (default: your settings')."),
]
RefreshFlag = Annotated[bool, typer.Option("--refresh", help="First ask for today's prices, through gpuhunt.")]
TopFlag = Annotated[int, typer.Option("--top", min=1, help="How many offers to show.")]


@takes_recipe(without={"gpu", "gpus"}, optional=True)
def gpus(
    recipe: Recipe | None,
    spot: SpotFlag = None,
    top: TopFlag = 20,
    refresh: RefreshFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """The catalog of GPUs; with RECIPE or MODEL, offers by cost."""
    if refresh:
        _refresh()
    if recipe is None:
        _catalog(as_json=as_json)
        return
    spot = load().prices == "spot" if spot is None else spot
    name, config, _origin = find_config(recipe.model)
    architecture = Architecture.from_config(config, name)
    ranked = rank_offers(recipe, architecture, workload_of(recipe), spot=spot)
    managed = managed_costs(recipe, architecture, ranked[0].plan.workload) if ranked else []
    rows = [
        {
            "provider": entry.offer.provider,
            "gpu": entry.offer.gpu,
            "count": entry.offer.count,
            "device_gib": round(entry.plan.memory.device_gib, 2),
            "memory_gib": entry.plan.hardware.memory_gib,
            "tokens_per_s": round(entry.plan.speed.tokens_per_s, 1),
            "time_s": round(entry.time_s, 1),
            "usd_per_h": entry.offer.usd_per_h_spot if spot else entry.offer.usd_per_h,
            "usd": round(entry.usd, 4),
            "as_of": entry.offer.as_of,
            "stale": entry.stale,
            "source": entry.offer.source,
            "over": entry.over,
            "quota": str(entry.quota or ""),
        }
        for entry in ranked[:top]
    ]
    services = [
        {
            "provider": cost.offer.provider,
            "model": cost.offer.model,
            "usd": round(cost.usd, 4),
            "usd_per_million_tokens": cost.offer.usd_per_million_tokens,
            "tokens": cost.tokens,
            "as_of": cost.offer.as_of,
            "stale": cost.stale,
            "source": cost.offer.source,
        }
        for cost in managed
    ]
    if as_json:
        print(json.dumps({"model": name, "spot": spot, "offers": rows, "managed": services}, indent=2))
        return
    from ..fit_view import print_managed, print_offers

    print_offers(name, rows, total=len(ranked))
    print_managed(services)


def _refresh() -> None:
    from ...planner import prices

    found = prices.refresh()
    providers = ", ".join(found.providers)
    print(f"{found.offers} offers of {providers} ({found.source}), kept in {found.path}", file=sys.stderr)
    for line in found.failed:
        print(f"no prices of {line}", file=sys.stderr)


def _catalog(*, as_json: bool) -> None:
    catalog = list(load_catalog().values())
    if as_json:
        print(json.dumps([dataclasses.asdict(gpu) for gpu in catalog], indent=2))
        return
    from ..fit_view import print_catalog

    print_catalog(catalog)
