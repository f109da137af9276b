"""Events: what a run says about itself, one JSON object per line of ``events.jsonl``.

The file is append-only and the only channel between a run and whoever watches. Every line has ``seq`` (1, 2, 3 …
without gaps), ``time`` (seconds since the epoch) and ``type``; the rest is the payload of that type. The supervisor
and rank 0 write to the same file, so an append takes a lock; readers take none, so no viewer can hold up a run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from ..planner.kinds import strange_field
from ..planner.secrets import redact
from .filelock import FileLock
from .modes import FILE


@dataclass(frozen=True)
class State:
    """The run changed its state; ``cause`` says why it failed."""

    type: ClassVar[str] = "state"
    state: str
    cause: str | None = None
    message: str = ""
    do: str = ""
    attempt: int = 1


@dataclass(frozen=True)
class Step:
    """One optimiser step. ``tokens`` counts all tokens processed so far, over all ranks."""

    type: ClassVar[str] = "step"
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    step_s: float
    steps: int = 0


@dataclass(frozen=True)
class Eval:
    """Mean loss per token on held-out data after ``step`` steps."""

    type: ClassVar[str] = "eval"
    step: int
    loss: float


@dataclass(frozen=True)
class Metrics:
    """Further figures of a step (accuracy, rewards, margins, KL) under the trainer's own names."""

    type: ClassVar[str] = "metrics"
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class MemoryUse:
    """What one rank's allocator holds, in GiB; ``peak_gib`` is the most that was ever allocated."""

    type: ClassVar[str] = "memory"
    rank: int
    allocated_gib: float
    reserved_gib: float
    peak_gib: float


@dataclass(frozen=True)
class GpuSample:
    """One NVML reading of one GPU. A figure the driver does not give is None.

    Traffic is in 10**9 bytes per second, seen from the GPU; errors of its memory are those since the driver was loaded.
    These and what follows ``throttle`` are told every few seconds only; an event without them leaves them as they were.
    """

    type: ClassVar[str] = "gpu"
    index: int
    name: str
    memory_used_gib: float | None
    memory_total_gib: float | None
    sm_percent: float | None
    power_w: float | None
    temperature_c: float | None
    sm_clock_mhz: float | None
    throttle: list[str]
    memory_clock_mhz: float | None = None
    power_limit_w: float | None = None
    pcie_in_gb_s: float | None = None
    pcie_out_gb_s: float | None = None
    nvlink_in_gb_s: float | None = None
    nvlink_out_gb_s: float | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None


@dataclass(frozen=True)
class HostSample:
    """One reading of the machine; ``disk_free_gib`` is that of the run directory's disk."""

    type: ClassVar[str] = "host"
    cpu_percent: float
    memory_used_gib: float
    disk_free_gib: float
    memory_total_gib: float = 0.0


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete on disk, ``seconds`` after it was begun; training waited ``waited_s`` of them."""

    type: ClassVar[str] = "checkpoint"
    step: int
    path: str
    bytes: int
    seconds: float
    waited_s: float = 0.0


@dataclass(frozen=True)
class Fallback:
    """Something the plan asked for is done in another way."""

    type: ClassVar[str] = "fallback"
    what: str
    why: str


@dataclass(frozen=True)
class Warn:
    """Something the user should know; training goes on."""

    type: ClassVar[str] = "warning"
    what: str
    where: str = ""
    do: str = ""


@dataclass(frozen=True)
class LogLine:
    """One line for the reader's eyes."""

    type: ClassVar[str] = "log"
    rank: int
    line: str


@dataclass(frozen=True)
class Phase:
    """What a run is busy with before, between and after steps: loading, tokenizing, saving …; ``done`` of ``total``."""

    type: ClassVar[str] = "phase"
    phase: str
    detail: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Sample:
    """What the model answers to a held-out prompt after ``step`` steps; or in a rollout, with the ``reward`` of it."""

    type: ClassVar[str] = "sample"
    step: int
    prompt: str
    answer: str
    expected: str = ""
    reward: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why one rank ended; the supervisor turns it into the run's state."""

    type: ClassVar[str] = "failure"
    rank: int
    cause: str
    message: str
    where: str = ""
    do: str = ""
    needed_gib: float | None = None
    """Out of memory: what the rank's tensors would have held."""


Payload = (
    State | Step | Eval | Metrics | MemoryUse | GpuSample | HostSample | CheckpointSaved | Fallback | Warn | LogLine
    | Phase | Sample | Failure
)  # fmt: skip


#: Each kind of payload by its name in the file.
_KINDS: dict[str, type] = {kind.type: kind for kind in get_args(Payload)}


@dataclass(frozen=True)
class Event:
    """One line of ``events.jsonl`` as read back; "nan", "inf" and "-inf" are floats again in ``data``."""

    seq: int
    time: float
    type: str
    data: dict[str, Any]


class EventLog:
    """Appends events to one file, safely from several processes and threads.

    Each append is one ``write`` under an exclusive lock. A half-written last line, left behind by a process that was
    killed, is cut off before the next append, so complete lines are all a reader ever has to understand.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE)
        self._lock = FileLock(self._fd, self.path)
        self._end = -1
        self._seq = 0
        self._turn = threading.Lock()  # a lock of the file is one between processes

    def append(self, payload: Payload) -> Event:
        """Write one event.

        Raises:
            OSError: the disk is full or the file is gone; nothing of the event stays behind.
        """
        with self._turn:
            return self._append(payload)

    def _append(self, payload: Payload) -> Event:
        self._lock.acquire()
        try:
            size = os.fstat(self._fd).st_size
            if size != self._end:
                size, self._seq = self._last_complete(size)
            data = {k: v for k, v in dataclasses.asdict(payload).items() if v is not None or k in _KEEP_NONE}
            event = Event(self._seq + 1, time.time(), payload.type, data)
            head = {"seq": event.seq, "time": round(event.time, 3), "type": event.type}
            line = json.dumps(_encodable({**head, **data}), ensure_ascii=False, separators=(",", ":")) + "\n"
            raw = line.encode("utf-8", errors="replace")  # half a surrogate pair is no character
            try:
                written = os.write(self._fd, raw)
                if written != len(raw):
                    raise OSError(28, "No space left on device", str(self.path))
            except OSError:
                os.ftruncate(self._fd, size)
                raise
            self._end, self._seq = size + len(raw), event.seq
            return event
        finally:
            self._lock.release()

    def _last_complete(self, size: int) -> tuple[int, int]:
        """Cut off a half-written last line; return the size and the last sequence number."""
        start, block = size, b""
        while start > 0:
            begin = max(0, start - 65536)
            block = os.pread(self._fd, start - begin, begin) + block
            start = begin
            newline = block.rfind(b"\n")
            if newline < 0:
                continue
            # The first piece is the end of a line that starts further up, unless this is the top of the file.
            for raw in reversed(block[:newline].split(b"\n")[1 if start else 0 :]):
                event = parse_line(raw)
                if event is not None:  # else damaged by something else: numbering goes on from the last good line
                    return self._cut(size, start + newline + 1), event.seq
        return self._cut(size, block.rfind(b"\n") + 1), 0

    def _cut(self, size: int, end: int) -> int:
        if end < size:
            os.ftruncate(self._fd, end)
        return end

    def close(self) -> None:
        """Release the file."""
        if self._fd >= 0:
            self._lock.close()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


#: Fields whose absence is itself the message: the driver does not give the figure.
_KEEP_NONE = frozenset({"cause", "memory_used_gib", "memory_total_gib", "sm_percent", "power_w", "temperature_c",
                        "sm_clock_mhz"})  # fmt: skip


class EventReader:
    """Reads a growing event file in pieces, without a lock and without reading anything twice.

    Args:
        path: the file, which need not exist yet.
        after: skip events up to this sequence number.
        offset: the byte to begin at, which must be the start of a line.
    """

    def __init__(self, path: str | Path, after: int = 0, offset: int = 0) -> None:
        self.path = Path(path)
        self.after = after
        self.offset = offset
        """Where the next unread line begins."""
        self._inode = 0

    def read(self, limit: int | None = None, *, skip: Sequence[bytes] = ()) -> list[Event]:
        """All complete events that were not returned before, at most ``limit`` of them.

        Args:
            limit: the most events to return; lines that are skipped do not count.
            skip: lines that hold one of these near their start are passed over unread, which is ten times as fast.
        """
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                copied = self._inode not in (0, status.st_ino)
                if copied or status.st_size < self.offset:  # copied anew, or a cut-off tail
                    self.offset = 0
                self._inode = status.st_ino
                file.seek(self.offset)
                events: list[Event] = []
                while limit is None or len(events) < limit:
                    raw = file.readline()
                    if not raw.endswith(b"\n"):
                        break
                    self.offset += len(raw)
                    if skip and any(word in raw[:_HEAD_BYTES] for word in skip):
                        continue
                    event = parse_line(raw)
                    if event is not None and event.seq > self.after:
                        self.after = event.seq
                        events.append(event)
                return events
        except FileNotFoundError:
            return []


#: Seconds since the epoch from which on a time is none that a calendar shows.
_YEAR_10000 = 253402300800.0


def parse_line(raw: bytes | str) -> Event | None:
    """One line as an event, or None if it is damaged."""
    try:
        line = raw if isinstance(raw, str) else raw.decode("utf-8")
        tree = json.loads(line)
        head = int(tree.pop("seq")), float(tree.pop("time")), str(tree.pop("type"))
        if not 0 <= head[1] < _YEAR_10000:
            return None
        kind = _KINDS.get(head[2])
        if kind is not None and strange_field(kind, tree) is not None:
            return None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    # Hardly any line holds a figure that is not finite, and looking for one in the text is faster than in the tree.
    return Event(*head, data=_decoded(tree) if '"nan"' in line or 'inf"' in line else tree)


def line_of(event: Event) -> str:
    """An event as its line of ``events.jsonl``, valid JSON whatever its figures are."""
    head = {"seq": event.seq, "time": event.time, "type": event.type}
    return json.dumps(_encodable({**head, **event.data}), ensure_ascii=False)


def read_events(path: str | Path, after: int = 0) -> list[Event]:
    """All complete events of a file after a sequence number."""
    return EventReader(path, after).read()


def follow(path: str | Path, after: int = 0, poll_s: float = 0.25) -> Iterator[Event]:
    """Yield events as they are written, forever; the caller stops by leaving the loop."""
    reader = EventReader(path, after)
    while True:
        events = reader.read()
        yield from events
        if not events:
            time.sleep(poll_s)


#: Bytes at the start of a line that are sure to hold its type: ``seq`` and ``time`` stand before it.
_HEAD_BYTES = 80
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
#: Fields that hold text: "inf" in a log line is a word, not a number.
_TEXT_FIELDS = frozenset({"line", "what", "why", "where", "do", "message", "state", "cause", "name", "path", "phase",
                          "detail", "prompt", "answer", "expected", "throttle"})  # fmt: skip


def _encodable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    return value


def _decoded(value: Any, key: str = "") -> Any:
    if isinstance(value, str) and key not in _TEXT_FIELDS:
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: _decoded(v, k) for k, v in value.items()}
    return value
