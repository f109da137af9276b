"""Tokens and labels of an example: loss on the assistant's answers, exactly, and always on what ends them.

An example is first turned into text with character spans that are trained. Those come from the template's
``{% generation %}`` markers, or else from rendering the conversation up to each answer and taking the difference. The
text is then tokenised whole, as it will be at inference, and character offsets carry the spans over to tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from ...planner.errors import DataError
from .formats import Example, Message
from .template import has_markers, render, render_marked, stop_token_ids

#: The label of a token without loss (``ignore_index`` of torch's cross entropy).
IGNORED = -100

TrainOn = Literal["answers", "all"]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example, their labels (:data:`IGNORED` where there is no loss), and how many tokens were cut."""

    input_ids: list[int]
    labels: list[int]
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Marked:
    """Text of one example, with the character spans that are trained.

    ``bos`` and ``eos`` ask for the tokenizer's own first and last token; a chat template writes these itself.
    """

    text: str
    spans: tuple[Span, ...]
    bos: bool
    eos: bool


def encode(
    example: Example, tokenizer: Any, *, train_on: TrainOn = "answers", max_length: int | None = None
) -> Encoded:
    """Token ids and labels of one example, cut on the right to ``max_length``.

    Args:
        example: one row.
        tokenizer: as :func:`~finetui.engine.data.template.prepare_tokenizer` leaves it.
        train_on: ``answers``, or ``all`` tokens.
        max_length: the longest sequence, in tokens.

    Raises:
        DataError: the chat template refuses the conversation, or moves its answers so that they can't be found.
    """
    return encode_batch([example], tokenizer, train_on=train_on, max_length=max_length)[0]


def encode_batch(
    examples: Sequence[Example], tokenizer: Any, *, train_on: TrainOn = "answers", max_length: int | None = None
) -> list[Encoded]:
    """:func:`encode` for many examples at once, which lets the tokenizer use all cores."""
    ends = end_tokens(tokenizer)
    marked = [mark(example, tokenizer, train_on, ends) for example in examples]
    bos = _first_token(tokenizer)
    rows = []
    for item, (ids, labels) in zip(marked, _tokenize(marked, tokenizer), strict=True):
        if item.bos and bos is not None:
            ids, labels = [bos, *ids], [IGNORED, *labels]
        if item.eos and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        length = len(ids) if max_length is None else min(len(ids), max_length)
        rows.append(Encoded(ids[:length], labels[:length], len(ids) - length))
    return rows


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that may close an answer, as text."""
    return tuple(tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)))


def mark(example: Example, tokenizer: Any, train_on: TrainOn, ends: tuple[str, ...]) -> Marked:
    """The text of an example, and which of its characters are trained; ``ends`` as :func:`end_tokens` gives them."""
    if example.kind == "text":
        return Marked(example.text, ((0, len(example.text)),), bos=True, eos=True)
    if example.kind == "completion":
        text = example.prompt + example.completion
        start = 0 if train_on == "all" else len(example.prompt)
        return Marked(text, ((start, len(text)),), bos=True, eos=True)
    text, spans = _answers(example, tokenizer, ends)
    ended = text[: spans[-1][1]].rstrip().endswith(ends)
    if train_on == "all":
        spans = [(0, len(text))]
    return Marked(text, tuple(spans), bos=False, eos=not ended)


def _answers(example: Example, tokenizer: Any, ends: tuple[str, ...]) -> tuple[str, list[Span]]:
    """The rendered conversation, and the span of each answer with its end token."""
    messages, where = example.messages, example.where
    turns = [i for i, message in enumerate(messages) if message.role == "assistant" and i >= example.train_from]
    if has_markers(tokenizer):
        text, spans = render_marked(tokenizer, messages, where)
        if spans:
            skipped = max(0, len(spans) - len(turns)) if example.train_from else 0
            return text, [_with_end(text, span, ends) for span in spans[skipped:]]
    text = render(tokenizer, messages, where)
    return text, [_difference(text, messages, turn, tokenizer, where, ends) for turn in turns]


def _difference(
    text: str, messages: Sequence[Message], turn: int, tokenizer: Any, where: str, ends: tuple[str, ...]
) -> Span:
    """The span of one answer: from the end of the prompt that asks for it to the end of its turn."""
    prompt = render(tokenizer, messages[:turn], where, prompt=True)
    through = text if turn == len(messages) - 1 else render(tokenizer, messages[: turn + 1], where)
    if text.startswith(prompt) and text.startswith(through) and len(prompt) < len(through):
        span = (len(prompt), len(through))
        closed = len(prompt) + len(text[slice(*span)].rstrip())
        return (len(prompt), closed) if text.endswith(ends, 0, closed) else span
    return _with_end(text, _locate(text, messages, turn, tokenizer, where, prompt), ends)


#: Stands in for an answer while it is looked for.
_STAND_IN = "FinetuiStandIn"


def _locate(text: str, messages: Sequence[Message], turn: int, tokenizer: Any, where: str, prompt: str) -> Span:
    """Find an answer where a template writes earlier or last turns differently: put a word in its place, compare."""
    swapped = [*messages]
    swapped[turn] = replace(messages[turn], content=_STAND_IN)
    before, found, after = render(tokenizer, swapped, where).partition(_STAND_IN)
    if found and text.startswith(before) and text.endswith(after) and len(before) + len(after) < len(text):
        return len(before), len(text) - len(after)
    if found and text.startswith(prompt) and text.endswith(after) and len(prompt) + len(after) < len(text):
        return len(prompt), len(text) - len(after)
    raise DataError(
        f"the chat template rewrites message {turn + 1}, so its answer can't be found in the rendered text",
        where=where,
        do="Set chat_template: to a template with {% generation %} markers around the assistant's words.",
    )


def _with_end(text: str, span: Span, ends: tuple[str, ...]) -> Span:
    """Extend a span over the end token that follows it: a marker may close before it."""
    start, stop = span
    if text[:stop].rstrip().endswith(ends):
        return span
    rest = text[stop:]
    lead = len(rest) - len(rest.lstrip())
    closing = next((token for token in ends if rest.startswith(token, lead)), None)
    return (start, stop + lead + len(closing)) if closing else span


def _first_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text of its own accord."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def _tokenize(items: Sequence[Marked], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of marked texts. A text whose tokens cross the start of an answer is tokenised in pieces.

    At inference the prompt is tokenised by itself, so no token may hold the end of the prompt and the start of the
    answer.
    """
    if not getattr(tokenizer, "is_fast", False):
        return [_in_pieces(item, tokenizer) for item in items]
    batch = tokenizer(
        [item.text for item in items],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    rows = []
    for item, ids, offsets in zip(items, batch["input_ids"], batch["offset_mapping"], strict=True):
        labels = _labels(ids, offsets, item.spans)
        rows.append(_in_pieces(item, tokenizer) if labels is None else (ids, labels))
    return rows


def _labels(ids: list[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int] | None:
    """Labels for the tokens inside the spans, or None if a token crosses the start of one."""
    labels = [IGNORED] * len(ids)
    position = 0
    for start, stop in spans:
        while position < len(ids) and offsets[position][1] <= start:
            position += 1
        if position < len(ids) and offsets[position][0] < start:
            return None
        while position < len(ids) and offsets[position][0] < stop:
            if offsets[position][1] > offsets[position][0] or offsets[position][0] >= start:
                labels[position] = ids[position]
            position += 1
    return labels


def _in_pieces(item: Marked, tokenizer: Any) -> tuple[list[int], list[int]]:
    cuts = sorted({0, len(item.text), *(edge for span in item.spans for edge in span)})
    ids: list[int] = []
    labels: list[int] = []
    for start, stop in pairwise(cuts):
        piece = tokenizer(item.text[start:stop], add_special_tokens=False)["input_ids"]
        trained = any(first <= start and stop <= last for first, last in item.spans)
        ids += piece
        labels += piece if trained else [IGNORED] * len(piece)
    return ids, labels
