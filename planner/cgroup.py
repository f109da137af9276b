"""What a container lets this process use: memory, CPU time, and how often the kernel has killed for memory.

Linux control groups, version 2 and 1. A limit may sit at any level above this process, and inside a container the
path in ``/proc/self/cgroup`` may not exist below ``/sys/fs/cgroup``, so every level that can be read is asked.
Source: Linux kernel documentation, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that the processes of the tightest group may hold, and hold now (without cache that can be dropped)."""

    limit: int
    used: int


def memory_limit(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> MemoryLimit | None:
    """The tightest memory limit above this process, or None if there is none."""
    found: MemoryLimit | None = None
    for folder in _folders("memory", root, membership):
        for limit_name, used_name, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            # Version 1 writes "no limit" as the largest multiple of a page in 63 bits.
            if limit is None or used is None or limit >= 1 << 60 or (found and found.limit <= limit):
                continue
            cache = _counters(folder / "memory.stat").get(cache_key, 0)
            found = MemoryLimit(limit, max(0, used - cache))
    return found


def usable_cpus(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int:
    """CPU cores this process may keep busy: its affinity, or less by quota; at least 1."""
    cpus = float(len(os.sched_getaffinity(0)))
    for folder in _folders("cpu", root, membership):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            quota, period = int(words[0]), int(words[1])
        if quota and period and quota > 0:
            cpus = min(cpus, quota / period)
    return max(1, math.floor(cpus))


def oom_kills(root: Path = _ROOT, membership: Path = _MEMBERSHIP, vmstat: Path = Path("/proc/vmstat")) -> int:
    """How often the kernel has killed a process for want of memory, in these groups and on this machine.

    Only a rise between two calls means something.
    """
    kills = _counters(vmstat).get("oom_kill", 0)
    for folder in _folders("memory", root, membership):
        for name in ("memory.events", "memory.oom_control"):
            kills += _counters(folder / name).get("oom_kill", 0)
    return kills


def _folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """This process's group of a controller and every group above it, in both versions, where they can be read."""
    for line in _text(membership).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy != "0" and controller not in controllers.split(","):
            continue
        top = root if hierarchy == "0" else root / controller
        group = top / path.strip("/")
        while True:
            if group.is_dir():
                yield group
            if group == top or top not in group.parents:
                break
            group = group.parent


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _counters(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
