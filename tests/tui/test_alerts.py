"""Alerts: each once, none for what was so before, and nothing in them that a terminal would obey."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.events import Event
from finetui.engine.status import Status
from finetui.planner.preferences import Preferences
from finetui.tui.alerts import Alert, Watchman, divergence, run_command, sound, terminal_sequence
from finetui.tui.history import History

RUNNING = Status("running")


def trained(losses: list[float]) -> History:
    history = History(steps=100)
    for step, loss in enumerate(losses, 1):
        history.apply(Event(step, float(step), "step", {"step": step, "loss": loss, "grad_norm": 1.0}))
    return history


def gpu(index: int, **figures: Any) -> Event:
    blank = dict.fromkeys(("memory_used_gib", "sm_percent", "power_w"))
    return Event(1, 1.0, "gpu", {"index": index, **blank, **figures})


@pytest.mark.parametrize("state", ["finished", "stopped", "failed", "lost"])
def test_the_end_of_a_run_is_told_once(state: Any) -> None:
    watchman, history = Watchman("my-run"), History()
    assert watchman.news(history, RUNNING) == []
    ended = Status(state, cause="oom" if state == "failed" else None, message="why it ended")
    (alert,) = watchman.news(history, ended)
    assert alert.kind == state
    assert alert.text == f"my-run {state}{' (oom)' if state == 'failed' else ''}: why it ended"
    assert watchman.news(history, ended) == []


def test_what_was_so_before_is_no_news() -> None:
    bad = trained([1.0] * 60 + [math.nan])
    bad.apply(gpu(0))
    assert Watchman("r").news(bad, Status("failed")) == []
    watchman = Watchman("r")
    assert watchman.news(bad, RUNNING) == []
    assert watchman.news(bad, RUNNING) == []


def test_divergence_is_told_once_an_attempt() -> None:
    watchman, history = Watchman("r"), trained([2.0 - step / 100 for step in range(80)])
    assert watchman.news(history, RUNNING) == []
    for step in range(81, 100):
        history.apply(Event(step, float(step), "step", {"step": step, "loss": 9.0, "grad_norm": 1.0}))
    (alert,) = watchman.news(history, RUNNING)
    assert alert.kind == "diverged"
    assert "risen to" in alert.text
    assert watchman.news(history, RUNNING) == []


@pytest.mark.parametrize(
    ("losses", "diverges"),
    [
        ([1.0] * 10 + [math.nan], True),
        ([1.0] * 60 + [math.inf], True),
        ([5.0, 4.0, 9.0], False),  # too early to say
        ([2.0 - step / 100 for step in range(100)], False),
        ([0.0, -0.1] * 40 + [0.5] * 10, False),  # a reward's loss may be anything
        ([1.0] * 80 + [1.6] * 20, False),
    ],
)
def test_what_counts_as_divergence(losses: list[float], diverges: bool) -> None:
    assert bool(divergence(trained(losses))) is diverges


def test_a_gpu_that_is_gone_is_told_and_told_again_when_it_goes_again() -> None:
    watchman, history = Watchman("r"), History()
    history.apply(gpu(3, power_w=300.0))
    assert watchman.news(history, RUNNING) == []
    history.apply(gpu(3))
    assert [alert.text for alert in watchman.news(history, RUNNING)] == ["r: GPU 3 gives no reading"]
    assert watchman.news(history, RUNNING) == []
    history.apply(gpu(3, power_w=300.0))
    assert watchman.news(history, RUNNING) == []
    history.apply(gpu(3))
    assert len(watchman.news(history, RUNNING)) == 1


def test_a_terminal_is_told_and_not_commanded() -> None:
    text = "run \x1b]0;owned\x07 failed;\n now \u202e"
    plain = terminal_sequence(text, {"TERM": "xterm"})
    assert plain.startswith("\a\x1b]9;run ")
    assert plain.endswith("\x07")
    assert plain[4:-1].isprintable()
    assert plain.count(";") == 1
    wrapped = terminal_sequence("done", {"TMUX": "/tmp/tmux-0/default,1,0", "TERM": "screen"})
    assert wrapped == "\a\x1bPtmux;\x1b\x1b]9;done\x07\x1b\\"
    assert terminal_sequence("done", {"TERM": "screen", "STY": "1.pts"}) == "\a\x1bP\x1b]9;done\x07\x1b\\"


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_users_command_is_run_with_what_happened(tmp_path: Path) -> None:
    target = tmp_path / "told"
    command = (
        f'printf "%s|%s|%s" "$FINETUI_ALERT" "$FINETUI_TEXT" "$FINETUI_RUN" > {target}.part; mv {target}.part {target}'
    )
    wanted = Preferences(bell=False, alert_command=command)
    assert sound(Alert("failed", "my-run failed; $(reboot)"), "my-run", wanted) == ""
    wait_for(target.exists)
    assert target.read_text() == "failed|my-run failed; $(reboot)|my-run"
    assert sound(Alert("failed", "x"), "r", dataclasses.replace(wanted, bell=True, alert_command="")).startswith("\a")


def test_a_command_that_fails_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    run_command("exit 3", Alert("finished", "x"), "r")
    told = ""

    def said() -> bool:
        nonlocal told
        told += capfd.readouterr().err
        return "exit status 3" in told

    wait_for(said)
    assert os.environ.get("FINETUI_ALERT") is None
