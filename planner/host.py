"""The host's memory and cores, as far as this process may use them.

Read from the files of the kernel where there are some: importing psutil takes 20 ms, much for a plan that takes 200.
"""

from __future__ import annotations

import os
from pathlib import Path

from .cgroup import memory_limit, usable_cpus

_MEMINFO = Path("/proc/meminfo")
_CPUS = Path("/sys/devices/system/cpu")


def host_memory() -> tuple[int, int]:
    """Bytes of memory in all and free, of this container where it has a limit of its own."""
    total, free = _memory()
    limit = memory_limit()
    if limit is None or limit.limit >= total:
        return total, free
    return limit.limit, min(free, max(limit.limit - limit.used, 0))


def cores() -> int:
    """Physical cores that this process may keep busy; at least 1."""
    siblings = {_text(path) for path in _CPUS.glob("cpu[0-9]*/topology/core_cpus_list")} - {""}
    if siblings and hasattr(os, "sched_getaffinity"):
        return max(1, min(len(siblings), usable_cpus()))
    import psutil

    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def _memory() -> tuple[int, int]:
    lines = (line.split() for line in _text(_MEMINFO).splitlines())
    kib = {words[0]: int(words[1]) for words in lines if len(words) == 3 and words[1].isdigit()}
    if {"MemTotal:", "MemAvailable:"} <= kib.keys():
        return 1024 * kib["MemTotal:"], 1024 * kib["MemAvailable:"]
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
