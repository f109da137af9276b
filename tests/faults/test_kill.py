"""``kill -9`` at random moments: every run ends with the results of one that was left in peace, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.run import Run

from .harness import Forge, Killer, Result, require_orderly, result_of, watched

MakeRun = Callable[..., Run]


@pytest.mark.parametrize(
    ("kills", "ranks"),
    [
        pytest.param(6, 1, id="short"),
        pytest.param(150, 1, id="long", marks=pytest.mark.slow),
        pytest.param(50, 2, id="two-ranks", marks=pytest.mark.slow),
    ],
)
def test_killed_runs_come_to_the_same_end(
    forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result], tmp_path: Path, kills: int, ranks: int
) -> None:
    expected = undisturbed(12, ranks)
    assert len(expected.steps) == 12
    assert expected.output
    report = tmp_path / "watched.txt"
    (tmp_path / "runs").mkdir()
    lines = Path(os.environ.get("FINETUI_FAULTS_LOG", tmp_path / "kills.txt"))
    killer = Killer(forge, kills, seed=kills, log=lambda line: _append(lines, line))

    def check(run: Run) -> None:
        assert result_of(run) == expected
        require_orderly(run)

    with watched(tmp_path / "runs", report) as violations:
        killer.torment(lambda: a_run(12, ranks), check)
        assert violations() == []
    assert sum(killer.done.values()) == kills
    assert "looked" in report.read_text()
    _append(lines, f"{kills} kills with {ranks} ranks: {killer.done}; the watcher {report.read_text().strip()}")


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
