"""From a recipe's sources to tokenised, split, packed rows on disk, made once and read by every rank and every resume.

The result lies in ``cache_dir/<key>/``; the key is a hash of everything it depends on. It is written beside and renamed
when whole, so that a reader sees all of it or nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.errors import DataError
from ...planner.recipe import Recipe
from . import cache
from .files import Row
from .formats import Detected, open_source, to_example
from .holdout import choose
from .labels import IGNORED, Encoded, TrainOn, encode_batch
from .packing import join, pack

if TYPE_CHECKING:
    import datasets

#: How many examples are tokenised in one call.
_BATCH = 256

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class DataSettings:
    """What a plan decides about data.

    Args:
        sequence_length: the longest row, in tokens.
        packing: put several examples into one row.
        train_on: ``answers``, or ``all`` tokens.
        seed: chooses the rows that are held out.
    """

    sequence_length: int
    packing: bool = False
    train_on: TrainOn = "answers"
    seed: int = 42


@dataclass(frozen=True)
class Facts:
    """What came out. Lengths are in tokens; a trained token is one with loss.

    Fields that begin with ``train_`` or ``eval_`` are of that part, the others of both. ``truncated`` examples lost
    ``cut_tokens`` at their end, ``dropped`` ones lost every answer and are left out, ``split`` texts became several
    examples. A row is an example, or with packing several.
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


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, rows to evaluate on (None without any), and what they hold.

    A row has ``input_ids`` and ``labels``; a packed one also ``seq_lengths``, the tokens of each document in it.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    facts: Facts
    path: Path


def prepare(
    recipe: Recipe, settings: DataSettings, tokenizer: Any, cache_dir: str | Path, progress: Progress | None = None
) -> Prepared:
    """Read, tokenise, split and pack a recipe's data, or find it done in ``cache_dir``.

    Args:
        recipe: its ``data`` and ``evaluation`` count.
        settings: what the plan decided.
        tokenizer: as :func:`~finetui.engine.data.template.prepare_tokenizer` leaves it.
        cache_dir: a folder that is made if need be.
        progress: called with the number of examples read so far.

    Raises:
        DataError: a source or a row is wrong, or no token at all is trained.
        HubError, MissingExtraError: as :func:`~finetui.engine.data.sources.read_rows`.
    """
    if not recipe.data:
        raise DataError("the recipe names no data", where="data", do="Add a line 'data: rows.jsonl'.")
    path = Path(cache_dir) / cache.key(tokenizer, recipe.data, asdict(settings), recipe.evaluation.holdout)
    if not path.is_dir():
        with cache.whole_folder(path) as work:
            facts = _build(recipe, settings, tokenizer, work, progress or (lambda _: None))
            (work / "facts.json").write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
    return _load(path)


@dataclass
class _Tally:
    """Counts over the examples of a split."""

    examples: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    cut: int = 0
    split: int = 0
    dropped: int = 0
    longest: int = 0

    def add(self, row: Encoded) -> None:
        self.examples += 1
        self.tokens += len(row.input_ids)
        self.trained += _trained(row.labels)
        self.longest = max(self.longest, len(row.input_ids))


def _trained(labels: list[int]) -> int:
    """Tokens with loss: the first token of a row is never predicted."""
    return sum(label != IGNORED for label in labels[1:])


def _build(recipe: Recipe, settings: DataSettings, tokenizer: Any, work: Path, progress: Progress) -> Facts:
    formats: dict[str, str] = {}
    tally = {"train": _Tally(), "eval": _Tally()}
    for split, counts in tally.items():
        with cache.RowWriter(work / f"{split}-examples.arrow", packed=False) as writer:
            for source in (source for source in recipe.data if source.split == split):
                detected, rows = open_source(source)
                formats[source.path] = f"{detected.format}: {detected.why}"
                for encoded in _encode_source(rows, detected, settings, tokenizer, counts):
                    counts.add(encoded)
                    writer.write({"input_ids": encoded.input_ids, "labels": encoded.labels})
                    if counts.examples % _BATCH == 0:
                        progress(tally["train"].examples + tally["eval"].examples)
    if not tally["train"].trained:
        raise _nothing_trained(tally["train"], settings)
    examples = cache.read_arrow(work / "train-examples.arrow")
    if any(source.split == "eval" for source in recipe.data):
        held_out = cache.read_arrow(work / "eval-examples.arrow")
        kept, out = list(range(len(examples))), list(range(len(held_out)))
    else:
        held_out = examples
        out = choose(len(examples), recipe.evaluation.holdout, settings.seed)
        kept = sorted(set(range(len(examples))) - set(out))
    train = _write_rows(work / "train.arrow", examples, kept, settings)
    evaluation = _write_rows(work / "eval.arrow", held_out, out, settings)
    for split in tally:
        (work / f"{split}-examples.arrow").unlink()
    total = _Tally(*(a + b for a, b in zip(*(asdict(t).values() for t in tally.values()), strict=True)))
    progress(total.examples)
    return Facts(
        examples=total.examples,
        train_examples=len(kept),
        eval_examples=len(out),
        train_rows=train.rows,
        eval_rows=evaluation.rows,
        tokens=total.tokens,
        trained_tokens=total.trained,
        train_tokens=train.tokens,
        train_trained_tokens=train.trained,
        truncated=total.truncated,
        cut_tokens=total.cut,
        split=total.split,
        dropped=total.dropped,
        mean_length=round(total.tokens / total.examples, 1),
        max_length=max(counts.longest for counts in tally.values()),
        formats=formats,
        warnings=_warnings(total, settings.sequence_length),
    )


def _encode_source(
    rows: Iterable[Row], detected: Detected, settings: DataSettings, tokenizer: Any, counts: _Tally
) -> Iterator[Encoded]:
    """Encoded examples of one source. Long texts become several; an example without any answer left is dropped."""
    iterator = iter(rows)
    limit = settings.sequence_length
    while batch := [to_example(row, detected) for row in islice(iterator, _BATCH)]:
        for example, encoded in zip(batch, encode_batch(batch, tokenizer, train_on=settings.train_on), strict=True):
            if example.kind == "text":
                pieces = list(_windows(encoded, limit))
                counts.split += len(pieces) > 1
            else:
                cut = max(0, len(encoded.input_ids) - limit)
                pieces = [Encoded(encoded.input_ids[:limit], encoded.labels[:limit], cut)]
                counts.truncated += cut > 0
                counts.cut += cut
            for piece in pieces:
                if _trained(piece.labels):
                    yield piece
                else:
                    counts.dropped += 1


def _windows(row: Encoded, limit: int) -> Iterator[Encoded]:
    """A long text in pieces of about equal length, so that no last piece is a stump."""
    size = math.ceil(len(row.input_ids) / math.ceil(len(row.input_ids) / limit))
    for start in range(0, len(row.input_ids), size):
        yield Encoded(row.input_ids[start : start + size], row.labels[start : start + size])


def _nothing_trained(counts: _Tally, settings: DataSettings) -> DataError:
    if counts.truncated:
        what = f"no token would be trained: in every row the answer starts after token {settings.sequence_length}"
        return DataError(what, where="data", do="Raise sequence_length, or shorten the prompts.")
    what = "no token would be trained: no row has an answer that the chat template writes"
    return DataError(what, where="data", do="Look at the rows with 'finetui data', and check chat_template.")


def _warnings(total: _Tally, limit: int) -> tuple[str, ...]:
    warnings = []
    if total.dropped:
        rows = total.examples + total.dropped
        warnings.append(f"{total.dropped} of {rows} rows have no answer within {limit} tokens and are left out")
    cut = total.truncated - total.dropped
    if cut > 0:
        warnings.append(f"{cut} of {total.examples} rows are longer than {limit} tokens and lose their end")
    return tuple(warnings)


@dataclass(frozen=True)
class _Written:
    rows: int
    tokens: int
    trained: int


def _write_rows(path: Path, examples: datasets.Dataset, chosen: list[int], settings: DataSettings) -> _Written:
    """Write the chosen examples, packed or not."""
    lengths = cache.lengths(examples)
    rows = [[index] for index in chosen]
    if settings.packing:
        rows = [[chosen[i] for i in row] for row in pack([lengths[i] for i in chosen], settings.sequence_length)]
    trained = 0
    with cache.RowWriter(path, packed=settings.packing) as writer:
        for row in rows:
            documents = [examples[index] for index in row]
            trained += sum(_trained(document["labels"]) for document in documents)
            writer.write(join(documents) if settings.packing else documents[0])
    return _Written(len(rows), sum(lengths[i] for i in chosen), trained)


def _load(path: Path) -> Prepared:
    stored = json.loads((path / "facts.json").read_text(encoding="utf-8"))
    facts = Facts(**{**stored, "warnings": tuple(stored["warnings"])})
    evaluation = cache.read_arrow(path / "eval.arrow") if facts.eval_rows else None
    return Prepared(cache.read_arrow(path / "train.arrow"), evaluation, facts, path)
