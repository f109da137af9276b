"""From what ranks said and how they exited to the state of a run."""

from __future__ import annotations

from signal import SIGABRT, SIGBUS, SIGKILL, SIGSEGV, SIGTERM
from typing import Any

import pytest

from finetui.engine.events import Failure
from finetui.engine.supervision.outcome import Facts, decide


def outcome(exit_codes: dict[int, int], **facts: Any) -> tuple[str, str | None, str]:
    found = decide(Facts("run", exit_codes, **facts))
    return found.state, found.cause, found.message


@pytest.mark.parametrize(
    ("facts", "state", "cause"),
    [
        ({}, "finished", None),
        ({"reason": "preempted"}, "finished", None),  # it was done before the request was seen
        ({"stopping": True}, "stopped", None),
        ({"stopping": True, "reason": "hours"}, "stopped", None),
        ({"stopping": True, "reason": "cost"}, "failed", "cost"),
        ({"stopping": True, "reason": "preempted"}, "failed", "preempted"),
        ({"stopping": True, "reason": "quit", "forced": True}, "stopped", None),
    ],
)
def test_ranks_that_all_exit_well(facts: dict[str, Any], state: str, cause: str | None) -> None:
    assert outcome({}, **facts)[:2] == (state, cause)


@pytest.mark.parametrize(
    ("codes", "facts", "cause", "words"),
    [
        ({0: 1}, {"disk_free": 1000}, "disk", "the disk is full"),
        ({0: -SIGKILL}, {"oom_kills": 1}, "oom", "memory ran out"),
        ({0: -SIGKILL}, {}, "crash", "from outside"),
        ({0: -SIGBUS}, {}, "crash", "/dev/shm"),
        ({1: -SIGSEGV}, {"last_line": "here"}, "crash", "rank 1 got SIGSEGV; last line: here"),
        ({0: -SIGTERM, 1: -SIGABRT}, {}, "crash", "rank 1 got SIGABRT"),
        ({0: -SIGTERM}, {}, "crash", "rank 0 got SIGTERM"),
        ({0: -99}, {}, "crash", "signal 99"),
    ],
)
def test_ranks_that_end_without_a_word(codes: dict[int, int], facts: dict[str, Any], cause: str, words: str) -> None:
    state, found, message = outcome(codes, **facts)
    assert (state, found) == ("failed", cause)
    assert words in message


def test_a_named_cause_goes_before_the_crash_of_a_peer() -> None:
    failures = [Failure(0, "crash", "connection closed"), Failure(1, "nan", "loss is nan", where="step 7")]
    assert outcome({0: 1, 1: 1}, failures=failures) == ("failed", "nan", "step 7: loss is nan")


def test_being_ended_for_a_peer_is_no_preemption() -> None:
    failures = [Failure(0, "preempted", "got SIGTERM"), Failure(1, "data", "row 3 is empty")]
    assert outcome({0: 1, 1: 1}, failures=failures)[1] == "data"
    assert outcome({0: 1}, failures=failures[:1])[1] == "crash"
    assert outcome({0: 1}, failures=failures[:1], reason="preempted")[1] == "preempted"


def test_a_machine_that_ends_the_ranks_too_is_still_a_preemption() -> None:
    state, cause, message = outcome({0: -SIGTERM, 1: -SIGKILL}, reason="preempted")
    assert (state, cause) == ("failed", "preempted")
    assert "no checkpoint was written in time" in message
    assert outcome({0: -SIGSEGV}, reason="preempted")[1] == "crash"


def test_a_cause_nobody_knows_is_a_crash() -> None:
    assert outcome({0: 1}, failures=[Failure(0, "gremlins", "x")])[1] == "crash"
