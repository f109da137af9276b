"""Real runs that hang, run out of memory, diverge, are stopped or preempted: what the supervisor makes of each."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.checkpoints import store
from finetui.engine.run import Run

from .harness import Forge, Result, gone, ranks_of, require_orderly, result_of, told, wait_until

MakeRun = Callable[..., Run]


def carry_out(forge: Forge, run: Run, fault: str) -> None:
    """Supervise a run whose ranks have a fault, to its end."""
    (run.path / "fault").write_text(fault)
    supervisor = forge.start(run)
    wait_until(lambda: gone(supervisor))


def warnings(run: Run) -> list[str]:
    return [event.data["what"] for event in told(run, "warning")]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_hang_is_found_and_costs_no_step(
    forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result], ranks: int
) -> None:
    run = a_run(12, ranks, limits={"hang_s": 5.0})
    carry_out(forge, run, "hang")
    assert result_of(run) == undisturbed(12, ranks)
    assert run.recorded.attempt == 2
    assert f"rank {ranks - 1} has not moved" in warnings(run)[0]
    assert "training goes on from step 4" in warnings(run)[0]
    assert "wait_for_ever" in run.log_path(ranks - 1).read_text()
    require_orderly(run)


def test_a_rank_that_is_stopped_goes_on(forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result]) -> None:
    run = a_run(12, limits={"hang_s": 6.0})
    carry_out(forge, run, "stopped")
    assert result_of(run) == undisturbed(12)
    assert run.recorded.attempt == 1
    assert "stopped by a signal (SIGSTOP)" in warnings(run)[0]


@pytest.mark.slow
def test_a_device_that_fails_once_costs_no_step(
    forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result]
) -> None:
    run = a_run(12)
    carry_out(forge, run, "device-lost")
    assert result_of(run) == undisturbed(12)
    assert "uncorrectable ECC" in warnings(run)[0]


def test_out_of_memory_halves_the_micro_batch_and_trains_the_same_rows(
    forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result]
) -> None:
    run = a_run(12, tuning={"type": "lora", "rank": 4})
    before = run.plan
    carry_out(forge, run, "oom")
    assert run.recorded.state == "finished"
    after = run.plan.resolved
    assert (before.resolved.micro_batch, after.micro_batch) == (4, 2)
    assert after.batch_size == before.resolved.batch_size
    assert run.plan.memory.device_gib < before.memory.device_gib
    assert told(run, "fallback")[-1].data["what"] == "micro batch 2 instead of 4"
    plain = a_run(12, tuning={"type": "lora", "rank": 4})
    supervisor = forge.start(plain)
    wait_until(lambda: gone(supervisor))
    steps = {event.data["step"]: event.data["loss"] for event in told(run, "step")}
    expected = {event.data["step"]: event.data["loss"] for event in told(plain, "step")}
    assert steps == pytest.approx(expected, rel=1e-4)
    require_orderly(run)


def test_nan_stops_before_the_weights_are_hit_and_names_the_rows(forge: Forge, a_run: MakeRun) -> None:
    run = a_run(14)
    carry_out(forge, run, "nan")
    status = run.recorded
    assert (status.state, status.cause) == ("failed", "nan")
    assert [c.step for c in store.find(run.path / "checkpoints")] == [6, 8]
    found = [event.data for event in told(run, "warning") if "is not finite" in event.data["what"]]
    assert [one["what"].split(" is ")[0] for one in found] == [f"the loss of step {step}" for step in (9, 10, 11)]
    assert "colour" in found[0]["where"]
    require_orderly(run)


def test_one_bad_batch_costs_one_update_and_is_named(forge: Forge, a_run: MakeRun) -> None:
    run = a_run(12)
    carry_out(forge, run, "nan-once")
    assert run.recorded.state == "finished"
    (bad,) = [event.data for event in told(run, "warning") if "is not finite" in event.data["what"]]
    assert "step 9" in bad["what"]
    assert bad["where"].count("what is") >= 1
    assert bad["where"].count(";") == 3  # the four rows of the micro-batch, not the eight of the step
    losses = [event.data["loss"] for event in told(run, "step")]
    assert [math.isnan(loss) for loss in losses].count(True) == 1


@pytest.mark.slow
def test_an_explosion_stops_the_run_with_the_weights_of_before(forge: Forge, a_run: MakeRun) -> None:
    run = a_run(14)
    carry_out(forge, run, "explosion")
    status = run.recorded
    assert (status.state, status.cause) == ("failed", "nan")
    assert "exploded for 3 steps in a row, up to step 12" in status.message
    assert sum("rose from" in what for what in warnings(run)) == 3


def test_sigterm_with_ten_seconds_of_grace_loses_no_step(
    forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result]
) -> None:
    """As ``docker stop`` does it: SIGTERM to all, and SIGKILL ten seconds later."""
    run = a_run(12, limits={"grace_s": 10.0}, checkpoint={"every": 100})
    (run.path / "fault").write_text("slow")
    supervisor = forge.start(run)
    wait_until(lambda: len(told(run, "step")) >= 5)
    everyone = [supervisor, *ranks_of(supervisor)]
    began = time.monotonic()
    for process in everyone:
        os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: gone(supervisor))
    assert time.monotonic() - began < 10.0
    assert (run.recorded.state, run.recorded.cause) == ("failed", "preempted")
    done = max(event.data["step"] for event in told(run, "step"))
    assert store.find(run.path / "checkpoints")[-1].step == done
    supervisor = forge.start(run)
    wait_until(lambda: gone(supervisor))
    assert result_of(run).steps == undisturbed(12).steps
    assert len(told(run, "step")) == 12  # none was done twice


@pytest.mark.slow
def test_a_notice_in_the_control_folder_saves_in_time(forge: Forge, a_run: MakeRun) -> None:
    run = a_run(60, checkpoint={"every": 100})
    (run.path / "fault").write_text("slow")
    supervisor = forge.start(run)
    wait_until(lambda: len(told(run, "step")) >= 2)
    (run.path / "control" / "preempted").write_text("25")
    wait_until(lambda: gone(supervisor))
    assert (run.recorded.state, run.recorded.cause) == ("failed", "preempted")
    assert "take this machine away in 25 s" in warnings(run)[0]
    assert "a checkpoint was written" in run.recorded.message


@pytest.mark.slow
def test_a_rank_killed_while_it_prepares_data_begins_again(
    forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result]
) -> None:
    run = a_run(12)
    supervisor = forge.start(run)
    wait_until(lambda: any(event.data["phase"] == "preparing the data" for event in told(run, "phase")), poll_s=0.001)
    for rank in ranks_of(supervisor):
        os.kill(rank.pid, signal.SIGKILL)
    wait_until(lambda: gone(supervisor))
    assert result_of(run) == undisturbed(12)
    assert run.recorded.attempt == 2


@pytest.mark.slow
def test_a_copied_run_is_a_run_of_its_own(forge: Forge, a_run: MakeRun, tmp_path: Path) -> None:
    import shutil

    run = a_run(12)
    (run.path / "fault").write_text("slow")
    supervisor = forge.start(run)
    wait_until(lambda: len(store.find(run.path / "checkpoints")) > 1)
    copy = Run(shutil.copytree(run.path, tmp_path / "elsewhere" / "copied"))
    assert run.live
    assert copy.status.state == "lost"  # nobody is at work on the copy
    wait_until(lambda: gone(supervisor))
    (copy.path / "fault").unlink()
    resumed = forge.start(copy)
    wait_until(lambda: gone(resumed))
    assert result_of(copy) == result_of(run)
