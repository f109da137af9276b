"""Compiled modules are kept for the ranks exactly where the machine would keep none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetui.engine import bytecode


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one module, without its compiled form."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "a_library.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(bytecode, "_LIBRARY", "a_library")
    return folder


def test_an_image_that_forbids_compiled_modules_gets_a_cache_that_works(library: Path, tmp_path: Path) -> None:
    present = {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    wanted = bytecode.environment(present)
    command = [sys.executable, "-c", "import a_library"]
    subprocess.run(command, check=True, env={**os.environ, **present, **wanted, "PYTHONPATH": str(library)})
    assert list((tmp_path / "cache").rglob("a_library.*.pyc"))
    assert not (library / "__pycache__").exists()


@pytest.mark.parametrize("present", [{}, {"PYTHONDONTWRITEBYTECODE": ""}])
def test_where_python_writes_them_itself_nothing_changes(library: Path, present: dict[str, str]) -> None:
    assert bytecode.environment(present) == {}


def test_what_is_compiled_already_is_used(library: Path) -> None:
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(library)], check=True)
    assert bytecode.environment({"PYTHONDONTWRITEBYTECODE": "1"}) == {}


def test_a_prefix_of_the_users_own_stays(library: Path) -> None:
    assert bytecode.environment({"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "/somewhere"}) == {}
