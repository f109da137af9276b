"""Adapters beside a base in shards: whole where they compute, by rows where they are trained.

Each rank has them whole, for they are small, and gradients add up on them as on any parameters, in fp32 where they are
of a narrower format. Behind the last micro-batch of a step one reduce-scatter gives each rank the averaged gradients of
its rows, over which its optimiser steps, and before the next forward one all-gather brings all rows back. All tensors
lie in the one buffer that is sent, so a step costs four kernels however many adapters there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .base_shards import all_gather


def rows_of(rows: int, rank: int, world: int) -> slice:
    """Which of a tensor's rows a rank has: as even as ``torch.chunk`` cuts, the last ranks with fewer or none."""
    each = -(-rows // world)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))


class AdapterRows:
    """Trained parameters that every rank has whole, and this rank's rows of them.

    Args:
        named: on the device, of one dtype, and the same on all ranks.
        lowered: what they are computed with, if that is narrower than they are; gradients are averaged in fp32 then.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], lowered: torch.dtype | None = None) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        first = next(iter(named.values()))
        self._named, self._world = dict(named), world
        self._shares = [-(-p.shape[0] // world) * math.prod(p.shape[1:]) for p in named.values()]
        size = sum(self._shares)
        self._mine = torch.zeros(size, dtype=first.dtype, device=first.device)
        self._all = torch.empty(world * size, dtype=lowered or first.dtype, device=first.device)
        self._summed = torch.float32 if lowered is not None else first.dtype
        self._shapes = {}
        self._whole: list[Tensor] = []
        start = 0
        for (name, parameter), share in zip(named.items(), self._shares, strict=True):
            cut = rows_of(parameter.shape[0], rank, world)
            self._shapes[name] = start, (cut.stop - cut.start, *parameter.shape[1:])
            self._row(self._mine, name).copy_(parameter.detach()[cut])
            place = self._all[world * start : world * (start + share)]
            self._whole.append(place.view(world, share))
            flat = place.data[: parameter.numel()].view(parameter.shape)
            flat.copy_(parameter.detach())
            parameter.data = flat
            start += share
        self.rows = {name: self._row(self._mine, name) for name in named}
        """This rank's rows by name: an optimiser steps over their memory."""
        self._earlier: list[Tensor] = []
        """Gradients of earlier micro-batches of the step, where those of the latest are narrower than their sum."""
        self._due = False
        self._stale = False

    def begin_micro_batch(self) -> None:
        """Gradients are on their way."""
        if self._due and self._all.dtype != self._summed:  # where they are they would add up in that many bits
            self._add_up()
        self._due = True

    def let_go(self) -> None:
        """Rows may change from here on: the next forward has them brought together."""
        self._stale = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Have what computes be what the rows are; every rank has to come here."""
        if not self._stale:
            return
        self._stale = False
        sent = self._mine.to(self._all.dtype)
        got = sent.new_empty(self._world * sent.numel())
        all_gather(got, sent)
        torch.split_with_sizes_copy(got.view(self._world, -1), self._shares, dim=1, out=self._whole)

    @torch.no_grad()
    def take_gradients(self) -> dict[str, Tensor]:
        """Gradients of this rank's rows, averaged over all ranks, once for all micro-batches since the last call.

        One that no micro-batch of this rank gave counts as zero. Every rank has to come here.
        """
        self.let_go()
        if not self._due:
            return {}
        self._due = False
        if self._earlier:
            self._add_up()
        whole, self._earlier = self._earlier or self._latest(), []
        sent = torch.empty(self._world, self._mine.numel(), dtype=self._summed, device=self._mine.device)
        torch._chunk_cat(whole, 0, self._world, out=sent)
        del whole
        got = sent.new_empty(self._mine.numel())
        # Its name from torch 2.13 on, which warns of the older one.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(got, sent.view(-1))
        got = got.div_(self._world).to(self._mine.dtype)
        return {name: self._row(got, name) for name in self._named}

    def _latest(self) -> list[Tensor]:
        latest = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self._named.values()]
        for parameter in self._named.values():
            parameter.grad = None
        return latest

    @torch.no_grad()
    def _add_up(self) -> None:
        latest = self._latest()
        if self._earlier:
            torch._foreach_add_(self._earlier, latest)
        else:
            self._earlier = [gradient.to(self._summed) for gradient in latest]

    def _row(self, flat: Tensor, name: str) -> Tensor:
        start, shape = self._shapes[name]
        return flat[start : start + math.prod(shape)].view(shape)
