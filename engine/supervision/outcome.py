"""Why a run ended: from what the ranks said, how they exited and what was asked of them, to a state and its cause."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..events import Failure
from ..status import Cause, RunState

#: Why a run was asked to end early.
EndReason = Literal["request", "quit", "preempted", "hours", "cost", "hang"]

_CAUSES: frozenset[str] = frozenset(get_args(Cause))


@dataclass(frozen=True)
class Outcome:
    """The last state of an attempt, as run.json records it."""

    state: RunState
    cause: Cause | None = None
    message: str = ""
    do: str = ""


@dataclass(frozen=True)
class Facts:
    """What the supervisor knows when all ranks have ended.

    Args:
        name: the run's name, for the commands in advice.
        exit_codes: of the ranks that failed; a negative code is a signal. Empty when all exited with 0.
        failures: what ranks said about their end, in order.
        stopping: rank 0 said that it stops on request.
        reason: why the supervisor asked for an early end, if it did.
        forced: ranks were killed because they did not end in time.
        oom_kills: processes that the kernel killed for want of memory meanwhile.
        disk_free: bytes free on the disk of the run.
        last_line: what the rank that failed first said last in its log, if it said anything.
        hung: which ranks hung, if the supervisor killed them for that.
    """

    name: str
    exit_codes: Mapping[int, int]
    failures: Sequence[Failure] = ()
    stopping: bool = False
    reason: EndReason | None = None
    forced: bool = False
    oom_kills: int = 0
    disk_free: int = 1 << 40
    last_line: str = ""
    hung: str = ""


def decide(facts: Facts) -> Outcome:
    """The state that a run ends in."""
    codes = facts.exit_codes.values()
    # A machine that goes down sends SIGTERM to ranks too, and follows it with SIGKILL.
    taken = facts.reason == "preempted" and all(-code in {signal.SIGTERM, signal.SIGKILL} for code in codes)
    if codes and not facts.forced and not taken:
        return _failed(facts)
    if not codes and not facts.stopping:
        return Outcome("finished")
    resume = f"Continue with: finetui resume {facts.name}"
    last = f"Continue from the last checkpoint with: finetui resume {facts.name}"
    match facts.reason:
        case "quit":
            return Outcome("stopped", None, "ended at once on request, without a checkpoint", last)
        case "preempted" if facts.forced or codes:
            what = "the machine asked for an end, and no checkpoint was written in time"
            return Outcome("failed", "preempted", what, last)
        case "preempted":
            return Outcome("failed", "preempted", "the machine asked for an end; a checkpoint was written", resume)
        case "hang":
            log = f"The stacks of all ranks are in its log/rank*.log. Look with: finetui logs {facts.name}"
            return Outcome("failed", "hang", facts.hung, f"{log}. {last}")
        case "cost":
            return Outcome("failed", "cost", "the cost limit is reached", f"Raise limits.cost_usd. {last}")
        case "hours":
            return Outcome("stopped", None, "the time limit is reached", f"Raise limits.hours. {last}")
        case _:
            return Outcome("stopped", None, "stopped on request", resume)


def _failed(facts: Facts) -> Outcome:
    told = _root_cause(facts)
    if told is not None:
        where = f"{told.where}: " if told.where else ""
        cause: Cause = told.cause if told.cause in _CAUSES else "crash"  # type: ignore[assignment]
        return Outcome("failed", cause, f"{where}{told.message}", told.do)
    rank, code = first_exit(facts.exit_codes)
    log = f"finetui logs {facts.name}" if facts.last_line else "log/supervisor.log in the run's folder"
    if facts.disk_free < 1 << 20:
        do = f"Free some space, then continue with: finetui resume {facts.name}"
        return Outcome("failed", "disk", "the disk is full", do)
    if code >= 0:
        said = f": {facts.last_line}" if facts.last_line else ""
        message = f"rank {rank} ended with exit code {code}{said}"
        return Outcome("failed", "crash", message, f"Its last words are in: {log}")
    return _killed(facts, rank, -code, log)


def _killed(facts: Facts, rank: int, number: int, log: str) -> Outcome:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGKILL" and facts.oom_kills:
        do = "Use a machine or a container with more memory, or a smaller model, batch or dataset."
        return Outcome("failed", "oom", f"the kernel killed rank {rank}: the machine's memory ran out", do)
    if name == "SIGKILL":
        message = f"rank {rank} was killed (SIGKILL) from outside; the kernel reports no want of memory"
        return Outcome("failed", "crash", message, f"Continue with: finetui resume {facts.name}")
    if name == "SIGBUS":
        message = f"rank {rank} got SIGBUS, as happens when /dev/shm or the disk is full"
        return Outcome("failed", "crash", message, "Give the container more shared memory (docker run --shm-size).")
    said = f"; last line: {facts.last_line}" if facts.last_line else ""
    return Outcome("failed", "crash", f"rank {rank} got {name}{said}", f"Its last words are in: {log}")


def _root_cause(facts: Facts) -> Failure | None:
    """The failure that came first, but a named one before a crash: what one rank loses, its peers report as a crash.

    Ranks that were asked to end because a peer had failed call that preempted, which it was not.
    """
    told = [failure for failure in facts.failures if failure.cause != "preempted" or facts.reason == "preempted"]
    named = [failure for failure in told if failure.cause != "crash"]
    return next(iter(named or told), None)


def first_exit(codes: Mapping[int, int]) -> tuple[int, int]:
    """The rank that failed by itself: the others were sent SIGTERM for it."""
    own = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM}
    return min((own or codes).items())
