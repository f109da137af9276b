"""What of an example is trained: the assistant's answers, exactly, and always what ends them.

An example is turned into text with character spans. Those come from the template's ``{% generation %}`` markers, or
else from rendering the conversation up to each answer and taking the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from ...planner.errors import DataError
from .examples import Example, Message, Span
from .template import (
    closing_token,
    has_markers,
    own_template,
    render,
    render_marked,
    stop_token_ids,
    training_template,
)
from .tokens import IGNORED, Encoded, Marked, Tokens

__all__ = ["IGNORED", "Encoded", "Marked", "TrainOn", "encode", "encode_batch", "end_tokens", "mark"]

TrainOn = Literal["answers", "last-answer", "all"]


def encode(
    example: Example, tokenizer: Any, *, train_on: TrainOn = "answers", max_length: int | None = None
) -> Encoded:
    """Token ids and labels of one example, cut on the right to ``max_length``.

    Args:
        example: one row.
        tokenizer: as :func:`~finetui.engine.data.template.prepare_tokenizer` leaves it.
        train_on: ``answers``, the ``last-answer`` alone, or ``all`` tokens.
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
    rows = Tokens(tokenizer).encode([mark(example, tokenizer, train_on, ends) for example in examples])
    return rows if max_length is None else [row.window(0, max_length) for row in rows]


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that may close an answer, as text."""
    ends = list(tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)))
    closing = closing_token(tokenizer)
    return (*ends, closing) if closing is not None and closing not in ends else tuple(ends)


def mark(example: Example, tokenizer: Any, train_on: TrainOn, ends: tuple[str, ...]) -> Marked:
    """The text of an example, and which of its characters are trained; ``ends`` as :func:`end_tokens` gives them."""
    if example.kind == "text":
        return Marked(example.text, ((0, len(example.text)),), bos=True, eos=True)
    if example.kind == "completion":
        text = example.prompt + example.completion
        start = 0 if train_on == "all" else len(example.prompt)
        return Marked(text, ((start, len(text)),), bos=True, eos=True)
    turns = trained_turns(example, train_on)
    text, spans = _answers(example, tokenizer, ends, turns)
    last = bool(turns) and turns[-1] == len(example.messages) - 1
    ended = not last or text[: spans[-1][1]].rstrip().endswith(ends)
    if train_on == "all":
        spans = [(0, len(text))]
    return Marked(text, tuple(spans), bos=False, eos=not ended)


def trained_turns(example: Example, train_on: TrainOn) -> list[int]:
    """The numbers of the messages that are learned."""
    messages = example.messages
    start = example.train_from
    if train_on == "last-answer":
        start = max(start, max(i + 1 for i, message in enumerate(messages) if message.role == "user"))
    return [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained and i >= start]


def _answers(example: Example, tokenizer: Any, ends: tuple[str, ...], turns: Sequence[int]) -> tuple[str, list[Span]]:
    """The rendered conversation, and the span of each answer with its end token."""
    messages, where, tools = example.messages, example.where, example.tools
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    text, spans = "", None
    template = training_template(own_template(tokenizer, tools))
    if has_markers(template):
        text, marked = render_marked(tokenizer, messages, where, tools=tools, template=template)
        if len(marked) == len(answers):
            spans = [_with_end(text, marked[answers.index(turn)], ends) for turn in turns]
        elif marked and list(turns) == answers:
            spans = [_with_end(text, span, ends) for span in marked]
    if spans is None:
        text = render(tokenizer, messages, where, tools=tools)
        spans = [_difference(text, example, turn, tokenizer, ends) for turn in turns]
    if any(messages[turn].untrained for turn in turns):
        parts = [_without_parts(text, s, messages[t], where) for s, t in zip(spans, turns, strict=True)]
        spans = [span for pieces in parts for span in pieces]
    return text, spans


def _difference(text: str, example: Example, turn: int, tokenizer: Any, ends: tuple[str, ...]) -> Span:
    """The span of one answer: from the end of the prompt that asks for it to the end of its turn."""
    messages, where, tools = example.messages, example.where, example.tools
    prompt = render(tokenizer, messages[:turn], where, prompt=True, tools=tools)
    through = text if turn == len(messages) - 1 else render(tokenizer, messages[: turn + 1], where, tools=tools)
    if text.startswith(prompt) and text.startswith(through) and len(prompt) < len(through):
        span = (len(prompt), len(through))
        closed = len(prompt) + len(text[slice(*span)].rstrip())
        return (len(prompt), closed) if text.endswith(ends, 0, closed) else _with_end(text, span, ends)
    return _with_end(text, _locate(text, example, turn, tokenizer, prompt), ends)


#: Stands in for an answer while it is looked for.
_STAND_IN = "FinetuiStandIn"


def _locate(text: str, example: Example, turn: int, tokenizer: Any, prompt: str) -> Span:
    """Find an answer where a template writes earlier or last turns differently: put a word in its place, compare."""
    swapped = [*example.messages]
    swapped[turn] = replace(swapped[turn], content=_STAND_IN)
    before, found, after = render(tokenizer, swapped, example.where, tools=example.tools).partition(_STAND_IN)
    stop = len(text) - len(after)
    if found and text.endswith(after):
        for lead in (prompt, before):  # a template may open the answer with more than the prompt for it
            if text.startswith(lead) and len(lead) < stop and (lead is before or before.startswith(lead)):
                return len(lead), stop
        if text.startswith(prompt) and len(prompt) < stop:
            return len(prompt), stop
    raise DataError(
        f"the chat template rewrites message {turn + 1}, so its answer can't be found in the rendered text",
        where=example.where,
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


def _without_parts(text: str, span: Span, message: Message, where: str) -> list[Span]:
    """The span of an answer without those parts of its content that have no loss."""
    if not message.untrained:
        return [span]
    at = text.find(message.content, *span)
    if at < 0:
        what = "the chat template changes this answer, so its parts without loss can't be found"
        raise DataError(what, where=where, do="Give the whole message weight 0 or 1.")
    pieces, position = [], span[0]
    for start, stop in message.untrained:
        pieces.append((position, at + start))
        position = at + stop
    return [piece for piece in [*pieces, (position, span[1])] if piece[0] < piece[1]]
