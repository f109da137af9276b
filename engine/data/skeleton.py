"""Conversations written by filling in the blanks of one that a chat template wrote before.

Rendering a template costs as much time as a third of the tokenising. Almost all templates write the content of messages
as it is, and decide by roles alone what stands around it; so one rendering with words of our own in place of the
contents gives the text, and the spans to train on, of every conversation with the same roles. Where that would not be
so the conversation is rendered: if a content holds anything that the template looks for (its syntax tree tells), begins
or ends with white space that the template treats in a way of its own, or if the template measures or takes apart
contents. The first conversations of each kind and some later ones are rendered as well, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .examples import Example, Message
from .template import own_template, training_template
from .tokens import Marked

#: So many conversations of a kind are also rendered, and then each one in so many.
_FIRST, _EVERY = 4, 2048
#: What a template might do to a content would show in these: quotes, marks of markup, both cases, other scripts.
_WORD = "Finetui{}Blank\"'\\<&>éß文 iI\n\n{}.end"
#: White space that templates strip or leave: each kind of it, at either end.
_SPACES = ((" ", ""), ("", " "), ("\n", ""), ("", "\n"), (" \n\t", "\n \n"), ("\t", "\t"))
_STRIPS = {"strip", "lstrip", "rstrip", "trim"}
#: Filters and methods whose arguments are no texts to look for in a content.
_HARMLESS = {
    "get",
    "raise_exception",
    "strftime_now",
    "namespace",
    "items",
    "append",
    "selectattr",
    "rejectattr",
    "map",
}
_MEASURES = {"length", "count", "wordcount", "truncate", "first", "last", "list", "batch", "slice", "wordwrap"}


class Mismatch(Exception):
    """A filled-in conversation is not what the template writes: blanks can't be used with this template."""


@dataclass(frozen=True, slots=True)
class _Blank:
    """A text with blanks: fixed parts, which message fills which blank, and where the spans begin and end.

    An edge is a number of fixed characters and the number of blanks before it.
    """

    parts: tuple[str, ...]
    order: tuple[int, ...]
    strip: tuple[bool | None, ...]
    edges: tuple[tuple[int, int], ...]
    eos: bool

    def fill(self, contents: list[str]) -> Marked:
        pieces = [self.parts[0]]
        sums = [0]
        size = 0
        for index, strip, part in zip(self.order, self.strip, self.parts[1:], strict=True):
            text = contents[index].strip() if strip else contents[index]
            pieces += (text, part)
            size += len(text)
            sums.append(size)
        at = [fixed + sums[blanks] for fixed, blanks in self.edges]
        return Marked("".join(pieces), tuple(zip(at[0::2], at[1::2], strict=True)), eos=self.eos)


class Blanks:
    """Marks conversations like ``render``, which it asks for the first of each kind.

    Args:
        tokenizer: its template is looked into.
        render: marks one example by rendering it.
        ends: tokens that close an answer.
    """

    def __init__(self, tokenizer: Any, render: Callable[[Example], Marked], ends: tuple[str, ...]) -> None:
        self._render = render
        looked_for = _looked_for(training_template(own_template(tokenizer))) if tokenizer.chat_template else None
        self._usable = looked_for is not None
        within, whole = looked_for or (set(), set())
        self._within = sorted({*within, *ends})
        self._whole = whole
        self._known: dict[Any, _Blank | None] = {}
        self._count: dict[Any, int] = {}

    def mark(self, example: Example) -> Marked:
        """The text and spans of an example.

        Raises:
            Mismatch: what was filled in before can't be trusted either.
        """
        if not self._usable or example.kind != "chat" or example.tools:
            return self._render(example)
        contents: list[str] = []
        shape: list[Any] = [example.train_from]
        for message in example.messages:
            if message.reasoning or message.tool_calls or message.untrained or message.name or message.tool_call_id:
                return self._render(example)
            contents.append(message.content)
            shape += (message.role, message.trained)
        kind = tuple(shape)
        if kind not in self._known:
            self._known[kind] = self._learn(example)
        blank = self._known[kind]
        if blank is None:
            return self._render(example)
        whole = "\0".join(contents)
        for text in self._within:
            if text in whole:
                return self._render(example)
        for index, strip in zip(blank.order, blank.strip, strict=True):
            text = contents[index]
            if not text or text.isspace() or text in self._whole:
                return self._render(example)
            if strip is None and (text[0].isspace() or text[-1].isspace()):
                return self._render(example)
        filled = blank.fill(contents)
        number = self._count[kind] = self._count.get(kind, 0) + 1
        if (number <= _FIRST or number % _EVERY == 0) and filled != self._render(example):
            raise Mismatch
        return filled

    def _learn(self, example: Example) -> _Blank | None:
        """The blanks of a kind of conversation, or None where its contents are not simply written down."""
        words = [_WORD.format(index, index) for index in range(len(example.messages))]
        bare = self._with(example, words)
        if bare is None or any(bare.text.count(word) != 1 for word in words):
            return None
        order = sorted(range(len(words)), key=lambda index: bare.text.index(words[index]))
        places = [(bare.text.index(words[index]), len(words[index])) for index in order]
        parts, position = [], 0
        for start, size in places:
            parts.append(bare.text[position:start])
            position = start + size
        parts.append(bare.text[position:])
        edges = []
        for edge in (edge for span in bare.spans for edge in span):
            before = [(start, size) for start, size in places if start + size <= edge]
            if any(start < edge < start + size for start, size in places):
                return None
            edges.append((edge - sum(size for _, size in before), len(before)))
        blank = _Blank(tuple(parts), tuple(order), (False,) * len(order), tuple(edges), bare.eos)
        if blank.fill(words) != bare:
            return None
        return replace(blank, strip=tuple(self._stripped(example, words, blank, slot) for slot in range(len(order))))

    def _with(self, example: Example, contents: list[str]) -> Marked | None:
        pairs = zip(example.messages, contents, strict=True)
        made = [Message(message.role, text, trained=message.trained) for message, text in pairs]
        try:
            return self._render(replace(example, messages=tuple(made)))
        except Exception:  # whatever the template has against our words, it may not have against the user's
            return None

    def _stripped(self, example: Example, words: list[str], blank: _Blank, slot: int) -> bool | None:
        """Whether a blank is filled with its content as it is (False) or stripped (True); None is neither."""
        found: set[bool | None] = set()
        for left, right in _SPACES:
            spaced = [*words]
            spaced[blank.order[slot]] = left + words[blank.order[slot]] + right
            rendered = self._with(example, spaced)
            modes = {s: tuple(s and index == slot for index in range(len(words))) for s in (False, True)}
            fits = [s for s in modes if rendered == replace(blank, strip=modes[s]).fill(spaced)]
            found.add(fits[0] if fits else None)
        return found.pop() if len(found) == 1 else None


def _looked_for(template: str) -> tuple[set[str], set[str]] | None:
    """Texts that a template looks for within contents, and texts that it compares whole ones with.

    None if it does what no list of texts describes: measure a content, or take it apart by numbers.
    """
    from jinja2 import TemplateError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except TemplateError:
        return None
    compares = list(tree.find_all(nodes.Compare))
    if _measures(tree, compares):
        return None
    within: set[str] = set()
    whole: set[str] = set()
    for compare in compares:
        for operand in compare.ops:
            inside = operand.op in ("in", "notin") and isinstance(compare.expr, nodes.Const)
            (within if inside else whole).update([*_texts(compare.expr), *_texts(operand.expr)])
    for node in tree.find_all((nodes.Call, nodes.Filter)):
        callee = node if isinstance(node, nodes.Filter) else node.node
        name = getattr(callee, "attr", getattr(callee, "name", ""))
        if name not in _STRIPS | _HARMLESS:
            within.update(text for argument in node.args for text in _texts(argument))
    return {text for text in within if text}, whole


def _measures(tree: Any, compares: list[Any]) -> bool:
    """Whether a template decides by the length of a content, or by a part of it that it takes by number."""
    from jinja2 import nodes

    harmless: set[int] = set()
    for compare in compares:
        if any(isinstance(item, nodes.Getitem) and _by_number(item) for item in compare.find_all(nodes.Getitem)):
            return True
        if all(isinstance(operand.expr, nodes.Const) and operand.expr.value == 0 for operand in compare.ops):
            harmless.update(map(id, compare.find_all(nodes.Filter)))  # contents that are blank are never filled in
    for item in tree.find_all((nodes.Filter, nodes.Getitem)):
        if isinstance(item, nodes.Getitem) and isinstance(item.arg, nodes.Slice) and _may_be_content(item.node):
            return True
        measures = isinstance(item, nodes.Filter) and item.name in _MEASURES and id(item) not in harmless
        if measures and _may_be_content(item.node):
            return True
    return False


def _by_number(item: Any) -> bool:
    from jinja2 import nodes

    named = isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str)
    return isinstance(item.arg, nodes.Slice | nodes.Const | nodes.Neg) and not named and _may_be_content(item.node)


def _texts(node: Any) -> Iterator[str]:
    from jinja2 import nodes

    found = [node, *node.find_all(nodes.Const)] if node is not None else []
    return (item.value for item in found if isinstance(item, nodes.Const) and isinstance(item.value, str))


def _may_be_content(node: Any) -> bool:
    """Whether an expression could be the text of a message: anything but the lists that templates also index."""
    from jinja2 import nodes

    name = getattr(node, "attr", None) or getattr(node, "name", None)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        name = node.arg.value
    if isinstance(node, nodes.Call):  # what split gives: its argument is looked for, so it is never split
        return getattr(node.node, "attr", "") not in ("split", "rsplit", "partition", "rpartition", "items")
    return str(name) not in _LISTS


_LISTS = {
    "messages", "loop_messages", "tools", "tool_calls", "documents", "rest", "custom_tools", "builtin_tools", "message",
    "reversed_messages", "type", "inner_type", "oneOf", "item_value",
}  # fmt: skip
