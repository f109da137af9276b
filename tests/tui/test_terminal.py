"""What a terminal can show, and where the app says no."""

from __future__ import annotations

import os
import pty
import threading

import pytest

from finetui.tui.terminal import refusal, theme_for, wants_ascii, watch_for_hangup


def test_refuses_what_can_not_be_drawn_on() -> None:
    assert "TERM" in refusal({"TERM": "dumb"}, tty=True)
    assert "TERM" in refusal({}, tty=True)
    assert "terminal" in refusal({"TERM": "xterm"}, tty=False)
    assert refusal({"TERM": "xterm-256color"}, tty=True) == ""


@pytest.mark.parametrize(
    ("environ", "ascii_only"),
    [
        ({"TERM": "xterm", "LANG": "en_US.UTF-8"}, False),
        ({"TERM": "xterm", "LANG": "C"}, True),
        ({"TERM": "xterm", "LANG": "en_US.UTF-8", "LC_ALL": "POSIX"}, True),
        ({"TERM": "linux", "LANG": "en_US.UTF-8"}, True),
        ({"TERM": "screen", "TMUX": "/tmp/tmux"}, True),
        ({"TERM": "linux", "FINETUI_CHARSET": "unicode"}, False),
        ({"TERM": "xterm", "LANG": "de_DE.UTF-8", "FINETUI_CHARSET": "ascii"}, True),
    ],
)
def test_charset(environ: dict[str, str], ascii_only: bool) -> None:
    assert wants_ascii(environ) is ascii_only


def test_sixteen_colours_unless_the_terminal_says_more() -> None:
    assert theme_for({"TERM": "xterm-256color", "COLORTERM": "truecolor"}) == "finetui"
    assert theme_for({"TERM": "xterm-256color"}) == "ansi-dark"
    assert theme_for({"TERM": "linux"}) == "ansi-dark"
    assert theme_for({"COLORTERM": "truecolor", "NO_COLOR": "1"}) == "ansi-dark"
    assert theme_for({"COLORTERM": "truecolor", "TEXTUAL_THEME": "nord"}) == "nord"


def test_a_hangup_without_a_signal_is_noticed() -> None:
    ours, theirs = pty.openpty()
    gone = threading.Event()
    watch_for_hangup(theirs, on_hangup=gone.set)
    assert not gone.wait(0.2)
    os.close(ours)
    assert gone.wait(6.0)
    os.close(theirs)
