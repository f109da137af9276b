"""Compiled modules are kept exactly where the machine would keep none: for the processes of a run, and for commands."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetui.engine import bytecode


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A library of one module, without its compiled form; this process keeps none by itself."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "a_library.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(bytecode, "_LIBRARIES", ("json", "a_library"))
    monkeypatch.setattr(bytecode, "_PACKAGE", "a_library")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    yield folder
    sys.modules.pop("a_library", None)


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
    bytecode.keep()
    assert sys.pycache_prefix is None


def test_a_prefix_of_the_users_own_stays(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytecode.environment({"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "/somewhere"}) == {}
    monkeypatch.setattr(sys, "pycache_prefix", "/somewhere")
    bytecode.keep()
    assert sys.pycache_prefix == "/somewhere"


def test_a_command_keeps_its_own_and_still_tells_its_children(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bytecode.keep()
    importlib.import_module("a_library")
    assert list((tmp_path / "cache").rglob("a_library.*.pyc"))
    told = bytecode.environment({"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert told["PYTHONPYCACHEPREFIX"] == sys.pycache_prefix


def test_a_home_that_cannot_be_written_changes_nothing(library: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert bytecode.environment({"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path / "file")}) == {}


def test_a_user_without_a_home_has_no_cache() -> None:
    code = (
        "import os, pathlib, pwd\nfrom finetui.engine import folders\n"
        "def nobody(_):\n    raise KeyError\n"
        "pwd.getpwuid = nobody\nos.environ.pop('HOME', None)\n"
        "assert folders.in_cache({}, 'modules') is None\n"
    )
    path = os.pathsep.join([str(Path(bytecode.__file__).parents[2]), *sys.path])
    subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
