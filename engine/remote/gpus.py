"""The GPUs and the host of another machine, over plain ssh: once a second, as its own nvidia-smi and /proc say.

Answers are lines on standard output: a letter and what it tells.

    G <csv>                     one GPU, as in :data:`_FIELDS`
    W <words>                   why there are none
    C <busy> <all>              the CPUs' time so far, in ticks
    M <total> <available>       memory in KiB
    D <free>                    KiB free on the disk of the home folder
    S                           that was all for now
"""

from __future__ import annotations

import csv
import subprocess
from dataclasses import dataclass, field
from typing import Any

from ...planner.errors import RunError
from ..events import GpuSample, HostSample
from .machine import Host

#: What nvidia-smi is asked (``nvidia-smi --help-query-gpu``): names, MiB, percent, watt, degrees Celsius, MHz.
_FIELDS = (
    "index", "name", "memory.used", "memory.total", "utilization.gpu", "power.draw", "temperature.gpu", "clocks.sm",
)  # fmt: skip

#: A reading comes after a second, because the CPU's load is what happened within it.
WATCH = (
    r"""
export LC_ALL=C
while :; do
  sleep 1
  if command -v nvidia-smi >/dev/null 2>&1; then
    gpus=$(nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits 2>&1) && mark=G || mark=W
    printf '%s\n' "$gpus" | sed "s/^/$mark /"
  else
    echo 'W nvidia-smi is not there'
  fi
  awk '$1 == "cpu" { for (n = 2; n <= 9; n++) all += $n; print "C", all - $5 - $6, all }' /proc/stat
  awk '$1 == "MemTotal:" { all = $2 } $1 == "MemAvailable:" { print "M", all, $2 }' /proc/meminfo
  df -Pk "$HOME" | awk 'NR == 2 { print "D", $4 }'
  echo S || exit
done
"""
).replace("FIELDS", ",".join(_FIELDS))


@dataclass
class Reading:
    """What a machine said at one moment; ``trouble`` is why its GPUs can't be watched."""

    gpus: list[GpuSample] = field(default_factory=list)
    host: HostSample = field(default_factory=lambda: HostSample(0.0, 0.0, 0.0))
    trouble: str = ""


class RemoteMonitor:
    """Reads another machine through one ssh process until :meth:`close`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self._ticks = (0, 0)

    def read(self) -> Reading:
        """Wait for the next reading: about a second.

        Raises:
            RunError: the machine can't be reached, or the connection ended.
        """
        if self._process is None:
            self._process = self._host.start(WATCH)
        assert self._process.stdout is not None
        reading, figures = Reading(), {"C": [0, 0], "M": [0, 0], "D": [0]}
        for raw in self._process.stdout:
            kind, _, rest = raw.decode("utf-8", "replace").strip().partition(" ")
            if kind == "G":
                reading.gpus += gpu_of(rest)
            elif kind == "W":
                reading.trouble = reading.trouble or rest
            elif kind in figures and all(word.isdigit() for word in rest.split()):
                figures[kind] = [int(word) for word in rest.split()]
            elif kind == "S":
                reading.host = self._host_of(figures)
                return reading
        what = self._host.complaint() or "the connection ended"
        raise RunError(what, where=self._host.address, do=f"Try: ssh {self._host.address}")

    def _host_of(self, figures: dict[str, list[int]]) -> HostSample:
        (busy, ticks), (total, available), (free,) = figures["C"], figures["M"], figures["D"]
        busy_before, ticks_before = self._ticks
        self._ticks = busy, ticks
        percent = 100 * (busy - busy_before) / (ticks - ticks_before) if ticks > ticks_before else 0.0
        return HostSample(round(percent, 1), (total - available) / 2**20, free / 2**20, memory_total_gib=total / 2**20)

    def close(self) -> None:
        """End the connection's process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def gpu_of(line: str) -> list[GpuSample]:
    """One GPU from a line of nvidia-smi's; none from any other line. Figures that it does not have are None."""
    cells = next(csv.reader([line], skipinitialspace=True), [])
    if len(cells) != len(_FIELDS) or not cells[0].isdigit():
        return []
    figures: list[Any] = []
    for cell in cells[2:]:
        try:
            figures.append(float(cell))
        except ValueError:  # [N/A], [Not Supported], [Unknown Error]
            figures.append(None)
    used, total, load, power, heat, clock = figures
    used, total = (None if value is None else round(value / 1024, 3) for value in (used, total))
    return [GpuSample(int(cells[0]), cells[1], used, total, load, power, heat, clock, [])]
