"""GpuPanel: the run's GPUs, one line each while there is room, else several to a line; and the host."""

from __future__ import annotations

from collections.abc import Callable

from .. import format  # noqa: A004
from ..format import short_name
from .lines import Line, Lines, fitted, length
from .memory_bar import bar

#: Seconds without a reading after which a live GPU is said to have gone quiet.
QUIET_S = 10.0
#: GPUs that get a line of their own; more share lines.
MOST_ROWS = 4
#: Cells that a GPU has among several on a line, and the fewest that it can do with.
_CELL, _LEAST_CELL = 34, 28


def _figure(value: float | None, unit: str, width: int) -> str:
    return (f"{value:.0f} {unit}" if value is not None else "–").rjust(width)


def _marked(text: str, role: str) -> tuple[str, str]:
    """A figure whose colour says that something is wrong also says so with a mark, in the blank before it."""
    bare = text.lstrip(" ")
    return (("!" + bare).rjust(len(text)) if role and len(bare) < len(text) else text, role)


def _heat(value: float | None, warn: float, bad: float) -> str:
    return "" if value is None or value < warn else "warn" if value < bad else "bad"


def gpu_row(gpu: dict, quiet_s: float, width: int) -> Line:
    """One GPU as one line: bar, memory, load, power, temperature and what holds it back."""
    name = short_name(str(gpu.get("name", "?")))[:14].ljust(14 if width >= 72 else 0)
    head: Line = [(f"{gpu.get('index', 0):>2} ", "bold"), (name + " ", "")]
    if silent := _silent(gpu, quiet_s):
        return [*head, (silent, "bad")]
    used, total = gpu.get("memory_used_gib"), gpu.get("memory_total_gib")
    sm, power, heat = gpu.get("sm_percent"), gpu.get("power_w"), gpu.get("temperature_c")
    memory = f"{format.bare_gib(used)}/{format.gib(total)}" if used is not None and total else "–"
    right: Line = [
        (memory.rjust(15), ""),
        (_figure(sm, "%", 6), ""),
        (_figure(power, "W", 7), ""),
        _marked(_figure(heat, "°C", 7), _heat(heat, 83, 90)),
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
    if _silent(gpu, quiet_s):
        return fitted([*head, ("✘ no reading", "bad")], width)
    memory = f"{used:.0f}/{total:.0f}G" if used is not None and total else "–"
    hot = "warn" if gpu.get("throttle") else _heat(heat, 83, 90)
    load = f"{memory:>8}{_figure(sm, '%', 6)}{_figure(power, 'W', 6)}"
    figures: Line = [(load, ""), _marked(_figure(heat, "°C", 6), hot)]
    if length(head) + length(figures) >= width:
        load = f"{memory:>8}{_figure(sm, '%', 6).replace(' %', '%')}{_figure(power, 'W', 7).replace(' W', 'W')}"
        figures = [(load, ""), _marked(_figure(heat, "°C", 6).replace(" °", "°"), hot)]
    room = width - length(head) - length(figures) - 2
    share = used / total if used is not None and total else 0.0
    return fitted([*head, *(bar(share, room - 1) if room >= 7 else []), *figures], width)


def _pair(gpu: dict, first: str, second: str, show: Callable[[float], str]) -> str:
    """Two figures as ``1.2/0.4``, or nothing if the driver gives neither."""
    values = gpu.get(first), gpu.get(second)
    return "" if values == (None, None) else "/".join("–" if value is None else show(value) for value in values)


def _traffic(gb_s: float) -> str:
    return f"{gb_s:.1f}" if gb_s < 9.95 else f"{gb_s:.0f}"


def _silent(gpu: dict, quiet_s: float) -> str:
    """Why there are no figures, or nothing."""
    if quiet_s > QUIET_S:
        return f"✘ no reading for {format.duration(quiet_s)}"
    figures = ("memory_used_gib", "sm_percent", "power_w")
    return "✘ the driver gives no reading" if all(gpu.get(name) is None for name in figures) else ""


def details_row(gpu: dict, quiet_s: float, width: int) -> Line:
    """One GPU as one line: clocks, PCIe and NVLink traffic, memory errors, and all that holds it back."""
    head: Line = [(f"{gpu.get('index', 0):>2} ", "bold")]
    if silent := _silent(gpu, quiet_s):
        return fitted([*head, (silent, "bad")], width)
    clocks = "/".join(f"{gpu[key]:.0f}" for key in ("sm_clock_mhz", "memory_clock_mhz") if gpu.get(key) is not None)
    pcie = _pair(gpu, "pcie_in_gb_s", "pcie_out_gb_s", _traffic)
    link = _pair(gpu, "nvlink_in_gb_s", "nvlink_out_gb_s", _traffic)
    parts: Line = [
        (f"{clocks or '–'} MHz".ljust(14), ""),
        (f"PCIe in/out {pcie} GB/s  " if pcie else "", ""),
        (f"NVLink {link} GB/s  " if link else "", ""),
    ]
    corrected, uncorrected = gpu.get("ecc_corrected"), gpu.get("ecc_uncorrected")
    if uncorrected:
        parts.append((f"✘ {uncorrected} memory errors  ", "bad"))
    elif corrected is not None:
        parts.append((f"ECC {corrected} corrected  ", ""))
    if throttle := ", ".join(gpu.get("throttle") or []):
        parts.append((f"! {throttle}", "warn"))
    if limit := gpu.get("power_limit_w"):
        parts.append((f"  limit {limit:.0f} W", "dim"))
    return fitted([*head, *parts], width)


def details_cell(gpu: dict, quiet_s: float, width: int) -> Line:
    """The same in few cells: SM clock, PCIe (P) and NVLink (N) in GB/s, memory errors (E), ! if held back."""
    head: Line = [(f"{gpu.get('index', 0):>2} ", "bold")]
    if _silent(gpu, quiet_s):
        return fitted([*head, ("✘ no reading", "bad")], width)
    clock = gpu.get("sm_clock_mhz")
    text = f"{clock:.0f} MHz" if clock is not None else "– MHz"
    if pcie := _pair(gpu, "pcie_in_gb_s", "pcie_out_gb_s", _traffic):
        text += f" P{pcie}"
    if link := _pair(gpu, "nvlink_in_gb_s", "nvlink_out_gb_s", _traffic):
        text += f" N{link}"
    errors = gpu.get("ecc_uncorrected")
    figures: Line = [(text, "")]
    if errors is not None:
        figures.append((f" E{errors}", "bad" if errors else ""))
    if gpu.get("throttle"):
        figures.append((" !", "warn"))
    return fitted([*head, *figures], width)


class GpuPanel(Lines):
    """GPUs and host of a run. Shows what its last events said; 0 GPUs is a run on the CPU.

    :attr:`detailed` shows clocks, traffic and errors in place of memory, load, power and temperature.
    """

    TITLED = True

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._gpus: list[tuple[dict, float]] = []
        self._host: dict = {}
        self.detailed = False

    def toggle(self) -> None:
        """Show the other figures."""
        self.detailed = not self.detailed
        self.refresh(layout=True)
        self.redraw()

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
        heard = [gpu for gpu, quiet in self._gpus if not _silent(gpu, quiet)]
        powers = [gpu["power_w"] for gpu in heard if gpu.get("power_w") is not None]
        if powers:
            line.append((f" {sum(powers):,.0f} W", "accent"))
        if self.detailed and self._gpus:
            line.append(("  clocks, traffic, errors", "second"))
        host = self._host
        if host:
            unit, memory = format.memory_unit(), format.bare_gib(host.get("memory_used_gib", 0), 0)
            if host.get("memory_total_gib"):
                memory += f"/{format.bare_gib(host['memory_total_gib'], 0)}"
            disk = format.bare_gib(host.get("disk_free_gib", 0), 0)
            figures = f"CPU {host.get('cpu_percent', 0):.0f}%  RAM {memory} {unit}  disk {disk} {unit} free"
            if len(figures) + sum(len(text) for text, _ in line) + 3 <= width:
                line.append((f"  {figures}", "dim"))
        return line

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if not self._gpus:
            waiting = "no GPU in use" if self._host else "no readings yet"
            return [[(waiting, "dim")]]
        row, short = (details_row, details_cell) if self.detailed else (gpu_row, gpu_cell)
        if len(self._gpus) <= min(MOST_ROWS, height) and width >= 50:
            return [row(gpu, quiet, width) for gpu, quiet in self._gpus]
        per_line = max(width // (_CELL if len(self._gpus) <= MOST_ROWS * (width // _CELL) else _LEAST_CELL), 1)
        cell = width // per_line
        return [
            [span for gpu, quiet in self._gpus[n : n + per_line] for span in short(gpu, quiet, cell)]
            for n in range(0, len(self._gpus), per_line)
        ]
