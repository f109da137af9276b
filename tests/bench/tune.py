"""Settings and variants of the kernels that fall short of their ceilings, each checked and timed, in one short run.

    python -P -m finetui.tests.bench.tune [--only adamw …] [--tokens 8192] [--seconds 240] [--warm 8] [--json FILE]

What a kernel is built from stands in constants of its module: widths of tiles, warps, and which of two ways it goes.
Each combination below is tried in their place; what it computes is held against what the constants as they are
compute, and it is timed on a warm GPU. The first line of each kernel is that of its constants as they are; choosing
others is then an edit of that module. The narrow products of adapters are cuBLAS's: there, the ways to ask for the same
product are tried. Compiling takes longer than all else, so ``--warm`` processes do it side by side first. The table of
the best comes last. Without a GPU, ``--check`` runs the smallest shapes in Triton's interpreter
(``TRITON_INTERPRET=1``) and times nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from finetui.engine.bench.clock import stopwatch
from finetui.kernels import adamw, fp8, linear_cross_entropy, lora_add, lora_glu, nf4, rms_norm
from finetui.kernels.launch import INTERPRETED, row_tile
from finetui.kernels.wide import mm_fp32

Made = list[torch.Tensor]
BF16 = torch.bfloat16
_RECORDED = 20  # calls of one graph


@dataclass(frozen=True)
class Trial:
    """One kernel and what may be set.

    Args:
        module: whose constants ``knobs`` are; each has its values. ``picked``: further settings, where not every
            combination is worth its time.
        make: from tokens and device to a call that returns what it computed.
        bytes: that one call must move, at so many tokens; flops likewise.
        near: how far results of two settings may lie apart (relative, Frobenius).
        short: a call takes the device less time than the host: it is timed from a CUDA graph.
    """

    name: str
    module: Any
    knobs: dict[str, list[Any]]
    make: Callable[[int, torch.device], Callable[[], Made]]
    picked: tuple[dict[str, Any], ...] = ()
    bytes: Callable[[int], float] = lambda _: 0.0
    flops: Callable[[int], float] = lambda _: 0.0
    near: float = 1e-3
    short: bool = False

    def settings(self) -> Iterator[dict[str, Any]]:
        """As it is, then every other combination, then what was picked."""
        names = dict.fromkeys((*self.knobs, *(knob for one in self.picked for knob in one)))
        now = {knob: getattr(self.module, knob) for knob in names}
        yield now
        combined = [dict(zip(self.knobs, values, strict=True)) for values in itertools.product(*self.knobs.values())]
        seen = [now]
        for chosen in (now | one for one in (*combined, *self.picked)):
            if chosen not in seen:
                seen.append(chosen)
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
    # Powers of two, in 16 bits: as the gradient of a layer's input has them.
    scale = torch.exp2(torch.randint(-4, 4, (wide,), generator=torch.Generator(device).manual_seed(0), device=device))
    dy, scale = _random(tokens, wide, device=device), scale.to(BF16 if not INTERPRETED else torch.float32)

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


def _rows_of_loss(tokens: int, device: torch.device) -> Callable[[], Made]:
    words, rows = _size(tokens, 128256), min(tokens, linear_cross_entropy.CHUNK_ROWS)
    logits = _random(rows, words, device=device, scale=3.0)
    targets = torch.randint(0, words, (rows,), generator=torch.Generator(device).manual_seed(1), device=device)
    losses, right = torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.int32, device=device)
    first = iter((True,))

    def run() -> Made:
        # Later calls go over what the first one left, at the same speed.
        figures = (targets, losses, right, losses)
        linear_cross_entropy.rows_of_loss(logits, figures, 1.0, None, 0.0, "nll", gradient=True)
        return [losses.clone(), logits[:64].clone(), logits.gather(1, targets[:, None])] if next(first, False) else []

    return run


@dataclass(frozen=True)
class _Warps:
    """:func:`.launch.row_tile` with a number of warps of its own."""

    warps: int

    def __call__(self, columns: int) -> tuple[int, int, int]:
        return *row_tile(columns)[:2], self.warps


def _norm(tokens: int, device: torch.device) -> Callable[[], Made]:
    columns = _size(tokens, 4096)
    x, dy, weight = (_random(n, columns, device=device) for n in (tokens, tokens, 1))
    _, rows, rstd = rms_norm.forward(x, weight[0], 1e-5, "cast-first")

    def run() -> Made:
        dx, dweight = rms_norm.backward(dy, None, rows, weight[0], rstd, "cast-first", weight_grad=True)
        assert dweight is not None
        return [dx[:64], dweight]

    return run


#: Ways to ask for x·Aᵀ with a few rows of A, for dy·B with a few columns of B, and for dyᵀ·xa with few columns of xa.
_NARROW: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "x·Aᵀ": {
        "as it is": lambda x, a, wide: torch.mm(x, a.t()),
        "turned": lambda x, a, wide: torch.mm(a, x.t()).t(),
        "A laid out turned": lambda x, a, wide: torch.mm(x, wide["turned"]),
        "64 columns": lambda x, a, wide: torch.mm(x, wide["padded"].t())[:, : a.shape[0]],
        "64 columns, turned": lambda x, a, wide: torch.mm(wide["padded"], x.t())[: a.shape[0]].t(),
    },
    "dyᵀ·xa": {
        "as it is": lambda dy, xa, wide: mm_fp32(dy.t(), xa.t(), 2.0),
        "turned": lambda dy, xa, wide: mm_fp32(xa, dy, 2.0).t(),
        "64 columns": lambda dy, xa, wide: mm_fp32(dy.t(), wide["padded"].t(), 2.0)[:, : xa.shape[0]],
        "64 columns, turned": lambda dy, xa, wide: mm_fp32(wide["padded"], dy, 2.0)[: xa.shape[0]].t(),
    },
}
_way = SimpleNamespace(WAY="as it is")


def _narrow(product: str, rank: int, width: int) -> Callable[[int, torch.device], Callable[[], Made]]:
    def make(tokens: int, device: torch.device) -> Callable[[], Made]:
        columns = _size(tokens, width)
        long = _random(tokens, columns, device=device)
        small = _random(rank, columns if product == "x·Aᵀ" else tokens, device=device)
        padded = torch.cat((small, small.new_zeros(64 - rank, small.shape[1])))
        beside = {"padded": padded, "turned": small.t().contiguous()}
        return lambda: [_NARROW[product][_way.WAY](long, small, beside)]

    return make


@dataclass(frozen=True)
class _Gated:
    """What a gated unit with LoRA works on; its columns are as many as those of Llama-3.1-8B."""

    g: torch.Tensor
    u: torch.Tensor
    dh: torch.Tensor
    xa: tuple[torch.Tensor, torch.Tensor]
    b: tuple[torch.Tensor, torch.Tensor]
    dha: torch.Tensor

    @classmethod
    def of(cls, tokens: int, device: torch.device, rank: int = 16) -> _Gated:
        columns = _size(tokens, 14336)
        g, u, dh = (_random(tokens, columns, device=device) for _ in range(3))
        xa_g, xa_u = _random(tokens, 2 * rank, device=device).split(rank, dim=1)
        b = _random(2 * columns, rank, device=device)
        return cls(g, u, dh, (xa_g, xa_u), (b[:columns], b[columns:]), _random(tokens, rank, device=device))


def _unit_forward(tokens: int, device: torch.device) -> Callable[[], Made]:
    of = _Gated.of(tokens, device)
    return lambda: [lora_glu.forward(of.g, of.u, of.xa, of.b, (1.0, 1.0), "silu")[:64]]


def _unit_backward(tokens: int, device: torch.device, *, rank: int) -> Callable[[], Made]:
    of, first = _Gated.of(tokens, device, rank), iter((True,))

    def run() -> Made:
        # Later calls go over what the first one left, at the same speed.
        made = lora_glu.backward(of.dh, of.g, of.u, of.xa, of.b, (1.0, 1.0), "silu", of.dha)
        if not next(first, False):
            return []
        assert made.da_down is not None
        return [one.clone() for one in (of.g[:64], of.u[:64], made.db_gate, made.db_up, made.da_down)]

    return run


def _add(tokens: int, device: torch.device, *, keep: bool) -> Callable[[], Made]:
    columns, rank = _size(tokens, 4096), 16
    y, add, xa, b = (_random(*shape, device=device) for shape in
                     ((tokens, columns), (tokens, columns), (tokens, rank), (columns, rank)))  # fmt: skip
    first = iter((True,))

    def run() -> Made:
        lora_add.add_to(y, add, None, xa, b, 2.0, keep=keep)
        return [y[:64].clone()] if next(first, False) else []

    return run


def trials() -> list[Trial]:
    """The kernels below 85% of a ceiling, and their neighbours."""
    head = 2.0 * 4096 * 128256
    found = [
        Trial(
            "rms_norm backward, weight trained", rms_norm, {"_PROGRAMS": [1, 2, 3, 4], "_AHEAD": [0, 1, 2, 3]}, _norm,
            ({"row_tile": _Warps(4)}, {"row_tile": _Warps(16)}, {"row_tile": _Warps(16), "_PROGRAMS": 1, "_AHEAD": 3},
             {"row_tile": _Warps(4), "_PROGRAMS": 3, "_AHEAD": 3}, {"row_tile": _Warps(4), "_PROGRAMS": 4}),
            bytes=lambda tokens: 3 * 2.0 * tokens * 4096, near=1e-3, short=True,
        ),
        Trial(
            "rows of the loss", linear_cross_entropy, {"_STAGES": [1, 3, 4, 5], "_LAST_USE": ["", "evict_first"]},
            _rows_of_loss,
            ({"_BLOCK": 8192, "_STAGES": 8}, {"_BLOCK": 8192, "_STAGES": 10}, {"_BLOCK": 32768},
             {"_BLOCK": 32768, "_STAGES": 3}, {"_BLOCK": 8192, "_WARPS": 16, "_STAGES": 9},
             {"_WARPS": 16, "_STAGES": 5}, {"_LANE": 16, "_STAGES": 5}, {"_LANE": 4, "_STAGES": 5}),
            bytes=lambda tokens: 2 * 2.0 * min(tokens, 1024) * 128256, near=1e-2, short=True,
        ),
        Trial(
            "adamw 8-bit", adamw, {}, _adamw,
            tuple(
                {"_TILE": {"8bit": tile, "bf16": (8, 8), "fp32": (8, 8)}, "_REGISTERS": registers, "_TILES": tiles}
                for tile, registers, tiles in (
                    ((2, 2), 64, 16), ((2, 2), 80, 16), ((2, 2), 72, 8), ((4, 4), 64, 16), ((4, 4), 80, 16),
                )
            ),
            bytes=lambda _: 3 * 14336 * 4096 * (6 + 2 * (2 + 8 / 256)),
        ),
        Trial(
            "fp8 quantise, folded", fp8,
            {"_PIECE": [4096, 8192], "_PIECE_WARPS": [8, 16]},
            _fold, bytes=lambda tokens: 3.0 * tokens * 28672, near=1e-6,
        ),
        Trial(
            "nf4", nf4, {"_TILE_BYTES": [1024, 2048, 4096, 8192], "_WARPS": [2, 4, 8]},
            _nf4, bytes=lambda _: 14336 * 4096 * 2.516, near=0.0, short=True,
        ),
        Trial(
            "gated unit with lora, forward", lora_glu, {}, _unit_forward,
            tuple({"_FORWARD": tile} for tile in ((16, 128, 4), (32, 64, 4), (32, 128, 8), (16, 64, 2), (64, 128, 8))),
            bytes=lambda tokens: 2.0 * tokens * 14336 * 3, near=2e-2, short=True,
        ),
        *(
            Trial(
                f"gated unit with lora of rank {rank}, backward", lora_glu, {}, partial(_unit_backward, rank=rank),
                tuple(
                    {"_BACKWARD": {rank: tile}, "_STAGES": stages, "_WAVES": waves}
                    for tile, stages, waves in tiles
                ),
                bytes=lambda tokens: 2.0 * tokens * 14336 * 5, near=2e-2, short=True,
            )
            for rank, tiles in (
                (16, (((16, 128, 4, 168), 3, 6), ((16, 128, 4, 168), 3, 12), ((16, 64, 2, 168), 3, 12),
                      ((32, 64, 4, 168), 3, 12), ((32, 64, 4, 128), 3, 12))),
                (32, (((16, 64, 4, 168), 3, 12), ((32, 64, 4, 255), 2, 12))),
                (64, (((16, 64, 4, 168), 3, 12), ((32, 64, 4, 255), 2, 12))),
            )
        ),
        *(
            Trial(
                f"adapter and residual {'after' if keep else 'before'} a product", lora_add, {},
                partial(_add, keep=keep),
                tuple(
                    {"_READ" if keep else "_NEW": tile}
                    for tile in ((64, 64, 8), (32, 128, 4), (64, 128, 4), (16, 256, 4), (16, 128, 2))
                ),
                bytes=partial(_work, (6.0 if keep else 4.0) * 4096), near=1e-2, short=True,
            )
            for keep in (False, True)
        ),
    ]  # fmt: skip
    for trained, rows in itertools.product((False, True), (1024, 2048, 4096)):
        name = f"linear + cross-entropy, head {'trained' if trained else 'frozen'}, chunks of {rows}"
        knobs = {"_STAGES": [1, 5]}
        passes = 3 if trained else 2
        work = partial(_work, passes * head)
        make = _cross_entropy(rows, trained=trained)
        found.append(Trial(name, linear_cross_entropy, knobs, make, flops=work, near=2e-2))
    for product, rank, width in itertools.product(_NARROW, (16, 32, 48), (2048, 4096, 8192)):
        if (rank, width) not in ((48, 8192), (32, 8192)):  # what three share is an input, not the widest
            moved = partial(_work, 2.0 * width)
            ways = {"WAY": list(_NARROW[product])}
            name, make = f"narrow {product}, {rank} of {width}", _narrow(product, rank, width)
            found.append(Trial(name, _way, ways, make, bytes=moved, near=1e-2, short=True))
    return found


def _work(per_token: float, tokens: int) -> float:
    return per_token * tokens


@contextlib.contextmanager
def constants(module: Any, values: dict[str, Any]) -> Iterator[None]:
    """A module with other constants."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def measure(
    trial: Trial, tokens: int, device: torch.device, until: float, *, timed: bool, part: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per setting: what was set, whether it is right, and how fast it is. ``part``: every so manieth alone."""
    expected: Made | None = None
    for values in itertools.islice(trial.settings(), part[0], None, part[1]):
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


def best_of(rows: list[dict[str, Any]]) -> list[str]:
    """The table of what was found, a line for each kernel: as it is, and its fastest right setting."""
    lines = [f"{'kernel':52}{'as it is':>10}{'best':>10}{'gain':>7}{'rate':>14}   what differs"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        right = [row for row in rows if row["kernel"] == kernel and row.get("right") and "ms" in row]
        wrong = sum(row.get("right") is False or "failed" in row for row in rows if row["kernel"] == kernel)
        more = f"; {wrong} wrong or failed" if wrong else ""
        if not right:
            lines.append(f"{kernel:52}{'':41}   nothing measured{more}")
            continue
        now, best = right[0], min(right, key=lambda row: row["ms"])
        differs = {knob: value for knob, value in best["settings"].items() if value != now["settings"][knob]}
        gain = f"{now['ms'] / best['ms'] - 1:.1%}"
        rate = f"{best['tflop_per_s']} TFLOP/s" if "tflop_per_s" in best else f"{best.get('gb_per_s', '')} GB/s"
        lines.append(f"{kernel:52}{now['ms']:>10}{best['ms']:>10}{gain:>7}{rate:>14}   {_plain(differs)}{more}")
    return lines


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda one: getattr(one, "__name__", str(one)))


def warm(options: argparse.Namespace, seconds: float) -> None:
    """Compile all settings in several processes, into the cache on disk that they share with this one."""
    command = [sys.executable, "-P", "-m", "finetui.tests.bench.tune", "--tokens", str(options.tokens)]
    command += ["--only", *options.only]
    children = [
        subprocess.Popen([*command, "--part", str(place), str(options.warm)], stdout=subprocess.DEVNULL)
        for place in range(options.warm)
    ]
    until = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def main() -> int:
    """Try them, write each row the moment it is known, and say which was the fastest right one of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of which a kernel's name has one")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--check", action="store_true", help="smallest shapes, no times")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="processes that compile beforehand")
    parser.add_argument("--part", type=int, nargs=2, metavar=("PLACE", "OF"), help="one of those")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if not a.check and not torch.cuda.is_available():
        print("timing needs a CUDA GPU; --check runs in the interpreter", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [trial for trial in trials() if any(word in trial.name for word in a.only)]
    began = time.monotonic()
    if a.warm and not a.check:
        warm(a, a.seconds / 3)
    rows: list[dict[str, Any]] = []
    for place, trial in enumerate(chosen):
        # No kernel may use up the time of those after it.
        now = time.monotonic()
        share = now + (began + a.seconds - now) / min(4, len(chosen) - place)
        timed = not a.check and a.part is None
        for row in measure(trial, 8 if a.check else a.tokens, device, share, timed=timed, part=a.part or (0, 1)):
            rows.append(row)
            print(_plain(row), flush=True)
            if a.json:
                a.json.write_text(_plain(rows) + "\n", encoding="utf-8")
    if a.part is None:
        print("\n".join(best_of(rows)), file=sys.stderr)
    return int(any(row.get("right") is False or "failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
