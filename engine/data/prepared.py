"""What a plan decides about data, and what came of it: rows to train and to evaluate on, and what they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...planner.recipe import Recipe
from . import cache
from .labels import TrainOn

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, slots=True)
class DataSettings:
    """What a plan decides about data.

    Args:
        sequence_length: the longest row, in tokens.
        packing: put several examples into one row.
        train_on: ``answers``, the ``last-answer`` of each conversation, or ``all`` tokens.
        seed: chooses the rows that are held out.
        method: what the rows are for, which decides on their columns.
        embeddings: tokens that the model has an embedding for; by default as its config.json says.
        rows: rows that the run can train on, which is as far as a streamed source is read if the recipe says
            ``max_steps``.
    """

    sequence_length: int
    packing: bool = False
    train_on: TrainOn = "answers"
    seed: int = 42
    method: str = "sft"
    embeddings: int | None = None
    rows: int | None = None

    def of(self, recipe: Recipe) -> DataSettings:
        """Without ``rows`` where they make no difference."""
        ends = recipe.max_steps is not None and any(source.streaming for source in recipe.data)
        return self if ends else replace(self, rows=None)


@dataclass(frozen=True)
class Facts:
    """What came out. Lengths are in tokens; a trained token is one with loss.

    Fields that begin with ``train_`` or ``eval_`` are of that part, the others of both. ``truncated`` examples lost
    ``cut_tokens`` at their end, ``dropped`` ones lost every answer and are left out, ``skipped`` rows could not be
    used, ``split`` texts became several examples. A row is an example, or with packing several.
    """

    examples: int
    train_examples: int
    eval_examples: int
    train_rows: int
    eval_rows: int
    tokens: int
    trained_tokens: int
    train_tokens: int
    train_trained_tokens: int
    truncated: int
    cut_tokens: int
    split: int
    dropped: int
    mean_length: float
    max_length: int
    formats: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    skipped: int = 0
    good: int | None = None
    """How many answers are judged good, where answers are judged."""
    mark: str = ""
    """Of all tokens and values of the training rows, in their order."""


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, rows to evaluate on (None without any), and what they hold.

    Their columns depend on the method, see :mod:`.encode`; a packed row also has ``seq_lengths``, the tokens of each
    document in it.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    facts: Facts
    path: Path

    def lengths(self) -> list[int] | None:
        """Tokens of each training row (all its sequences), or None where rows are packed and so all about as long."""
        if "seq_lengths" in self.train.column_names:
            return None
        import pyarrow.compute as pc

        names = [name for name in self.train.column_names if name.endswith("_ids")]
        columns = [pc.list_value_length(self.train.data.column(name)).to_numpy() for name in names]
        lengths: list[int] = sum(columns[1:], columns[0]).tolist()
        return lengths


def load(path: Path) -> Prepared:
    """What lies in a folder that :func:`~finetui.engine.data.prepare.prepare` has filled."""
    stored = json.loads((path / "facts.json").read_text(encoding="utf-8"))
    facts = Facts(**{**stored, "warnings": tuple(stored["warnings"])})
    evaluation = cache.read_arrow(path / "eval.arrow") if facts.eval_rows else None
    return Prepared(cache.read_arrow(path / "train.arrow"), evaluation, facts, path)
