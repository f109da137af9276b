"""Which run a word means: the whole of a name, or as much of its beginning as tells it from the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

from ..planner.errors import RunError

#: What follows a run's name in that of its stages.
STAGE = re.compile(r"\.(\d+)-[A-Za-z0-9_-]+")
#: Names that a message lists.
_LISTED = 6


class Named(Protocol):
    """Whatever has a run's name."""

    name: str


R = TypeVar("R", bound=Named)


def named(runs: Sequence[R], word: str, *, where: str = "") -> R | None:
    """The run of this name, else the only one whose name begins so; None where there is none.

    A run is meant before its stages are, whose names begin with its own.

    Args:
        runs: the newest first; of two of one name the newer is meant.
        where: the machine that they are on, for the message.

    Raises:
        RunError: several begin so; the message names them.
    """
    if not word:
        return None
    if whole := [run for run in runs if run.name == word]:
        return whole[0]
    found = {run.name: run for run in reversed(runs) if run.name.startswith(word)}
    heads = [name for name in found if not any(_is_stage(name, other) for other in found)]
    if len(heads) <= 1:
        return found[heads[0]] if heads else None
    listed = [name for name in dict.fromkeys(run.name for run in runs) if name in heads]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    do = f"Type more of its name: {', '.join(listed[:_LISTED])}{more}."
    raise RunError(f"the names of {len(listed)} runs begin with {word!r}", where=where, do=do)


def _is_stage(name: str, of: str) -> bool:
    return name.startswith(of) and STAGE.fullmatch(name[len(of) :]) is not None
