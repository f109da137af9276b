"""Offers of machines for rent, ranked by what a recipe costs on each, within the deadline and budget that it sets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .architecture import Architecture
from .cost import price_of, restart_s
from .hardware import Node, Offer, find_gpu, load_offers
from .plan import Plan, Workload
from .quotas import Quota, quota_of
from .solver import make_plan

if TYPE_CHECKING:
    from .limits import Limits
    from .recipe import Recipe


@dataclass(frozen=True)
class RankedOffer:
    """One offer with what the plan costs there, and the plan itself. ``over`` names the limit that it breaks: one of
    the recipe's, or ``quota`` where what is lent for nothing ends before the run does."""

    offer: Offer
    plan: Plan
    usd: float
    time_s: float
    stale: bool
    over: str = ""
    quota: Quota | None = None


def rank_offers(
    recipe: Recipe,
    architecture: Architecture,
    workload: Workload | None = None,
    *,
    offers: Iterable[Offer] | None = None,
    framework: str = "finetui",
    spot: bool = False,
    everything: bool = False,
) -> list[RankedOffer]:
    """Offers on which the recipe fits, cheapest run first; one plan per kind of machine, shared by its offers.

    Those that take longer than ``limits.hours`` or than one session of a free quota, or cost more than
    ``limits.cost_usd``, come after all that don't, with the limit that they break.

    Args:
        spot: by interruptible prices, with the time that interruptions cost.
        everything: add those on which it does not fit, after all that do.
    """
    # A limit ends a run early; what is asked here is how long and dear the whole of it is.
    whole = recipe.model_copy(update={"limits": type(recipe.limits)(nan_steps=recipe.limits.nan_steps)})
    plans: dict[tuple[str, int], Plan] = {}
    ranked = []
    for offer in load_offers() if offers is None else offers:
        price = price_of(offer, spot=spot)
        if price is None:
            continue
        key = (offer.gpu, offer.count)
        if key not in plans:
            node = Node(find_gpu(offer.gpu), offer.count)
            plans[key] = make_plan(whole, architecture, node, workload, framework=framework, offers=())
        plan = plans[key]
        if plan.fits or everything:
            time_s = plan.time_s + (restart_s(plan) if spot else 0.0)
            usd = price * time_s / 3600
            quota = quota_of(offer)
            over = _over(recipe.limits, usd, time_s)
            if not over and quota is not None and time_s > 3600 * quota.session_h:
                over = "quota"
            ranked.append(RankedOffer(offer, plan, usd, time_s, offer.is_stale(), over, quota))
    return sorted(ranked, key=lambda entry: (not entry.plan.fits, bool(entry.over), entry.usd, entry.time_s))


def cheapest(ranked: Iterable[RankedOffer]) -> RankedOffer | None:
    """The cheapest offer on which the run fits and keeps to its limits; undated prices only where no other does."""
    kept = [entry for entry in ranked if entry.plan.fits and not entry.over]
    return min(kept, key=lambda entry: (entry.offer.as_of == "unknown", entry.usd, entry.time_s), default=None)


def fastest(ranked: Iterable[RankedOffer]) -> RankedOffer | None:
    """The fastest offer on which the run fits and keeps to its limits."""
    kept = [entry for entry in ranked if entry.plan.fits and not entry.over]
    return min(kept, key=lambda entry: (entry.time_s, entry.usd), default=None)


def _over(limits: Limits, usd: float, time_s: float) -> str:
    if limits.hours is not None and time_s > 3600 * limits.hours:
        return "hours"
    if limits.cost_usd is not None and usd > limits.cost_usd:
        return "cost_usd"
    return ""
