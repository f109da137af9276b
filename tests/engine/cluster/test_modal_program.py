"""The program for Modal, carried out with a stand-in for the package: what its function does on the machine."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finetui.engine.cluster import modal
from finetui.engine.cluster.attempt import main
from finetui.engine.cluster.job import Job
from finetui.planner.recipe import Recipe


class Anything:
    """Takes every call and every attribute, and notes which were asked for."""

    def __init__(self, notes: list[str], name: str = "modal") -> None:
        self._notes, self._name = notes, name

    def __getattr__(self, name: str) -> Any:
        return Anything(self._notes, f"{self._name}.{name}")

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._notes.append(self._name.removeprefix("modal."))
        # A decorator gives back what it decorates.
        if self._name.endswith((".function()", ".local_entrypoint()")):
            return args[0]
        return Anything(self._notes, f"{self._name}()")


@pytest.fixture
def program(job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """The program as a module whose attempt is a stand-in, and whose machine is a folder of the test."""
    notes: list[str] = []

    def make(attempt: Any) -> Any:
        text = modal.write(job("modal"), tmp_path, "job").text
        text = text.replace("/tmp/finetui", str(tmp_path / "work")).replace("'/root", f"'{tmp_path}/root")
        package = ModuleType("modal")
        package.__getattr__ = lambda name: getattr(Anything(notes), name)  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, "modal", package)
        monkeypatch.setattr(subprocess, "Popen", attempt)
        names: dict[str, Any] = {"__file__": str(tmp_path / "job.py"), "__name__": "job"}
        exec(compile(text, "job.py", "exec"), names)
        return SimpleNamespace(**names, notes=notes)

    return make


def test_it_starts_the_attempt_beside_its_files(
    program: Callable[[Any], Any], job: Callable[..., Job], tmp_path: Path
) -> None:
    called: list[Any] = []

    def attempt(command: list[str], cwd: Path) -> Any:
        called.append((command, cwd))
        return SimpleNamespace(wait=lambda: 75)

    there = program(attempt)
    assert "Image.debian_slim().apt_install().uv_pip_install().add_local_file" in there.notes
    assert there.train() == 75
    [(command, work)] = called
    assert command[:4] == [sys.executable, "-P", "-m", main.__module__]
    assert command[4:] == ["recipe.yaml", "--name", "test-run", "--runs", "runs", "--keep", "/keep"]
    assert (work / "files").readlink() == tmp_path / "root" / "files"
    source = Recipe.load(work / "recipe.yaml").data[0].path
    assert source.endswith("files/0/rows.jsonl")
    assert there.notes[-1] == "Volume.from_name().commit"
    there.train()  # the same container again
    assert (work / "files").is_symlink()


def test_a_container_that_is_taken_away_saves_the_run(program: Callable[[Any], Any]) -> None:
    done: list[Any] = []

    def wait(timeout: float | None = None) -> int:
        done.append(timeout)
        if timeout is None:
            raise KeyboardInterrupt
        return 75

    def attempt(command: list[str], cwd: Path) -> Any:
        return SimpleNamespace(wait=wait, send_signal=done.append)

    there = program(attempt)
    with pytest.raises(KeyboardInterrupt):  # Modal must see it, to call the function again
        there.train()
    assert done == [None, signal.SIGTERM, 25]
    assert there.notes[-1] == "Volume.from_name().commit"
