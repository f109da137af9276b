"""Pairs and judged answers, runs over them, and the same training by plain TRL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.events import read_events
from finetui.engine.run import Run

Outputs = Any
ANSWERS = ("red like a rose", "blue like the sky", "green as grass", "as white as snow")


class HostRecorder:
    """Stands in for a GPU: a replay is the call again, between tensors that stay."""

    pool_bytes = 0

    def run(self, call: Callable[[], Outputs]) -> Outputs:
        return call()

    def record(self, call: Callable[[], Outputs], like: Outputs) -> tuple[Callable[[], object], Outputs]:
        outputs = tuple(one.clone() for one in like)

        def replay() -> None:
            for place, made in zip(outputs, call(), strict=True):
                if place.shape != made.shape or place.dtype != made.dtype:
                    raise RuntimeError(f"a replay made {made.dtype} {tuple(made.shape)}, not {tuple(place.shape)}")
                place.copy_(made)

        return replay, outputs

    def forget(self) -> None:
        pass


def pairs(count: int = 24) -> list[dict[str, Any]]:
    """Prompts with a right and a wrong answer, of different lengths."""
    return [
        {
            "prompt": f"{'what is ' * (1 + i % 3)}colour {i}?",
            "chosen": f" {ANSWERS[i % 4]}",
            "rejected": f" {ANSWERS[(i + 1) % 4][: 6 + i % 5]}",
        }
        for i in range(count)
    ]


def judged(count: int = 24) -> list[dict[str, Any]]:
    """Prompts with one answer each, two thirds of them good."""
    rows = pairs(count)
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if i % 3 == 0 else "chosen"],
            "label": i % 3 != 0,
        }
        for i, row in enumerate(rows)
    ]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    """The payloads of one type of event."""
    return [event.data for event in read_events(run.events_path) if event.type == kind]


def losses(run: Run) -> list[float]:
    """The loss of each step; of a repeated step the latest."""
    told = {step["step"]: step["loss"] for step in events(run, "step")}
    return [told[step] for step in sorted(told)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def method_run(training_run: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Makes a run of a method over :func:`pairs` or :func:`judged`, without held-out rows unless asked for."""

    def make(method: str, tuning: str = "lora", recipe: dict[str, Any] | None = None, **plan: Any) -> Run:
        rows = plan.pop("rows", None) or (judged() if method == "kto" else pairs())
        path = write_rows(tmp_path / f"{method}.jsonl", rows)
        asked = {"method": method, "data": str(path), "evaluation": {"holdout": 0.0, "every": 2}}
        knobs = {"method": method, "micro_batch": 4, "learning_rate": 1e-3 if tuning == "full" else 1e-2}
        return training_run("llama", tuning, {**asked, **(recipe or {})}, **{**knobs, **plan})

    return make
