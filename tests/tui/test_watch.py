"""Watching from the command line: every line of a short run, the newest of a long one, and being called back."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from finetui.engine.events import EventLog, Step
from finetui.engine.run import Run
from finetui.tests.bench.long_run import lines
from finetui.tui import watch as watching
from finetui.tui.watch import watch


def ends_when_nothing_is_new(monkeypatch: pytest.MonkeyPatch, run: Run, **changes: str) -> None:
    """The run ends when its watcher has seen all there is and goes to sleep."""
    clock = SimpleNamespace(strftime=time.strftime, localtime=time.localtime, sleep=lambda _: run.update(**changes))
    monkeypatch.setattr(watching, "time", clock)


def test_whoever_watches_is_called_back_once(fleet: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(watching, "sound", lambda alert, run, wanted: told.append(alert.text) or "")
    ends_when_nothing_is_new(monkeypatch, fleet[0], state="failed", cause="oom", message="CUDA out of memory")
    assert watch(fleet[0], plain=True) == 1
    assert told == [f"{fleet[0].name} failed (oom): CUDA out of memory"]
    assert watch(fleet[0], plain=True) == 1  # it has failed before: no news
    assert len(told) == 1


def test_every_line_goes_to_a_pipe(make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("long", [], state="finished")
    made, about = lines(14_000, 1, 1000.0)
    run.events_path.write_text("\n".join(made) + "\n", encoding="utf-8")
    assert watch(run, plain=True) == 0
    out = capsys.readouterr().out.splitlines()
    assert sum(" step " in line for line in out) >= about.steps


def test_a_terminal_gets_the_newest_of_a_long_run(
    make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("long", [], state="running")
    made, about = lines(14_000, 1, 1000.0)
    run.events_path.write_text("\n".join(made) + "\n", encoding="utf-8")
    with EventLog(run.events_path) as log:
        log.append(Step(about.steps + 1, 1.0, 0.125, 1e-4, 0.5, 1, 1.0, 1.0))
    ends_when_nothing_is_new(monkeypatch, run, state="finished")
    watching._watch_lines(run, whole=False)
    told = capsys.readouterr()
    out = told.out.splitlines()
    assert len(out) <= 210
    assert any("loss 0.1250" in line for line in out)
    assert out[-1].endswith("finished")
    assert "finetui logs long --events" in told.err


def test_what_can_be_done_with_a_run_that_has_ended(
    make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    done, stopped = make_run("done", [], state="finished"), make_run("halted", [], state="stopped")
    done.output_path.mkdir()
    assert watch(done, plain=True) == 0
    said = capsys.readouterr().err
    assert f"The result lies in {done.output_path}" in said
    assert "finetui chat done" in said
    assert watch(done, plain=True, after=False) == 0
    assert "finetui chat" not in capsys.readouterr().err
    assert watch(stopped, plain=True) == 0
    assert "Continue it with: finetui resume halted" in capsys.readouterr().err


def test_a_run_whose_plan_cannot_be_read_is_watched_all_the_same(
    fleet: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = fleet[1]
    (ended.path / "plan.json").write_text("[]", encoding="utf-8")
    assert watch(ended, plain=True) == 0
    out, err = capsys.readouterr()
    assert "step 412" in out
    assert err.count("plan.json: the plan can't be read") == 1
    assert f"{ended.name} finished" in err
