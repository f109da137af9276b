"""Which process is meant by a number."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

from finetui.engine.process import Identity, has_open, this_process


def test_a_process_lives_until_it_ends_and_no_other_takes_its_place() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = this_process()
    assert me.lives
    ticks = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    other = Identity(child.pid, ticks, me.boot)
    assert other.lives
    assert not dataclasses.replace(other, ticks=ticks + 1).lives
    assert not dataclasses.replace(other, boot="another").lives
    child.kill()
    child.communicate()
    assert not other.lives


def test_a_moved_file_is_still_open_and_a_copied_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "supervisor.lock"
    with open(path, "w") as _held:
        assert has_open(this_process().pid, path) is True
        shutil.copytree(tmp_path / "a", tmp_path / "copy")
        assert has_open(this_process().pid, tmp_path / "copy" / "supervisor.lock") is False
        (tmp_path / "a").rename(tmp_path / "b")
        assert has_open(this_process().pid, tmp_path / "b" / "supervisor.lock") is True
    assert has_open(this_process().pid, tmp_path / "b" / "supervisor.lock") is None
