"""The kernels that settings are tried on: what may be set in each, its inputs, and what it must move or compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from finetui.kernels import adamw, fp8, linear_cross_entropy, lora_add, lora_glu, nf4, rms_norm
from finetui.kernels.launch import INTERPRETED, row_tile
from finetui.kernels.wide import mm_fp32

Made = list[torch.Tensor]
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Trial:
    """One kernel and what may be set.

    Args:
        module: whose constants ``knobs`` are; each has its values. ``picked``: further settings, where not every
            combination is worth its time.
        make: from tokens and device to a call that returns what it computed, itself or views of it: what it
            copied would be timed. What lies in place is looked at after the first call.
        bytes: that one call must move, at so many tokens; flops likewise.
        near: how far results of two settings may lie apart (relative, Frobenius).
        short: a call takes the device less time than the host: it is timed from a CUDA graph, on a cold cache.
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
    # As it is trained: without random rounding a thread needs fewer registers, and another setting is the fastest.
    optimizer = adamw.AdamW(params, lr=1e-3, states="8bit")

    def run() -> Made:
        optimizer.step()
        return [p.detach()[:64] for p in params]

    return run


def _fold(tokens: int, device: torch.device) -> Callable[[], Made]:
    wide = 2 * _size(tokens, 14336)
    # Powers of two, in 16 bits: as the gradient of a layer's input has them.
    scale = torch.exp2(torch.randint(-4, 4, (wide,), generator=torch.Generator(device).manual_seed(0), device=device))
    dy, scale = _random(tokens, wide, device=device), scale.to(BF16 if not INTERPRETED else torch.float32)

    def run() -> Made:
        made = fp8.quantise(dy, scale)
        return [made.scale, made.data[:64].view(fp8.E4M3)]

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
    return lambda: [nf4.dequantise(state, out)[:64]]


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

    def run() -> Made:
        # Later calls go over what the first one left, at the same speed.
        figures = (targets, losses, right, losses)
        linear_cross_entropy.rows_of_loss(logits, figures, 1.0, None, 0.0, "nll", gradient=True)
        return [losses, logits[:64]]

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
    of = _Gated.of(tokens, device, rank)

    def run() -> Made:
        # Later calls go over what the first one left, at the same speed.
        made = lora_glu.backward(of.dh, of.g, of.u, of.xa, of.b, (1.0, 1.0), "silu", of.dha)
        assert made.da_down is not None
        return [of.g[:64], of.u[:64], made.db_gate, made.db_up, made.da_down]

    return run


def _add(tokens: int, device: torch.device, *, keep: bool) -> Callable[[], Made]:
    columns, rank = _size(tokens, 4096), 16
    y, add, xa, b = (_random(*shape, device=device) for shape in
                     ((tokens, columns), (tokens, columns), (tokens, rank), (columns, rank)))  # fmt: skip

    def run() -> Made:
        lora_add.add_to(y, add, None, xa, b, 2.0, keep=keep)
        return [y[:64]]

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
                    ((2, 2), 72, 16), ((2, 2), 96, 16), ((2, 2), 80, 8), ((4, 4), 80, 16), ((8, 8), 80, 16),
                )
            ),
            bytes=lambda _: 3 * 14336 * 4096 * (6 + 2 * (2 + 8 / 256)), near=1e-2,
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
                (16, (((16, 128, 4, 168), 3, 9), ((16, 128, 4, 168), 3, 12), ((16, 64, 2, 160), 3, 12),
                      ((16, 128, 4, 168), 2, 6))),
                (32, (((16, 128, 4, 255), 3, 4), ((16, 128, 4, 255), 3, 8), ((16, 64, 2, 255), 3, 8))),
                (64, (((16, 64, 4, 168), 3, 4), ((16, 64, 4, 224), 3, 6), ((16, 64, 4, 224), 3, 9))),
            )
        ),
        *(
            Trial(
                f"adapter and residual {'after' if keep else 'before'} a product", lora_add, {},
                partial(_add, keep=keep),
                tuple(
                    {"_READ" if keep else "_NEW": tile}
                    for tile in ((64, 32, 4), (128, 32, 4), (64, 32, 2), (64, 128, 4), (64, 64, 4), (32, 128, 4))
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
