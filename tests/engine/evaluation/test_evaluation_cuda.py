"""On a GPU an evaluation says what it says on the CPU, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

from finetui.engine.evaluation.answers import Generation
from finetui.engine.evaluation.evaluation import Wanted, evaluate
from finetui.engine.evaluation.subjects import subjects
from finetui.engine.run import Run

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("tuning", ["lora", "full", "qlora"])
def test_the_same_figures_as_on_the_cpu(trained_run: Callable[..., Run], tuning: str) -> None:
    run = trained_run(tuning=tuning, recipe={"evaluation": {"holdout": 0.4}})

    def figures(device: str, batch: int) -> list[dict[str, float]]:
        wanted: Any = Wanted(batch=batch, answers=4, generation=Generation(6))
        made = evaluate(subjects([str(run.path)], [], device), wanted, lambda *_: None, lambda _: None)
        return [{name: one.figures[name].value for name in ("loss", "bits_per_byte")} for one in made.entries]

    for mine, theirs, alone in zip(figures("cuda", 8), figures("cpu", 8), figures("cuda", 1), strict=True):
        # NF4 products differ between devices in how they are rounded.
        assert mine == pytest.approx(theirs, rel=2e-2 if tuning == "qlora" else 1e-3)
        assert mine == pytest.approx(alone, rel=5e-3 if tuning == "qlora" else 1e-4)
