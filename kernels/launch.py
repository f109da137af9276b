"""What every kernel needs to be launched: shapes as rows, sizes of tiles, the right device, and the launch itself.

Triton's own autotuner is not used: it measures for seconds on first use, and it needs a GPU even to import its
configurations under the interpreter. Row-wise kernels are limited by memory, so their few settings follow from the
row's width.

``kernel[grid](…)`` works out anew in each call which compiled kernel the arguments need, in some 10 µs of Python, as
long as a small kernel runs. :func:`launch` remembers the answer.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
import triton

#: Triton runs kernels in Python on the CPU, for tests; it reads the variable when a kernel is decorated.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

#: A row kernel keeps its row in registers; beyond this width it would spill.
MAX_COLUMNS = 65536


def unavailable(device: torch.device) -> str:
    """Why kernels can't run on ``device``, in words; empty if they can."""
    if INTERPRETED:
        return ""
    if device.type == "meta":
        return "its weights are not loaded"
    if device.type != "cuda":
        return f"it is on {device.type}, and these kernels need a GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and (major, minor) < (8, 0):
        return f"compute capability {major}.{minor} is below 8.0 (Ampere)"
    return ""


def on(tensor: torch.Tensor) -> Any:
    """A context in which Triton launches on the tensor's device rather than on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


#: Versions of Triton of which it is known what decides over the kernel that is compiled: the types of arguments, what
#: divides integers, the alignment of pointers, constants and options (``triton/backends/compiler.py``,
#: ``BaseBackend.get_tensor_specialization``). On AMD the sizes of tensors do too.
_REMEMBERS = triton.__version__.split(".")[:2] in [["3", minor] for minor in "6789"] and torch.version.hip is None
#: Compiled kernels by all that decided over them; emptied when it has grown to so many.
_compiled: dict[tuple[Any, ...], Any] = {}
_MOST = 4096
#: Triton takes it for granted in the kernel it compiles for aligned pointers.
_ALIGNED = 15


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[torch.Tensor, ...], numbers: tuple[int | float, ...],
    constants: tuple[Any, ...], **options: Any,
) -> None:  # fmt: skip
    """``kernel[grid](*tensors, *numbers, *constants, **options)``, on the device of the first tensor.

    Args:
        kernel: of a module, so that it is there for good; it takes pointers first, ``tl.constexpr`` last.
        numbers: each always an int, or always a float; 1 and 1.0 are not told apart.
        options: of the compiler, such as ``num_warps``.
    """
    if INTERPRETED or not _REMEMBERS or torch.compiler.is_compiling():
        with on(tensors[0]):
            kernel[grid](*tensors, *numbers, *constants, **options)
        return
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, **options)
        return
    together = 0
    for tensor in tensors:
        together |= tensor.data_ptr()
    if together & _ALIGNED:
        kernel[grid](*tensors, *numbers, *constants, **options)
        return
    # Numbers by value say more than Triton asks for; by identity, since a kernel's own hash is a hash of its source.
    key = (id(kernel), device, *[tensor.dtype for tensor in tensors], numbers, constants, *options.items())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)](*tensors, *numbers, *constants)
        return
    compiled = kernel[grid](*tensors, *numbers, *constants, **options)
    if len(_compiled) >= _MOST:
        _compiled.clear()
    if compiled is not None:
        _compiled[key] = compiled


def forget() -> None:
    """Ask Triton anew from here on, as after another driver took over."""
    _compiled.clear()


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., columns]`` as ``[rows, columns]`` whose columns lie side by side; a copy only where no view can do it.

    Expanded gradients (stride 0, as ``sum().backward()`` makes them) are copied.
    """
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own unwraps constants of kernels first."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def row_tile(columns: int, elements: int = 2048) -> tuple[int, int, int]:
    """``(rows, block, num_warps)`` of one program: at least ``elements`` values, about 16 per thread.

    Narrow rows (a head's Q/K norm) share a program; a wide row has one of its own.

    Raises:
        ValueError: a row is too wide for one program.
    """
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of {columns} values are wider than these kernels hold ({MAX_COLUMNS})")
    block = next_power_of_2(columns)
    rows = max(1, elements // block)
    return rows, block, min(32, max(4, rows * block // 512))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number under the interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
