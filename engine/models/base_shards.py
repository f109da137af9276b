"""A frozen base in shards, of which two layers at a time are whole, without a copy on the way.

What is never trained nor written needs no rows and no parameters of its own: all frozen tensors of a layer lie one
behind another in one run of bytes, of which each rank keeps its part. A layer comes together by one all-gather, right
into one of two buffers that the layers take turns with, and its weights are views of that buffer which stay what they
are from the first step to the last. So nothing is allocated, copied in or out, or put on modules while a step runs,
which costs FSDP2 (:mod:`.sharding` has it for what is trained) 20 to 40 microseconds of Python for each tensor and
pass, and bytes of quantised weights are as good as numbers.

While a layer computes, the next one comes into the other buffer: behind it in forward, before it in backward. The order
is only what is expected. A layer that is asked for and is not there is gathered at once; and a buffer is written anew
only behind all that was launched before, which is why whoever computes does so on one stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_leaves

#: Where a tensor may begin in a run of bytes: what wide loads and TMA descriptors ask for, and more.
_ALIGNED = 256
_BUFFERS = 2


@dataclass(frozen=True)
class Piece:
    """One frozen tensor of a layer: where it stands in modules (a tied one in several places) and in the bytes."""

    places: tuple[tuple[nn.Module, str], ...]
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, whole: Tensor) -> Tensor:
        """It, in the bytes of its layer."""
        size = self.shape.numel() * self.dtype.itemsize
        return whole[self.start : self.start + size].view(self.dtype).view(self.shape)


def pieces_of(layer: nn.Module, lowered: torch.dtype | None) -> list[Piece]:
    """The frozen parameters of a layer one behind another.

    Args:
        lowered: what floating-point ones are computed with, if that is narrower than they are; they are kept as that.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    held: dict[int, nn.Parameter] = {}
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                places.setdefault(id(parameter), []).append((module, name))
                held[id(parameter)] = parameter
    pieces, end = [], 0
    for key, parameter in held.items():
        dtype = lowered if lowered is not None and parameter.is_floating_point() else parameter.dtype
        pieces.append(Piece(tuple(places[key]), end, parameter.shape, dtype))
        end = _aligned(end + parameter.numel() * dtype.itemsize, _ALIGNED)
    return pieces


class BaseShards:
    """The frozen tensors of all layers, of which this rank keeps its part.

    Args:
        layers: in the order in which they compute; without memory, or where ``place`` finds their values.
        place: gives a layer the values of rank 0, on ``device``.
        lowered: as in :func:`pieces_of`.
    """

    def __init__(
        self, layers: Sequence[nn.Module], place: Callable[[nn.Module], object], device: torch.device,
        lowered: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        rank, world = dist.get_rank(), dist.get_world_size()
        pieces = [pieces_of(layer, lowered) for layer in layers]
        self._sizes = [_aligned(_end(each), world * _ALIGNED) for each in pieces]
        largest = max(self._sizes, default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        self._parts: list[Tensor] = []
        for number, layer in enumerate(layers):
            place(layer)
            # Writing to it is no change of what autograd has seen: the values are the same whenever they are read.
            seen, size = self._buffers[number % _BUFFERS].data, self._sizes[number]
            for piece in pieces[number]:
                module, name = piece.places[0]
                piece.view(seen).copy_(module._parameters[name])  # type: ignore[arg-type]
                weight = nn.Parameter(piece.view(seen), requires_grad=False)
                for module, name in piece.places:
                    module._parameters[name] = weight
            self._parts.append(seen[:size].chunk(world)[rank].clone())
        self._held: list[int | None] = [None] * _BUFFERS
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._there: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._hooks = [hook for number, layer in enumerate(layers) for hook in self._watch(number, layer)]

    @property
    def bytes(self) -> int:
        """What this rank keeps of it, with the buffers."""
        return sum(t.numel() for t in (*self._parts, *self._buffers))

    def ready(self, number: int) -> None:
        """Have a layer whole for what is launched from here on, and the one expected after it on its way."""
        self._bring(number)
        there = self._there[number % _BUFFERS]
        if there is not None:
            torch.cuda.current_stream().wait_event(there)
        backward = torch._C._current_graph_task_id() != -1
        after = number - 1 if backward else number + 1
        if 0 <= after < len(self._parts):
            self._bring(after)

    def _bring(self, number: int) -> None:
        buffer = number % _BUFFERS
        if self._held[buffer] == number:
            return
        self._held[buffer] = number
        whole = self._buffers[buffer][: self._sizes[number]]
        if self._beside is None:
            all_gather(whole, self._parts[number])
            return
        self._beside.wait_stream(torch.cuda.current_stream())  # which may be reading the layer that was there
        with torch.cuda.stream(self._beside):
            all_gather(whole, self._parts[number])
            self._there[buffer] = self._beside.record_event()

    def _watch(self, number: int, layer: nn.Module) -> Iterator[Any]:
        yield layer.register_forward_pre_hook(lambda *_: self.ready(number), prepend=True)

        def before_backward(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                for tensor in tree_leaves(output):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(lambda _: self.ready(number))

        yield layer.register_forward_hook(before_backward)


class LoneTable:
    """A frozen embedding in shards, whole for its look-up alone.

    Args:
        table: on the device, whole.
    """

    def __init__(self, table: nn.Embedding, lowered: torch.dtype | None = None) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        (piece,) = pieces_of(table, lowered)
        size = _aligned(_end([piece]), world * _ALIGNED)
        self._whole = torch.empty(size, dtype=torch.uint8, device=table.weight.device)
        seen = self._whole.data
        piece.view(seen).copy_(table.weight)
        table.weight = nn.Parameter(piece.view(seen), requires_grad=False)
        self._part = seen.chunk(world)[rank].clone()
        self._free()
        self._hooks = (
            table.register_forward_pre_hook(lambda *_: self._bring(), prepend=True),
            table.register_forward_hook(lambda *_: self._free()),
        )

    def _bring(self) -> None:
        self._whole.untyped_storage().resize_(self._whole.numel())
        all_gather(self._whole, self._part)

    def _free(self) -> None:
        self._whole.untyped_storage().resize_(0)


def all_gather(whole: Tensor, part: Tensor) -> None:
    """The parts of all ranks, one behind another."""
    # Its name from torch 2.13 on, which warns of the older one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with torch.no_grad():
        gather(whole, part)


def _end(pieces: Sequence[Piece]) -> int:
    return max((piece.start + piece.shape.numel() * piece.dtype.itemsize for piece in pieces), default=0)


def _aligned(size: int, to: int) -> int:
    return math.ceil(size / to) * to
