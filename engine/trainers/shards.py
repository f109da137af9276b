"""What a trainer does with a model in shards: the optimiser steps over this rank's rows alone.

Each shard becomes a plain parameter over the same memory, and an optimiser that works element by element needs to know
no more: its states are as large as the shards, and its step sends nothing. What takes a whole gradient to know, its
norm, is one sum over the ranks.

A checkpoint has the states whole and under the names of their parameters, so that any number of ranks can go on from
it, one included; each reads its own rows out of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ...planner.errors import RunError
from ..models.sharding import Split, gathered, local, rows_of
from .flat import members_of
from .tree import Stored, loaded, opened_tree

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
        self.named = [(name, nn.Parameter(local(p))) for name, p in self._sources.items()]
        """This rank's rows by name, in the order of the model."""

    def take_gradients(self) -> None:
        """Hand the gradients of a step, averaged and split by now, over to the shards; once more has no effect."""
        for name, shard in self.named:
            source = self._sources[name]
            if source.grad is not None:
                shard.grad = local(source.grad)
                source.grad = None

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

    def state(self, optimizer: Any) -> dict[str, Any] | None:
        """What a checkpoint keeps of an optimiser over these shards, on rank 0; every rank has to come here."""
        inner = getattr(optimizer, "optimizer", optimizer)
        found: dict[str, dict[str, Any]] = {}
        for name, shard in self.named:
            shape, whole = self._sources[name].shape, dict[str, Any]()
            for key, value in sorted(inner.state.get(shard, {}).items()):
                if not isinstance(value, Tensor):
                    whole[key] = value
                elif not value.dim():
                    whole[key] = value.detach().to("cpu", copy=True)  # training goes on while this is written
                else:
                    assert value.shape == shard.shape, f"{key} of {name} is not of the shape of its weight"
                    whole[key] = gathered(value, shape)
            found[name] = whole
        groups = named_groups(inner, self.named)
        return {NAMED: found, "param_groups": groups} if dist.get_rank() == 0 else None

    def read(self, optimizer: Any, path: Path) -> dict[str, Any]:
        """A checkpoint's tree of training state, with the optimiser's as that takes it: this rank's rows alone.

        Raises:
            RunError: a run that was not split wrote the checkpoint.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        with opened_tree(path) as tree:
            if NAMED not in tree["optimizer"]:
                do = "Resume it as it was: hardware.strategy ddp, or one GPU."
                raise RunError("this checkpoint was written by a run that was not split", where=str(path.parent), do=do)
            rest = loaded({key: value for key, value in tree.items() if key != "optimizer"})
            states: dict[str, dict[str, Any]] = tree["optimizer"][NAMED]
            mine = {
                name: {key: self._mine(name, value, rank, world) for key, value in state.items()}
                for name, state in states.items()
            }
            told = {NAMED: mine, "param_groups": loaded(tree["optimizer"]["param_groups"])}
            return {**rest, "optimizer": numbered(optimizer, self.named, told)}

    def _mine(self, name: str, value: Any, rank: int, world: int) -> Any:
        rows = rows_of(self._sources[name].shape[0], rank, world)
        return value.rows(rows) if isinstance(value, Stored) else value


def named_groups(optimizer: Any, named: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """The groups of an optimiser with its parameters by name."""
    names = {id(p): name for name, p in named}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def numbered(optimizer: Any, named: Iterable[tuple[str, Tensor]], told: Mapping[str, Any]) -> dict[str, Any]:
    """A state dictionary as an optimiser has it, by numbers, of one by names.

    Args:
        named: the model's parameters, of which the optimiser may have joined some (:mod:`.flat`).
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    names = {id(p): name for name, p in named}
    state: dict[int, dict[str, Any]] = {}
    groups, number = [], 0
    for group, saved in zip(inner.param_groups, told["param_groups"], strict=True):
        first = number
        for parameter in group["params"]:
            parts = [told[NAMED][names[id(member)]] for member in members_of(inner, parameter)]
            if parts[0]:
                state[number] = {key: _joined([part[key] for part in parts]) for key in parts[0]}
            number += 1
        groups.append({**saved, "params": list(range(first, number))})
    return {"state": state, "param_groups": groups}


def _joined(values: list[Any]) -> Any:
    if len(values) == 1 or not isinstance(values[0], Tensor) or not values[0].dim():
        return values[0]
    return torch.cat([value.reshape(-1) for value in values])
