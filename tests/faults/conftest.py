"""A forge, a tiny model, and the result of a run that nothing happened to; made once for all tests of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from finetui.engine.run import Run

from .harness import Forge, Result, build_run, gone, result_of, wait_until

MakeRun = Callable[..., Run]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder does harm."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.faults)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither see the runs of whoever runs them, nor leave theirs behind."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """Starts supervisors in no time."""
    made = Forge(tmp_path_factory.mktemp("forge") / "forge.log")
    yield made
    made.close()


@pytest.fixture(scope="session")
def ground(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its rows."""
    return forge.ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def a_run(ground: tuple[Path, Path], tmp_path: Path) -> MakeRun:
    """Makes runs of twelve steps."""

    def make(steps: int = 12, ranks: int = 1, root: Path | None = None, **recipe: Any) -> Run:
        return build_run(ground, root or tmp_path / "runs", steps, ranks, **recipe)

    return make


_REFERENCES: dict[tuple[int, int], Result] = {}


@pytest.fixture
def undisturbed(
    forge: Forge, ground: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Result]:
    """What a run of so many steps and ranks comes to if it is left in peace."""

    def of(steps: int = 12, ranks: int = 1) -> Result:
        if (steps, ranks) not in _REFERENCES:
            run = build_run(ground, tmp_path_factory.mktemp("peace"), steps, ranks)
            supervisor = forge.start(run)
            wait_until(lambda: gone(supervisor))
            assert run.recorded.state == "finished", run.recorded
            _REFERENCES[steps, ranks] = result_of(run)
        return _REFERENCES[steps, ranks]

    return of
