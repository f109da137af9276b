"""What happens once a run has ended: by whom it was ended decides, and nobody else's run is shut down with it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from finetui.engine.events import read_events
from finetui.engine.preflight import at_end as check
from finetui.engine.run import Run
from finetui.engine.supervision import at_end
from finetui.engine.supervision.outcome import Outcome
from finetui.planner.errors import RecipeError
from finetui.planner.limits import AtEnd
from finetui.planner.recipe import Recipe

FINISHED = Outcome("finished")


def said(run: Run) -> list[str]:
    return [
        event.data.get("what", event.data.get("line"))
        for event in read_events(run.events_path)
        if event.type in {"warning", "log"}
    ]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose ``shutdown`` writes down what it is told; this user is root."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "shutdown").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/down\n')
    (tools / "shutdown").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(at_end, "cannot", lambda *_: "")
    monkeypatch.setattr(at_end.os, "geteuid", lambda: 0)
    return tmp_path / "down"


def test_a_command_gets_the_run_and_how_it_ended(make_run: Callable[..., Run]) -> None:
    run = make_run()
    wish = AtEnd(do="command", command='echo "$FINETUI_RUN $FINETUI_STATE $FINETUI_CAUSE" | tee told; pwd')
    at_end.act(run, wish, Outcome("failed", "nan"), None)
    assert (run.path / "told").read_text() == f"{run.path} failed nan\n"
    assert str(run.path) in (run.path / "log" / "at_end.log").read_text()
    assert said(run) == ["limits.at_end: the command is done"]


def test_a_command_that_fails_or_hangs_is_told(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    at_end.act(run, AtEnd(do="command", command="echo no >&2; exit 3"), FINISHED, None)
    monkeypatch.setattr(at_end, "COMMAND_S", 0.3)
    at_end.act(run, AtEnd(do="command", command=f"echo $$ > {run.path}/pid; sleep 60"), FINISHED, None)
    assert said(run) == ["the command ended with exit code 3", "the command took more than 0 s and was ended"]
    assert not psutil.pid_exists(int((run.path / "pid").read_text()))


@pytest.mark.parametrize(
    ("outcome", "reason", "acts"),
    [
        (FINISHED, None, True),
        (Outcome("failed", "crash"), None, True),
        (Outcome("failed", "cost"), "cost", True),
        (Outcome("stopped"), "hours", True),
        (Outcome("stopped"), None, False),
        (Outcome("stopped"), "quit", False),
        (Outcome("failed", "preempted"), "preempted", False),
    ],
)
def test_who_ended_the_run_decides(
    make_run: Callable[..., Run], machine: Path, outcome: Outcome, reason: at_end.EndReason | None, acts: bool
) -> None:
    run = make_run()
    at_end.act(run, AtEnd(do="shutdown"), outcome, reason)
    assert machine.exists() == acts
    if acts:
        assert machine.read_text().startswith("-h +1")
    at_end.act(run, AtEnd(), outcome, reason)


def test_no_shutdown_under_another_run(make_run: Callable[..., Run], machine: Path) -> None:
    import socket

    run, other = make_run(name="ended"), make_run(name="other")
    started = psutil.Process().create_time()
    other.update(state="running", pid=os.getpid(), pid_started=started, host=socket.gethostname(), started=time.time())
    at_end.act(run, AtEnd(do="shutdown"), FINISHED, None)
    assert not machine.exists()
    assert said(run) == ["the machine is not shut down: other is at work"]


def test_a_container_is_not_shut_down_and_preflight_says_so_before(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "container" in at_end.cannot(tmp_path / "no-systemd")
    monkeypatch.setattr(at_end, "cannot", lambda *_: "this is a container")
    monkeypatch.setattr("finetui.engine.preflight.cannot_shut_down", lambda: "this is a container")
    run = make_run({"limits": {"at_end": "shutdown"}})
    at_end.act(run, run.recipe.limits.at_end, FINISHED, None)
    assert said(run) == ["the machine is not shut down: this is a container"]
    (found,) = check(run.recipe)
    assert (found.status, "can't be shut down" in found.detail) == ("fail", True)
    (shown,) = check(Recipe.build({"model": "m", "limits": {"at_end": {"do": "command", "command": "true"}}}))
    assert (shown.status, shown.detail) == ("ok", "runs: true")
    assert check(Recipe.build({"model": "m"})) == []


def test_who_may_shut_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, code in (("shutdown", 0), ("sudo", 1)):
        (tools / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(at_end.os, "geteuid", lambda: 0)
    assert at_end.way_to_shut_down(tmp_path) == []
    monkeypatch.setattr(at_end.os, "geteuid", lambda: 1000)
    assert at_end.way_to_shut_down(tmp_path) is None
    assert "password" in at_end.cannot(tmp_path)
    (tools / "sudo").write_text("#!/bin/sh\nexit 0\n")
    assert at_end.way_to_shut_down(tmp_path) == ["sudo", "-n"]
    (tools / "sudo").unlink()
    assert at_end.cannot(tmp_path) == "only root may do that"


@pytest.mark.parametrize(
    ("wish", "wrong"),
    [({"do": "command"}, "needs a command"), ({"command": "true"}, "has no effect"), ("sleep", "shutdown")],
)
def test_a_wish_that_can_t_be_meant_is_refused(wish: object, wrong: str) -> None:
    with pytest.raises(RecipeError, match=wrong):
        Recipe.build({"model": "m", "limits": {"at_end": wish}})


def test_the_end_is_that_of_all_stages() -> None:
    from finetui.planner.stages import expand

    stages = [{"method": "sft"}, {"method": "dpo"}]
    recipe = Recipe.build({"model": "m", "limits": {"at_end": "shutdown", "hours": 3.0}, "stages": stages})
    parts = [step.recipe for step in expand(recipe) if step.recipe]
    assert [part.limits.at_end.do for part in parts] == ["nothing", "nothing"]
    assert [part.limits.hours for part in parts] == [3.0, 3.0]


def test_a_folder_that_can_t_be_written_prevents_nothing(
    make_run: Callable[..., Run], machine: Path, tmp_path: Path
) -> None:
    import shutil

    run = make_run()
    shutil.rmtree(run.path)
    run.path.parent.mkdir(exist_ok=True)
    run.path.touch()  # nothing can be made in it
    at_end.act(run, AtEnd(do="shutdown"), Outcome("failed", "disk"), None)
    assert machine.exists()
