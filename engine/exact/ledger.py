"""Ledger: the storages that are alive at each instant of a step, counted without a byte being allocated.

Every operation on fake tensors passes through :class:`Ledger`, a ``TorchDispatchMode``. A storage that an operation
makes is entered with its size, rounded up to the 512 bytes that CUDA's caching allocator hands out, and struck out
when the last tensor on it is gone: what autograd saves for its backward pass stays alive as it does in a real step. So
the largest sum of what is entered is what ``torch.cuda.max_memory_allocated`` would answer, but for memory that the
libraries below torch ask for by themselves (cuBLAS workspaces).

Nothing has values here. Where code asks for one (``.item()``, ``if tensor.all()``), it is told yes, or 0.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

#: Smallest unit of CUDA's caching allocator (``kMinBlockSize`` in c10/cuda/CUDACachingAllocator.cpp).
BLOCK = 512


_INDEXED = frozenset(
    {
        torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default,
        torch.ops.aten._index_put_impl_.default, torch.ops.aten._unsafe_index_put.default,
    }
)  # fmt: skip

#: Functions between an operation and this: dispatch, and what torch.compile puts around it.
_PLUMBING = frozenset({"_accumulates", "__torch_dispatch__", "inner", "_fn"})

_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
#: The same for sequences end to end.
_DOCUMENTS_BACKWARD = torch.ops.aten._flash_attention_backward.default


@dataclass
class Peak:
    """The fullest instant of one moment: bytes in all, and by what they are for."""

    bytes: int = 0
    terms: dict[str, int] = field(default_factory=dict)


@dataclass
class _Entry:
    size: int
    term: str


class Ledger(TorchDispatchMode):
    """Counts live storages, by what they are for.

    ``term`` names what storages made from now on are for; ``moment`` names the peak that they count towards. Both are
    changed by whoever runs the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.term = "activations"
        self.moment = ""
        self.live: dict[str, int] = {}
        self.total = 0
        self.peaks: dict[str, Peak] = {}
        self._entries: dict[int, _Entry] = {}
        self._watch: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0].dtype)
        if func in _INDEXED:
            args = (args[0], [part for index in args[1] for part in _places(index)], *args[2:])
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs) if not kwargs.pop("pin_memory", None) else self._on_host(func(*args, **kwargs))
        if func is torch.ops.aten.add.Tensor and _accumulates(args):
            self._take_over(args[0])
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.enter(tensor)
        if func is _ATTENTION_BACKWARD:
            (rows, heads, length, _), key_heads = args[1].shape, args[2].shape[1]
            places = rows * -(-length // 128) * 128
            self._look(_attention_workspace(args[1], heads, key_heads, places))
        elif func is _DOCUMENTS_BACKWARD:
            (length, heads, _), key_heads, documents = args[1].shape, args[2].shape[1], args[6].numel() - 1
            self._look(_attention_workspace(args[1], heads, key_heads, length + 128 * documents))
        return out

    def enter(self, tensor: torch.Tensor, term: str | None = None) -> None:
        """Count a tensor's storage, once; with ``term`` also say (again) what it is for."""
        storage = tensor.untyped_storage()
        key = id(storage)
        entry = self._entries.get(key)
        if entry is None:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._entries[key] = entry = _Entry(size, term or self.term)
            self._watch[key] = weakref.ref(storage, partial(self._strike, key))
            self._add(entry.term, size)
        elif term is not None and term != entry.term:
            self._add(entry.term, -entry.size)
            entry.term = term
            self._add(term, entry.size)

    def _take_over(self, tensor: torch.Tensor) -> None:
        """A tensor that is written over: its memory is counted with what comes in its place."""
        entry = self._entries.get(id(tensor.untyped_storage()))
        if entry is not None:
            self._add(entry.term, -entry.size)
            entry.size = 0

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pinned memory is the host's: it counts for nothing here."""
        key = id(tensor.untyped_storage())
        self._entries[key] = _Entry(0, "host")
        self._watch[key] = weakref.ref(tensor.untyped_storage(), partial(self._strike, key))
        return tensor

    @contextmanager
    def during(self, moment: str, term: str) -> Iterator[None]:
        """What is made in the block belongs to a moment and is for something."""
        before = (self.moment, self.term)
        self.moment, self.term = moment, term
        self._look()
        try:
            yield
        finally:
            self.moment, self.term = before

    def _strike(self, key: int, _gone: Any) -> None:
        entry = self._entries.pop(key)
        del self._watch[key]
        self._add(entry.term, -entry.size)

    def _add(self, term: str, size: int) -> None:
        self.live[term] = self.live.get(term, 0) + size
        self.total += size
        if size > 0:
            self._look()

    def _look(self, passing: int = 0) -> None:
        """Is this the fullest instant, with ``passing`` bytes that a library takes and gives back?"""
        peak = self.peaks.setdefault(self.moment, Peak())
        if self.total + passing > peak.bytes:
            peak.bytes, peak.terms = self.total + passing, dict(self.live)
            if passing:
                peak.terms["buffers"] = peak.terms.get("buffers", 0) + passing


def _accumulates(args: Any) -> bool:
    """Whether autograd's engine adds two gradients of one tensor: it does so in place, but never on fake tensors
    (``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp)."""
    if torch.is_grad_enabled() or not all(isinstance(tensor, torch.Tensor) for tensor in args[:2]):
        return False
    first, second = args[:2]
    whole = first.untyped_storage().nbytes() == first.numel() * first.element_size()
    return whole and first.shape == second.shape and first.dtype == second.dtype and _asker() == "_engine_run_backward"


def _asker() -> str:
    """The function that asked for the operation at hand."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name in _PLUMBING:
        frame = frame.f_back
    return frame.f_code.co_name


def _attention_workspace(query: torch.Tensor, heads: int, key_heads: int, places: int) -> int:
    """Bytes that attention's backward takes for itself: the gradient of the queries in fp32 and a row sum, both for
    rows rounded up to 128; where heads are shared, the gradients of keys and values of each query head too
    (``mha_bwd`` and ``mha_varlen_bwd`` in flash_api.cpp of FlashAttention-2, as torch carries it)."""
    shared = 2 * query.numel() * query.element_size() if key_heads != heads else 0
    return 4 * heads * places * (-(-query.shape[-1] // 32) * 32 + 1) + shared


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A boolean index as the integers it stands for, all of it chosen: how many there are would be a value."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.zeros(index.numel(), dtype=torch.long) for _ in range(index.dim())]


def _answer(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 0.0 if dtype.is_floating_point else 0
