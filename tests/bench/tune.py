"""Settings and variants of the kernels that fall short of their ceilings, each checked and timed, in one short run.

    python -P -m finetui.tests.bench.tune [--only adamw …] [--tokens 8192] [--seconds 240] [--json FILE]

What a kernel is built from stands in constants of its module: widths of tiles, warps, and which of two ways it goes.
Each combination below is tried in their place; what it computes is held against what the constants as they are
compute, and it is timed on a warm GPU. The first line of each kernel is that of its constants as they are; choosing
others is then an edit of that module. Without a GPU, ``--check`` runs the smallest shapes in Triton's interpreter
(``TRITON_INTERPRET=1``) and times nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from finetui.engine.bench.clock import stopwatch
from finetui.kernels import adamw, fp8, linear_cross_entropy, lora_glu, nf4
from finetui.kernels.launch import INTERPRETED

Made = list[torch.Tensor]
BF16 = torch.bfloat16
_RECORDED = 20  # calls of one graph


@dataclass(frozen=True)
class Trial:
    """One kernel and what may be set.

    Args:
        module: whose constants ``knobs`` are; each has its values.
        make: from tokens and device to a call that returns what it computed.
        bytes: that one call must move, at so many tokens; flops likewise.
        near: how far results of two settings may lie apart (relative, Frobenius).
        short: a call takes the device less time than the host: it is timed from a CUDA graph.
    """

    name: str
    module: ModuleType
    knobs: dict[str, list[Any]]
    make: Callable[[int, torch.device], Callable[[], Made]]
    bytes: Callable[[int], float] = lambda _: 0.0
    flops: Callable[[int], float] = lambda _: 0.0
    near: float = 1e-3
    short: bool = False

    def settings(self) -> Iterator[dict[str, Any]]:
        """As it is, then every other combination."""
        now = {knob: getattr(self.module, knob) for knob in self.knobs}
        yield now
        for values in itertools.product(*self.knobs.values()):
            chosen = dict(zip(self.knobs, values, strict=True))
            if chosen != now:
                yield chosen


def _random(*shape: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    draw = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(*shape, generator=draw, device=device) * scale).to(BF16 if not INTERPRETED else torch.float32)


def _size(tokens: int, full: int) -> int:
    """A width of the real model; a small one for a check."""
    return full if tokens >= 1024 else 96


def _adamw(tokens: int, device: torch.device) -> Callable[[], Made]:
    params = [torch.nn.Parameter(_random(_size(tokens, 14336), _size(tokens, 4096), device=device)) for _ in range(3)]
    for p in params:
        p.grad = _random(*p.shape, device=device)
    optimizer = adamw.AdamW(params, lr=1e-3, states="8bit", stochastic=False)
    steps = iter(range(10**9))

    def run() -> Made:
        optimizer.step()
        # What is compared is the first step of each setting; later ones would be another number of steps.
        return [p.detach()[:64].clone() for p in params] if next(steps) == 0 else []

    return run


def _fold(tokens: int, device: torch.device) -> Callable[[], Made]:
    wide = 2 * _size(tokens, 14336)
    dy, scale = _random(tokens, wide, device=device), _random(wide, device=device).float().abs() + 0.5

    def run() -> Made:
        made = fp8.quantise(dy, scale)
        return [made.scale, made.data[:64].view(fp8.E4M3).float()]

    return run


def _nf4(tokens: int, device: torch.device) -> Callable[[], Made]:
    rows, columns = _size(tokens, 14336), _size(tokens, 4096) // 64 * 64
    draw = torch.Generator(device).manual_seed(0)

    def codes(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=draw, device=device)

    blocks = rows * columns // 64
    code = torch.linspace(-1, 1, 16, device=device)
    inner = torch.rand(-(-blocks // 256), generator=draw, device=device)
    nested = (inner, torch.linspace(-1, 1, 256, device=device), 256, torch.full((), 0.01, device=device))
    dtype = torch.float32 if INTERPRETED else BF16
    state = nf4.NF4(codes(rows * columns // 2), codes(blocks), code, 64, (rows, columns), dtype, nested)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return lambda: [nf4.dequantise(state, out)[:64].clone()]


def _cross_entropy(chunk_rows: int, *, trained: bool) -> Callable[[int, torch.device], Callable[[], Made]]:
    def make(tokens: int, device: torch.device) -> Callable[[], Made]:
        words, width = _size(tokens, 128256), _size(tokens, 4096)
        hidden = _random(tokens, width, device=device).requires_grad_()
        weight = _random(words, width, device=device, scale=0.02).requires_grad_(trained)
        labels = torch.randint(0, words, (tokens,), generator=torch.Generator(device).manual_seed(1), device=device)

        def run() -> Made:
            loss = linear_cross_entropy.linear_cross_entropy(
                hidden, weight, labels, labelled=tokens, chunk_rows=min(chunk_rows, tokens)
            )
            wanted = [hidden, weight] if trained else [hidden]
            return [loss.detach(), *(g[:64] for g in torch.autograd.grad(loss, wanted))]

        return run

    return make


def _unit(tokens: int, device: torch.device) -> Callable[[], Made]:
    columns, rank = _size(tokens, 14336), 16
    g, u, dh = (_random(tokens, columns, device=device) for _ in range(3))
    xa, b = _random(tokens, 2 * rank, device=device).split(rank, dim=1), _random(2 * columns, rank, device=device)
    bs, dha = (b[:columns], b[columns:]), _random(tokens, rank, device=device)

    def run() -> Made:
        # Backward writes its gradients over g and u: what is compared is what comes out beside them.
        h = lora_glu.forward(g, u, (xa[0], xa[1]), bs, (1.0, 1.0), "silu")
        made = lora_glu.backward(dh, g.clone(), u.clone(), (xa[0], xa[1]), bs, (1.0, 1.0), "silu", dha)
        return [h[:64], made.db_gate, made.db_up, *([made.da_down] if made.da_down is not None else [])]

    return run


def trials() -> list[Trial]:
    """The kernels below 85% of a ceiling, and the gated unit, which has not been timed."""
    head = 2.0 * 4096 * 128256
    found = [
        Trial(
            "adamw 8-bit", adamw,
            {"_TILE": [{"8bit": tile} for tile in ((2, 2), (4, 4), (8, 8), (4, 8))], "_REGISTERS": [72, 80, 96, 128]},
            _adamw, bytes=lambda _: 3 * 14336 * 4096 * (6 + 2 * (2 + 8 / 256)),
        ),
        Trial(
            "fp8 quantise, folded", fp8,
            {"_WHOLE": [16384, 65536], "_PIECE": [4096, 8192, 16384], "_PIECE_WARPS": [8, 16, 32]},
            _fold, bytes=lambda tokens: 3.0 * tokens * 28672, near=1e-6,
        ),
        Trial(
            "nf4", nf4, {"_TILE_BYTES": [1024, 2048, 4096, 8192], "_WARPS": [2, 4, 8]},
            _nf4, bytes=lambda _: 14336 * 4096 * 2.516, near=0.0, short=True,
        ),
        Trial(
            "gated unit with lora", lora_glu,
            {
                "_FORWARD": [(32, 128, 4), (64, 64, 4), (64, 128, 8), (16, 256, 4)],
                "_BACKWARD": [(32, 64, 4), (64, 64, 8), (32, 128, 8), (64, 32, 4)],
                "_STAGES": [1, 2, 3], "_WAVES": [4, 8],
            },
            # g, u and dh of forward and backward; the copies of g and u that keep the trial repeatable are counted too
            _unit, bytes=lambda tokens: 2.0 * tokens * 14336 * (3 + 5 + 4), near=2e-2,
        ),
    ]  # fmt: skip
    for trained, rows in itertools.product((False, True), (1024, 2048, 4096)):
        name = f"linear + cross-entropy, head {'trained' if trained else 'frozen'}, chunks of {rows}"
        knobs = {"_BLOCK": [4096, 8192, 16384], "_WARPS": [8, 16, 32]} if rows == 1024 else {"_BLOCK": [8192]}
        passes = 3 if trained else 2
        work = partial(_work, passes * head)
        make = _cross_entropy(rows, trained=trained)
        found.append(Trial(name, linear_cross_entropy, knobs, make, flops=work, near=2e-2))
    return found


def _work(per_token: float, tokens: int) -> float:
    return per_token * tokens


@contextlib.contextmanager
def constants(module: ModuleType, values: dict[str, Any]) -> Iterator[None]:
    """A module with other constants."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def measure(trial: Trial, tokens: int, device: torch.device, until: float, *, timed: bool) -> Iterator[dict[str, Any]]:
    """One row per setting: what was set, whether it is right, and how fast it is."""
    expected: Made | None = None
    for values in trial.settings():
        row: dict[str, Any] = {"kernel": trial.name, "settings": values}
        if time.monotonic() > until:
            yield row | {"left_out": "the time is up"}
            return
        try:
            with constants(trial.module, values):
                run = trial.make(tokens, device)
                made = [one.detach().float().clone() for one in run()]
                expected = expected or made
                row["apart"] = max(_apart(a, b) for a, b in zip(made, expected, strict=True))
                row["right"] = row["apart"] <= trial.near
                if timed:
                    timed_run, calls = (_recorded(run), _RECORDED) if trial.short else (run, 1)
                    row |= _timed(trial, tokens, stopwatch(timed_run, device, budget_s=0.06, least=5).median / calls)
        except Exception as error:  # a setting that does not compile or launch is a finding, not an end
            row["failed"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        yield row


def _recorded(run: Callable[[], Made]) -> Callable[[], None]:
    """Several calls as one replay of a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_RECORDED):
            run()
    return graph.replay


def _apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def _timed(trial: Trial, tokens: int, seconds: float) -> dict[str, float]:
    rate = {}
    if trial.bytes(tokens):
        rate["gb_per_s"] = round(trial.bytes(tokens) / seconds / 1e9, 1)
    if trial.flops(tokens):
        rate["tflop_per_s"] = round(trial.flops(tokens) / seconds / 1e12, 1)
    return {"ms": round(seconds * 1e3, 4), **rate}


def main() -> int:
    """Try them, write each row the moment it is known, and say which was the fastest right one of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of which a kernel's name has one")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--check", action="store_true", help="smallest shapes, no times")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if not a.check and not torch.cuda.is_available():
        print("timing needs a CUDA GPU; --check runs in the interpreter", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [trial for trial in trials() if any(word in trial.name for word in a.only)]
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for place, trial in enumerate(chosen):
        # No kernel may use up the time of those after it.
        share = began + a.seconds * (place + 1) / len(chosen)
        for row in measure(trial, 8 if a.check else a.tokens, device, share, timed=not a.check):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if a.json:
                a.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        right = [row for row in rows if row["kernel"] == trial.name and row.get("right") and "ms" in row]
        if right:
            best = min(right, key=lambda row: row["ms"])
            told = f"{right[0]['ms']} ms as it is, {best['ms']} ms with {best['settings']}"
            print(f"{trial.name}: {told}", file=sys.stderr)
    return int(any(row.get("right") is False or "failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
