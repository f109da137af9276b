"""From exceptions to causes and advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from finetui.engine.supervision.failure import classify, memory_levers
from finetui.planner.errors import DataError, RecipeError, TrainingError
from finetui.planner.plan import Plan


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (TrainingError("the loss was not finite", cause="nan"), "nan"),
        (DataError("no token is trained", where="rows.jsonl"), "data"),
        (RecipeError("unknown key"), "crash"),
        (OSError(28, "No space left on device"), "disk"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crash"),
    ],
)
def test_causes(error: Exception, cause: str, make_plan: Callable[..., Plan]) -> None:
    failure = classify(error, 3, make_plan().resolved)
    assert (failure.cause, failure.rank) == (cause, 3)


def test_a_crash_names_error_and_place() -> None:
    try:
        {}["absent"]  # type: ignore[index]
    except KeyError as error:
        failure = classify(error, 0, None)
    assert failure.message == "KeyError: 'absent'"
    assert failure.where.startswith("test_failure.py:")
    assert "log/rank0.log" in failure.do


def test_levers_against_a_lack_of_memory_are_those_not_pulled_yet(make_plan: Callable[..., Plan]) -> None:
    resolved = make_plan().resolved
    large = dataclasses.replace(resolved, micro_batch=8, sequence_length=4096)
    advice = memory_levers(large)
    for lever in ("micro_batch: 4", "checkpointing: full", "adamw-8bit", "tuning: qlora", "sequence_length: 2048"):
        assert lever in advice
    least = dataclasses.replace(
        resolved, micro_batch=1, checkpointing="full", optimizer="adamw-8bit", tuning="qlora", sequence_length=256
    )
    assert memory_levers(least) == "Use a GPU with more memory."
