"""Optimiser states by name: what a split run saves is what any other one can go on from."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from finetui.engine.models.sharding import rows_of  # noqa: E402
from finetui.engine.trainers.shards import (  # noqa: E402
    BLOCK,
    NAMED,
    Shards,
    blocks_of,
    by_name,
    in_blocks,
    named_groups,
    numbered,
)
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


def test_states_by_name_are_those_of_another_optimiser() -> None:
    named = trained()
    whole = adamw(named)
    step(whole, named, 1)
    told = {
        NAMED: copy.deepcopy({name: dict(whole.state[p]) for name, p in named}),
        "param_groups": named_groups(whole, named),
    }  # fmt: skip
    others = trained()
    second = adamw(others)
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(others, named, strict=True):
            ours.copy_(theirs)
    second.load_state_dict(numbered(second, others, told))
    for optimizer, parameters in ((whole, named), (second, others)):
        step(optimizer, parameters, 2)
    for (_, ours), (_, theirs) in zip(others, named, strict=True):
        assert torch.equal(ours, theirs)


def test_rows_are_read_alone(tmp_path: Path) -> None:
    moment = torch.arange(12.0).reshape(6, 2)
    write_tree(tmp_path / "tree", {"state": {"w": {"moment": moment, "step": torch.tensor(3.0)}}, "rate": 0.1})
    with opened_tree(tmp_path / "tree") as tree:
        state = tree["state"]["w"]
        assert torch.equal(state["moment"].rows(slice(2, 4)), moment[2:4])
        assert state["moment"].rows(slice(6, 6)).shape == (0, 2)
        assert state["step"].rows(slice(2, 4)) == 3
        assert tree["rate"] == 0.1


@pytest.mark.parametrize(("shape", "world", "whole"), [
    ((128, 128), 2, True),
    ((128, 128), 3, True),  # 43, 43 and 42 rows of half a block: the second ends in the middle of one
    ((16, 4096), 3, True),
    ((64, 64), 2, False),  # a share is too small for 8 bits
    ((100, 300), 2, False),
    ((8192,), 2, True),
    ((130, 8192), 64, True),  # 3 rows each, and none for the last ones
])  # fmt: skip
def test_blocks_lie_on_one_rank_each_or_states_stay_wide(shape: tuple[int, ...], world: int, whole: bool) -> None:
    columns = math.prod(shape[1:])
    cuts = [rows_of(shape[0], rank, world) for rank in range(world)]
    ends = [cut.stop * columns for cut in cuts if cut.stop > cut.start]
    whole &= all(end % BLOCK == 0 for end in ends[:-1])
    assert in_blocks(shape, world) is whole
    if whole:
        blocks = [blocks_of(shape, rank, world) for rank in range(world)]
        assert [place for cut in blocks for place in range(cut.start, cut.stop)] == list(
            range(-(-math.prod(shape) // BLOCK))
        )


def test_states_that_can_t_be_cut_for_so_many_ranks_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    from finetui.engine.trainers import shards as module
    from finetui.planner.errors import RunError

    state = {"exp_avg": torch.zeros(100, 300, dtype=torch.int8), "exp_avg_scale": torch.zeros(118), "step": 3}
    write_tree(tmp_path / "tree", {"optimizer": {NAMED: {"w": state}, "param_groups": []}})
    shards: Any = object.__new__(Shards)
    shards._sources, shards.named = {"w": torch.zeros(100, 300)}, []
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    with pytest.raises(RunError, match="8-bit states of w can't be cut for 2 ranks") as caught:
        shards.read(None, tmp_path / "tree")
    assert "one" in (caught.value.do or "")


def test_states_of_bitsandbytes_are_read_by_name_too() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Which tensors have states in 32 bits it remembers by their ids, also of those that are gone.
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    named = [("w", torch.nn.Parameter(torch.ones(64, 128)))]
    optimizer = bitsandbytes.optim.AdamW([p for _, p in named], optim_bits=8)
    named[0][1].grad = torch.ones(64, 128)
    optimizer.step()
    found = by_name(optimizer, named, optimizer.state_dict())["w"]
    assert found.keys() == optimizer.state[named[0][1]].keys()
    assert found["absmax1"].shape == (64 * 128 // BLOCK,)


def test_states_of_embeddings_and_of_what_spans_ranks_stay_in_32_bits(monkeypatch: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from finetui.engine.trainers import shards as module

    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    shards: Any = object.__new__(Shards)
    model = torch.nn.ModuleDict({"words": torch.nn.Embedding(64, 256), "up": torch.nn.Linear(256, 64)})
    shards.split = SimpleNamespace(model=model)
    shards._sources = dict(model.named_parameters())
    shards.named = [
        (name, torch.nn.Parameter(p.detach()[: len(p) // 2].clone())) for name, p in shards._sources.items()
    ]
    mine = dict(shards.named)
    (words, bias) = (mine["words.weight"], mine["up.bias"])
    settled = shards.settled({"lr": 0.1, "wide": [None]})
    assert [id(p) for p in settled["wide"]] == [id(words), id(bias)]
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    monkeypatch.setattr(manager, "module_weight_config_triple", [])
    assert shards.settled({"optim_bits": 8}) == {"optim_bits": 8}
    optimizer = bitsandbytes.optim.AdamW(mine.values(), optim_bits=8)
    for p in mine.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    told = {name: optimizer.state[p]["state1"].dtype for name, p in mine.items()}
    assert told == {"words.weight": torch.float32, "up.weight": torch.uint8, "up.bias": torch.float32}
    assert shards.settled({"lr": 0.1}) == {"lr": 0.1}


def test_a_checkpoint_is_put_together_once_the_one_before_is_written(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from finetui.engine.trainers.base import RunTrainer

    done: list[str] = []
    trainer: Any = object.__new__(RunTrainer)
    trainer.state = SimpleNamespace(global_step=4)
    trainer.args = SimpleNamespace(device=torch.device("cpu"), should_save=True, world_size=1)
    trainer.order = SimpleNamespace(rows=8, batch_size=2)
    trainer.identity, trainer.tokens, trainer.optimizer, trainer.on_saved = {}, 0, None, lambda step: None
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
