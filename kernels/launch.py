"""What every kernel needs to be launched: shapes as rows, sizes of tiles, the right device.

Triton's own autotuner is not used: it measures for seconds on first use, and it needs a GPU even to import its
configurations under the interpreter. Row-wise kernels are limited by memory, so their few settings follow from the
row's width.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch

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


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., columns]`` as ``[rows, columns]`` whose columns lie side by side; a copy only where no view can do it.

    Expanded gradients (stride 0, as ``sum().backward()`` makes them) are copied.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


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
