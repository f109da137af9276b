"""Kernels beside stock torch and Liger: first whether they are right, then how fast, as a share of the ceiling.

Versions take turns; a time is the median of the rounds' medians (of ``triton.testing.do_bench``, which empties the L2
cache between calls), its spread their range: what a caller waits for, launches included where they take longer than the
work. Rates and shares are of the time on the device alone, from replays of a CUDA graph where ours can be captured in
one, with a long read between calls: else an operation finds in the cache what the call before left there, and moves
bytes faster than memory can. Beside it stands a copy of as many bytes by the same clock: no launch moves them faster. A
share is of what this GPU reaches in a long plain copy, for kernels that move memory, or in a plain bf16 product, for
those that multiply, both measured in the same minute.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from triton.testing import do_bench, do_bench_cudagraph

from ...kernels.selfcheck import Verdict
from .kernel_cases import TIMES, Case
from .kernel_checks import BF16, CHECKS, DEVICE, HIDDEN, INTERMEDIATE, Function, randn
from .turns import facts

#: Rounds of one case, and milliseconds that each version runs in each.
ROUNDS, ROUND_MS = 3, 80
#: Several times what a cache holds: that of an H200 has 50 MiB, of a B200 126 MiB.
_READ_BYTES = 2**28
Tell = Callable[[str], None]


@dataclass
class Timing:
    """Milliseconds with their range over the rounds, on the device alone, and the share of the ceiling then reached.

    ``copy_ms``: what a copy that moves as many bytes takes, by the same clock: a launch's start and end, which are all
    of the shortfall of a small one.
    """

    name: str
    ours_ms: float
    ours_range_ms: tuple[float, float]
    device_ms: float
    stock_ms: float | None
    liger_ms: float | None
    rate: float
    unit: str
    share: float
    copy_ms: float | None = None


def run(names: Sequence[str], tokens: int, tell: Tell, *, timing: bool = True) -> dict[str, Any]:
    """Check and time kernels.

    Args:
        names: of ``kernel_checks.CHECKS``.
        tokens: rows of each input.
    """
    torch.manual_seed(0)
    verdicts = _verdicts(names, tell)
    timings: list[Timing] = []
    copy, product = ceilings() if timing else (0.0, 0.0)
    for name in names if timing else ():
        for case in TIMES[name](tokens):
            timed = _time(case, copy, product, tell)
            if timed is not None:
                timings.append(timed)
                tell(f"{case.name}: {timed.ours_ms:.3f} ms, {timed.share:.0%} of the ceiling")
            torch.cuda.empty_cache()
    return {
        **facts("finetui bench kernels"), "tokens": tokens,
        "copy_gb_per_s": round(copy / 1e9, 1), "gemm_tflop_per_s": round(product / 1e12, 1),
        "verdicts": {name: asdict(verdict) for name, verdict in verdicts.items()},
        "timings": [asdict(timing) for timing in timings],
    }  # fmt: skip


def _verdicts(names: Sequence[str], tell: Tell) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    for name in names:
        try:
            for label, verdict in CHECKS[name]():
                found[label] = verdict
                tell(f"{label}: {'ok' if verdict.ok else 'WRONG'} {verdict.why}")
        except Exception as error:  # told in the table; the other kernels are still worth looking at
            found[name] = Verdict(False, f"{type(error).__name__}: {str(error)[:500]}")
            tell(f"{name}: {found[name].why}")
        torch.cuda.empty_cache()
    return found


def _time(case: Case, copy: float, product: float, tell: Tell) -> Timing | None:
    versions = {"ours": case.ours, "stock": case.stock, "liger": case.liger}
    times = race({name: function for name, function in versions.items() if function is not None}, tell, case.name)
    if "ours" not in times:
        return None
    median = {name: statistics.median(rounds) for name, rounds in times.items()}
    amount, top = (case.bytes, copy) if case.bytes else (case.flops, product)
    alone = device_ms(case.ours) if case.graph else median["ours"]
    beside = copy_ms(case.bytes) if case.bytes and case.graph else None
    rate = amount / (alone * 1e-3)
    scaled, unit = (rate / 1e9, "GB/s") if case.bytes else (rate / 1e12, "TFLOP/s")
    between = min(times["ours"]), max(times["ours"])
    return Timing(
        case.name, median["ours"], between, alone, median.get("stock"), median.get("liger"), scaled, unit, rate / top,
        beside,
    )  # fmt: skip


def race(versions: dict[str, Function], tell: Tell, what: str) -> dict[str, list[float]]:
    """The milliseconds of each version in each round; a version that can't run is left out, with a word."""
    times: dict[str, list[float]] = {}
    dead: set[str] = set()
    for _ in range(ROUNDS):
        for name, function in versions.items():
            if name in dead:
                continue
            try:
                took = float(do_bench(function, warmup=20, rep=ROUND_MS, return_mode="median"))
                times.setdefault(name, []).append(took)
            except Exception as error:  # a peer that cannot run this is a gap in the table, not the end of it
                dead.add(name)
                times.pop(name, None)
                tell(f"{what}, {name}: {type(error).__name__}: {str(error)[:200]}")
    return times


def device_ms(function: Function, rep_ms: float = ROUND_MS) -> float:
    """The time on the device alone, of a call that finds nothing of its own in the cache; ten rounds of ``rep_ms``.

    Between calls memory is read, so that what a call leaves to be written is written in the time of both; the time of
    the reads alone is taken off.
    """
    other, sums = torch.zeros(_READ_BYTES // 4, device=DEVICE).view(4096, -1), torch.empty(4096, device=DEVICE)

    def read() -> None:
        torch.sum(other, dim=1, out=sums)

    def both() -> None:
        function()
        read()

    together, alone = (float(do_bench_cudagraph(f, rep=rep_ms, return_mode="median")) for f in (both, read))
    return together - alone


@functools.cache
def copy_ms(moved: float) -> float:
    """Of a copy that reads and writes ``moved`` bytes in all, by the clock of :func:`device_ms`."""
    source = randn(max(1, round(moved / 4)))
    target = torch.empty_like(source)
    return device_ms(lambda: target.copy_(source), ROUND_MS / 4)


def ceilings() -> tuple[float, float]:
    """(bytes/s of a copy, FLOP/s of a bf16 product) on this GPU, with random data."""
    source, target = randn(2**28), torch.empty(2**28, dtype=BF16, device=DEVICE)
    copy = 4.0 * 2**28 / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)
    a, b = randn(8192, HIDDEN), randn(INTERMEDIATE, HIDDEN)
    product = 2.0 * 8192 * HIDDEN * INTERMEDIATE / (do_bench(lambda: a @ b.t(), return_mode="median") * 1e-3)
    return copy, product
