"""What a recipe's data holds, as its tokens say: lengths, what is trained and lost, duplicates, scripts, bad rows.

Nothing here draws or trains: the command and the screen that show data are made from one :class:`Report`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any

from ...planner.datasource import DataSource
from ...planner.errors import DataError
from ...planner.recipe import Recipe
from .encode import KINDS, Encoder, Tally
from .examples import Judged, Pair, Prompt, Record
from .files import Row
from .formats import Detected, detect
from .prepared import DataSettings
from .readers import to_records
from .sources import read_rows
from .template import stop_token_ids, writes_own_turns
from .tokens import Encoded, Marked

#: Rows that are looked at unless more are asked for, and columns of the histogram.
LOOKED_AT, BINS = 2000, 12
_BATCH = 256
#: Letters of an example that are told apart by script.
_LETTERS = 400


@dataclass(frozen=True, slots=True)
class Problem:
    """Rows that can't be used for the same reason: how many, why, and where the first is."""

    count: int
    what: str
    where: str
    do: str


@dataclass(frozen=True, slots=True)
class Bin:
    """Sequences whose length in tokens, before any cut, is from ``start`` to ``stop``."""

    start: int
    stop: int
    count: int


@dataclass
class Report:
    """Counts over the training examples looked at. Lengths are in tokens, shares are of 1.

    ``truncated`` examples lose ``cut_tokens`` at their end, ``overlong`` ones are left out for their length as the
    recipe wishes, ``dropped`` ones have no answer left within ``sequence_length``. ``unended`` answers have no end
    token, though nothing of them is cut: a model that learns from them does not learn to stop. ``repeated`` examples
    are the same as an earlier one; ``leaked`` evaluation examples are also trained on. ``with_special`` texts hold
    special tokens outside of what the template writes.
    ``planned_tokens`` is what the whole run will process, if the rest is like what was looked at.
    """

    method: str
    sequence_length: int
    rows: int = 0
    whole: bool = False
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    trained_share: float = 0.0
    mean: float = 0.0
    median: int = 0
    p95: int = 0
    longest: int = 0
    histogram: list[Bin] = field(default_factory=list)
    truncated: int = 0
    cut_tokens: int = 0
    dropped: int = 0
    overlong: int = 0
    unended: int = 0
    repeated: int = 0
    leaked: int = 0
    with_special: int = 0
    unknown_tokens: int = 0
    scripts: dict[str, float] = field(default_factory=dict)
    chosen_mean: float | None = None
    rejected_mean: float | None = None
    good_share: float | None = None
    bad_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    planned_tokens: int | None = None
    warnings: list[str] = field(default_factory=list)


class _Look:
    """One pass over the first rows of a recipe's data."""

    def __init__(self, recipe: Recipe, tokenizer: Any, settings: DataSettings) -> None:
        self.recipe, self.tokenizer, self.settings = recipe, tokenizer, settings
        self.kind = KINDS[recipe.method]
        self.encoder = Encoder(tokenizer, self.kind, settings.sequence_length, settings.train_on)
        self.stops = {*stop_token_ids(tokenizer), *tokenizer.convert_tokens_to_ids(list(self.encoder.ends))}
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.report = Report(recipe.method, settings.sequence_length)
        self.lengths: list[int] = []
        self.sides: tuple[list[int], list[int]] = ([], [])
        self.good = 0
        self.problems: dict[str, list[Any]] = {}
        self.seen: set[bytes] = set()
        self.letters: Counter[str] = Counter()
        self.plain = False

    def trouble(self, error: DataError) -> None:
        self.report.bad_rows += 1
        known = self.problems.setdefault(re.sub(r"\d+", "#", error.what), [0, error])
        known[0] += 1

    def source(self, source: DataSource, most: int) -> tuple[list[Record], int, bool]:
        """The records of the first rows of a source, how many rows those were, and whether there are no more."""
        rows = list(islice(read_rows(source, refuse=self.trouble), most + 1))
        whole = len(rows) <= most
        rows = rows[:most]
        detected = detect(rows, source, self.recipe.method)
        chat = detected.chat or detected.format not in ("prompt-completion", "preference", "prompt-only")
        self.plain |= not chat and writes_own_turns(self.tokenizer)
        return [record for row in rows for record in self.records(row, detected)], len(rows), whole

    def records(self, row: Row, detected: Detected) -> list[Record]:
        try:
            return to_records(row, detected, self.recipe.method)
        except DataError as error:
            self.trouble(error)
            return []

    def marked(self, records: Sequence[Record]) -> Iterator[tuple[Record, list[Marked]]]:
        for record in records:
            try:
                yield record, self.encoder.marked([record])
            except DataError as error:
                self.trouble(error)

    def add(self, records: Sequence[Record], *, drop: bool) -> None:
        marked = list(self.marked(records))
        for start in range(0, len(marked), _BATCH):
            batch = marked[start : start + _BATCH]
            encoded = iter(self.encoder.tokens.encode([text for _, texts in batch for text in texts]))
            for record, texts in batch:
                self.example(record, texts, [next(encoded) for _ in texts], drop)

    def example(self, record: Record, texts: list[Marked], rows: list[Encoded], drop: bool) -> None:
        report, limit = self.report, self.settings.sequence_length
        mark = _fingerprint(texts)
        report.repeated += mark in self.seen
        self.seen.add(mark)
        tally = Tally()
        if self.kind == "learned":
            list(self.encoder.learned([record], rows, tally, drop=drop))
        elif self.kind == "asked":
            list(self.encoder.asked([record], rows, tally))
        else:
            list(self.encoder.answered([record], rows, tally, drop=drop))
        report.examples += 1
        report.tokens += tally.tokens
        report.trained_tokens += tally.trained
        report.dropped += tally.dropped
        report.overlong += tally.overlong
        report.truncated += tally.truncated > 0 and not tally.dropped
        if not tally.split and not tally.overlong:
            report.cut_tokens += sum(max(0, len(row.input_ids) - limit) for row in rows)
        self.lengths += [len(row.input_ids) for row in rows]
        if not isinstance(record, Prompt):
            report.unended += sum(not self.ended(row) for row in rows)
        if isinstance(record, Pair):
            for side, row in zip(self.sides, rows, strict=True):
                side.append(len(row.input_ids) - row.spans[0][0] if row.spans else 0)
        if isinstance(record, Judged):
            self.good += record.label
        report.with_special += any(self.special.search(text) for text in _own_words(record))
        unknown = self.tokenizer.unk_token_id
        report.unknown_tokens += sum(row.input_ids.count(unknown) for row in rows) if unknown is not None else 0
        self.letters.update(map(_script, filter(str.isalpha, texts[-1].text[-_LETTERS:])))

    def ended(self, row: Encoded) -> bool:
        """Whether each answer closes with an end token, white space after it aside."""
        for start, stop in row.spans:
            tail = row.input_ids[max(start, stop - 3) : stop]
            if not self.stops.intersection(tail):
                return False
        return True

    def finish(self) -> Report:
        report, lengths = self.report, sorted(self.lengths)
        if lengths:
            report.mean = round(sum(lengths) / len(lengths), 1)
            report.median, report.longest = lengths[len(lengths) // 2], lengths[-1]
            report.p95 = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
            report.histogram = histogram(lengths)
        report.trained_share = round(report.trained_tokens / report.tokens, 4) if report.tokens else 0.0
        letters = sum(self.letters.values())
        shares = ((name, round(count / letters, 3)) for name, count in self.letters.most_common(6))
        report.scripts = {name: share for name, share in shares if share >= 0.001}
        if self.sides[0]:
            report.chosen_mean, report.rejected_mean = (round(sum(s) / len(s), 1) for s in self.sides)
        if self.kind == "judged" and report.examples:
            report.good_share = round(self.good / report.examples, 3)
        report.problems = [
            Problem(count, error.what, error.where, error.do)
            for count, error in sorted(self.problems.values(), key=lambda item: -item[0])
        ]
        report.warnings = _warnings(report, self.plain)
        return report


def look(
    recipe: Recipe,
    tokenizer: Any,
    settings: DataSettings,
    rows: int = LOOKED_AT,
    examples_per_epoch: int | None = None,
) -> Report:
    """Tokenise the first rows of a recipe's data and count; bad rows are counted whatever the recipe does about them.

    Args:
        recipe: its data and method count.
        tokenizer: as :func:`~finetui.engine.data.template.prepare_tokenizer` leaves it.
        settings: length and loss as planned.
        rows: how many rows of each source.
        examples_per_epoch: how many examples an epoch has, to say how many tokens the run will process.

    Raises:
        DataError, HubError, MissingExtraError: a source can't be read at all, or its format is not clear.
    """
    made = _Look(recipe, tokenizer, settings)
    tolerant = [source.model_copy(update={"on_bad_row": "skip"}) for source in recipe.data]
    held: list[Record] = []
    whole = True
    for source in tolerant:
        records, read, ended = made.source(source, rows)
        if source.split == "eval":
            held += records
            continue
        made.report.rows += read
        whole &= ended
        made.add(records, drop=source.too_long == "drop")
    made.report.whole = whole
    made.report.leaked = sum(_fingerprint(texts) in made.seen for _, texts in made.marked(held))
    report = made.finish()
    if examples_per_epoch is None and whole:
        examples_per_epoch = report.examples
    if examples_per_epoch is not None and report.examples:
        report.planned_tokens = round(report.tokens / report.examples * examples_per_epoch * recipe.epochs)
    return report


def histogram(lengths: Sequence[int], bins: int = BINS) -> list[Bin]:
    """Lengths in bins of equal width, which is a round number; the last bin has all that is longer than most."""
    ordered = sorted(lengths)
    wide = max(1, ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
    width = next(
        step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if step * bins >= wide
    )
    count = min(bins, ordered[-1] // width + 1)
    counts = Counter(min(length // width, count - 1) for length in ordered)
    last = max(count * width, ordered[-1] + 1)
    first = min(ordered[0] // width, count - 1)
    return [Bin(i * width, (i + 1) * width if i < count - 1 else last, counts[i]) for i in range(first, count)]


def _fingerprint(texts: Sequence[Marked]) -> bytes:
    return blake2b("\0".join(text.text for text in texts).encode(), digest_size=12).digest()


def _own_words(record: Record) -> Iterator[str]:
    """The texts of a record as the row has them, before a template."""
    for name in ("prompt", "completion", "chosen", "rejected", "messages", "text"):
        turns = getattr(record, name, "")
        yield from [turns] if isinstance(turns, str) else [message.content for message in turns]


@lru_cache(maxsize=8192)
def _script(letter: str) -> str:
    """The script of a letter, by the first word of its Unicode name; Chinese characters are Han."""
    first = unicodedata.name(letter, "OTHER").split(maxsplit=1)[0].split("-")[0]
    return {"CJK": "Han", "FULLWIDTH": "Latin", "MICRO": "Greek"}.get(first, first.capitalize())


def _warnings(report: Report, plain: bool) -> list[str]:
    """What these counts have meant for those who trained on such data."""
    count, told = max(report.examples, 1), []
    if report.dropped:
        told.append(f"{report.dropped:,} of {count:,} examples have no answer within {report.sequence_length} tokens")
    if report.overlong:
        told.append(
            f"{report.overlong:,} of {count:,} examples are longer than {report.sequence_length} tokens: left out"
        )
    if report.truncated:
        told.append(f"{report.truncated:,} of {count:,} examples are cut, so the model never sees how they end")
    if report.unended:
        told.append(f"{report.unended:,} answers have no end token: the model would not learn to stop there")
    if report.examples and not report.trained_tokens and KINDS[report.method] != "asked":
        told.append("no token is trained")
    elif 0 < report.trained_share < 0.05:
        told.append(f"only {report.trained_share:.1%} of the tokens are trained")
    if report.repeated > 0.01 * count:
        told.append(f"{report.repeated:,} of {count:,} examples are the same as an earlier one")
    if report.leaked:
        told.append(f"{report.leaked:,} evaluation examples are also trained on: the evaluation loss will be too good")
    if report.with_special:
        told.append(
            f"{report.with_special:,} examples hold special tokens in their own words, as if a template wrote them"
        )
    if report.unknown_tokens:
        told.append(f"{report.unknown_tokens:,} tokens are unknown to the tokenizer")
    if report.good_share in (0.0, 1.0):
        told.append(f"all answers are judged {'good' if report.good_share else 'bad'}: there is nothing to compare")
    if report.chosen_mean and report.rejected_mean and report.chosen_mean > 1.5 * report.rejected_mean:
        told.append("chosen answers are much longer than rejected ones: the model may learn to talk longer, no more")
    if plain:
        told.append(
            "prompts are plain text, though the tokenizer has a chat template that chats will use: "
            "set chat: true on the source to train on turns"
        )
    return told
