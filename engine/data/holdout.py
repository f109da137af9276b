"""Which training rows are held out when a recipe names none."""

from __future__ import annotations


def holdout_size(rows: int, holdout: float | str) -> int:
    """How many of ``rows`` are held out; ``auto`` is 5%, at most 200, and none below 20 rows."""
    if holdout == "auto":
        return 0 if rows < 20 else min(200, max(1, round(0.05 * rows)))
    share = float(holdout)
    return min(rows - 1, max(1, round(share * rows))) if share and rows > 1 else 0


def choose(rows: int, holdout: float | str, seed: int) -> list[int]:
    """The indices of the rows that are held out, in order; the same for the same seed."""
    import random

    return sorted(random.Random(seed).sample(range(rows), holdout_size(rows, holdout)))


def times(rows: list[int], weight: float, seed: int) -> list[int]:
    """Each row ``weight`` times: the whole part of it always, the rest as a random share of them, in order."""
    import random

    whole = int(weight)
    extra = random.Random(seed).sample(range(len(rows)), round((weight - whole) * len(rows)))
    chosen = set(extra)
    return [row for index, row in enumerate(rows) for _ in range(whole + (index in chosen))]
