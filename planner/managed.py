"""Fine-tuning as a service: what providers that train for you charge for the same data, beside machines for rent.

They bill tokens, not hours, and hand back an adapter or an endpoint; ``presets/managed.csv`` holds their prices with
source and date. Whether a provider hosts a given model is its own list to say.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import TYPE_CHECKING

from .architecture import Architecture
from .hardware import PRESETS, is_stale
from .plan import Workload

if TYPE_CHECKING:
    from .recipe import Recipe

_BILLION = 1e9
#: QLoRA is a way to save memory, which is not the customer's concern there: it is sold as LoRA.
_SOLD_AS = {"qlora": "lora"}


@dataclass(frozen=True)
class ManagedOffer:
    """One price: for one model, or for all of a range of sizes. Prices are USD per million trained tokens."""

    provider: str
    model: str
    min_billion: float
    max_billion: float
    method: str
    tuning: str
    usd_per_million_tokens: float
    minimum_usd: float
    open: bool
    """Whether new customers may still buy it."""
    note: str
    as_of: str
    source: str

    def covers(self, name: str, parameters: int, method: str, tuning: str) -> bool:
        """Whether it is an offer for this model, method and tuning."""
        if not self.open or self.method != method or self.tuning != _SOLD_AS.get(tuning, tuning):
            return False
        if self.model:
            return self.model.lower() == name.lower()
        return self.min_billion <= parameters / _BILLION <= self.max_billion

    def is_stale(self, today: date | None = None) -> bool:
        """Whether the price is undated or older than 90 days."""
        return is_stale(self.as_of, today)


@dataclass(frozen=True)
class ManagedCost:
    """What one offer charges for a recipe's data."""

    offer: ManagedOffer
    tokens: int
    usd: float
    stale: bool


@cache
def load_managed() -> tuple[ManagedOffer, ...]:
    """The offers of ``presets/managed.csv``, closed ones included."""
    with (PRESETS / "managed.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            ManagedOffer(
                provider=row["provider"],
                model=row["model"],
                min_billion=float(row["min_billion"] or 0),
                max_billion=float(row["max_billion"] or 0),
                method=row["method"],
                tuning=row["tuning"],
                usd_per_million_tokens=float(row["usd_per_million_tokens"]),
                minimum_usd=float(row["minimum_usd"] or 0),
                open=row["status"] == "open",
                note=row["note"],
                as_of=row["as_of"],
                source=row["source"],
            )
            for row in csv.DictReader(file)
        )


def managed_costs(
    recipe: Recipe, architecture: Architecture, workload: Workload, offers: Iterable[ManagedOffer] | None = None
) -> list[ManagedCost]:
    """What services charge for the recipe's data over its epochs, cheapest first; the smallest bill is their minimum.

    Args:
        workload: the same that :func:`.ranking.rank_offers` is given, or :attr:`.plan.Plan.workload`.
    """
    method = "sft" if recipe.method == "pretrain" else recipe.method
    tokens = round(workload.tokens * recipe.epochs)
    found = [
        ManagedCost(
            offer, tokens, max(tokens / 1e6 * offer.usd_per_million_tokens, offer.minimum_usd), offer.is_stale()
        )
        for offer in (load_managed() if offers is None else offers)
        if offer.covers(architecture.name, architecture.parameters, method, recipe.tuning.type)
    ]
    return sorted(found, key=lambda cost: (cost.usd, cost.offer.provider))
