"""What the app asks of a terminal and a machine: time to paint, bytes on the wire, processor, memory. On a real pty.

    python -m tests.bench.app [--only first-paint plan wire open hour] [--json FILE]

Each figure stands beside its limit. Times are wall clock, so they hold for a machine with nothing else to do: the load
when the figure was taken stands with it, and so does the processor time, which other programs hardly touch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from finetui.engine.run import Run
from finetui.planner.version import VERSION
from finetui.tests.bench import long_run
from finetui.tests.bench.live import Feeder, live_run, own_it
from finetui.tests.bench.terminal import Terminal, environment
from finetui.tui.keys import key_of

MIB = 2**20
APP = [sys.executable, "-P", "-m", "finetui"]
#: A word that the first picture of every screen holds.
PAINTED = b"Monitor"
#: A simulated hour, and what a run of a million events says in it.
HOUR_S, EVENTS = 3600, 1_000_000
#: Pieces in which the hour is told, and the seconds that each is given.
PIECES, PIECE_S = 120, 0.5


@dataclass(frozen=True)
class Measured:
    """One figure. ``limit`` is the most it may be, 0 where there is none; ``note`` says how it came about."""

    name: str
    value: float
    unit: str
    limit: float = 0.0
    note: str = ""

    @property
    def held(self) -> bool:
        """Whether it is within its limit."""
        return not self.limit or self.value <= self.limit


def first_paint(home: Path) -> Iterator[Measured]:
    """From the start of the process to the first picture."""
    for name, before, environ, limit, rounds in (
        ("first paint, warm", lambda: None, {}, 0.5, 11),
        ("first paint, files not in memory", evict, {}, 0.5, 5),
        ("first paint, nothing compiled yet", lambda: None, {"PYTHONDONTWRITEBYTECODE": "1"}, 0.0, 3),
    ):
        walls, processor = [], []
        for turn in range(rounds):
            before()
            more = {**environ, "PYTHONPYCACHEPREFIX": str(home / f"none-{turn}")} if environ else {}
            with Terminal(APP, environment(home, **more)) as terminal:
                terminal.read(30.0, lambda terminal=terminal: PAINTED in terminal.written)
                walls.append(time.perf_counter() - terminal.started)
                processor.append(terminal.cpu_seconds())
        note = f"median of {rounds}, best {min(walls):.2f}, processor {statistics.median(processor):.2f} s"
        yield Measured(name, statistics.median(walls), "s", limit, note)


def evict() -> None:
    """Drop the files that the app is made of from the memory of the operating system."""
    code = (
        "import finetui.tui.screens.plan, sys\n"
        "print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', 0)), sep='\\n')"
    )
    said = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True,
                          env=environment(Path(tempfile.gettempdir())))  # fmt: skip
    for name in said.stdout.splitlines():
        source = Path(name)
        for path in (source, *source.parent.glob(f"__pycache__/{source.stem}.*.pyc")):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def replan(home: Path) -> Iterator[Measured]:
    """From a key that changes the plan's form to the new verdict on the screen, with the real planner."""
    with Terminal(APP, environment(home)) as terminal:
        terminal.wait_for("fits", "GiB")
        terminal.send("jjj")  # to the rank of the adapters
        terminal.read(1.0)
        taken = []
        for key in [*"lllhhhlll", *"hhhlll"]:
            before = _verdict(terminal)
            begun = time.perf_counter()
            terminal.send(key)
            terminal.read(5.0, lambda before=before: _verdict(terminal) != before)
            if _verdict(terminal) == before:
                raise RuntimeError(f"the plan did not change:\n{terminal.screen.text()}")
            taken.append((time.perf_counter() - begun) * 1000)
            terminal.read(0.4)
        note = f"median of {len(taken)}, best {min(taken):.0f}, worst {max(taken):.0f}"
        yield Measured("plan anew after an edit", statistics.median(taken), "ms", 100.0, note)


def _verdict(terminal: Terminal) -> str:
    """The right half of the Plan screen."""
    return "\n".join(line[terminal.screen.width // 2 :] for line in terminal.screen.text().splitlines()[1:])


def wire(home: Path, seconds: float = 20.0) -> Iterator[Measured]:
    """Monitor on eight GPUs at 1 Hz, every figure another one each second."""
    run = live_run(home / "runs")
    for colours, environ in (("24-bit", {}), ("16", {"COLORTERM": ""})):
        with Feeder(run), _monitor(home, run, **environ) as terminal:
            terminal.wait_for("RAM")
            terminal.read(3.0)
            cpu, begun = terminal.cpu_seconds(), time.monotonic()
            sent = terminal.read(seconds)
            taken = time.monotonic() - begun
            used = (terminal.cpu_seconds() - cpu) / taken
            if b"NVIDIA" in terminal.written or sent < 2000:
                raise RuntimeError(f"this measures nothing: {sent} bytes\n{terminal.screen.text()}")
            note = f"{seconds:.0f} s, 8 GPUs, 4 charts, 100x30, {colours} colours"
            yield Measured(f"bytes to the terminal, {colours} colours", sent / taken, "B/s", 10_000.0, note)
            yield Measured(f"processor, {colours} colours", 100 * used, "% of a core", 3.0, note)
            yield Measured(f"memory, {colours} colours", terminal.process.memory_info().rss / MIB, "MiB", 120.0, "RSS")
    with _monitor(home, run) as terminal:
        terminal.wait_for("RAM")
        terminal.send(key_of("plan"))
        terminal.wait_for("fits")
        terminal.read(3.0)
        cpu = terminal.cpu_seconds()
        sent = terminal.read(10.0)
        used = 100 * (terminal.cpu_seconds() - cpu) / 10
        yield Measured("processor, Plan with nothing to do", used, "% of a core", 1.0, f"10 s, {sent} bytes")


def opening(home: Path) -> Iterator[Measured]:
    """A run that ended after a million events, from the start of the process to its last step on the screen."""
    made = long_run.make(home / "runs" / "long", EVENTS)
    size = (made.path / "events.jsonl").stat().st_size / MIB
    walls, memory, processor = [], [], []
    for _ in range(5):
        with _monitor(home, Run(made.path)) as terminal:
            terminal.wait_for(f"{made.steps:,}/", "stopped")
            walls.append(time.perf_counter() - terminal.started)
            processor.append(terminal.cpu_seconds())
            terminal.read(4.0)
            memory.append(terminal.process.memory_info().rss / MIB)
    note = f"median of 5, {made.events:,} events, {size:.0f} MiB, processor {statistics.median(processor):.2f} s"
    yield Measured("a run of a million events, from exec to picture", statistics.median(walls), "s", 1.0, note)
    yield Measured("memory with that run", max(memory), "MiB", 120.0, "RSS, 4 s later")


def hour(home: Path) -> Iterator[Measured]:
    """A simulated hour of a million events, told in a minute to a Monitor that is open all the while."""
    made = long_run.make(home / "runs" / "hour", EVENTS)
    run, begin = Run(made.path), time.time() - HOUR_S
    lines = run.events_path.read_text(encoding="utf-8").splitlines(keepends=True)
    run.events_path.write_text("".join(lines[:3]), encoding="utf-8")
    own_it(run, begin)
    with _monitor(home, run) as terminal, open(run.events_path, "a", encoding="utf-8") as file:
        terminal.wait_for("running")
        peak, cpu = 0.0, terminal.cpu_seconds()
        for piece in range(PIECES):
            file.writelines(lines[3 + piece * len(lines) // PIECES : 3 + (piece + 1) * len(lines) // PIECES])
            file.flush()
            terminal.read(PIECE_S)
            peak = max(peak, terminal.process.memory_info().rss / MIB)
        terminal.wait_for(f"{made.steps:,}/", seconds=120.0)
        used = terminal.cpu_seconds() - cpu
        peak = max(peak, terminal.process.memory_info().rss / MIB)
    note = f"most RSS while {made.events:,} events came in {PIECES * PIECE_S:.0f} s"
    yield Measured("memory over a simulated hour", peak, "MiB", 120.0, note)
    yield Measured("processor over that hour", 100 * used / HOUR_S, "% of a core", 3.0, f"{used:.1f} s in all")


def _monitor(home: Path, run: Run, **environ: str) -> Terminal:
    return Terminal([*APP, "attach", str(run.path)], environment(home, **environ))


MEASURES: dict[str, Callable[[Path], Iterator[Measured]]] = {
    "first-paint": first_paint, "plan": replan, "wire": wire, "open": opening, "hour": hour,
}  # fmt: skip


def surroundings(only: list[str]) -> dict[str, object]:
    """What the figures hold for."""
    names = ("textual", "rich", "pydantic", "psutil")
    return {
        "command": " ".join(["python -m tests.bench.app", *([] if only == list(MEASURES) else ["--only", *only])]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "finetui": VERSION,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
    }


def main() -> int:
    """Measure, print a table, and say with the exit status whether every limit was held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(MEASURES), default=list(MEASURES))
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON, to a file or standard output")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="finetui-bench-") as folder:
        os.environ["XDG_STATE_HOME"] = folder  # what is made here is no run of the user's
        for number, name in zip(itertools.count(), arguments.only, strict=False):
            home = Path(folder) / f"{number}-{name}"
            home.mkdir()
            for found in MEASURES[name](home):
                rows.append({**asdict(found), "held": found.held, "load": round(os.getloadavg()[0], 2)})
                limit = f"≤ {found.limit:g}" if found.limit else ""
                mark = "" if not found.limit else "holds" if found.held else "MISSES"
                print(f"{found.name:<48} {found.value:>9.3g} {found.unit:<12} {limit:<8} {mark:<7} "
                      f"load {os.getloadavg()[0]:.1f}  {found.note}", file=sys.stderr, flush=True)  # fmt: skip
    answer = json.dumps({**surroundings(arguments.only), "measured": rows}, indent=2)
    if arguments.json == "-":
        print(answer)
    elif arguments.json:
        Path(arguments.json).write_text(answer + "\n", encoding="utf-8")
    return 0 if all(row["held"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
