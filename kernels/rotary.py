"""The rotary function that an attention module calls: what it computes, and a forward that calls ours instead.

In transformers it is a function of the model's file, not a part of the module. It is replaced for one instance by
giving that instance's forward the same code over a copy of its globals, in which one name means our function; the
model's file and all other modules keep theirs.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .launch import unavailable
from .rope import LAYOUTS, Layout, rope, rope_reference

_NAME = "apply_rotary_pos_emb"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: (device, dtype, dim, rotary, layout) → may ours run; filled as inputs come.
Allowed = Callable[[torch.device, torch.dtype, int, int, Layout], bool]


def looks_rotary(module: nn.Module) -> bool:
    """Its forward calls a rotary function on queries and keys by name."""
    function = _function(type(module).forward)
    return function is not None and list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]


@functools.cache
def layout(forward: Callable[..., Any]) -> Layout | str:
    """The layout of the rotary function that a forward calls, or why it is not recognised; found by running it."""
    function = _function(forward)
    if function is None:
        return "it calls no rotary function"
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (3, 1))
    cos, sin = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    try:
        out = function(q, k, cos, sin)
    except Exception as error:  # a foreign function may raise anything on plain tables
        return f"its rotary function takes other tables ({type(error).__name__})"
    for name in LAYOUTS:
        if all(
            a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
            for a, b in zip(out, rope_reference(q, k, cos, sin, name), strict=True)
        ):
            return name
    return "its rotary function is of no known layout"


@functools.cache
def rebound(forward: Callable[..., Any], allowed: Allowed) -> Callable[..., Any]:
    """``forward`` with our rotary function in place of the one it names; ours hands back what is not allowed."""
    stock = _function(forward)
    found = layout(forward)
    assert stock is not None
    assert found in LAYOUTS

    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        axis = kwargs.get("unsqueeze_dim", 1)
        plain = not args and set(kwargs) <= {"unsqueeze_dim"} and axis in (1, 2)
        if plain and _fits(q, k, cos, sin) and allowed(q.device, q.dtype, q.shape[-1], cos.shape[-1], found):
            return rope(q, k, cos, sin, found, head_axis=axis)
        return stock(q, k, cos, sin, *args, **kwargs)

    assert isinstance(forward, types.FunctionType)
    names = {**forward.__globals__, _NAME: apply}
    function = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return function


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and q.dtype == k.dtype
        and q.dtype in _DTYPES
        and cos.shape[-1] <= q.shape[-1]
        and not (cos.requires_grad or sin.requires_grad)
        and not unavailable(q.device)
    )


def _function(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    if not isinstance(forward, types.FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(_NAME)
    return function if isinstance(function, types.FunctionType) else None
