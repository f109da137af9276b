"""What a trainer does with a model in shards: the optimiser steps over this rank's rows alone.

Each shard becomes a plain parameter over the same memory, and an optimiser that works element by element needs to know
no more: its states are as large as the shards, and its step sends nothing. What takes a whole gradient to know, its
norm, is one sum over the ranks.

8-bit states share a scale among 256 neighbours. Where each rank's rows are whole blocks, the scales of all ranks are
end to end those of the whole tensor; where they are not, the states stay in 32 bits, as those of small tensors do.

A checkpoint has the states whole and under the names of their parameters, so that any number of ranks can go on from
it, one included; each reads its own rows out of the file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ...planner.errors import RunError
from ..models.adapter_rows import rows_of
from ..models.landing import Landing
from ..models.sharding import Split, gathered
from .tree import Stored, loaded, opened_tree

#: 8-bit states share a scale among so many neighbours, and tensors below so many values have none
#: (:mod:`finetui.kernels.adamw`, and bitsandbytes' ``optimizer_update_8bit_blockwise`` and ``min_8bit_size``).
BLOCK, SMALLEST = 256, 4096
#: What these optimisers call the scales of blocks, and the tables of what codes stand for.
_SCALES = frozenset({"exp_avg_scale", "exp_avg_sq_scale", "absmax1", "absmax2"})
_TABLES = frozenset({"qmap1", "qmap2"})
#: Under this key bitsandbytes puts scales and tables when it is asked for its states (``Optimizer8bit.state_dict``).
WRAPPED = "__bnb_optimizer_quant_state__"
#: Under this key a checkpoint has states by name; without it they are as the optimiser itself numbers them.
NAMED = "named"


class Shards:
    """The trained shards of a model as an optimiser sees them.

    Args:
        split: of :func:`..models.sharding.split`.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._sources = {name: p for name, p in split.parameters.items() if p.requires_grad}
        self.named = [(name, nn.Parameter(rows)) for name, rows in split.rows().items()]
        """This rank's rows by name, in the order of the model."""

    def take_gradients(self) -> None:
        """Hand the gradients of a step, averaged and split by now, over to the shards; once more has no effect."""
        taken = self.split.take_gradients()
        for name, shard in self.named:
            if name in taken and shard.numel():  # some optimisers can't step over nothing
                shard.grad = taken[name]

    def norm(self) -> Tensor:
        """The norm of the gradient of all parameters, the same on every rank."""
        gradients = [p.grad for _, p in self.named if p.grad is not None and p.grad.numel()]
        device = self.named[0][1].device
        square = torch.zeros((), dtype=torch.float64, device=device)
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
            square = norms.double().square().sum()
        dist.all_reduce(square)
        return square.sqrt().float()

    def over_ranks(self, norms: Tensor) -> Tensor:
        """Norms of whole tensors, of those of their shards."""
        squares = norms.double().square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def clip(self, optimizer: Any, max_norm: float) -> Tensor:
        """The norm before clipping; what is longer than ``max_norm`` (0: whatever is) is shortened to it."""
        self.take_gradients()
        norm = self.norm()
        if max_norm <= 0:
            return norm
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if hasattr(inner, "scale_gradients"):  # by the step that reads them anyway
            inner.scale_gradients(torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), torch.nan))
            return norm
        # As torch.nn.utils.clip_grad_norm_ has it.
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def settled(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of an optimiser with 8-bit states, by which those of some shards stay in 32 bits: where blocks
        would span ranks, and of embeddings, whose gradients are far from evenly spread (arXiv:2110.02861)."""
        world = dist.get_world_size()
        tables = {f"{path}.weight" for path, m in self.split.model.named_modules() if isinstance(m, nn.Embedding)}
        wide = [p for n, p in self.named if n in tables or not in_blocks(self._sources[n].shape, world)]
        if "wide" in given:
            return {**given, "wide": wide}
        if given.get("optim_bits") == 8:
            from bitsandbytes.optim import GlobalOptimManager

            for shard in wide:
                place = SimpleNamespace(weight=shard)
                GlobalOptimManager.get_instance().register_module_override(place, "weight", {"optim_bits": 32})
        return given

    def state(self, optimizer: Any) -> dict[str, Any] | None:
        """What a checkpoint keeps of an optimiser over these shards, on rank 0; every rank has to come here."""
        inner = getattr(optimizer, "optimizer", optimizer)
        with contextlib.closing(Landing(self.named[0][1].device)) as landing:
            found = {
                name: self._whole_state(name, shard, inner.state.get(shard, {}), landing) for name, shard in self.named
            }
        groups = named_groups(inner, self.named)
        return {NAMED: found, "param_groups": groups} if dist.get_rank() == 0 else None

    def _whole_state(self, name: str, shard: Tensor, state: Mapping[str, Any], landing: Landing) -> dict[str, Any]:
        shape, whole = self._sources[name].shape, dict[str, Any]()
        for key, value in sorted(state.items()):
            if not isinstance(value, Tensor):
                whole[key] = value
            elif not value.dim():
                whole[key] = value.detach().to("cpu", copy=True)  # training goes on while this is written
            elif key in _TABLES:
                whole[key] = value.to("cpu", copy=True)
            elif key in _SCALES:
                count = -(-shape.numel() // BLOCK)
                whole[key] = gathered(value, [count], landing, lambda _, *at: blocks_of(shape, *at))
            else:
                assert value.shape == shard.shape, f"{key} of {name} is not of the shape of its weight"
                # Paged states are no tensors of a device as far as torch knows.
                whole[key] = gathered(value.to(shard.device), shape, landing)
        return whole

    def read(self, optimizer: Any, path: Path) -> dict[str, Any]:
        """A checkpoint's tree of training state, with the optimiser's as that takes it: this rank's rows alone.

        Raises:
            RunError: its 8-bit states can't be cut for so many ranks, or it is of an optimiser over other parameters.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        with opened_tree(path) as tree:
            rest = loaded({key: value for key, value in tree.items() if key != "optimizer"})
            try:
                states: dict[str, dict[str, Any]] = by_name(optimizer, self.named, tree["optimizer"])
            except ValueError:
                what, do = "its optimiser is of other parameters than this run's", "Resume with as many GPUs as before."
                raise RunError(what, where=str(path.parent), do=do) from None
            for name, state in states.items():
                if not _SCALES.isdisjoint(state) and not in_blocks(self._sources[name].shape, world, smallest=0):
                    what = f"the 8-bit states of {name} can't be cut for {world} ranks: blocks would span them"
                    raise RunError(what, where=str(path.parent), do="Resume with as many GPUs as before, or with one.")
            mine = {
                name: {key: self._mine(name, key, value, rank, world) for key, value in state.items()}
                for name, state in states.items()
            }
            told = {NAMED: mine, "param_groups": loaded(tree["optimizer"]["param_groups"])}
            return {**rest, "optimizer": numbered(optimizer, self.named, told)}

    def _mine(self, name: str, key: str, value: Any, rank: int, world: int) -> Any:
        if not isinstance(value, Stored):
            return value
        if key in _TABLES:
            return value.whole()
        shape = self._sources[name].shape
        return value.rows(blocks_of(shape, rank, world) if key in _SCALES else rows_of(shape[0], rank, world))


def in_blocks(shape: Sequence[int], world: int, *, smallest: int = SMALLEST) -> bool:
    """Whether each rank's rows of a tensor are blocks of their own, and no fewer values than ``smallest``.

    The last rank's may end in a part of one, as the whole tensor does.
    """
    columns = math.prod(shape[1:])
    cuts = [rows_of(shape[0], rank, world) for rank in range(world)]
    sizes = [size for cut in cuts if (size := (cut.stop - cut.start) * columns)]
    return all(size >= smallest for size in sizes) and all(size % BLOCK == 0 for size in sizes[:-1])


def blocks_of(shape: Sequence[int], rank: int, world: int) -> slice:
    """Which of a tensor's blocks a rank has, where :func:`in_blocks` holds."""
    rows, columns = rows_of(shape[0], rank, world), math.prod(shape[1:])
    return slice(*(-(-end * columns // BLOCK) for end in (rows.start, rows.stop)))


def named_groups(optimizer: Any, named: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """The groups of an optimiser with its parameters by name."""
    names = {id(p): name for name, p in named}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def by_name(optimizer: Any, named: Iterable[tuple[str, Tensor]], told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """States by the names of their parameters, also of a run that was not split, which has them by numbers.

    Args:
        optimizer: over the same parameters, in the same groups.
        named: its parameters.
        told: what a checkpoint has of an optimiser.

    Raises:
        ValueError: it is of other groups.
    """
    if NAMED in told:
        states: dict[str, dict[str, Any]] = told[NAMED]
        return states
    inner = getattr(optimizer, "optimizer", optimizer)
    names, found = {id(p): name for name, p in named}, dict[str, dict[str, Any]]()
    for group, saved in zip(inner.param_groups, told["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            state = dict(told["state"].get(number, {}))
            found[names[id(parameter)]] = {**state.pop(WRAPPED, {}), **state}
    return found


def numbered(optimizer: Any, named: Iterable[tuple[str, Tensor]], told: Mapping[str, Any]) -> dict[str, Any]:
    """A state dictionary as an optimiser has it, by numbers, of one by names.

    Args:
        named: the model's parameters.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    names = {id(p): name for name, p in named}
    state: dict[int, dict[str, Any]] = {}
    groups, number = [], 0
    for group, saved in zip(inner.param_groups, told["param_groups"], strict=True):
        first = number
        for parameter in group["params"]:
            if found := told[NAMED][names[id(parameter)]]:
                state[number] = found
            number += 1
        groups.append({**saved, "params": list(range(first, number))})
    return {"state": state, "param_groups": groups}
