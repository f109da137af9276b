"""Whether a fused kernel is faster than the separate operations it stands for, measured once on each GPU.

A fused kernel saves memory traffic and may lose it again to registers, barriers or a compiler that did not see the
point; which of the two wins differs from one GPU to the next. It is found out on random data when a model is patched,
within some ten milliseconds, and kept on disk with the proofs of :mod:`.selfcheck`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import glu, launch, lora_add, lora_glu, selfcheck
from .selfcheck import Verdict

#: Rows on which two ways are timed: enough to fill a GPU, few enough to need little memory.
_ROWS = 2048
#: A fused kernel has to be this much faster: at equal speed, the fewer launches of stock operations are not missed.
_MARGIN = 0.97


def gated_unit(
    device: torch.device, dtype: torch.dtype, columns: int, rank: int, activation: glu.Activation
) -> Verdict:
    """Whether ``lora_glu`` beats a plain gated unit with its LoRA products beside it, forward and backward together.

    Under the interpreter, where time says nothing, the answer is yes.
    """
    return Verdict(True) if launch.INTERPRETED else _gated_unit(device, dtype, columns, rank, activation)


@functools.cache
def _gated_unit(
    device: torch.device, dtype: torch.dtype, columns: int, rank: int, activation: glu.Activation
) -> Verdict:
    def trial() -> Verdict:
        g, u, dh = (torch.randn(_ROWS, columns, device=device).to(dtype) for _ in range(3))
        xa = torch.randn(_ROWS, 2 * rank, device=device).to(dtype).split(rank, dim=1)
        b = tuple(torch.randn(columns, rank, device=device).to(dtype) for _ in range(2))
        dha, out = torch.randn(_ROWS, rank, device=device).to(dtype), torch.empty_like(g)

        def fused() -> None:
            lora_glu.forward(g, u, xa, (b[0], b[1]), (1.0, 1.0), activation)
            lora_glu.backward(dh, g, u, xa, (b[0], b[1]), (1.0, 1.0), activation, dha)

        def separate() -> None:
            for mine, factor in zip(xa, b, strict=True):
                torch.mm(mine, factor.t(), out=out)  # the large product that adds to it would read it once more
            glu.forward(g, u, activation)
            glu.backward(dh, g, u, activation, dgate=g, dup=u, h=dh)
            torch.mm(dha.t(), dh)
            for wide, mine in zip((g, u), xa, strict=True):
                torch.mm(wide.t(), mine)

        return _told(_milliseconds(fused, device), _milliseconds(separate, device))

    sources = (str(lora_glu.__file__), str(glu.__file__))
    return selfcheck.proven("lora_glu is faster", sources, device, f"{activation} {dtype} [{columns}] x {rank}", trial)


def sum_first(device: torch.device, dtype: torch.dtype, columns: int, rank: int) -> Verdict:
    """Whether ``lora_add`` beats the product that copies a residual and adds an adapter's share to it.

    Under the interpreter the answer is yes.
    """
    return Verdict(True) if launch.INTERPRETED else _sum_first(device, dtype, columns, rank)


@functools.cache
def _sum_first(device: torch.device, dtype: torch.dtype, columns: int, rank: int) -> Verdict:
    def trial() -> Verdict:
        # As many rows as a step has: fewer stay in the cache, where the copy costs little.
        add, y = (torch.randn(4 * _ROWS, columns, device=device).to(dtype) for _ in range(2))
        xa, b = (torch.randn(rows, rank, device=device).to(dtype) for rows in (4 * _ROWS, columns))
        ours = _milliseconds(lambda: lora_add.add_to(y, add, None, xa, b, 1.0, keep=False), device)
        theirs = _milliseconds(lambda: torch.addmm(add, xa, b.t(), out=y), device)
        return _told(ours, theirs)

    source = str(lora_add.__file__)
    return selfcheck.proven("lora_add is faster", source, device, f"{dtype} [{columns}] x {rank}", trial)


def _told(ours: float, theirs: float) -> Verdict:
    told = f"{ours:.3f} ms fused, {theirs:.3f} ms as separate operations"
    return Verdict(ours < _MARGIN * theirs, told, worst=ours / theirs)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few timings of a few runs each."""
    shortest = float("inf")
    with torch.cuda.device(device), torch.no_grad():
        for _ in range(2):
            run()  # compiles
        for _ in range(5):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(4):
                run()
            ended.record()
            ended.synchronize()
            shortest = min(shortest, began.elapsed_time(ended) / 4)
    return shortest
