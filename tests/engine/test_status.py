"""How a run stands."""

from __future__ import annotations

from finetui.engine.status import Status


def test_elapsed_time_counts_all_attempts() -> None:
    assert Status().elapsed_s() == 0.0
    assert Status(started=100.0, spent_s=50.0).elapsed_s(now=160.0) == 110.0
    assert Status(started=100.0, ended=130.0, spent_s=50.0).elapsed_s(now=160.0) == 80.0
    assert Status(started=100.0).elapsed_s(now=90.0) == 0.0, "a clock that was set back"
