"""What a CUDA machine would do with fake tensors that live on the CPU.

A CPU build of torch has no autograd for fake CUDA tensors, so a step is followed on fake CPU tensors, and everything
that would differ on a GPU is told to:

- attention takes the operation that CUDA would choose (``sdp_utils.cpp``): flash attention in 16 bits without a mask,
  memory-efficient attention with one, else the plain product;
- autocast computes in fp32 what it does on CUDA and not on the CPU (``autocast_mode.h``, ``AT_FORALL_FP32``);
- ``tensor.is_cuda`` is true, and Triton kernels are launched without effect: their outputs are made by the code around
  them, which is what counts.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_HALF = (torch.bfloat16, torch.float16)
#: Getters are made anew at each look, so they are compared by value.
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
#: Widest head of flash attention on CUDA.
_FLASH_HEAD = 256

#: Functions that CUDA's autocast runs in fp32 and the CPU's does not, as models call them.
_FP32: frozenset[Callable[..., Any]] = frozenset(
    {
        functional.layer_norm, torch.layer_norm, functional.group_norm, functional.softplus, functional.nll_loss,
        torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.__rpow__, torch.exp, torch.Tensor.exp,
        torch.rsqrt, torch.Tensor.rsqrt, torch.log, torch.Tensor.log, torch.reciprocal, torch.Tensor.reciprocal,
        torch.cumsum, torch.Tensor.cumsum, torch.norm, torch.Tensor.norm, torch.logsumexp, torch.sum, torch.Tensor.sum,
        functional.softmax, torch.softmax, torch.Tensor.softmax, functional.log_softmax, torch.log_softmax,
        torch.expm1, torch.log1p, torch.Tensor.log1p,
    }
)  # fmt: skip


class Pretended(TorchFunctionMode):
    """Answers of a CUDA device, for functions that Python code calls on fake tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return True
        if func is functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func in _FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALF else value


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Scaled dot-product attention by the operation that CUDA takes; shapes as in torch."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) for t in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        fused = key.shape[-1] == value.shape[-1] and query.shape[-1] <= _FLASH_HEAD
        if attn_mask is None and query.dtype in _HALF and fused:
            width = -(-query.shape[-1] // 8) * 8
            padded = [functional.pad(t, (0, width - t.shape[-1])) if width != t.shape[-1] else t
                      for t in (query, key, value)]  # fmt: skip
            scale = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
            out = torch.ops.aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, scale=scale)[0]
            return out[..., : value.shape[-1]]
        groups = query.shape[1] // key.shape[1]
        if enable_gqa and groups > 1:  # memory-efficient attention has no shared heads: torch takes the plain product
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
            return _product(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
        bias = None
        if attn_mask is not None:
            bias = attn_mask
            if bias.dtype == torch.bool:  # convert_boolean_attn_mask in attention.cpp
                bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]


def _product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, is_causal: bool,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """The plain product (``_scaled_dot_product_attention_math``), which keeps every pair of positions."""
    scores = (query * (scale or 1 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril_()
    if mask is not None:
        scores = scores + (torch.zeros_like(mask, dtype=scores.dtype) if mask.dtype == torch.bool else mask)
    return torch.softmax(scores, -1) @ value


class Stream:
    """A stream, and an event on it, on which everything is done at once."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _other: Any) -> None:
        """Nothing is under way."""

    def wait_event(self, _event: Any) -> None:
        """It has happened."""

    def record_event(self) -> Stream:
        """An event that has happened."""
        return self

    def synchronize(self) -> None:
        """Nothing is under way."""


@contextlib.contextmanager
def pretended(*, packed: bool) -> Iterator[None]:
    """Everything above, for the length of a block.

    Args:
        packed: whether rows hold several sequences, which transformers finds out from values that nobody has here.
    """

    def nothing(*_: Any, **__: Any) -> None:
        return None

    instead: dict[str, Any] = {
        "transformers.masking_utils.is_tracing": lambda *_: packed,
        "torch.cuda.device": lambda _: contextlib.nullcontext(),
        "torch.cuda.stream": lambda _: contextlib.nullcontext(),
        "torch.cuda.current_stream": lambda *_: Stream(),
        "torch.cuda.Stream": Stream,
        "triton.runtime.jit.JITFunction.run": nothing,
        "triton.runtime.autotuner.Autotuner.run": nothing,
        "triton.runtime.interpreter.InterpretedFunction.run": nothing,
        "trl.kernels.chunked_logprob._use_triton": lambda _: True,
        # On CUDA the product is added in place.
        "trl.kernels.chunked_logprob._addmm_fp32": lambda total, *_: total,
    }
    with contextlib.ExitStack() as stack:
        for target, value in instead.items():
            owner, name = _owner(target)
            if hasattr(owner, name):
                stack.enter_context(swapped(owner, name, value))
        stack.enter_context(Pretended())
        yield


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` for the length of a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _owner(target: str) -> tuple[Any, str]:
    """The module or class that holds what a dotted path names, or None where a library does not have it."""
    path, _dot, name = target.rpartition(".")
    module, _dot, kind = path.rpartition(".")
    with contextlib.suppress(ImportError):
        return importlib.import_module(path), name
    with contextlib.suppress(ImportError, AttributeError):
        return getattr(importlib.import_module(module), kind), name
    return None, name
