"""``finetui top``: this machine's GPUs, with or without a run, and which run has which."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...engine.run import Run, default_root, list_runs
from ...engine.telemetry import GpuMonitor, HostMonitor
from ...planner.errors import RunError
from .options import JsonFlag

if TYPE_CHECKING:
    from rich.console import RenderableType

OnceFlag = Annotated[bool, typer.Option("--once", help="One reading, then leave.")]
_BAR = 20


def top(once: OnceFlag = False, as_json: JsonFlag = False) -> None:
    """Memory, load, power, temperature and clocks of each GPU, once a second until Ctrl-C."""
    root = default_root()
    disk = next(folder for folder in (root, *root.parents) if folder.exists())
    machine = Machine(GpuMonitor(), HostMonitor(disk))
    try:
        if as_json:
            print(json.dumps(machine.reading(), indent=2, ensure_ascii=False))
            return
        from rich.live import Live

        from ..console import Console

        console = Console(highlight=False)
        if once or not console.is_terminal:
            console.print(picture(machine.reading()))
            return
        with Live(picture(machine.reading()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(1.0)
                live.update(picture(machine.reading()), refresh=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        machine.gpus.close()


@dataclass
class Machine:
    """What is asked, and what the driver said last: it tells each trouble once."""

    gpus: GpuMonitor
    host: HostMonitor
    warnings: list[str] = field(default_factory=list)

    def reading(self) -> dict[str, Any]:
        """GPUs with the runs that are at work on them, the host, and what is wrong."""
        users = _users()
        gpus = [{**dataclasses.asdict(sample), "runs": users.get(sample.index, [])} for sample in self.gpus.sample()]
        told = [f"{warning.what}. {warning.do}".rstrip(". ") + "." for warning in self.gpus.take_warnings()]
        self.warnings = told or self.warnings
        return {"gpus": gpus, "host": dataclasses.asdict(self.host.sample()), "warnings": self.warnings}


def _users() -> dict[int, list[str]]:
    """Names of the live runs on each GPU."""
    users: dict[int, list[str]] = {}
    for run in list_runs():
        if run.live:
            for index in _gpus_of(run):
                users.setdefault(index, []).append(run.name)
    return users


def _gpus_of(run: Run) -> list[int]:
    try:
        resolved = run.plan.resolved
    except RunError:
        return []
    return resolved.gpus if resolved.device == "cuda" else []


def picture(now: dict[str, Any]) -> RenderableType:
    """A reading as a table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines: list[RenderableType] = [Text(f"! {warning}", style="yellow") for warning in now["warnings"]]
    if now["gpus"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        columns = _columns(now["gpus"])
        for heading in columns:
            table.add_column(
                heading, no_wrap=True, justify="left" if heading.strip() in ("GPU", "run", "") else "right"
            )
        for gpu in now["gpus"]:
            row = _row(gpu)
            table.add_row(*(row[heading] for heading in columns))
        lines.append(table)
    elif not now["warnings"]:
        lines.append(Text("This machine has no NVIDIA GPU.", style="dim"))
    host = now["host"]
    lines.append(
        Text(
            f"CPU {host['cpu_percent']:.0f} %   RAM {host['memory_used_gib']:.0f}/{host['memory_total_gib']:.0f} GiB"
            f"   disk {host['disk_free_gib']:.0f} GiB free",
            style="dim",
        )
    )
    return Group(*lines)


#: Columns that are left out where no GPU gives their figure.
_SOMETIMES = ("PCIe in/out", "NVLink in/out", "ECC errors", "held back by")


def _columns(gpus: list[dict[str, Any]]) -> list[str]:
    rows = [_row(gpu) for gpu in gpus]
    return [name for name in rows[0] if name not in _SOMETIMES or any(row[name] for row in rows)]


def _row(gpu: dict[str, Any]) -> dict[str, str]:
    """A GPU's cells by their heading; those of one that lacks its figure are empty or a dash."""

    def figure(key: str, unit: str) -> str:
        return f"{gpu[key]:.0f} {unit}" if gpu.get(key) is not None else "–"

    def traffic(kind: str) -> str:
        values = gpu.get(f"{kind}_in_gb_s"), gpu.get(f"{kind}_out_gb_s")
        return "" if values == (None, None) else "/".join("–" if v is None else f"{v:.3g}" for v in values) + " GB/s"

    used, total = gpu.get("memory_used_gib"), gpu.get("memory_total_gib")
    memory, share = ("–", 0.0) if used is None or not total else (f"{used:.1f}/{total:.1f} GiB", used / total)
    corrected, uncorrected = gpu.get("ecc_corrected"), gpu.get("ecc_uncorrected")
    errors = "" if corrected is None and uncorrected is None else f"{corrected or 0} + {uncorrected or 0} lasting"
    return {
        "GPU": str(gpu["index"]),
        "": str(gpu["name"]),
        "memory": memory,
        " ": ("█" * round(share * _BAR)).ljust(_BAR, "░"),
        "load": figure("sm_percent", "%"),
        "power": figure("power_w", "W"),
        "heat": figure("temperature_c", "°C"),
        "clock": figure("sm_clock_mhz", "MHz"),
        "PCIe in/out": traffic("pcie"),
        "NVLink in/out": traffic("nvlink"),
        "ECC errors": errors,
        "held back by": ", ".join(gpu.get("throttle") or []),
        "run": ", ".join(gpu["runs"]) or "–",
    }
