"""A dataset in a folder of the test, and jobs for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.cluster.job import Ask, Job, make_job
from finetui.planner.recipe import Recipe

MODEL = "Qwen/Qwen3-8B"


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small dataset under a name of the test's."""

    def write(name: str = "rows.jsonl") -> Path:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": "how are you", "completion": "well enough"}
        path.write_text(f"{json.dumps(row)}\n" * 200, encoding="utf-8")
        return path

    return write


@pytest.fixture
def job(rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Job]:
    """Makes a job for a system; keys of the recipe are given with dots, of the wish without."""

    def make(system: Any, recipe: dict[str, Any] | None = None, *, has_token: bool = False, **ask: Any) -> Job:
        tree: dict[str, Any] = {"model": MODEL, "tuning": "qlora", "hardware": {"gpu": "H100"}, **(recipe or {})}
        tree.setdefault("data", [{"path": str(rows())}])
        return make_job(Recipe.build(tree), Ask(system, **{"name": "test-run", **ask}), has_token=has_token)

    return make
