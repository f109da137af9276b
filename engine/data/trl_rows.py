"""A recipe's data as rows of TRL's own formats, untokenised: for trainers that tokenise by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from ...planner.recipe import Recipe
from .encode import as_row
from .formats import open_source
from .readers import to_records

__all__ = ["as_row", "trl_rows"]


def trl_rows(recipe: Recipe, method: str, split: str = "train", limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a split, in order; messages are lists of role and content.

    Raises:
        DataError: as :func:`~finetui.engine.data.prepare.prepare`.
    """
    return islice(_rows(recipe, method, split), limit)


def _rows(recipe: Recipe, method: str, split: str) -> Iterator[dict[str, Any]]:
    for source in (source for source in recipe.data if source.split == split):
        detected, rows = open_source(source, method)
        for row in rows:
            for record in to_records(row, detected, method):
                yield as_row(record)
