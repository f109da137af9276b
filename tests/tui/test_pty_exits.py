"""Ways out of the app, and of the terminal under it: each leaves the terminal as it was found, and nothing spins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.run import Run
from finetui.tests.bench.live import live_run
from finetui.tests.bench.screen import ALTERNATE
from finetui.tests.bench.terminal import Terminal, environment
from finetui.tui.keys import key_of

Open = Callable[..., Terminal]

#: The app with a mistake in it that shows when a key is pressed.
CRASHES = """
from finetui.tui.app import FinetuiApp, run_app
def action_keys(self): raise ZeroDivisionError("a mistake of ours")
FinetuiApp.action_keys = action_keys
run_app()
"""


@pytest.fixture
def live(tmp_path: Path) -> Run:
    """A run that is at work in this very process."""
    return live_run(tmp_path / "runs", gpus=2)


@pytest.mark.parametrize("leave", ["q", "\x11", signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT], ids=repr)
def test_the_terminal_is_as_it_was(terminal: Open, live: Run, leave: str | signal.Signals) -> None:
    app = terminal(live)
    app.wait_for("loss 1.")
    assert set(app.left_over()) >= {"stty", "cursor hidden", ALTERNATE, "?1000"}, "it was never taken"
    if isinstance(leave, str):
        app.send(leave)
        assert app.wait() == 0
        assert "eight goes on" in app.screen.text()
    else:
        os.kill(app.pid, leave)
        assert app.wait() == 128 + leave
    assert app.left_over() == []
    assert live.live


def test_a_mistake_of_ours_leaves_a_clean_terminal_and_says_so(terminal: Open) -> None:
    app = terminal(words=["-c", CRASHES])
    app.wait_for("fits")
    app.send("?")
    assert app.wait() == 1
    assert app.left_over() == []
    assert "a mistake of ours" in app.screen.text()
    assert "\\u001b" not in app.screen.text()


@pytest.mark.parametrize("hup", [True, False], ids=["signal", "nohup"])
def test_the_viewer_goes_when_its_terminal_does(terminal: Open, live: Run, hup: bool) -> None:
    app = terminal(live, hup=hup)
    app.wait_for("loss 1.")
    before = app.cpu_seconds()
    app.hang_up()
    assert app.wait(10.0) != 0
    assert app.cpu_in_all - before < 0.7, "it spins before it goes"
    assert live.live


def test_suspended_the_terminal_is_the_shell_s_and_then_the_app_s_again(terminal: Open) -> None:
    app = terminal()
    app.wait_for("fits", "GPU")
    app.settle()
    before = app.screen.text()
    for _ in range(2):
        os.kill(app.pid, signal.SIGTSTP)
        assert app.suspended()
        app.read(0.2)
        assert app.left_over() == []
        app.foreground()
        app.read(8.0, lambda: app.screen.text() == before)
        assert app.screen.text() == before
    _still_works(app)


def test_stopped_without_warning_it_goes_on_as_if_nothing_had_been(terminal: Open) -> None:
    app = terminal()
    app.wait_for("fits", "GPU")
    app.settle()
    before = app.screen.text()
    os.kill(app.pid, signal.SIGSTOP)
    assert app.suspended()
    seen = len(app.written)
    app.foreground()
    # Until the app has the terminal again, what is typed is the shell's.
    app.read(8.0, lambda: f"{ALTERNATE}h".encode() in app.written[seen:] and app.screen.text() == before)
    assert app.screen.text() == before
    _still_works(app)


def _still_works(app: Terminal) -> None:
    app.send(key_of("runs"))
    app.wait_for("held-out")
    app.send("q")
    assert app.wait() == 0
    assert app.left_over() == []


@pytest.mark.parametrize(("environ", "said"), [({"TERM": "dumb"}, "TERM"), ({"TERM": ""}, "TERM")])
def test_a_terminal_that_can_not_show_it_is_refused_in_words(
    terminal: Open, environ: dict[str, str], said: str
) -> None:
    app = terminal(**environ)
    assert app.wait() == 2
    assert said in app.screen.text()
    assert "finetui plan" in app.screen.text()
    assert app.written.count(b"\x1b") == 0


def test_the_end_of_input_is_no_terminal(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-P", "-m", "finetui"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        env=environment(tmp_path),
    )  # fmt: skip
    assert said.returncode == 2
    assert said.stdout == ""
    assert "needs a terminal" in said.stderr
