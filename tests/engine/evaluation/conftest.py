"""Runs that have been trained for a moment, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.run import Run


@pytest.fixture
def trained_run(training_run: Callable[..., Run]) -> Callable[..., Run]:
    """:func:`training_run`, carried out."""

    def make(*words: Any, **knobs: Any) -> Run:
        from finetui.engine.worker import attempt

        run = training_run(*words, **knobs)
        assert attempt(run) == 0, run.events_path.read_text()
        run.update(state="finished")
        return run

    return make


@pytest.fixture
def evaluated() -> Callable[..., Any]:
    """Evaluates runs or models on the CPU and gives the tree that is kept, and what was warned of."""

    def evaluate(*targets: str | Path | Run, checkpoints: list[str] | None = None, **wanted: Any) -> dict[str, Any]:
        from finetui.engine.evaluation.answers import Generation
        from finetui.engine.evaluation.evaluation import Wanted, evaluate
        from finetui.engine.evaluation.records import as_tree, samples
        from finetui.engine.evaluation.subjects import subjects

        wanted = {"generation": Generation(8), "answers": 0, **wanted}
        words = [str(target.path) if isinstance(target, Run) else str(target) for target in targets]
        done = evaluate(subjects(words, checkpoints or [], "cpu"), Wanted(**wanted), lambda *_: None, lambda _: None)
        return {**as_tree(done), "samples": samples(done), "evaluation": done}

    return evaluate


def figures(tree: dict[str, Any], label: str | None = None) -> dict[str, float]:
    """The values of one model's figures; of the last one unless it is named."""
    model = next(one for one in reversed(tree["models"]) if label is None or one["label"] == label)
    return {name: figure["value"] for name, figure in model["figures"].items()}
