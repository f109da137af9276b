"""What is in the data: counts without a tokenizer, for planning; and tokens with their labels, for looking at.

:func:`survey` reads the head of each file and counts the rest by bytes, so that a plan can be made before anything is
downloaded. Its token counts are estimates and say so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.datasource import DataSource
from ...planner.errors import DataError, MissingExtraError
from ...planner.recipe import Recipe
from .files import Row
from .formats import DETECT_ROWS, Example, detect, open_source, to_example
from .holdout import holdout_size
from .sources import is_local, read_rows, source_files

if TYPE_CHECKING:
    from .prepare import DataSettings

#: English text has about four characters per token in today's large vocabularies.
CHARACTERS_PER_TOKEN = 4.0
#: Tokens that a chat template writes around each message (ChatML: start, role, line break, end, line break).
TOKENS_PER_MESSAGE = 5
#: Files up to this size are counted line by line; of larger ones, so much is read.
_COUNTED_BYTES = 16 << 20
_BASIS = "estimate: characters / 4, from the first rows"


@dataclass(frozen=True, slots=True)
class SourceSurvey:
    """One source. ``rows`` and what follows are None for a hub dataset, which is not downloaded to be counted.

    ``mean_tokens`` and ``max_tokens`` are per example over the first rows, ``trained_share`` is the share of tokens in
    answers; all three are estimates.
    """

    path: str
    split: str
    format: str | None
    confidence: float
    why: str
    rows: int | None
    rows_exact: bool
    mean_tokens: float | None
    max_tokens: int | None
    trained_share: float | None


@dataclass(frozen=True, slots=True)
class Survey:
    """All sources together; None where a source could not be counted."""

    sources: tuple[SourceSurvey, ...]
    train_rows: int | None
    eval_rows: int | None
    tokens: int | None
    mean_tokens: float | None
    max_tokens: int | None
    trained_share: float | None
    basis: str = _BASIS


def survey(recipe: Recipe) -> Survey:
    """What a recipe's data holds, as far as the first rows and the sizes of files tell. Needs no tokenizer.

    Raises:
        DataError: a file is missing, its first rows are broken, or its format is not recognised.
    """
    found = tuple(_survey(source) for source in recipe.data)
    train = [item for item in found if item.split == "train"]
    rows = _total(item.rows for item in train)
    held = _total(item.rows for item in found if item.split == "eval")
    if rows is not None and not any(item.split == "eval" for item in found):
        held = holdout_size(rows, recipe.evaluation.holdout)
        rows -= held
    counted = [item for item in train if item.rows and item.mean_tokens is not None]
    weight = sum(item.rows or 0 for item in counted)
    sums = [(item, (item.rows or 0) * (item.mean_tokens or 0.0)) for item in counted]
    tokens = sum(value for _, value in sums)
    mean = tokens / weight if weight else None
    return Survey(
        sources=found,
        train_rows=rows,
        eval_rows=held,
        tokens=round(mean * rows) if mean is not None and rows is not None else None,
        mean_tokens=round(mean, 1) if mean is not None else None,
        max_tokens=max((item.max_tokens or 0 for item in counted), default=None),
        trained_share=round(sum(v * (i.trained_share or 0.0) for i, v in sums) / tokens, 3) if tokens else None,
    )


def read_through(recipe: Recipe, seconds: float = 20.0) -> tuple[int, bool]:
    """Read every row of the local sources as training will, so that a broken one is found before a run begins.

    Args:
        seconds: stop after so long; the rest is read when it is tokenised.

    Returns:
        The number of rows read, and whether those were all.

    Raises:
        DataError: a row is broken, with its file, line and field.
    """
    until = time.monotonic() + seconds
    read = 0
    for source in recipe.data:
        if not is_local(source.path):
            continue
        detected, rows = open_source(source)
        for row in rows:
            to_example(row, detected)
            read += 1
            if read % 1024 == 0 and time.monotonic() > until:
                return read, False
    return read, True


def _total(values: Iterator[int | None]) -> int | None:
    listed = list(values)
    return None if any(value is None for value in listed) else sum(value or 0 for value in listed)


def _survey(source: DataSource) -> SourceSurvey:
    if not is_local(source.path):
        why = "a hub dataset, not looked at before it is downloaded"
        wanted = None if source.format == "auto" else source.format
        return SourceSurvey(source.path, source.split, wanted, 0.0, why, None, False, None, None, None)
    stamps = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in source_files(source))
    return _survey_files(source, stamps)


@lru_cache(maxsize=64)
def _survey_files(source: DataSource, stamps: tuple[tuple[str, int, int], ...]) -> SourceSurvey:
    """A local source; ``stamps`` makes a changed file a new question, and an unchanged one is read once per process."""
    first = list(read_rows(source, limit=DETECT_ROWS))
    detected = detect(first, source.format)
    examples = [to_example(row, detected) for row in first]
    lengths = [_tokens(example) for example in examples]
    rows, exact = _count(source, first)
    return SourceSurvey(
        path=source.path,
        split=source.split,
        format=detected.format,
        confidence=detected.confidence,
        why=detected.why,
        rows=rows,
        rows_exact=exact,
        mean_tokens=round(sum(total for total, _ in lengths) / len(lengths), 1),
        max_tokens=round(max(total for total, _ in lengths)),
        trained_share=round(sum(trained for _, trained in lengths) / sum(total for total, _ in lengths), 3),
    )


def _tokens(example: Example) -> tuple[float, float]:
    """Estimated tokens of an example: all, and those of answers."""
    if example.kind == "text":
        size = len(example.text) / CHARACTERS_PER_TOKEN + 1
        return size, size
    if example.kind == "completion":
        answer = len(example.completion) / CHARACTERS_PER_TOKEN + 1
        return len(example.prompt) / CHARACTERS_PER_TOKEN + answer, answer
    total = trained = 0.0
    for index, message in enumerate(example.messages):
        size = len(message.content) / CHARACTERS_PER_TOKEN
        total += size + TOKENS_PER_MESSAGE
        trained += size + 1 if message.role == "assistant" and index >= example.train_from else 0.0
    return total, trained


def _count(source: DataSource, first: Sequence[Row]) -> tuple[int, bool]:
    """The rows of a local source, and whether that is exact."""
    if len(first) < DETECT_ROWS:
        return len(first), True
    total, exact = 0, True
    for path in source_files(source):
        rows, sure = _count_file(path, source)
        total, exact = total + rows, exact and sure
    if source.limit is not None and total >= source.limit:
        return source.limit, exact
    return total, exact


def _count_file(path: Path, source: DataSource) -> tuple[int, bool]:
    suffix, size = path.suffix.lower(), path.stat().st_size
    if suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise MissingExtraError(f"reading {path.name}", "train") from None
        return parquet.read_metadata(path).num_rows, True
    if suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as file:
            head = file.read(_COUNTED_BYTES)
        lines = sum(1 for line in head.split(b"\n") if line.strip())
        return (lines, True) if size <= len(head) else (round(lines * size / len(head)), False)
    sample = DataSource(path=str(path), format=source.format)
    if size <= _COUNTED_BYTES // 8:
        return sum(1 for _ in read_rows(sample)), True
    rows = list(read_rows(sample, limit=DETECT_ROWS))
    bytes_per_row = sum(len(repr(row.values).encode()) for row in rows) / len(rows)
    return max(len(rows), round(size / bytes_per_row)), False


@dataclass(frozen=True, slots=True)
class Piece:
    """One token as text, and whether it is trained."""

    text: str
    token_id: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One example as the model will see it; ``cut`` tokens beyond the sequence length are left out."""

    where: str
    pieces: tuple[Piece, ...]
    cut: int

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(piece.trained for piece in self.pieces)


def preview(recipe: Recipe, tokenizer: Any, n: int = 3, settings: DataSettings | None = None) -> list[Sample]:
    """The first ``n`` training examples, token by token.

    Args:
        recipe: its training sources are read in order.
        tokenizer: as :func:`~finetui.engine.data.template.prepare_tokenizer` leaves it.
        n: how many examples.
        settings: length and loss as planned; by default nothing is cut and answers are trained.

    Raises:
        DataError, HubError, MissingExtraError: as :func:`~finetui.engine.data.prepare.prepare`.
    """
    from .labels import IGNORED, encode

    samples: list[Sample] = []
    for source in (source for source in recipe.data if source.split == "train"):
        detected, rows = open_source(source)
        for row in islice(rows, n - len(samples)):
            example = to_example(row, detected)
            train_on = settings.train_on if settings else "answers"
            encoded = encode(
                example, tokenizer, train_on=train_on, max_length=settings.sequence_length if settings else None
            )
            texts = [tokenizer.decode([token]) for token in encoded.input_ids]
            # The first token of a row is never predicted, whatever its label.
            trained = [label != IGNORED and index > 0 for index, label in enumerate(encoded.labels)]
            pieces = tuple(map(Piece, texts, encoded.input_ids, trained))
            samples.append(Sample(row.where, pieces, encoded.cut))
    if not samples:
        raise DataError("the recipe names no training data", where="data", do="Add a line 'data: rows.jsonl'.")
    return samples
