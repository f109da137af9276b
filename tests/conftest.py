"""What every test gets, before torch and triton are imported."""

import glob
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Tests run side by side; OpenMP threads that spin while they wait would slow each other down several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton reads this once, when it is imported, which the first test module that needs it does for all.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A test that fails fails everywhere: the same examples on each machine. HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a verb or a supervisor that runs in the test's own process sets is not there for the next test."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many MiB, where that is allowed."""
    made: list[Path] = []

    def mount(mib: int) -> Path:
        folder = tmp_path / f"{mib}-mib"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not allowed here")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
