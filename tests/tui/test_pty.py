"""The app on a real terminal: what it costs, what it shows, and what it survives. Ways out are in test_pty_exits.py."""

from __future__ import annotations

import random
import re
import select
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.run import Run
from finetui.tests.bench.live import Feeder, live_run
from finetui.tests.bench.terminal import Terminal
from finetui.tui.keys import key_of

#: Bytes per second that a viewer over SSH may cost at 1 Hz.
BUDGET = 10_000
#: Keys that leave, or that end what is watched.
_DEADLY = b"\x03\x11qxK"

Open = Callable[..., Terminal]


@pytest.fixture
def live(tmp_path: Path) -> Run:
    """A run with eight GPUs that is at work in this very process."""
    return live_run(tmp_path / "runs")


def test_eight_gpus_at_1_hz_stay_below_10_kb_per_second(terminal: Open, live: Run) -> None:
    with Feeder(live) as feeder:
        app = terminal(live)
        app.wait_for("RAM", "8 × H100")
        app.read(2.0)
        first, sent = feeder.step, app.read(4.0)
    assert _gpus_with_figures(app) == set(range(8))
    assert feeder.step - first >= 3
    assert sent > 2000, "hardly anything was drawn: this measures nothing"
    assert sent / 4.0 < BUDGET, f"{sent / 4.0:,.0f} bytes/s"


def test_losses_that_are_not_finite_and_a_gpu_that_is_lost(terminal: Open, live: Run) -> None:
    with Feeder(live) as feeder:
        app = terminal(live)
        app.wait_for("RAM")
        feeder.nan, feeder.lost = True, 3
        app.wait_for("not finite", "✘ no reading")
        app.read(10.0, lambda: 3 not in _gpus_with_figures(app))
        assert 3 not in _gpus_with_figures(app)
        feeder.nan, feeder.lost = False, None
        app.read(10.0, lambda: _gpus_with_figures(app) == set(range(8)))
        assert _gpus_with_figures(app) == set(range(8))
    assert app.alive


def _gpus_with_figures(app: Terminal) -> set[int]:
    """The GPUs whose power is on the screen."""
    return {index for index in range(8) if re.search(rf"\b{index} [█░]* .*?\d\d W", app.screen.text())}


def test_no_gpu_is_said(terminal: Open, tmp_path: Path) -> None:
    run = live_run(tmp_path / "runs", "cpu", gpus=0)
    with Feeder(run, gpus=0):
        app = terminal(run)
        app.wait_for("loss 1.", "no readings yet")


def test_garbage_is_no_key(terminal: Open, live: Run) -> None:
    """Mouse reports of another age (as tmux sends them on reattach), halves of sequences, bytes that are no text."""
    app = terminal(live)
    app.wait_for("RAM")
    rng = random.Random(3)
    noise = bytes(byte for byte in rng.choices([*range(32), *range(127, 256)], k=400) if byte not in _DEADLY)
    for junk in (b"\x1b[M \xc3\xa0", b"\x1b[M#\xff\xfe", b"\x1b[M@\x80\x90", b"\x1b[<0;99999999999;1M", b"\x1b[<;;M",
                 b"\x1b[200~\xff\x00\x1b[A", b"\x1b[201~", b"\x1bP\x1b_\x9b\x1b[?", noise):  # fmt: skip
        app.send(junk)
        app.read(0.1)
    app.read(1.5)  # a lone escape waits for the rest of its sequence
    assert app.alive
    for _ in range(4):  # out of whatever dialog the noise has opened
        app.send(b"\x1b")
        app.read(0.3)
    app.send(key_of("runs"))
    app.wait_for("held-out", "Watch")
    app.send("q")
    assert app.wait() == 0


def test_a_storm_of_sizes_leaves_the_picture_as_it_was(terminal: Open) -> None:
    app = terminal()
    app.wait_for("fits", "GPU")
    app.settle()
    before = app.screen.text()
    for width, height in ((40, 10), (200, 50), (1, 1), (2, 60), (300, 2), (80, 24), (1, 1)) * 3:
        app.resize(width, height)
        app.read(0.05)
    app.resize(100, 30)
    app.read(8.0, lambda: app.screen.text() == before)
    assert app.screen.text() == before


def test_ascii_terminals_get_ascii(terminal: Open, live: Run) -> None:
    app = terminal(live, TERM="linux", LANG="C", COLORTERM="")
    app.wait_for("RAM")
    for mode in ("plan", "gpus", "runs", "logs"):
        app.send(key_of(mode))
        app.read(1.5)
    assert app.written.isascii()
    assert "?" not in app.screen.text().replace("? Help", "")


@pytest.mark.parametrize("term", ["xterm-256color", "tmux-256color", "screen", "vt100"])
def test_sixteen_colours_where_no_more_are_promised(terminal: Open, live: Run, term: str) -> None:
    app = terminal(live, TERM=term, COLORTERM="")
    app.wait_for("RAM")
    styles = [cell.style for row in app.screen.rows for cell in row]
    used = {style.color for style in styles} | {style.back for style in styles}
    assert used - {""}, "nothing is coloured"
    assert all(color == "" or (color.isdigit() and int(color) < 16) for color in used), used


def test_without_colour_there_is_none_and_the_cursor_shows(terminal: Open, live: Run) -> None:
    app = terminal(live, NO_COLOR="1")
    app.wait_for("RAM", "q Quit")
    cells = [cell for row in app.screen.rows for cell in row]
    assert not any(cell.style.color or cell.style.back for cell in cells)
    reversed_ = "".join(cell.text for cell in cells if cell.style.reverse)
    assert "Monitor" in reversed_, "the current screen's name is not reversed"


def test_the_first_picture_is_quick_and_then_nothing_moves(terminal: Open) -> None:
    app = terminal()
    app.wait_for("fits", "GPU")
    # 0.5 s is the aim on an idle machine (tests/bench/app.py measures it); here the processor's share is looked at.
    assert app.cpu_seconds() < 3.0
    app.settle()
    before = app.cpu_seconds()
    assert app.read(3.0) == 0
    assert app.cpu_seconds() - before < 0.3


def test_a_slow_terminal_holds_up_nothing(terminal: Open, live: Run) -> None:
    """A viewer that nobody reads from, such as an ssh session that hangs, neither spins nor holds up the run."""
    with Feeder(live) as feeder:
        app = terminal(live)
        app.wait_for("RAM")
        before, first = app.cpu_seconds(), feeder.step
        select.select([], [], [], 4.0)
        assert feeder.step - first >= 3
    assert app.cpu_seconds() - before < 1.0
    app.wait_for(f"step {feeder.step}")
