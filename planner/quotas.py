"""Quotas: how long at a time, and how long a week, a provider lends what it gives away."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

from .hardware import PRESETS, Offer


@dataclass(frozen=True)
class Quota:
    """Hours that one session lasts, and hours in a week."""

    session_h: float
    week_h: float

    def __str__(self) -> str:
        return f"{self.session_h:g} h a session, {self.week_h:g} h a week"


@cache
def _load() -> dict[str, Quota]:
    with (PRESETS / "quotas.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return {row["provider"]: Quota(float(row["session_h"]), float(row["week_h"])) for row in rows}


def quota_of(offer: Offer) -> Quota | None:
    """The quota of an offer that costs nothing on demand; None for one that costs something."""
    return _load().get(offer.provider) if offer.usd_per_h == 0 else None
