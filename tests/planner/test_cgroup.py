"""Limits of containers, read from copies of the kernel's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetui.planner.cgroup import MemoryLimit, memory_limit, oom_kills, usable_cpus


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Stands for /sys/fs/cgroup."""
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def member(root: Path, *lines: str) -> Path:
    path = root.parent / "membership"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_version_2_takes_the_tightest_level_and_leaves_out_cache(root: Path) -> None:
    me = member(root, "0::/a/b")
    put(root / "a", memory__max="1000", memory__current="900", memory__stat="anon 1\ninactive_file 300")
    put(root / "a/b", memory__max="max", memory__current="800", cpu__max="150000 100000")
    assert memory_limit(root, me) == MemoryLimit(1000, 600)
    put(root / "a/b", memory__max="500")
    assert memory_limit(root, me) == MemoryLimit(500, 800)
    put(root / "a", memory__events="oom 1\noom_kill 2")
    assert oom_kills(root, me, vmstat=root / "none") == 2
    assert usable_cpus(root, me) == 1


def test_version_1_reads_its_own_files_and_its_word_for_no_limit(root: Path) -> None:
    me = member(root, "4:memory:/job", "1:cpu,cpuacct:/", "0::/")
    put(root / "memory/job", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="10")
    put(root / "memory", memory__limit_in_bytes="2000", memory__usage_in_bytes="700")
    assert memory_limit(root, me) == MemoryLimit(2000, 700)
    put(root / "memory/job", memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 3")
    assert oom_kills(root, me, vmstat=root / "none") == 3
    put(root / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert usable_cpus(root, me) == len(os.sched_getaffinity(0))


def test_inside_a_container_the_path_of_the_host_is_not_there(root: Path) -> None:
    me = member(root, "0::/kubepods/pod1")
    put(root, memory__max="4096", memory__current="96")
    assert memory_limit(root, me) == MemoryLimit(4096, 96)


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert memory_limit(nowhere, nowhere) is None
    assert usable_cpus(nowhere, nowhere) == len(os.sched_getaffinity(0))
    assert oom_kills(nowhere, nowhere, nowhere) == 0
