"""What models are evaluated on: text to be found likely, prompts to be answered, answers that were compared.

The rows are those that a run held out, as it tokenised them, or those of a file. Both become the same three lists, of
which a kind of data fills one or two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ...planner.datasource import DataSource
from ...planner.errors import DataError, RunError
from ...planner.recipe import Recipe
from ..data.encode import KINDS, Encoder, Tally
from ..data.examples import Example, Prompt, Record
from ..data.files import Row
from ..data.formats import DETECT_ROWS, Detected, detect
from ..data.labels import TrainOn
from ..data.prepare import prepare
from ..data.readers import split_last_answer, to_records
from ..data.sources import read_rows
from ..evaluate import IGNORED, data_cache, data_settings
from ..run import Run
from ..samples import question
from .likelihood import Learned

#: Columns whose values are kept for rewards although a format reads them.
_ANSWERS = ("answer", "completion", "output")
_AT_ONCE = 256


@dataclass(frozen=True)
class Question:
    """A prompt in tokens, as text or turns, and in words for people; the answers any of which will do, if there are
    any; and the row's columns for rewards."""

    ids: list[int]
    prompt: Any
    shown: str
    expected: list[str]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """Answers to one prompt, each with its tokens labelled, and whether it is a good one: a better and a worse, or one
    that was judged by itself."""

    answers: tuple[Learned, ...]
    good: tuple[bool, ...]


@dataclass
class Rows:
    """Rows to evaluate on, and where they are from."""

    source: str
    learned: list[Learned] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return max(len(self.learned), len(self.compared)) or len(self.questions)


def held_out_rows(run: Run, tokenizer: Any, limit: int | None, rows_of: Recipe | None = None) -> Rows:
    """The rows that a run held out, packed ones taken apart.

    Args:
        tokenizer: of the model that they are for, which need not be this run's.
        limit: take the first so many.
        rows_of: the recipe whose held-out rows are meant instead, as rows of sft or pretrain.

    Raises:
        RunError: none were held out.
        DataError: the data can't be read any more.
    """
    settings, recipe = data_settings(run.plan.resolved), rows_of or run.recipe
    if rows_of is not None:
        whole: TrainOn = "all" if rows_of.method == "pretrain" else "answers"
        settings = dataclasses.replace(settings, method=rows_of.method, train_on=whole, packing=False)
    kind = KINDS[recipe.method]
    prepared = prepare(recipe, settings, tokenizer, data_cache(run))
    if prepared.evaluation is None or not len(prepared.evaluation):
        do = "Name rows with --data FILE, or give the recipe a source with split: eval."
        raise RunError("this run held no rows out", where=run.name, do=do)
    rows = Rows(f"held-out rows of {run.name}")
    for row in _taken_apart(prepared.evaluation, limit):
        if kind == "learned":
            rows.learned.append(_learned(tokenizer, row["input_ids"], row["labels"]))
            asked = _asked(tokenizer, row["input_ids"], row["labels"], settings.sequence_length)
            rows.questions += [asked] if asked and recipe.method != "pretrain" else []
        elif kind == "asked":
            rows.questions.append(_of_prompt(tokenizer, row, list(row["prompt_ids"])))
        else:
            rows.compared.append(_compared(row))
    return rows


def _taken_apart(rows: Any, limit: int | None) -> Iterator[dict[str, Any]]:
    def documents() -> Iterator[dict[str, Any]]:
        for row in rows:
            start = 0
            for length in row.get("seq_lengths") or []:
                part = slice(start, start + length)
                yield {"input_ids": row["input_ids"][part], "labels": row["labels"][part]}
                start += length
            if not start:
                yield row

    return islice(documents(), limit)


def file_rows(
    path: str,
    tokenizer: Any,
    *,
    method: str,
    length: int,
    limit: int | None = None,
    form: str = "auto",
    train_on: TrainOn = "answers",
) -> Rows:
    """The rows of a file, folder, address or hub dataset, as whatever they are: see :func:`_detected`.

    Args:
        method: of the model that they are for; what rows can be read as for it comes first.
        length: longest sequence in tokens; longer rows are cut, long texts split.
        form: a format of recipes.
        train_on: which tokens of a chat count.

    Raises:
        DataError: a row is wrong, or none can be used.
    """
    source = DataSource.model_validate({"path": path, "format": form})
    raw = list(read_rows(source, limit))
    if not raw:
        raise DataError("there are no rows", where=path, do="Give a file that has some.")
    method, detected = _detected(raw, source, method)
    encoder = Encoder(tokenizer, KINDS[method], length, train_on, fill=False)
    asker = Encoder(tokenizer, "asked", length, fill=False)
    rows, tally = Rows(path), Tally()
    for start in range(0, len(raw), _AT_ONCE):
        several = [
            (row, record) for row in raw[start : start + _AT_ONCE] for record in to_records(row, detected, method)
        ]
        records = [record for _, record in several]
        encoded = encoder.tokens.encode(encoder.marked(records))
        per_record = len(encoded) // max(len(records), 1)
        for index, record in enumerate(records):
            mine = encoded[index * per_record : (index + 1) * per_record]
            if encoder.kind == "learned":
                kept = encoder.learned([record], mine, tally)
                rows.learned += [_learned(tokenizer, piece.input_ids, piece.labels) for piece in kept]
            elif encoder.kind != "asked":
                made = encoder.answered([record], mine, tally)
                rows.compared += [_compared({**columns.ids, **columns.values}) for columns in made]
        if method != "pretrain":
            prompts = [prompt for row, record in several if (prompt := _prompt_of(row, record, detected))]
            ids = asker.tokens.encode(asker.marked(prompts))
            rows.questions += [
                _of_prompt(tokenizer, {**one.columns, "answer": one.answer, "prompt": one.prompt}, each.input_ids)
                for one, each in zip(prompts, ids, strict=True)
            ]
    if lost := tally.dropped + tally.overlong:
        rows.notes.append(f"{lost} rows of {path} have no answer within {length} tokens and are left out")
    if not len(rows):
        raise DataError("no row can be used", where=path, do="Look at it with 'finetui data'.")
    return rows


def _detected(raw: Sequence[Row], source: DataSource, method: str) -> tuple[str, Detected]:
    """As what rows are read: for the model's own method if they fit it, else as text to learn, pairs, or prompts.

    Raises:
        DataError: none fits; that of the model's own method.
    """
    first: DataError | None = None
    for one in dict.fromkeys((method, "sft", "dpo", "grpo")):
        try:
            return one, detect(raw[:DETECT_ROWS], source, one)
        except DataError as error:
            first = first or error
    assert first is not None
    raise first


def _prompt_of(row: Row, record: Record, detected: Detected) -> Prompt | None:
    """What a row asks, with the answer that it gives; None where it asks nothing or its answers are compared."""
    if isinstance(record, Prompt):
        return record
    if not isinstance(record, Example) or record.kind == "text":
        return None
    prompt, answer = split_last_answer(record)
    read = {column for part, column in detected.columns.items() if part not in _ANSWERS}
    rest = {name: value for name, value in row.values.items() if name not in read}
    told = answer if isinstance(answer, str) else answer[-1].content
    return Prompt(row.where, prompt, told, rest, record.tools)


# --- one row


def _learned(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> Learned:
    ids, labels = list(ids), list(labels)
    return Learned(ids, labels, sum(len(text.encode()) for text in _texts(tokenizer, ids, _spans(labels))))


def _spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Where tokens with a label begin and end; the first token of a row is never predicted."""
    edges = [i for i in range(1, len(labels)) if (labels[i] != IGNORED) != (i > 1 and labels[i - 1] != IGNORED)]
    if len(edges) % 2:
        edges.append(len(labels))
    return list(zip(edges[::2], edges[1::2], strict=True))


def _texts(tokenizer: Any, ids: list[int], spans: Sequence[tuple[int, int]]) -> list[str]:
    """The text of spans without special tokens: what decoding up to their end adds to decoding up to their start, since
    some tokenizers leave out the space that a text begins with."""

    def upto(stop: int) -> str:
        return str(tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return [upto(stop)[len(upto(start)) :] for start, stop in spans]


def _asked(tokenizer: Any, ids: list[int], labels: list[int], length: int) -> Question | None:
    """The last answer of a tokenised row and all before it; None for plain text, and where the answer was cut off."""
    spans = _spans(labels)
    if not spans or spans[-1][0] <= 1 or len(ids) >= length:
        return None
    start = spans[-1][0]
    expected = _texts(tokenizer, ids, spans[-1:])[0].strip()
    prompt = ids[:start]
    return Question(
        prompt, str(tokenizer.decode(prompt)), question(tokenizer, prompt), [expected], {"answer": expected}
    )


def _of_prompt(tokenizer: Any, row: dict[str, Any], ids: list[int]) -> Question:
    columns = {name: value for name, value in row.items() if name not in ("prompt", "prompt_ids", "tools")}
    prompt, answer = row["prompt"], row.get("answer")
    if not isinstance(prompt, str):
        prompt = [{"role": m["role"], "content": m["content"]} if isinstance(m, dict) else _turn(m) for m in prompt]
    shown = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    expected = [str(one) for one in (answer if isinstance(answer, list) else [answer]) if one is not None]
    return Question(ids, prompt, shown, expected, columns)


def _turn(message: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(message).items() if key in ("role", "content")}


def _compared(row: dict[str, Any]) -> Compared:
    """A row of pairs or of judged answers; of a reward model's the prompt is part of the answers."""
    prompt = list(row.get("prompt_ids") or [])

    def answer(ids: Sequence[int]) -> Learned:
        return Learned([*prompt, *ids], [*[IGNORED] * len(prompt), *ids])

    if "completion_ids" in row:
        return Compared((answer(row["completion_ids"]),), (bool(row["label"]),))
    return Compared((answer(row["chosen_ids"]), answer(row["rejected_ids"])), (True, False))
