"""The past of a long event file, at a cost that hardly grows with it.

A run of days says millions of things. Whoever opens it wants the picture at once: what is so now, which stands at the
end of the file; the course of its curves, for which a few hundred places say as much as a screen has columns; and how
it came out, which stands in the few events that are told seldom.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .events import Event, parse_line

#: Files up to this size are read whole: that takes no longer than a few frames.
SHORT_BYTES = 2 << 20
#: What is read whole of a longer file, at its start and at its end.
_START_BYTES, _END_BYTES = 64 << 10, 512 << 10
#: Places in between, and what is read at each.
_PLACES, _PLACE_BYTES = 400, 8 << 10
#: What is searched at a time for events that are told seldom.
_CHUNK_BYTES = 4 << 20
#: Types that come once a second for each GPU: of these, old ones tell nothing about the course of a run.
SAMPLED_TYPES = (b'"type":"gpu"', b'"type":"host"')
#: Types that are told seldom, and say how a run came out.
_SELDOM = tuple(
    b'"type":"%s"' % kind for kind in (b"state", b"eval", b"checkpoint", b"fallback", b"warning", b"failure")
)
_MEMORY = b'"type":"memory"'


@dataclass(frozen=True)
class Past:
    """What was read of a file: ``events`` in their order, some of them left out before ``exact_from``.

    Attributes:
        events: what was read.
        exact_from: the sequence number from which on nothing is left out; 0 if nothing is at all.
        offset: the byte at which reading goes on.
    """

    events: list[Event]
    exact_from: int
    offset: int


def glimpse(path: str | Path) -> Past:
    """The start, the end, and a step with its figures at each of a few hundred places in between.

    Reads at most 4 MB and parses at most a few thousand lines, however long the file is. A short file is read whole.

    Raises:
        OSError: there is no such file, or it can't be read.
    """
    with open(path, "rb") as file:
        if (short := _short(file)) is not None:
            return short
        tail = os.fstat(file.fileno()).st_size - _END_BYTES
        events = _parsed(_whole_lines(file.read(_START_BYTES)))
        for place in range(_PLACES):
            at = _START_BYTES + (tail - _START_BYTES) * place // _PLACES
            events += _step_in(os.pread(file.fileno(), _PLACE_BYTES, at))
        return _with_tail(file, tail, events)


def essentials(path: str | Path) -> Past:
    """The end, and of all before it the events that are told seldom: states, evaluations, checkpoints, warnings.

    Of the many that tell a rank's memory, one of each kind of content is kept, which is enough for the most. The file
    is searched as bytes: 200 MB take a few tenths of a second.

    Raises:
        OSError: there is no such file, or it can't be read.
    """
    with open(path, "rb") as file:
        if (short := _short(file)) is not None:
            return short
        tail = os.fstat(file.fileno()).st_size - _END_BYTES
        found: list[Event] = []
        seen: set[bytes] = set()
        for chunk in _chunks(file, tail):
            for word in _SELDOM:
                found += _parsed(_lines_with(chunk, word))
            for raw in _lines_with(chunk, _MEMORY):
                content = raw.partition(_MEMORY)[2]
                if content not in seen:
                    seen.add(content)
                    found += _parsed([raw])
        return _with_tail(file, tail, found)


def _short(file: BinaryIO) -> Past | None:
    if os.fstat(file.fileno()).st_size > SHORT_BYTES:
        return None
    block = file.read()
    end = block.rfind(b"\n") + 1
    return Past(_parsed(block[:end].split(b"\n")), 0, end)


def _with_tail(file: BinaryIO, tail: int, before: list[Event]) -> Past:
    """What was found before byte ``tail``, in order and once each, and all from there."""
    file.seek(tail)
    begin = tail + len(file.readline())
    block = file.read()
    end = block.rfind(b"\n") + 1
    newest = _parsed(block[:end].split(b"\n"))
    first = newest[0].seq if newest else 0
    unique = {event.seq: event for event in before if not newest or event.seq < first}
    return Past([*(unique[seq] for seq in sorted(unique)), *newest], first, begin + end)


def _chunks(file: BinaryIO, end: int) -> Iterator[bytes]:
    """The file up to byte ``end`` in pieces of whole lines; the last one may be cut anywhere."""
    rest = b""
    file.seek(0)
    while file.tell() < end:
        block = rest + file.read(min(_CHUNK_BYTES, end - file.tell()))
        cut = block.rfind(b"\n") + 1
        yield block[:cut]
        rest = block[cut:]


def _lines_with(chunk: bytes, word: bytes) -> Iterator[bytes]:
    """The lines that hold a word near their start: inside a text it may be anything."""
    at = chunk.find(word)
    while at >= 0:
        begin, end = chunk.rfind(b"\n", 0, at) + 1, chunk.find(b"\n", at)
        if at - begin < 80:
            yield chunk[begin:end]
        at = chunk.find(word, end)


def _whole_lines(block: bytes) -> list[bytes]:
    return block[: block.rfind(b"\n") + 1].split(b"\n")


def _parsed(raws: Iterator[bytes] | list[bytes]) -> list[Event]:
    found = (parse_line(raw) for raw in raws if raw)
    return [event for event in found if event is not None]


def _step_in(block: bytes) -> list[Event]:
    """The first step in a block that begins anywhere, and the figures that follow it; nothing if it holds none."""
    raws: list[bytes] = []
    for raw in block.split(b"\n")[1:-1]:
        head = raw[:80]
        is_step = b'"type":"step"' in head
        if is_step and raws:
            break
        if is_step or (raws and b'"type":"metrics"' in head):
            raws.append(raw)
    return _parsed(raws)
