"""What is gone on from by itself, how often, and with which plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.checkpoints import store
from finetui.engine.events import Failure
from finetui.engine.planning import plan_for
from finetui.engine.run import Run
from finetui.engine.supervision.failure import classify
from finetui.engine.supervision.outcome import Facts, Outcome
from finetui.engine.supervision.recovery import Restarts, again, learn_from_oom, passes, with_less_memory
from finetui.planner.calibration import history
from finetui.planner.plan import Memory, Plan
from finetui.planner.recipe import Recipe
from finetui.planner.state import state_dir

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is "
    "free. Of the allocated memory 9.50 GiB is allocated by PyTorch, and 7.00 GiB is reserved but unallocated."
)


class OutOfMemoryError(RuntimeError):
    """Named like torch's own."""


def crashed(message: str, codes: dict[int, int] | None = None) -> bool:
    facts = Facts("run", codes or {0: 1})
    return passes(facts, Outcome("failed", "crash", message))


@pytest.mark.parametrize(
    ("message", "codes", "expected"),
    [
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", {0: 1}, True),
        ("DistBackendError: NCCL error: remote process exited", {0: 1}, True),
        ("RuntimeError: Connection closed by peer [127.0.0.1]", {0: 1, 1: -9}, True),
        ("rank 0 got SIGSEGV", {0: -11}, True),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", {0: 1}, True),
        ("RuntimeError: CUDA error: device-side assert triggered", {0: 1}, False),
        ("KeyError: 'text'", {0: 1}, False),
        ("rank 0 ended with exit code 3", {0: 3}, False),
    ],
)
def test_what_may_not_happen_again_is_tried_again(message: str, codes: dict[int, int], expected: bool) -> None:
    assert crashed(message, codes) == expected


@pytest.mark.parametrize("cause", ["oom", "nan", "data", "disk", "preempted", "cost"])
def test_named_causes_are_not_tried_again_as_they_are(cause: str) -> None:
    assert not passes(Facts("run", {0: -9}), Outcome("failed", cause, "CUDA error"))  # type: ignore[arg-type]


def test_restarts_count_from_the_last_new_checkpoint(make_run: Callable[..., Run]) -> None:
    run = make_run()
    restarts = Restarts(run, 2)
    assert [restarts.left(), restarts.left(), restarts.left()] == [True, True, False]
    folder = run.path / "checkpoints" / "step-000007"
    folder.mkdir()
    (folder / store.MANIFEST).write_text('{"step": 7, "files": {}}')
    assert restarts.newest() == 7
    assert [restarts.left(), restarts.left(), restarts.left()] == [True, True, False]
    assert restarts.pause_s() <= 30.0


def a_recipe(**more: object) -> Recipe:
    presets = Path(__file__).parents[3] / "presets"
    return Recipe.build(
        {"model": str(presets / "tiny"), "tuning": "full", "data": str(presets / "data" / "train.jsonl"),
         "hardware": {"device": "cpu"}, "sequence_length": 128, "batch_size": 8, "micro_batch": 8, "packing": False,
         **more}
    )  # fmt: skip


def test_half_the_micro_batch_makes_the_same_step() -> None:
    recipe = a_recipe()
    plan = plan_for(recipe)
    new = with_less_memory(recipe, plan)
    assert new is not None
    assert (new.resolved.micro_batch, new.resolved.accumulation) == (4, 2)
    same = dataclasses.replace(new.resolved, micro_batch=8, accumulation=1)
    assert same == plan.resolved  # nothing else has changed
    assert new.memory.device_gib < plan.memory.device_gib
    assert new.reasons[-1].setting == "micro_batch"
    assert Plan.from_dict(new.to_dict()) == new
    least = with_less_memory(
        recipe, dataclasses.replace(plan, resolved=dataclasses.replace(plan.resolved, micro_batch=1))
    )
    assert least is None


def test_no_smaller_plan_where_the_planner_finds_none_that_fits() -> None:
    recipe = a_recipe()
    plan = plan_for(recipe)
    tight = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, device_gib=0.0))
    assert with_less_memory(recipe, tight) is None
    judged = str(Path(recipe.model).parent / "data" / "judged.jsonl")
    preferences = a_recipe(method="kto", micro_batch=2, tuning="lora", data=judged)  # compares rows of a micro batch
    assert with_less_memory(preferences, plan_for(preferences)) is None


@pytest.mark.parametrize("graphs", [True, False])
def test_whether_steps_are_replayed_is_not_decided_anew(graphs: bool) -> None:
    """Else memory and speed of the smaller plan are those of steps that it does not take."""
    recipe = a_recipe(
        model="Qwen/Qwen2.5-0.5B", tuning="lora", packing=True, epochs=400.0, micro_batch=4, batch_size=4,
        hardware={"gpu": "H200"},
    )  # fmt: skip
    plan = plan_for(recipe.with_overrides({"hardware.graphs": graphs}))
    assert plan.resolved.graphs is graphs
    new = with_less_memory(recipe, plan)
    assert new is not None
    micro = new.resolved.micro_batch
    assert new.resolved.graphs is graphs
    expected = plan_for(recipe.with_overrides({"hardware.graphs": graphs, "micro_batch": micro}))
    assert new.speed == expected.speed
    assert new.memory == expected.memory


def test_what_a_rank_held_is_read_from_its_last_words() -> None:
    failure = classify(OutOfMemoryError(TORCH_SAYS), 0, None)
    assert (failure.cause, failure.needed_gib) == ("oom", 10.0)
    assert classify(MemoryError("no room"), 0, None).needed_gib is None


def test_out_of_memory_teaches_the_planner_once(make_run: Callable[..., Run], make_plan: Callable[..., Plan]) -> None:
    terms = {"weights": 4.0, "adapter": 0.0, "optimizer": 0.0, "gradients": 0.0, "activations": 4.0, "logits": 0.0,
             "buffers": 0.0, "context": 0.0}  # fmt: skip
    plan = dataclasses.replace(make_plan(device="cuda", gpus=[0]), memory=Memory(8.0, 8.0, 8.0, 7.0, 9.0, terms))
    run = make_run()
    facts = Facts("run", {0: 1}, [Failure(0, "oom", "out of memory", needed_gib=10.0)])
    learn_from_oom(run, plan, facts)
    (lesson,) = history(state_dir())
    assert lesson.at_least
    assert lesson.memory == pytest.approx(1.5)  # (10 - 4) of (8 - 4)
    learn_from_oom(run, plan, Facts("run", {0: 1}, [Failure(0, "oom", "out of memory", needed_gib=7.0)]))
    assert len(history(state_dir())) == 1  # somebody else had the rest: the plan was right


def test_memory_of_the_machine_is_not_the_gpus(make_run: Callable[..., Run], make_plan: Callable[..., Plan]) -> None:
    """Where the kernel killed a rank, a smaller micro batch is no remedy that the planner could know."""
    run = make_run()
    outcome = Outcome("failed", "oom", "the kernel killed rank 0: the machine's memory ran out")
    assert again(run, run.recipe, make_plan(), Facts("run", {0: -9}, oom_kills=1), outcome, Restarts(run, 3)) is None
