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
from .examples import Example, Judged, Pair, Prompt, Record, Turns
from .files import Row
from .formats import DETECT_ROWS, Detected, detect, open_source
from .holdout import holdout_size
from .places import suffix_of
from .readers import to_records
from .refuse import Refused
from .sources import is_local, read_rows, source_files, splits_told

if TYPE_CHECKING:
    from .prepared import DataSettings

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

    ``mean_tokens`` and ``max_tokens`` are per sequence over the first rows (a pair is two), ``trained_share`` is the
    share of tokens in answers; all three are estimates. ``examples`` is how many examples an epoch has of this source.
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
    examples: int | None = None


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
    found = tuple(_survey(source, recipe.method) for source in recipe.data)
    train = [item for item in found if item.split == "train"]
    rows = _total(item.examples for item in train)
    held = _total(item.examples for item in found if item.split == "eval")
    if rows is not None and not any(item.split == "eval" for item in found):
        held = holdout_size(rows, recipe.evaluation.holdout)
        rows -= held
    counted = [item for item in train if item.examples and item.mean_tokens is not None]
    weight = sum(item.examples or 0 for item in counted)
    sums = [(item, (item.examples or 0) * (item.mean_tokens or 0.0)) for item in counted]
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
        refused = Refused(source)
        detected, rows = open_source(source, recipe.method, refused)
        for row in rows:
            try:
                to_records(row, detected, recipe.method)
            except DataError as error:
                refused(error)
            read += 1
            if read % 1024 == 0 and time.monotonic() > until:
                return read, False
    return read, True


def _total(values: Iterator[int | None]) -> int | None:
    listed = list(values)
    return None if any(value is None for value in listed) else sum(value or 0 for value in listed)


def _survey(source: DataSource, method: str) -> SourceSurvey:
    if not is_local(source.path):
        why = "not looked at before it is downloaded"
        wanted = None if source.format == "auto" else source.format
        return SourceSurvey(source.path, source.split, wanted, 0.0, why, None, False, None, None, None)
    stamps = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in source_files(source))
    return _survey_files(source.model_dump_json(), method, stamps)


@lru_cache(maxsize=64)
def _survey_files(described: str, method: str, stamps: tuple[tuple[str, int, int], ...]) -> SourceSurvey:
    """A local source; ``stamps`` makes a changed file a new question, and an unchanged one is read once per process."""
    source = DataSource.model_validate_json(described)
    refused = Refused(source)
    first = list(read_rows(source, limit=DETECT_ROWS, refuse=refused))
    detected = detect(first, source, method)
    records = [record for row in first for record in _records(row, detected, method, refused)]
    if not records and refused.error is not None:
        error = refused.error
        raise DataError(f"none of the first rows can be used: {error.what}", where=error.where, do=error.do)
    lengths = [size for record in records for size in estimate(record)]
    rows, exact = _count(source, first)
    left_out = splits_told(source)
    return SourceSurvey(
        path=source.path,
        split=source.split,
        format=detected.format,
        confidence=detected.confidence,
        why=f"{detected.why}; {left_out}" if left_out else detected.why,
        rows=rows,
        rows_exact=exact,
        mean_tokens=round(sum(total for total, _ in lengths) / len(lengths), 1),
        max_tokens=round(max(total for total, _ in lengths)),
        trained_share=round(sum(trained for _, trained in lengths) / sum(total for total, _ in lengths), 3),
        examples=round(rows * len(records) / len(first) * source.weight),
    )


def _records(row: Row, detected: Detected, method: str, refused: Refused) -> list[Record]:
    try:
        return to_records(row, detected, method)
    except DataError as error:
        refused(error)
        return []


def estimate(record: Record) -> list[tuple[float, float]]:
    """Estimated tokens of each sequence of a record: all, and those of answers."""
    if isinstance(record, Pair):
        return [_answered(record.prompt, answer) for answer in (record.chosen, record.rejected)]
    if isinstance(record, Judged):
        return [_answered(record.prompt, record.completion)]
    if isinstance(record, Prompt):
        return [(_size(record.prompt), 0.0)]
    if not isinstance(record, Example):
        return [_answered(record.prompt, "\n".join(record.completions))]
    if record.kind != "chat":
        answer = len(record.completion or record.text) / CHARACTERS_PER_TOKEN + 1
        return [(len(record.prompt) / CHARACTERS_PER_TOKEN + answer, answer)]
    trained = sum(
        len(message.content) / CHARACTERS_PER_TOKEN + 1
        for index, message in enumerate(record.messages)
        if message.role == "assistant" and message.trained and index >= record.train_from
    )
    return [(_size(record.messages), trained)]


def _answered(prompt: Turns, answer: Turns) -> tuple[float, float]:
    """A plain answer gets an end token, which that of a chat has among the tokens around it."""
    if isinstance(answer, str):
        trained = _size(answer) + 1
        return _size(prompt) + trained, trained
    return _size(prompt) + _size(answer), _size(answer) - TOKENS_PER_MESSAGE + 1


def _size(turns: Turns) -> float:
    if isinstance(turns, str):
        return len(turns) / CHARACTERS_PER_TOKEN
    return sum(len(message.content) / CHARACTERS_PER_TOKEN + TOKENS_PER_MESSAGE for message in turns)


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
    suffix, size = suffix_of(path.name), path.stat().st_size
    if suffix == ".parquet" and suffix == path.suffix.lower():
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise MissingExtraError(f"reading {path.name}", "train") from None
        return parquet.read_metadata(path).num_rows, True
    if suffix in (".jsonl", ".ndjson") and suffix == path.suffix.lower():
        with path.open("rb") as file:
            head = file.read(_COUNTED_BYTES)
        lines = sum(1 for line in head.split(b"\n") if line.strip())
        return (lines, True) if size <= len(head) else (round(lines * size / len(head)), False)
    sample = DataSource(path=str(path), format=source.format, on_bad_row=source.on_bad_row)
    if size <= _COUNTED_BYTES // 8:
        return sum(1 for _ in read_rows(sample)), True
    rows = list(read_rows(sample, limit=DETECT_ROWS))
    bytes_per_row = sum(len(repr(row.values).encode()) for row in rows) / len(rows)
    return max(len(rows), round(size / bytes_per_row)), False


def trainable(recipe: Recipe, tokenizer_json: Path, length: int, seconds: float = 5.0) -> bool:
    """Whether any row may have an answer within ``length`` tokens; needs neither a template nor transformers.

    A template only adds to a prompt, so a prompt that alone fills a row leaves no room for its answer. False is
    certain; the answer is True as soon as one row leaves room, or when time is up.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_json))
    except Exception:  # the library has no other class for a file it can't read; loading the model tells what is wrong
        return True
    until = time.monotonic() + seconds
    for source in recipe.data:
        if source.split == "eval":
            continue
        if not is_local(source.path):
            return True
        refused = Refused(source)
        detected, rows = open_source(source, recipe.method, refused)
        for row in rows:
            for record in _records(row, detected, recipe.method, refused):
                prompt = _before_answer(record)
                if prompt is not None and len(tokenizer.encode(prompt, add_special_tokens=False).ids) < length:
                    return True
            if time.monotonic() > until:
                return True
    return False


def _before_answer(record: Record) -> str | None:
    """The text before the first answer with loss, as far as the row has it; None where there is no such answer."""
    if isinstance(record, Example) and record.kind == "text":
        return ""
    turns: Turns = record.prompt
    if isinstance(record, Example) and record.kind == "chat":
        numbered = enumerate(record.messages)
        first = next((i for i, m in numbered if m.role == "assistant" and m.trained and i >= record.train_from), None)
        if first is None:
            return None
        turns = record.messages[:first]
    return turns if isinstance(turns, str) else "\n".join(message.content for message in turns)


@dataclass(frozen=True, slots=True)
class Piece:
    """One token as text, and whether it is trained."""

    text: str
    token_id: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence as the model will see it; ``cut`` tokens beyond the sequence length are left out.

    ``part`` is which answer of a pair it has, ``good`` or ``bad`` for a judged one; '' for what is simply learned.
    """

    where: str
    pieces: tuple[Piece, ...]
    cut: int
    part: str = ""

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(piece.trained for piece in self.pieces)


def preview(recipe: Recipe, tokenizer: Any, n: int = 3, settings: DataSettings | None = None) -> list[Sample]:
    """The first ``n`` training examples, token by token; a pair is two samples.

    Args:
        recipe: its training sources are read in order.
        tokenizer: as :func:`~finetui.engine.data.template.prepare_tokenizer` leaves it.
        n: how many examples.
        settings: length and loss as planned; by default nothing is cut and answers are trained.

    Raises:
        DataError, HubError, MissingExtraError: as :func:`~finetui.engine.data.prepare.prepare`.
    """
    from .encode import KINDS, Encoder

    limit = settings.sequence_length if settings else 1 << 60
    encoder = Encoder(tokenizer, KINDS[recipe.method], limit, settings.train_on if settings else "answers")
    samples: list[Sample] = []
    for source in (source for source in recipe.data if source.split == "train"):
        refused = Refused(source)
        detected, rows = open_source(source, recipe.method, refused)
        records = (record for row in rows for record in _records(row, detected, recipe.method, refused))
        for record, marked in islice(_marked(records, encoder, refused), n):
            for part, encoded in zip(_parts(record), encoder.tokens.encode(marked), strict=True):
                samples.append(_sample(record.where, encoded.window(0, limit), tokenizer, part))
            n -= 1
    if not samples:
        raise DataError("the recipe names no training data", where="data", do="Add a line 'data: rows.jsonl'.")
    return samples


def _marked(records: Iterator[Record], encoder: Any, refused: Refused) -> Iterator[tuple[Record, Any]]:
    for record in records:
        try:
            yield record, encoder.marked([record])
        except DataError as error:
            refused(error)


def _parts(record: Record) -> tuple[str, ...]:
    if isinstance(record, Pair):
        return "chosen", "rejected"
    if isinstance(record, Judged):
        return ("good" if record.label else "bad",)
    return ("prompt",) if isinstance(record, Prompt) else ("",)


def _sample(where: str, encoded: Any, tokenizer: Any, part: str) -> Sample:
    texts = [tokenizer.decode([token]) for token in encoded.input_ids]
    # The first token of a row is never predicted, whatever its label.
    trained = [any(max(start, 1) <= i < stop for start, stop in encoded.spans) for i in range(len(texts))]
    return Sample(where, tuple(map(Piece, texts, encoded.input_ids, trained)), encoded.cut, part)
