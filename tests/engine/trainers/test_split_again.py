"""A run that was not split, for a while or from its start, goes on in shards from its checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from finetui.engine.run import Run  # noqa: E402
from finetui.engine.supervision.spread import spread  # noqa: E402
from finetui.engine.trainers.shards import NAMED, Shards, by_name  # noqa: E402
from finetui.engine.trainers.tree import write_tree  # noqa: E402
from finetui.engine.worker import attempt  # noqa: E402
from finetui.planner.errors import RunError  # noqa: E402

from .conftest import losses  # noqa: E402
from .test_sharded import on_two_ranks, require_alike, require_went_on  # noqa: E402

MakeRun = Callable[..., Run]


def parameters(count: int = 3) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"w{number}", torch.nn.Parameter(torch.ones(number + 1))) for number in range(count)]


def adamw(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.AdamW:
    """Two groups, in which the parameters are not in the order of the model."""
    optimizer = torch.optim.AdamW([{"params": [p for _, p in named[1:]]}, {"params": [named[0][1]]}])
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_states_by_number_are_found_by_name() -> None:
    named = parameters()
    optimizer = adamw(named)
    found = by_name(optimizer, named, optimizer.state_dict())
    assert {name: state["exp_avg"].shape for name, state in found.items()} == {name: p.shape for name, p in named}
    assert by_name(optimizer, named, {NAMED: found}) is found


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    write_tree(tmp_path / "optimizer.safetensors", {"optimizer": adamw(parameters(4)).state_dict()})
    named = parameters()
    shards: Any = object.__new__(Shards)
    shards.named, shards._sources = named, {name: SimpleNamespace(shape=p.shape) for name, p in named}
    with pytest.raises(RunError, match="other parameters"):
        shards.read(adamw(named), tmp_path / "optimizer.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_one_process_then_two_with_half_of_the_model_each(
    training_run: MakeRun, power_cut: Callable[..., AbstractContextManager[None]], tuning: str
) -> None:
    more: dict[str, Any] = {"steps": 6, "micro_batch": 2, "accumulation": 4}
    whole, moved = training_run("llama", tuning, **more), training_run("llama", tuning, **more)
    assert attempt(whole) == 0
    with power_cut():
        assert attempt(moved) != 0
    assert len(losses(moved)) == 3
    resolved = dataclasses.replace(moved.plan.resolved, gpus=[0, 1], strategy="fsdp", accumulation=2)
    dataclasses.replace(moved.plan, resolved=resolved).save(moved.path / "plan.json")
    on_two_ranks(moved)
    require_went_on(moved)
    require_alike(moved, whole)


@pytest.mark.parametrize(("asked", "strategy"), [("auto", "ddp"), ("fsdp", "fsdp"), ("ddp", "ddp")])
def test_a_run_that_was_to_be_split_is_split_again_on_more_gpus(
    training_run: MakeRun, asked: str, strategy: str
) -> None:
    run = training_run("llama", "lora", {"hardware": {"device": "cpu", "strategy": asked}}, accumulation=2)
    run.update(state="stopped")
    assert spread(run, 2).resolved.strategy == strategy
    assert spread(run, 1).resolved.strategy == "single"
    assert spread(run, 2).resolved.strategy == strategy
