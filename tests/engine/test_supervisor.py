"""The supervisor with ranks that have no model: how attempts end, and what is recorded of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.supervision.outcome import Outcome
from finetui.engine.supervisor import main, supervise
from finetui.planner.errors import RunError
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe

FAKE = Path(__file__).with_name("fake_rank.py")


def carry_out(run: Run, mode: str, **options: float) -> Outcome:
    return supervise(run, worker=(str(FAKE), mode), **options)


def when(run: Run, state: str, action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a run is in a state."""

    def watch() -> None:
        while (recorded := run.recorded).state != state or not recorded.pid:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def states(run: Run) -> list[str]:
    return [event.data["state"] for event in read_events(run.events_path) if event.type == "state"]


def test_a_run_finishes(make_run: Callable[..., Run]) -> None:
    run = make_run(gpus=[0, 1])
    assert carry_out(run, "finish") == Outcome("finished")
    assert states(run) == ["preparing", "running", "finished"]
    status = run.recorded
    assert (status.attempt, status.cause) == (1, None)
    assert status.ended >= status.started > 0
    events = read_events(run.events_path)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert {"phase", "host", "step"} <= {event.type for event in events}
    environments = [(run.path / f"environment{rank}").read_text().splitlines() for rank in (0, 1)]
    assert all("CUDA_VISIBLE_DEVICES=" in lines and "WORLD_SIZE=2" in lines for lines in environments)
    assert not (run.path / "control" / "reserve").exists()
    with pytest.raises(RunError, match="finished already"):
        carry_out(run, "finish")


def test_cuda_ranks_see_the_gpus_of_the_plan(make_run: Callable[..., Run]) -> None:
    run = make_run(gpus=[3], device="cuda")
    assert carry_out(run, "finish").state == "finished"
    environment = (run.path / "environment0").read_text().splitlines()
    assert "CUDA_VISIBLE_DEVICES=3" in environment
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in environment
    samples = [event.data for event in read_events(run.events_path) if event.type == "gpu"]
    assert samples
    assert {sample["index"] for sample in samples} == {3}


def test_what_a_rank_says_decides_and_the_root_cause_goes_before_its_echo(make_run: Callable[..., Run]) -> None:
    run = make_run()
    outcome = carry_out(run, "say-oom")
    assert (outcome.state, outcome.cause) == ("failed", "oom")
    assert run.status.message == "out of memory in step 1"
    assert run.status.do == "Use a smaller micro_batch."


def test_a_failure_of_an_earlier_attempt_is_not_blamed_again(make_run: Callable[..., Run]) -> None:
    run = make_run()
    carry_out(run, "say-oom")
    assert carry_out(run, "silent-crash").cause == "crash"
    assert run.recorded.attempt == 2
    assert run.recorded.spent_s > 0
    assert carry_out(run, "finish") == Outcome("finished")
    assert run.recorded.message == ""


def test_a_crash_without_a_word_is_told_by_exit_code_and_last_line(make_run: Callable[..., Run]) -> None:
    outcome = carry_out(make_run(), "silent-crash")
    assert (outcome.state, outcome.cause) == ("failed", "crash")
    assert "exit code 3: RuntimeError: the last words" in outcome.message


def test_a_worker_that_does_not_exist_is_a_crash(make_run: Callable[..., Run]) -> None:
    outcome = supervise(make_run(), worker=("-m", "finetui.engine.no_such_worker"))
    assert (outcome.state, outcome.cause) == ("failed", "crash")
    assert "supervisor.log" in outcome.do


def test_a_killed_rank_is_told_from_one_out_of_memory(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = carry_out(make_run({"limits": {"restarts": 0}}), "killed")
    assert (outcome.cause, "SIGKILL" in outcome.message) == ("crash", True)
    counts = iter([4, 5])
    monkeypatch.setattr("finetui.engine.supervisor.oom_kills", lambda: next(counts))
    assert carry_out(make_run(), "killed").cause == "oom"


def test_when_one_of_two_ranks_dies_both_end(make_run: Callable[..., Run]) -> None:
    run = make_run(gpus=[0, 1])
    outcome = carry_out(run, "second-dies")
    assert (outcome.state, outcome.cause) == ("failed", "crash")
    assert "rank 1 ended with exit code 7" in outcome.message
    assert not psutil.pid_exists(int((run.path / "pid0").read_text()))


def test_a_stop_request_ends_as_stopped(make_run: Callable[..., Run]) -> None:
    run = make_run()
    when(run, "running", lambda: run.request("stop"))
    assert carry_out(run, "endless").state == "stopped"
    assert states(run) == ["preparing", "running", "stopping", "stopped"]
    assert not run.requested("stop")


def test_a_stop_request_before_the_ranks_start_is_heard(make_run: Callable[..., Run]) -> None:
    run = make_run()
    run.request("stop")
    assert carry_out(run, "endless").state == "stopped"
    assert not (run.path / "pid0").exists()


def test_sigterm_is_a_preemption_with_a_checkpoint(make_run: Callable[..., Run]) -> None:
    run = make_run()
    when(run, "running", lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = carry_out(run, "endless")
    assert (outcome.state, outcome.cause) == ("failed", "preempted")
    assert "a checkpoint was written" in outcome.message


def test_a_preemption_kills_ranks_that_do_not_end_in_time(make_run: Callable[..., Run]) -> None:
    run = make_run()
    when(run, "running", lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = carry_out(run, "deaf", preemption_s=0.3)
    assert (outcome.state, outcome.cause) == ("failed", "preempted")
    assert "no checkpoint was written in time" in outcome.message
    assert not psutil.pid_exists(int((run.path / "pid0").read_text()))


def test_sighup_and_sigint_are_ignored(make_run: Callable[..., Run]) -> None:
    run = make_run()

    def disturb() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGINT)

    when(run, "running", disturb)
    assert carry_out(run, "finish").state == "finished"


def test_signal_handlers_are_given_back(make_run: Callable[..., Run]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)]
    carry_out(make_run(), "silent-crash")
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)]
    assert after == before


@pytest.mark.parametrize(
    ("limits", "state", "cause"),
    [({"hours": 1e-6}, "stopped", None), ({"cost_usd": 1e-6}, "failed", "cost")],
)
def test_limits_end_a_run_with_a_checkpoint(
    make_run: Callable[..., Run], limits: dict[str, float], state: str, cause: str | None
) -> None:
    run = make_run({"limits": limits}, usd_per_h=3600.0)
    outcome = carry_out(run, "endless")
    assert (outcome.state, outcome.cause) == (state, cause)
    assert "limit is reached" in outcome.message
    assert states(run)[-2] == "stopping"


def test_a_cost_limit_without_a_price_is_said_to_have_no_effect(make_run: Callable[..., Run]) -> None:
    run = make_run({"limits": {"cost_usd": 1e-6}})
    assert carry_out(run, "finish").state == "finished"
    warnings = [event.data["what"] for event in read_events(run.events_path) if event.type == "warning"]
    assert any("the plan has no price" in what for what in warnings)


def test_a_run_that_fills_the_disk_ends_as_such(small_disk: Path, make_plan: Callable[..., Plan]) -> None:
    run = Run.create(Recipe.build({"model": "tiny"}), make_plan(), root=small_disk)
    outcome = carry_out(run, "fill-disk")
    assert (outcome.state, outcome.cause) == ("failed", "disk")
    assert (run.status.state, run.status.cause) == ("failed", "disk")
    assert states(run)[-1] == "failed"


def test_only_one_supervisor_at_a_time(make_run: Callable[..., Run]) -> None:
    run = make_run()
    lock = run.claim()
    with pytest.raises(RunError, match="another process"):
        carry_out(run, "finish")
    os.close(lock)
    assert run.recorded.attempt == 0


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_sigquit_ends_ranks_at_once_however_early_it_comes(make_run: Callable[..., Run]) -> None:
    for state in ("preparing", "running"):
        run = make_run(gpus=[0, 1])
        when(run, state, lambda: os.kill(os.getpid(), signal.SIGQUIT))
        outcome = carry_out(run, "endless")
        assert (outcome.state, outcome.message) == ("stopped", "ended at once on request, without a checkpoint")
        for pid in run.path.glob("pid?"):
            assert not psutil.pid_exists(int(pid.read_text()))
