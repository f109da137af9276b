"""Watching a run from the command line: a live panel on a terminal, plain lines elsewhere.

The viewer only reads files. Ending it, by Ctrl-C or by closing the terminal, never touches the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..engine.events import Event, EventReader, read_events
from ..engine.run import LIVE_STATES, Run, Status
from .format import STATE_GLYPHS, count, duration, gib, loss, rate
from .history import History, LogEntry
from .series import Series

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 32
_GPU_FIGURES = (("sm_percent", "%"), ("power_w", "W"), ("temperature_c", "°C"))


def watch(run: Run, *, plain: bool | None = None) -> int:
    """Show a run from its start until it ends or the user leaves.

    Args:
        run: the run.
        plain: one line per event; the default is a live panel on a terminal and lines elsewhere.

    Returns:
        The exit code: 0 finished, stopped or left running; 1 failed or lost; 2 failed over the user's data.
    """
    console = Console(highlight=False)
    if plain is None:
        plain = not console.is_terminal or console.is_dumb_terminal
    try:
        status = _watch_lines(run) if plain else _watch_live(run, console)
    except KeyboardInterrupt:
        print(f"\nThe run goes on. Watch it again with: finetui attach {run.name}", file=sys.stderr)
        return 0
    glyph = STATE_GLYPHS[status.state][0]
    if status.state in {"failed", "lost"}:
        cause = f" ({status.cause})" if status.cause else ""
        print(f"{glyph} {run.name} {status.state}{cause}: {status.message}\n  {status.do}".rstrip(), file=sys.stderr)
        return 2 if status.cause == "data" else 1
    print(f"{glyph} {run.name} {status.state}.", file=sys.stderr)
    return 0


def history_of(run: Run) -> History:
    """A run so far."""
    history = History(steps=run.plan.resolved.steps)
    for event in read_events(run.events_path):
        history.apply(event)
    return history


def lines_of(events: Iterable[Event], history: History) -> Iterator[str]:
    """What the log pane shows of these events, each with its time of day."""
    for event in events:
        logged = history.logged
        history.apply(event)
        if history.logged > logged:
            entry: LogEntry = history.log[-1]
            yield f"{time.strftime('%H:%M:%S', time.localtime(entry.time))} {entry.text}"


def _events_until_end(run: Run, poll_s: float = 0.25) -> Iterator[list[Event] | Status]:
    """Batches of events as they come; the last item is the final status."""
    reader = EventReader(run.events_path)
    while True:
        status = run.status  # read before the events, so that none written before the end is missed
        events = reader.read()
        yield events
        if events:
            continue
        if status.state not in LIVE_STATES:
            yield status
            return
        time.sleep(poll_s)


def _watch_lines(run: Run) -> Status:
    history = History(steps=run.plan.resolved.steps)
    for item in _events_until_end(run):
        if isinstance(item, Status):
            return item
        for line in lines_of(item, history):
            print(line, flush=True)
    raise AssertionError("unreachable")


class _Panel:
    """What the live view shows, redrawn from the events so far."""

    def __init__(self, run: Run) -> None:
        plan = run.plan
        self.name, self.where = run.name, f"{plan.hardware.count} × {plan.hardware.gpu}"
        self.history = History(steps=plan.resolved.steps)
        self.notes: list[str] = []

    def __rich__(self) -> Group:
        h = self.history
        head = Text.assemble((f"{STATE_GLYPHS[h.state][0]} {h.state} ", "bold"), self.name, (f"  {self.where}", "dim"))
        rows = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(h.steps, 1), completed=h.step, width=_WIDTH)
        rows.add_row("progress", bar, f"{h.step}/{h.steps}  ETA {duration(h.eta_s())}")
        rows.add_row("loss", sparkline(h.loss, _WIDTH), f"{_told(h.loss)}  held-out {_told(h.evaluation)}")
        if h.step:
            speed = f"{rate(h.tokens_per_s.latest)} tok/s, {count(h.tokens)} tokens so far"
            rows.add_row("speed", speed, f"lr {h.learning_rate.latest:.2e}  grad norm {h.grad_norm.latest:.3g}")
        if h.phase:
            rows.add_row("now", h.phase, "")
        for index, gpu in sorted(h.gpus.items()):
            used, total = gpu.get("memory_used_gib"), gpu.get("memory_total_gib")
            memory = f"{gib(used)} of {gib(total)}" if used is not None and total else "memory not told"
            known = [(gpu.get(key), unit) for key, unit in _GPU_FIGURES]
            rows.add_row(
                f"GPU {index}", memory, "  ".join(f"{value:.0f} {unit}" for value, unit in known if value is not None)
            )
        notes = [Text(note, style="dim", overflow="ellipsis", no_wrap=True) for note in self.notes]
        return Group(head, rows, *notes, Text("Ctrl-C leaves; the run goes on.", style="dim"))


def _watch_live(run: Run, console: Console) -> Status:
    panel = _Panel(run)
    with Live(panel, console=console, refresh_per_second=4) as live:
        for item in _events_until_end(run):
            if isinstance(item, Status):
                panel.history.state = item.state
                live.refresh()
                return item
            notes = [
                line for line in lines_of(item, panel.history) if panel.history.log[-1].kind not in {"step", "phase"}
            ]
            panel.notes = [*panel.notes, *notes][-4:]
    raise AssertionError("unreachable")


def _told(series: Series) -> str:
    return loss(series.latest) if series else "–"


def sparkline(series: Series, width: int) -> str:
    """The course of a series in one line of block characters; × marks values that are not finite."""
    buckets = series.buckets
    size = max(1, math.ceil(len(buckets) / width))
    columns = [[b.end for b in buckets[i : i + size] if b.count] for i in range(0, len(buckets), size)]
    means = [sum(column) / len(column) if column else math.nan for column in columns]
    finite = [mean for mean in means if math.isfinite(mean)]
    low = min(finite, default=0.0)
    span = max(max(finite, default=0.0) - low, 1e-12)
    return "".join(_BLOCKS[round((m - low) / span * 7)] if math.isfinite(m) else "×" for m in means)
