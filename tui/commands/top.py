"""``finetui top``: the GPUs of this machine or another one, with or without a run, and which run has which."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...engine.run import Run, default_root, list_runs
from ...engine.status import LIVE_STATES
from ...engine.telemetry import GpuMonitor, HostMonitor
from ...planner.errors import RunError
from .. import format  # noqa: A004
from ..columns import Column, table
from .options import JsonFlag
from .places import HostFlag, runs_of

if TYPE_CHECKING:
    import rich.console as rich

    from ...engine.remote.gpus import RemoteMonitor
    from ..remote import RemoteRuns

OnceFlag = Annotated[bool, typer.Option("--once", help="One reading, then leave.")]
_BAR = 20
_BLOCKS = "▁▂▃▄▅▆▇█"


def top(once: OnceFlag = False, host: HostFlag = None, as_json: JsonFlag = False) -> None:
    """Memory, load, power, heat and clock of each GPU, until Ctrl-C."""
    with machine_of(host) as machine:
        if as_json:
            print(json.dumps(machine.reading(), indent=2, ensure_ascii=False))
            return
        from rich.live import Live

        from ..console import Console

        console = Console(highlight=False)
        if once or not console.is_terminal:
            console.print(picture(machine.reading()))
            return
        lately = Lately()
        try:
            with Live(picture(lately.take(machine.reading())), console=console, auto_refresh=False) as live:
                while True:
                    time.sleep(machine.pause_s)
                    live.update(picture(lately.take(machine.reading())), refresh=True)
        except KeyboardInterrupt:
            print(file=sys.stderr)


@contextlib.contextmanager
def machine_of(host: str | None) -> Iterator[Machine | RemoteMachine]:
    """This machine, or another one over ssh; what watches it ends with the block."""
    if host is None:
        root = default_root()
        disk = next(folder for folder in (root, *root.parents) if folder.exists())
        machine = Machine(GpuMonitor(), HostMonitor(disk))
        try:
            yield machine
        finally:
            machine.gpus.close()
        return
    from ...engine.remote.gpus import RemoteMonitor

    with runs_of(host) as remote:
        monitor = RemoteMonitor(remote.host)
        try:
            yield RemoteMachine(remote, monitor)
        finally:
            monitor.close()


@dataclass
class Machine:
    """What is asked, and what the driver said last: it tells each trouble once."""

    gpus: GpuMonitor
    host: HostMonitor
    warnings: list[str] = field(default_factory=list)
    pause_s = 1.0

    def reading(self) -> dict[str, Any]:
        """GPUs with the runs that are at work on them, the host, and what is wrong."""
        users = _users(list_runs())
        gpus = [{**dataclasses.asdict(sample), "runs": users.get(sample.index, [])} for sample in self.gpus.sample()]
        told = [f"{warning.what}. {warning.do}".rstrip(". ") + "." for warning in self.gpus.take_warnings()]
        self.warnings = told or self.warnings
        return {"gpus": gpus, "host": dataclasses.asdict(self.host.sample()), "warnings": self.warnings}


@dataclass
class RemoteMachine:
    """Another machine, whose readings come once a second of themselves."""

    runs: RemoteRuns
    monitor: RemoteMonitor
    pause_s = 0.0

    def reading(self) -> dict[str, Any]:
        """As :meth:`Machine.reading`. Raises :class:`RunError` where there is no connection."""
        users = _users(self.runs.runs())
        now = self.monitor.read()
        gpus = [{**dataclasses.asdict(sample), "runs": users.get(sample.index, [])} for sample in now.gpus]
        trouble = [f"GPUs of {self.runs.host.address} can't be watched: {now.trouble}."] if now.trouble else []
        return {"gpus": gpus, "host": dataclasses.asdict(now.host), "warnings": trouble}


class Lately:
    """The load of each GPU in the newest readings, as a line of blocks."""

    def __init__(self) -> None:
        self._loads: dict[int, deque[float]] = {}

    def take(self, now: dict[str, Any]) -> dict[str, Any]:
        """A reading with ``lately`` in each GPU, once there are two."""
        for gpu in now["gpus"]:
            loads = self._loads.setdefault(gpu["index"], deque(maxlen=_BAR))
            loads.append(gpu["sm_percent"] if gpu.get("sm_percent") is not None else math.nan)
            if len(loads) > 1:
                gpu["lately"] = "".join(_block(load) for load in loads)
        return now


def _block(percent: float) -> str:
    return "·" if math.isnan(percent) else _BLOCKS[min(round(percent / 100 * (len(_BLOCKS) - 1)), len(_BLOCKS) - 1)]


def _users(runs: Iterable[Run]) -> dict[int, list[str]]:
    """Names of the live runs on each GPU."""
    users: dict[int, list[str]] = {}
    for run in runs:
        if run.status.state in LIVE_STATES:
            for index in _gpus_of(run):
                users.setdefault(index, []).append(run.name)
    return users


def _gpus_of(run: Run) -> list[int]:
    try:
        resolved = run.plan.resolved
    except RunError:
        return []
    return resolved.gpus if resolved.device == "cuda" else []


def picture(now: dict[str, Any]) -> rich.RenderableType:
    """A reading as a table, as wide as there is room."""
    from rich.console import Group
    from rich.text import Text

    lines: list[rich.RenderableType] = [Text(f"! {warning}", style="yellow") for warning in now["warnings"]]
    if now["gpus"]:
        lines.append(_Table([_row(gpu) for gpu in now["gpus"]]))
    elif not now["warnings"]:
        lines.append(Text("There is no NVIDIA GPU.", style="dim"))
    host, unit = now["host"], format.memory_unit()
    memory = f"{format.bare_gib(host['memory_used_gib'], 0)}/{format.bare_gib(host['memory_total_gib'], 0)} {unit}"
    free = f"{format.bare_gib(host['disk_free_gib'], 0)} {unit} free"
    lines.append(Text(f"CPU {host['cpu_percent']:.0f} %   RAM {memory}   disk {free}", style="dim"))
    return Group(*lines)


#: What is known of a GPU; a column that no GPU fills is left out.
_COLUMNS = (
    Column("GPU", right=True), Column("name", rank=5, least=8), Column("memory", right=True), Column("of it", rank=6),
    Column("load", right=True), Column("lately", rank=9), Column("power", right=True), Column("heat", right=True),
    Column("clock", right=True, rank=4), Column("PCIe in/out", right=True, rank=7),
    Column("NVLink in/out", right=True, rank=8), Column("ECC errors", right=True, rank=3),
    Column("held back by", rank=2, least=12), Column("run", rank=1, least=10),
)  # fmt: skip


class _Table:
    """Rows of cells, cut to the width that they are drawn in."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self._rows = rows
        self._columns = [column for column in _COLUMNS if any(row[column.name] for row in rows)]

    def __rich_console__(self, console: rich.Console, options: rich.ConsoleOptions) -> rich.RenderResult:
        from rich.text import Text

        room = options.max_width if console.is_terminal else 1000
        for line in table(self._columns, self._rows, room):
            yield Text(line, no_wrap=True, overflow="ignore")


def _row(gpu: dict[str, Any]) -> dict[str, str]:
    """A GPU's cells by their heading; those of one that lacks its figure are empty or a dash."""

    def figure(key: str, unit: str) -> str:
        return f"{gpu[key]:.0f} {unit}" if gpu.get(key) is not None else "–"

    def traffic(kind: str) -> str:
        values = gpu.get(f"{kind}_in_gb_s"), gpu.get(f"{kind}_out_gb_s")
        return "" if values == (None, None) else "/".join("–" if v is None else f"{v:.3g}" for v in values) + " GB/s"

    used, total = gpu.get("memory_used_gib"), gpu.get("memory_total_gib")
    memory, share = ("–", 0.0)
    if used is not None and total:
        memory = f"{format.bare_gib(used)}/{format.bare_gib(total)} {format.memory_unit()}"
        share = used / total
    corrected, uncorrected = gpu.get("ecc_corrected"), gpu.get("ecc_uncorrected")
    errors = "" if corrected is None and uncorrected is None else f"{corrected or 0} + {uncorrected or 0} lasting"
    return {
        "GPU": str(gpu["index"]),
        "name": format.short_name(str(gpu["name"])),
        "memory": memory,
        "of it": ("█" * round(share * _BAR)).ljust(_BAR, "░"),
        "load": figure("sm_percent", "%"),
        "lately": gpu.get("lately", ""),
        "power": figure("power_w", "W"),
        "heat": figure("temperature_c", "°C"),
        "clock": figure("sm_clock_mhz", "MHz"),
        "PCIe in/out": traffic("pcie"),
        "NVLink in/out": traffic("nvlink"),
        "ECC errors": errors,
        "held back by": ", ".join(gpu.get("throttle") or []),
        "run": ", ".join(gpu["runs"]) or "–",
    }
