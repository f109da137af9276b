"""Optimiser states by name: what a split run saves is what any other one can go on from."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from finetui.engine.trainers.flat import flatten  # noqa: E402
from finetui.engine.trainers.shards import NAMED, named_groups, numbered  # noqa: E402
from finetui.engine.trainers.tree import opened_tree, write_tree  # noqa: E402

#: Shapes of which the first two are large enough to be joined.
_SHAPES = [(64, 64), (128, 64), (8, 8), (5,)]


def trained() -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"w{i}", torch.nn.Parameter(torch.randn(*shape, generator=generator))) for i, shape in enumerate(_SHAPES)]


def adamw(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.AdamW:
    groups = [{"params": [p for _, p in named[:3]]}, {"params": [p for _, p in named[3:]], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.1)


def step(optimizer: Any, named: list[tuple[str, torch.nn.Parameter]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_states_by_name_serve_an_optimiser_that_has_joined_its_tensors() -> None:
    named = trained()
    whole = adamw(named)
    step(whole, named, 1)
    told = {
        NAMED: copy.deepcopy({name: dict(whole.state[p]) for name, p in named}),
        "param_groups": named_groups(whole, named),
    }  # fmt: skip
    others = trained()
    joined = adamw(others)
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(others, named, strict=True):
            ours.copy_(theirs)
    assert flatten(joined) == 2
    joined.load_state_dict(numbered(joined, others, told))
    assert len(joined.state_dict()["state"]) == 3
    for optimizer, parameters in ((whole, named), (joined, others)):
        step(optimizer, parameters, 2)
    for (_, ours), (_, theirs) in zip(others, named, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_are_read_alone(tmp_path: Path) -> None:
    moment = torch.arange(12.0).reshape(6, 2)
    write_tree(tmp_path / "tree", {"state": {"w": {"moment": moment, "step": torch.tensor(3.0)}}, "rate": 0.1})
    with opened_tree(tmp_path / "tree") as tree:
        state = tree["state"]["w"]
        assert torch.equal(state["moment"].rows(slice(2, 4)), moment[2:4])
        assert state["moment"].rows(slice(6, 6)).shape == (0, 2)
        assert state["step"].rows(slice(2, 4)) == 3
        assert tree["rate"] == 0.1


def test_a_checkpoint_is_put_together_once_the_one_before_is_written(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from finetui.engine.trainers.base import RunTrainer

    done: list[str] = []
    trainer: Any = object.__new__(RunTrainer)
    trainer.state = SimpleNamespace(global_step=4)
    trainer.args = SimpleNamespace(device=torch.device("cpu"), should_save=True, world_size=1)
    trainer.order = SimpleNamespace(rows=8, batch_size=2)
    trainer.identity, trainer.tokens, trainer.optimizer, trainer.on_saved = {}, 0, None, lambda: None
    trainer.saver = SimpleNamespace(
        directory=tmp_path, wait=lambda: done.append("wait"), save=lambda *_: done.append("save")
    )
    trainer.shards = SimpleNamespace(
        state=lambda _: done.append("gather"), split=SimpleNamespace(whole=contextlib.nullcontext)
    )
    trainer._snapshot = lambda *_: None
    trainer._save_checkpoint(None, None)
    assert done == ["wait", "gather", "save"]
    done.clear()
    trainer.shards = None  # what training holds is copied only where there is room
    trainer._save_checkpoint(None, None)
    assert done == ["save"]
