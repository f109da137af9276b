"""Watching a run from the command line: a live panel on a terminal, plain lines elsewhere.

The viewer only reads files. Ending it, by Ctrl-C or by closing the terminal, never touches the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..engine.events import Event, EventReader
from ..engine.past import SHORT_BYTES, glimpse
from ..engine.run import Run
from ..engine.status import LIVE_STATES, Status
from ..planner.errors import RunError
from ..planner.plan import Plan
from ..planner.preferences import load
from .alerts import Watchman, sound
from .console import Console
from .follower import BATCH, read_whole
from .format import STATE_GLYPHS, count, duration, gib, loss, rate, usd
from .history import History
from .series import Series

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 32
#: Newest events that are told one by one when a long run is opened.
_NEWEST = 200
_GPU_FIGURES = (("sm_percent", "%"), ("power_w", "W"), ("temperature_c", "°C"))


def watch(run: Run, *, plain: bool | None = None, after: bool = True) -> int:
    """Show a run from its start until it ends or the user leaves.

    Args:
        run: the run.
        plain: one line per event; the default is a live panel on a terminal and lines elsewhere.
        after: whether to say what can be done with a run that has ended.

    Returns:
        The exit code: 0 finished, stopped or left running; 1 failed or lost; 2 failed over the user's data.
    """
    console = Console(highlight=False)
    if plain is None:
        plain = not console.is_terminal or console.is_dumb_terminal
    try:
        status = _watch_lines(run, whole=not console.is_terminal) if plain else _watch_live(run, console)
    except KeyboardInterrupt:
        print(f"\nThe run goes on. Watch it again with: finetui attach {run.name}", file=sys.stderr)
        return 0
    glyph = STATE_GLYPHS[status.state][0]
    if status.state in {"failed", "lost"}:
        cause = f" ({status.cause})" if status.cause else ""
        print(f"{glyph} {run.name} {status.state}{cause}: {status.message}\n  {status.do}".rstrip(), file=sys.stderr)
        return 2 if status.cause == "data" else 1
    print(f"{glyph} {run.name} {status.state}.", file=sys.stderr)
    if after and status.state == "stopped":
        print(f"  Continue it with: finetui resume {run.name}", file=sys.stderr)
    elif after and status.state == "finished" and run.output_path.exists():
        print(f"  The result lies in {run.output_path}", file=sys.stderr)
        print(
            f"  Talk to it with: finetui chat {run.name}; take it elsewhere: finetui export {run.name}", file=sys.stderr
        )
    return 0


def history_of(run: Run) -> History:
    """A run so far."""
    return read_whole(run, _begun(run)[0])


def _begun(run: Run) -> tuple[History, Plan | None]:
    """A history with nothing in it, and the plan; a run is watched without one that can't be read, which is told."""
    try:
        plan = run.plan
    except RunError as error:
        print(f"! {error}", file=sys.stderr)
        return History(), None
    return History(steps=plan.resolved.steps), plan


def lines_of(events: Iterable[Event], history: History) -> Iterator[str]:
    """What the log pane shows of these events, each with its time of day."""
    for event in events:
        logged = history.logged
        history.apply(event)
        if history.logged > logged:
            entry = history.log[-1]
            yield f"{time.strftime('%H:%M:%S', time.localtime(entry.time))} {entry.text}"


def _events_until_end(run: Run, reader: EventReader, poll_s: float = 0.25) -> Iterator[list[Event] | Status]:
    """Batches of events as they come; the last item is the final status."""
    while True:
        status = run.status  # read before the events, so that none written before the end is missed
        events = reader.read(BATCH)
        yield events
        if events:
            continue
        if status.state not in LIVE_STATES:
            yield status
            return
        time.sleep(poll_s)


class _Caller:
    """Calls somebody back: compares the run with what it was, and rings as the user wants it."""

    def __init__(self, run: Run) -> None:
        self._run, self._watchman, self._preferences = run, Watchman(run.name), load()

    def look(self, history: History, status: Status) -> None:
        """Tell what has happened since the last look."""
        for alert in self._watchman.news(history, status):
            sequence = sound(alert, self._run.name, self._preferences)
            terminal = sys.__stderr__  # not the guarded one, which would spell the sequence out
            if sequence and terminal is not None and terminal.isatty():
                terminal.write(sequence)
                terminal.flush()


def _opened(run: Run, history: History, newest: int) -> tuple[list[Event], EventReader]:
    """The newest events of a run, all before them taken in, of a long one by a glimpse; and who reads on."""
    try:
        past = glimpse(run.events_path)
    except OSError:  # not written yet
        return [], EventReader(run.events_path)
    events = past.events
    for event in events[:-newest]:
        history.apply(event)
    return events[-newest:], EventReader(run.events_path, events[-1].seq if events else 0, past.offset)


def _watch_lines(run: Run, *, whole: bool) -> Status:
    history, caller = _begun(run)[0], _Caller(run)
    reader = EventReader(run.events_path)
    if not whole and run.events_path.stat().st_size > SHORT_BYTES:
        events, reader = _opened(run, history, _NEWEST)
        print(f"The newest events of a long run; all of them: finetui logs {run.name} --events", file=sys.stderr)
        for line in lines_of(events, history):
            print(line, flush=True)
    for item in _events_until_end(run, reader):
        if isinstance(item, Status):
            caller.look(history, item)
            return item
        for line in lines_of(item, history):
            print(line, flush=True)
        if len(item) < BATCH:
            caller.look(history, run.status)
    raise AssertionError("unreachable")


class _Panel:
    """What the live view shows, redrawn from the events so far."""

    def __init__(self, run: Run) -> None:
        self.history, self.plan = _begun(run)
        self.status = run.recorded
        hardware = self.plan.hardware if self.plan else None
        self.name, self.where = run.name, f"{hardware.count} × {hardware.gpu}" if hardware else ""
        self.notes: list[str] = []

    def take(self, events: list[Event]) -> None:
        """Take in what is new; what is neither a step nor a phase is noted."""
        h = self.history
        notes = [line for line in lines_of(events, h) if h.log[-1].kind not in {"step", "phase"}]
        self.notes = [*self.notes, *notes][-4:]

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
        if self.plan and (mfu := h.mfu(self.plan)) == mfu:  # NaN is a share that there is none of
            rows.add_row("MFU", f"{mfu:.0%}", f"planned {self.plan.speed.mfu:.0%}")
        if self.plan and self.plan.cost.usd_per_h:
            spent = self.status.elapsed_s()
            projected = h.projected_usd(self.plan, spent)
            of = f"of ~{usd(projected)}" if math.isfinite(projected) else ""
            rows.add_row("money", f"{usd(h.cost_usd(self.plan, spent))} {of}", f"planned {usd(self.plan.cost.usd)}")
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
    panel, caller = _Panel(run), _Caller(run)
    events, reader = _opened(run, panel.history, _NEWEST)
    panel.take(events)
    with Live(panel, console=console, refresh_per_second=4) as live:
        for item in _events_until_end(run, reader):
            if isinstance(item, Status):
                panel.history.state = item.state
                caller.look(panel.history, item)
                live.refresh()
                return item
            panel.take(item)
            if len(item) < BATCH:
                panel.status = run.status
                caller.look(panel.history, panel.status)
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
