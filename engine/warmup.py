"""What a GPU and its libraries load at first use, loaded while the process is busy importing Python modules.

cuBLAS makes its handle and workspace at the first matrix product, attention loads its kernels from a library of
gigabytes at the first call, and Triton reads its own compiler to name it in the keys of its cache. Each takes a good
part of a second of disk, driver and hashing, none of it Python, and a start would spend them one after the other.
Nothing of it draws random numbers or stays in memory that the first step would not have taken.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable

import torch


class Warmup:
    """Begins at once; :meth:`wait` before the GPU is used for anything else than copies.

    Args:
        dtype: of matrix products.
        head: numbers per attention head; None without scaled-dot-product attention.
        packed: attention will be within the documents of packed rows, which has kernels of its own.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, head: int | None, *, packed: bool = False) -> None:
        self._threads: list[threading.Thread] = []
        if device.type != "cuda":
            return
        if importlib.util.find_spec("triton"):
            import triton  # noqa: F401  # by this thread: two that import the same packages get in each other's way
        for name, ways in (("compiler", [name_triton]), ("warmup", _on_gpu(device, dtype, head, packed))):
            self._threads.append(threading.Thread(target=_try, args=(ways,), name=name, daemon=True))
            self._threads[-1].start()

    def wait(self) -> None:
        """Until all is loaded; what could not be is loaded, or fails with a reason, when it is used."""
        for thread in self._threads:
            thread.join()


Ways = list[Callable[[], None]]


def _try(ways: Ways) -> None:
    for way in ways:
        try:
            way()
        except Exception as error:  # a thread has nobody to raise to, and the next way may work
            print(f"warming up: {error!r}", flush=True)


def _on_gpu(device: torch.device, dtype: torch.dtype, head: int | None, packed: bool) -> Ways:
    ways: Ways = [
        lambda: torch.cuda.set_device(device),  # or each operation would begin on the first device, and leave a context
        lambda: _multiply(device, dtype),
    ]
    if head is not None:
        attend = _attend_within if packed and dtype in (torch.bfloat16, torch.float16) and head % 8 == 0 else _attend
        ways.append(lambda: attend(device, dtype, head))
    return ways


def name_triton() -> None:
    """Have Triton make the name of its compiler, which it remembers."""
    if importlib.util.find_spec("triton"):
        from triton.runtime.cache import triton_key

        triton_key()


def _multiply(device: torch.device, dtype: torch.dtype) -> None:
    matrix = torch.ones(64, 64, device=device, dtype=dtype)
    torch._foreach_norm([torch.mm(matrix, matrix)])


def _attend(device: torch.device, dtype: torch.dtype, head: int) -> None:
    q, k, v = (torch.zeros(1, 2, 64, head, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    with torch.enable_grad():
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.autograd.grad(attended, (q, k, v), torch.ones_like(attended))


def _attend_within(device: torch.device, dtype: torch.dtype, head: int) -> None:
    """Two documents end to end, as ``kernels/attention.py`` has them on a GPU; its heads have at most 256 numbers."""
    q, k, v = (torch.zeros(64, 2, head, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, 32, 64], dtype=torch.int32, device=device)
    with torch.enable_grad():
        attended = torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, 32, 32, 0.0, True, False)[0]
    torch.autograd.grad(attended, (q, k, v), torch.ones_like(attended))
