"""From records to the columns that their method trains on, cut to the sequence length, with what was lost counted.

================================== ==========================================================
sft pretrain distill               ``input_ids``, ``labels``
dpo ipo orpo cpo simpo             ``prompt_ids``, ``chosen_ids``, ``rejected_ids``
reward                             ``chosen_ids``, ``rejected_ids``: prompt and answer; ``margin`` if every pair has one
kto                                ``prompt_ids``, ``completion_ids``, ``label``
grpo rloo ppo                      ``prompt`` (text or messages), ``prompt_ids``, ``answer``, the row's own columns
================================== ==========================================================

These are the names of TRL's tokenised datasets. An answer is cut on the right; a row without a token of it left is
dropped, and so is a pair for a reward model that would have to be cut: half an answer has no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ...planner.errors import DataError
from .examples import Example, Judged, Pair, Prompt, Record, Stepwise, Tools, Turns
from .labels import TrainOn, end_tokens, mark
from .skeleton import Blanks
from .template import as_dict, render
from .tokens import Encoded, Marked, Tokens

Kind = Literal["learned", "paired", "scored", "judged", "asked"]
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("sft", "pretrain", "distill"), "learned"),
    **dict.fromkeys(("dpo", "ipo", "orpo", "cpo", "simpo"), "paired"),
    "reward": "scored",
    "kto": "judged",
    **dict.fromkeys(("grpo", "rloo", "ppo"), "asked"),
}
#: Columns of token ids, and of one value each: ``b`` for true and false, ``d`` for numbers.
COLUMNS: dict[Kind, tuple[list[str], dict[str, str]]] = {
    "learned": (["input_ids"], {}),
    "paired": (["prompt_ids", "chosen_ids", "rejected_ids"], {}),
    "scored": (["chosen_ids", "rejected_ids"], {"margin": "d"}),
    "judged": (["prompt_ids", "completion_ids"], {"label": "b"}),
}


@dataclass
class Tally:
    """Counts over examples. Lengths are in tokens; a trained token is one with loss."""

    examples: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    cut: int = 0
    split: int = 0
    dropped: int = 0
    overlong: int = 0
    longest: int = 0

    def add(self, tokens: int, trained: int, longest: int) -> None:
        """One more example."""
        self.examples += 1
        self.tokens += tokens
        self.trained += trained
        self.longest = max(self.longest, longest)

    def __add__(self, other: Tally) -> Tally:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Tally(**{**sums, "longest": max(self.longest, other.longest)})


class Columns(NamedTuple):
    """One row to train on: token ids and single values by column."""

    ids: dict[str, list[int]]
    values: dict[str, float]


@dataclass
class Encoder:
    """A tokenizer put to the use of one method.

    Args:
        tokenizer: as :func:`~finetui.engine.data.template.prepare_tokenizer` leaves it.
        kind: what the method trains on.
        limit: the longest sequence.
        train_on: which tokens of a learned example count.
        fill: write conversations by filling in blanks where that is the same, see :mod:`.skeleton`.
    """

    tokenizer: Any
    kind: Kind
    limit: int
    train_on: TrainOn = "answers"
    fill: bool = True
    tokens: Tokens = field(init=False)
    ends: tuple[str, ...] = field(init=False)
    _mark: Callable[[Example], Marked] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens, self.ends = Tokens(self.tokenizer), end_tokens(self.tokenizer)
        self._mark = self._rendered
        if self.fill:
            self._mark = Blanks(self.tokenizer, self._rendered, self.ends).mark

    def _rendered(self, example: Example) -> Marked:
        return mark(example, self.tokenizer, self.train_on, self.ends)

    def marked(self, records: Sequence[Record]) -> list[Marked]:
        """The texts of records: one of a learned example, prompt first and then its answers of the others."""
        texts: list[Marked] = []
        for record in records:
            if isinstance(record, Example):
                texts.append(self._mark(record))
            elif isinstance(record, Pair):
                texts += self._answered(record.prompt, [record.chosen, record.rejected], record.tools, record.where)
            elif isinstance(record, Judged):
                texts += self._answered(record.prompt, [record.completion], record.tools, record.where)
            elif isinstance(record, Prompt):
                texts.append(self._prompt(record.prompt, record.tools, record.where))
            else:
                raise TypeError(f"no method trains on {type(record).__name__}")
        try:
            "".join([text.text for text in texts]).encode()
        except UnicodeEncodeError:
            raise _half_a_character(records, texts) from None
        return texts

    def _prompt(self, prompt: Turns, tools: Tools, where: str) -> Marked:
        if isinstance(prompt, str):
            return Marked(prompt, (), bos=True)
        return Marked(render(self.tokenizer, prompt, where, prompt=True, tools=tools), ())

    def _answered(self, prompt: Turns, answers: Sequence[Turns], tools: Tools, where: str) -> list[Marked]:
        """Prompt with answer, for each answer; the answer is the span, and begins at the same place in all of them."""
        asked = self._prompt(prompt, tools, where)
        texts: list[str] = []
        for answer in answers:
            if isinstance(prompt, str) or isinstance(answer, str):
                texts.append(asked.text + str(answer))
            else:
                texts.append(render(self.tokenizer, (*prompt, *answer), where, tools=tools))
        # A template may end the prompt with more than it writes before an answer that is there already.
        start = min(_shared(asked.text, text) for text in texts)
        plain = isinstance(prompt, str)
        return [
            Marked(text, ((start, len(text)),), bos=plain, eos=plain or not text.rstrip().endswith(self.ends))
            for text in texts
        ]

    def learned(
        self, records: Sequence[Record], encoded: Sequence[Encoded], tally: Tally, *, drop: bool = False
    ) -> Iterator[Encoded]:
        """Examples within the limit. Long texts become several; an example without any answer left is dropped, and with
        ``drop`` whatever would have to be cut."""
        limit = self.limit
        for record, row in zip(records, encoded, strict=True):
            size = len(row.input_ids)
            pieces = [row]
            if size > limit and drop:
                tally.overlong += 1
                continue
            if size > limit:
                if isinstance(record, Example) and record.kind == "text":
                    pieces = list(_windows(row, limit))
                    tally.split += 1
                else:
                    pieces = [row.window(0, limit)]
                    tally.truncated += 1
                    tally.cut += size - limit
            for piece in pieces:
                trained = piece.trained
                if trained > 0:
                    tally.add(len(piece.input_ids), trained, len(piece.input_ids))
                    yield piece
                else:
                    tally.dropped += 1

    def answered(
        self, records: Sequence[Record], encoded: Sequence[Encoded], tally: Tally, *, drop: bool = False
    ) -> Iterator[Columns]:
        """Pairs and judged answers within the limit; with ``drop`` only those that are so by themselves."""
        rows = iter(encoded)
        for record in records:
            values: dict[str, float] = {}
            if isinstance(record, Judged):
                made = self._fit([next(rows)], ["completion_ids"], tally, drop)
                values["label"] = record.label
            else:
                made = self._fit([next(rows), next(rows)], ["chosen_ids", "rejected_ids"], tally, drop)
                if self.kind == "scored" and isinstance(record, Pair):
                    values["margin"] = math.nan if record.margin is None else record.margin
            if made is not None:
                yield Columns(made, values)

    def _fit(self, rows: list[Encoded], names: list[str], tally: Tally, drop: bool) -> dict[str, list[int]] | None:
        starts = [row.spans[0][0] if row.spans else len(row.input_ids) for row in rows]
        lengths = [len(row.input_ids) for row in rows]
        over = max(lengths) > self.limit
        if over and drop:
            tally.overlong += 1
            return None
        if over:
            tally.truncated += 1
        cut = [row.input_ids[: self.limit] for row in rows]
        same = len(cut) == 2 and cut[0] == cut[1]  # where they differ was cut off
        if max(starts) >= min(self.limit, *lengths) or (over and self.kind == "scored") or same:
            tally.dropped += 1
            return None
        tally.cut += sum(max(0, length - self.limit) for length in lengths)
        trained = sum(len(ids) - start for ids, start in zip(cut, starts, strict=True))
        tally.add(sum(map(len, cut)), trained, max(map(len, cut)))
        if self.kind == "scored":
            return dict(zip(names, cut, strict=True))
        answers = [ids[start:] for ids, start in zip(cut, starts, strict=True)]
        return {"prompt_ids": cut[0][: starts[0]], **dict(zip(names, answers, strict=True))}

    def asked(self, records: Sequence[Record], encoded: Sequence[Encoded], tally: Tally) -> Iterator[dict[str, Any]]:
        """Prompts that leave room for an answer, as rows of TRL's prompt-only format."""
        for record, row in zip(records, encoded, strict=True):
            assert isinstance(record, Prompt)
            size = len(row.input_ids)
            if size >= self.limit:
                tally.dropped += 1
                continue
            tally.add(size, 0, size)
            yield {**as_row(record), "prompt_ids": row.input_ids}


def _half_a_character(records: Sequence[Record], texts: Sequence[Marked]) -> DataError:
    """The error for a text that no tokenizer takes: JSON may write a lone surrogate, which is no character."""
    per_record = len(texts) // len(records)
    lone = ((index, code) for index, text in enumerate(texts) for code in text.text if "\ud800" <= code <= "\udfff")
    index, code = next(lone)
    what = f"the text holds half of a character (\\u{ord(code):04x} without its other half)"
    return DataError(what, where=records[index // per_record].where, do="Remove it, or write the whole character.")


def as_row(record: Record) -> dict[str, Any]:
    """A record as a row of TRL's formats: text, or lists of messages."""
    tools = {} if isinstance(record, Stepwise) or not record.tools else {"tools": list(record.tools)}
    if isinstance(record, Pair):
        sides = {name: _turns(getattr(record, name)) for name in ("prompt", "chosen", "rejected")}
        return {**sides, **tools, **({} if record.margin is None else {"margin": record.margin})}
    if isinstance(record, Judged):
        return {
            "prompt": _turns(record.prompt), "completion": _turns(record.completion), "label": record.label, **tools
        }  # fmt: skip
    if isinstance(record, Prompt):
        return {**record.columns, "prompt": _turns(record.prompt), "answer": record.answer, **tools}
    if isinstance(record, Example):
        if record.kind == "text":
            return {"text": record.text}
        if record.kind == "completion":
            return {"prompt": record.prompt, "completion": record.completion}
        return {"messages": _turns(record.messages), **tools}
    steps = {"completions": list(record.completions), "labels": list(record.labels)}
    return {"prompt": _turns(record.prompt), **steps}


def _turns(turns: Turns) -> Any:
    return turns if isinstance(turns, str) else [as_dict(message) for message in turns]


def _shared(prompt: str, text: str) -> int:
    """The length of what two texts begin with in common."""
    if text.startswith(prompt):
        return len(prompt)
    return next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))


def _windows(row: Encoded, limit: int) -> Iterator[Encoded]:
    """A long text in pieces of about equal length, so that no last piece is a stump."""
    count = len(row.input_ids)
    size = math.ceil(count / math.ceil(count / limit))
    for start in range(0, count, size):
        yield replace(row.window(start, start + size), cut=0)
