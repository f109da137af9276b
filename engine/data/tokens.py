"""From texts with trained characters to token ids with trained tokens.

A text is tokenised whole, as it will be at inference, and character offsets carry its spans over to tokens. At
inference the prompt is tokenised by itself, so no token may hold the end of the prompt and the start of the answer: a
text in which one would is tokenised in pieces.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from .examples import Span

if TYPE_CHECKING:
    import numpy as np

#: The label of a token without loss (``ignore_index`` of torch's cross entropy).
IGNORED = -100


# Made by the million: a frozen dataclass takes three times as long to make.
@dataclass(slots=True)
class Marked:
    """Text of one example, with the character spans that are trained.

    ``bos`` and ``eos`` ask for the tokenizer's own first and last token; a chat template writes these itself.
    """

    text: str
    spans: tuple[Span, ...]
    bos: bool = False
    eos: bool = False


@dataclass(slots=True)
class Encoded:
    """Token ids of one example, the spans of them that are trained, and how many tokens were cut."""

    input_ids: list[int]
    spans: tuple[Span, ...]
    cut: int = 0

    @property
    def labels(self) -> list[int]:
        """The ids in the spans, :data:`IGNORED` elsewhere."""
        labels = [IGNORED] * len(self.input_ids)
        for start, stop in self.spans:
            labels[start:stop] = self.input_ids[start:stop]
        return labels

    @property
    def trained(self) -> int:
        """Tokens with loss: the first token of a row is never predicted."""
        return sum(stop - max(start, 1) for start, stop in self.spans)

    def window(self, start: int, stop: int) -> Encoded:
        """The tokens from ``start`` to ``stop``; what is left out counts as cut if it is the end."""
        spans = tuple((max(a, start) - start, min(b, stop) - start) for a, b in self.spans if a < stop and b > start)
        return Encoded(self.input_ids[start:stop], spans, max(0, len(self.input_ids) - stop))


class Tokens:
    """A tokenizer, with what has to be found out about it only once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id
        ids = tokenizer("a")["input_ids"]
        #: The token that the tokenizer puts before a text of its own accord.
        self.first_id: int | None = ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
        self._backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        self._widths: np.ndarray | None = None
        if self._backend is not None:
            self._backend.no_padding()
            self._backend.no_truncation()
            # Some classes do more than their backend; those are asked themselves, which is slower.
            alone = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
            if self._backend.encode(_PROBE, add_special_tokens=False).ids != alone:
                self._backend = None
            elif hasattr(self._backend, "encode_batch_fast"):
                self._widths = _widths(self._backend)

    def raw(self, texts: Sequence[str]) -> Any:
        """The slow part of :meth:`encode`, which needs no Python thread; give its result to :meth:`finish`."""
        if self._backend is None:
            return None
        encode = self._backend.encode_batch if self._widths is None else self._backend.encode_batch_fast
        return encode(list(texts), add_special_tokens=False)

    def encode(self, items: Sequence[Marked]) -> list[Encoded]:
        """Ids and trained spans of marked texts."""
        return self.finish(items, self.raw([item.text for item in items]))

    def finish(self, items: Sequence[Marked], raw: Any) -> list[Encoded]:
        """What :meth:`encode` gives, from what :meth:`raw` gave."""
        if raw is None:
            return [self._ended(item, *self._in_pieces(item)) for item in items]
        every = [encoding.ids for encoding in raw]
        if self._widths is not None:
            placed = _placed(items, every, self._widths)
        else:
            placed = [_carried(*pair) for pair in zip(raw, items, strict=True)]
        rows = []
        for item, ids, spans in zip(items, every, placed, strict=True):
            if spans is _UNKNOWN and self._backend is not None:
                spans = _carried(self._backend.encode(item.text, add_special_tokens=False), item)
            rows.append(self._ended(item, *(self._in_pieces(item) if spans is None else (ids, spans))))
        return rows

    def _ended(self, item: Marked, ids: list[int], spans: tuple[Span, ...]) -> Encoded:
        if item.eos and (not ids or ids[-1] != self.end_id):
            size = len(ids)
            ids = [*ids, self.end_id]
            joins = bool(spans) and spans[-1][1] == size
            spans = (*spans[:-1], (spans[-1][0], size + 1)) if joins else (*spans, (size, size + 1))
        if item.bos and self.first_id is not None:
            ids = [self.first_id, *ids]
            spans = tuple((start + 1, stop + 1) for start, stop in spans)
        return Encoded(ids, spans)

    def _in_pieces(self, item: Marked) -> tuple[list[int], tuple[Span, ...]]:
        cuts = sorted({0, len(item.text), *(edge for span in item.spans for edge in span)})
        ids: list[int] = []
        spans: list[Span] = []
        for start, stop in pairwise(cuts):
            begin = len(ids)
            ids += self.tokenizer(item.text[start:stop], add_special_tokens=False)["input_ids"]
            if len(ids) > begin and any(first <= start and stop <= last for first, last in item.spans):
                spans.append((begin, len(ids)))
        return ids, tuple(spans)


#: What tokenizers treat in different ways: case, digits, white space, other scripts, special tokens.
_PROBE = "A line, 3 + 42.\n\n  Ünd\t文字 é<|im_end|> </s>weiter [INST] e\u0301"
#: Stands for spans that widths of tokens don't tell.
_UNKNOWN: tuple[Span, ...] = ((-1, -1),)


def _widths(backend: Any) -> np.ndarray | None:
    """Bytes of text that each token stands for, where a tokenizer keeps every byte of the text (byte-level BPE).

    With them the place of a token follows from those before it, and the tokenizer need not keep offsets, which takes a
    fifth of its time.
    """
    import numpy as np

    tree = json.loads(backend.to_str())
    normalizer = (tree.get("normalizer") or {}).get("type")
    if (tree.get("decoder") or {}).get("type") != "ByteLevel" or normalizer not in (None, "NFC"):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {token["id"]: token["content"] for token in tree["added_tokens"]}
    widths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():  # a character of the byte-level alphabet stands for one byte
        widths[number] = len(added[number].encode()) if number in added else len(token)
    return widths


def _placed(items: Sequence[Marked], every: Sequence[list[int]], widths: np.ndarray) -> list[tuple[Span, ...] | None]:
    """As :func:`_carried` for many texts at once, by the widths of tokens; :data:`_UNKNOWN` if they don't add up."""
    import numpy as np

    counts = [len(ids) for ids in every]
    flat = array("i")
    for ids in every:
        flat += array("i", ids)
    # bounds[k] is the byte at which token k begins, all texts end to end.
    bounds = np.concatenate([[0], np.cumsum(widths[np.frombuffer(flat, dtype=np.int32)])])
    firsts = [0, *accumulate(counts)]
    begins = bounds[firsts].tolist()
    edges = array("q")
    known = []
    for item, begin, end in zip(items, begins, begins[1:], strict=False):
        text = item.text
        plain = text.isascii()
        known.append(end - begin == (len(text) if plain else len(text.encode())))
        for edge in (edge for span in item.spans for edge in span):
            edges.append(begin + (edge if plain else len(text[:edge].encode())))
    at = np.searchsorted(bounds, np.frombuffer(edges, dtype=np.int64))
    exact = (bounds[np.minimum(at, len(bounds) - 1)] == edges).tolist()
    tokens = at.tolist()
    placed: list[tuple[Span, ...] | None] = []
    number = 0
    for item, first, sure in zip(items, firsts, known, strict=False):
        spans: tuple[Span, ...] | None = ()
        for _ in item.spans:
            start, stop = tokens[number] - first, tokens[number + 1] - first
            if not exact[number]:
                spans = None
            elif spans is not None and stop > start:
                spans = (*spans, (start, stop))
            number += 2
        placed.append(spans if sure else _UNKNOWN)
    return placed


def _carried(encoding: Any, item: Marked) -> tuple[Span, ...] | None:
    """The token spans of a text's character spans, or None where a token crosses the start of one."""
    spans: list[Span] = []
    size, count = len(item.text), len(encoding)
    for start, stop in item.spans:
        first, last = 0, count
        if start:
            first = encoding.char_to_token(start)
            if first is None:
                return _by_offsets(encoding.offsets, item.spans)
            if encoding.token_to_chars(first)[0] < start:
                return None
        if stop < size:
            last = encoding.char_to_token(stop)
            if last is None:
                return _by_offsets(encoding.offsets, item.spans)
            last += encoding.token_to_chars(last)[0] < stop
        if last > first:
            spans.append((first, last))
    return tuple(spans)


def _by_offsets(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[Span, ...] | None:
    """As :func:`_carried`, where the tokenizer leaves out the very character that a span begins or ends with."""
    found: list[Span] = []
    position = 0
    for start, stop in spans:
        while position < len(offsets) and offsets[position][1] <= start:
            position += 1
        first = position
        if position < len(offsets) and offsets[position][0] < start:
            return None
        while position < len(offsets) and offsets[position][0] < stop:
            position += 1
        if position > first:
            found.append((first, position))
    return tuple(found)
