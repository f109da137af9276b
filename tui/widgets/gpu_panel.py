"""GpuPanel: the run's GPUs, one line each while there is room, else several to a line; and the host."""

from __future__ import annotations

import re

from .. import format  # noqa: A004
from .lines import Line, Lines, fitted, length
from .memory_bar import bar

#: Seconds without a reading after which a live GPU is said to have gone quiet.
QUIET_S = 10.0
#: GPUs that get a line of their own; more share lines.
MOST_ROWS = 4
_CELL = 34
_NOISE = re.compile(r"\b(NVIDIA|GeForce|Tesla|Quadro|Graphics|Device|HBM\w*|PCIe)\b")


def short_name(name: str) -> str:
    """A GPU's name without what all of them have in common."""
    return re.sub(r"[ -]+", " ", _NOISE.sub("", name)).strip() or name


def _figure(value: float | None, unit: str, width: int) -> str:
    return (f"{value:.0f} {unit}" if value is not None else "–").rjust(width)


def _heat(value: float | None, warn: float, bad: float) -> str:
    return "" if value is None or value < warn else "warn" if value < bad else "bad"


def gpu_row(gpu: dict, quiet_s: float, width: int) -> Line:
    """One GPU as one line: bar, memory, load, power, temperature and what holds it back."""
    name = short_name(str(gpu.get("name", "?")))[:14].ljust(14 if width >= 72 else 0)
    head: Line = [(f"{gpu.get('index', 0):>2} ", "bold"), (name + " ", "")]
    if quiet_s > QUIET_S:
        return [*head, (f"✘ no reading for {format.duration(quiet_s)}", "bad")]
    used, total = gpu.get("memory_used_gib"), gpu.get("memory_total_gib")
    sm, power, heat = gpu.get("sm_percent"), gpu.get("power_w"), gpu.get("temperature_c")
    if used is None and sm is None and power is None:
        return [*head, ("✘ the driver gives no reading", "bad")]
    memory = f"{used:.1f}/{total:.1f} GiB" if used is not None and total else "–"
    right: Line = [
        (memory.rjust(15), ""),
        (_figure(sm, "%", 6), ""),
        (_figure(power, "W", 7), ""),
        (_figure(heat, "°C", 7), _heat(heat, 83, 90)),
    ]
    throttle = ", ".join(gpu.get("throttle") or [])
    if throttle:
        right.append((f"  ! {throttle}"[:18], "warn"))
    room = width - sum(len(text) for text, _ in [*head, *right]) - 1
    share = used / total if used is not None and total else 0.0
    middle = [*bar(share, room), (" ", "")] if room >= 6 else []
    return [*head, *middle, *right]


def gpu_cell(gpu: dict, quiet_s: float, width: int) -> Line:
    """One GPU in few cells: index, memory, load, power, temperature."""
    head: Line = [(f"{gpu.get('index', 0):>2} ", "bold")]
    used, total = gpu.get("memory_used_gib"), gpu.get("memory_total_gib")
    sm, power, heat = gpu.get("sm_percent"), gpu.get("power_w"), gpu.get("temperature_c")
    if quiet_s > QUIET_S or (used is None and sm is None and power is None):
        return fitted([*head, ("✘ no reading", "bad")], width)
    memory = f"{used:.0f}/{total:.0f}G" if used is not None and total else "–"
    hot = "warn" if gpu.get("throttle") else _heat(heat, 83, 90)
    figures: Line = [(f"{memory:>8}{_figure(sm, '%', 6)}{_figure(power, 'W', 6)}", ""), (_figure(heat, "°C", 6), hot)]
    room = width - length(head) - length(figures) - 2
    share = used / total if used is not None and total else 0.0
    return fitted([*head, *(bar(share, room - 1) if room >= 7 else []), *figures], width)


class GpuPanel(Lines):
    """GPUs and host of a run. Shows what its last events said; 0 GPUs is a run on the CPU."""

    TITLED = True

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._gpus: list[tuple[dict, float]] = []
        self._host: dict = {}

    def show(self, gpus: list[tuple[dict, float]], host: dict) -> None:
        """Draw GPUs, each with the seconds since its last reading, and the host."""
        rows = self.lines_needed(self.size.width)
        self._gpus, self._host = gpus, host
        if rows != self.lines_needed(self.size.width):
            self.refresh(layout=True)
        self.redraw()

    def title(self, width: int) -> Line:
        """How many GPUs, what they draw together, and the host."""
        line: Line = [("GPUs" if self._gpus else "host", "bold")]
        powers = [gpu["power_w"] for gpu, _ in self._gpus if gpu.get("power_w") is not None]
        if powers:
            line.append((f" {sum(powers):,.0f} W", "accent"))
        host = self._host
        if host:
            memory = f"{host.get('memory_used_gib', 0):.0f}"
            if host.get("memory_total_gib"):
                memory += f"/{host['memory_total_gib']:.0f}"
            cpu, disk = host.get("cpu_percent", 0), host.get("disk_free_gib", 0)
            figures = f"CPU {cpu:.0f}%  RAM {memory} GiB  disk {disk:,.0f} GiB free"
            if len(figures) + sum(len(text) for text, _ in line) + 3 <= width:
                line.append((f"  {figures}", "dim"))
        return line

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if not self._gpus:
            waiting = "no GPU in use" if self._host else "no readings yet"
            return [[(waiting, "dim")]]
        if len(self._gpus) <= min(MOST_ROWS, height) and width >= 50:
            return [gpu_row(gpu, quiet, width) for gpu, quiet in self._gpus]
        per_line = max(width // _CELL, 1)
        cell = width // per_line
        return [
            [span for gpu, quiet in self._gpus[n : n + per_line] for span in gpu_cell(gpu, quiet, cell)]
            for n in range(0, len(self._gpus), per_line)
        ]
