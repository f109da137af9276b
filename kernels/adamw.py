"""AdamW in one launch for many tensors, with states in 8, 16 or 32 bits and stochastic rounding.

    m ← β₁·m + (1 − β₁)·g          v ← β₂·v + (1 − β₂)·g²
    p ← p·(1 − lr·λ) − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101. All of it in fp32, whatever
the formats of p, g, m and v. Two things make pure 16-bit training work:

- What is stored in bf16 (weights, and states of that kind) is rounded up or down at random, with the probabilities that
  make the mean right. Rounded to nearest, an update below half a step of the weight is lost every time.
- 8-bit states are stored block by block (256 values and their largest one) in the dynamic format of Dettmers et al.,
  "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861: within each power of ten the codes are evenly
  spaced, and each larger power of ten has twice as many. The number of codes below a value is therefore a concave
  function made of straight lines, so it is the least of them; a code's value is the middle of its cell.

The random bits are a function of (seed, step, tensor, place), so a step is repeatable, also after a resume and on every
rank of a data-parallel run. A second moment is never rounded to 0 unless it is 0: with ε = 1e-8 the next update of that
weight would be enormous.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl

from . import selfcheck
from .launch import on, unavailable

#: How m and v are stored. Tensors below :data:`SMALLEST` values have fp32 states under ``8bit``.
States = Literal["8bit", "bf16", "fp32"]
STATES: tuple[States, ...] = get_args(States)
#: Values that share a scale.
BLOCK = 256
#: What 8-bit states of a smaller tensor would save is nothing, and norms are sensitive.
SMALLEST = 4096

_TILE_BLOCKS = 8
_TILES = 16  # per program
_WARPS = 8
#: Of 8-bit states: codes are decoded by arithmetic instead of a table; the next tile is read while one is worked on.
_ARITHMETIC, _AHEAD = False, True
_COLUMNS = 7  # of the table: addresses of p, g, m, v and the scales of m and v; number of values
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_8BIT = tl.constexpr(0)
_BF16 = tl.constexpr(1)


@triton.jit
def _encode(x, TOP: tl.constexpr):
    """Values in [0, 1] to the codes of their cells, 0 … 2^(TOP+1) − 1 (as floats less a half: see ``_whole``)."""
    cells = x * (2.0 * 10.0 ** (TOP - 1) / 0.9) + (2 * 8 / 9 - 1.5)
    for j in tl.static_range(2, TOP + 1):
        cells = tl.minimum(cells, x * (2.0**j * 10.0 ** (TOP - j) / 0.9) + (2.0**j * 8 / 9 - 1.5))
    return cells


@triton.jit
def _decode(code, TOP: tl.constexpr):
    """What codes 0 … 2^(TOP+1) − 1 stand for, by the lines that :func:`values` is made of: no table, so no look-ups."""
    middle = code.to(tl.float32) + 0.5
    value = tl.zeros_like(middle)
    for j in tl.static_range(1, TOP + 1):
        value = tl.maximum(value, (middle - (2.0**j * 8 / 9 - 1)) * (0.9 / (2.0**j * 10.0 ** (TOP - j))))
    return tl.minimum(value, 1.0)


@triton.jit
def _whole(x):
    """The nearest integer of x, −1 < x < 256: adding 1.5·2²³ leaves it in the low bits, cheaper than a cast."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _mix(x):
    """A 32-bit integer hash whose every output bit depends on every input bit (xor-shift and multiply, twice)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _to_bf16(x, bits):
    """fp32 rounded to bf16: up with the probability of what is cut off, by 16 random ``bits``."""
    whole = x.to(tl.uint32, bitcast=True)
    moved = ((whole + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, moved, x).to(tl.bfloat16)  # the bits of a NaN might carry over into those of a number


@triton.jit
def _pointer(table_ptr, tensor, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + tensor * COLUMNS + COLUMN).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(g_ptr, p_ptr, m_ptr, v_ptr, tile, left, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """One tile as it is stored."""
    at = (tile * BLOCKS + tl.arange(0, BLOCKS)[:, None]) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < left
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0)
    return g, p, m, tl.load(v_ptr + at, mask=inside, other=0)


@triton.jit(do_not_specialize=["key"])
def _kernel(
    table_ptr, tensor_ptr, chunk_ptr, values_ptr, lr, beta1, beta2, new1, new2, eps, decay, rate, root2, key,
    P: tl.constexpr, G: tl.constexpr, STATE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    ARITHMETIC: tl.constexpr, AHEAD: tl.constexpr,
    COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(tensor_ptr + tl.program_id(0)).to(tl.int64)
    chunk = tl.load(chunk_ptr + tl.program_id(0)).to(tl.int64)
    KIND: tl.constexpr = tl.uint8 if STATE == _8BIT else (tl.bfloat16 if STATE == _BF16 else tl.float32)
    p_ptr = _pointer(table_ptr, tensor, 0, COLUMNS, P, ALIGNED)
    g_ptr = _pointer(table_ptr, tensor, 1, COLUMNS, G, ALIGNED)
    m_ptr = _pointer(table_ptr, tensor, 2, COLUMNS, KIND, ALIGNED)
    v_ptr = _pointer(table_ptr, tensor, 3, COLUMNS, KIND, ALIGNED)
    m_scale_ptr = _pointer(table_ptr, tensor, 4, COLUMNS, tl.float32, ALIGNED)
    v_scale_ptr = _pointer(table_ptr, tensor, 5, COLUMNS, tl.float32, ALIGNED)
    first = chunk * (TILES * BLOCKS)
    left = tl.minimum(tl.load(table_ptr + tensor * COLUMNS + 6) - first * BLOCK, TILES * BLOCKS * BLOCK).to(tl.int32)
    if ALIGNED:  # so that 16 bytes lie within the mask or outside it as one
        left = tl.multiple_of(left, 16)
    seed = _mix(_mix(key.to(tl.uint32) + tensor.to(tl.uint32)) + chunk.to(tl.uint32))
    p_ptr += first * BLOCK
    g_ptr += first * BLOCK
    m_ptr += first * BLOCK
    v_ptr += first * BLOCK
    m_scale_ptr += first
    v_scale_ptr += first
    if AHEAD:
        g, p, m_raw, v_raw = _read(g_ptr, p_ptr, m_ptr, v_ptr, 0, left, BLOCKS, BLOCK)
    for tile in range(TILES):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)[:, None]
        some = block * BLOCK < left
        at = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = at < left
        # 8-bit states take long enough to work on that the next tile has to be on its way meanwhile.
        if AHEAD:
            next_g, next_p, next_m, next_v = _read(g_ptr, p_ptr, m_ptr, v_ptr, tile + 1, left, BLOCKS, BLOCK)
        else:
            g, p, m_raw, v_raw = _read(g_ptr, p_ptr, m_ptr, v_ptr, tile, left, BLOCKS, BLOCK)
        if STATE == _8BIT:
            if ARITHMETIC:
                m = _decode(m_raw & 127, 6)
                m = tl.where(m_raw > 127, -m, m)
                v = _decode(v_raw, 7)
            else:
                m = tl.load(values_ptr + m_raw.to(tl.int32))
                v = tl.load(values_ptr + 256 + v_raw.to(tl.int32))
            m *= tl.load(m_scale_ptr + block, mask=some, other=0.0)
            v *= tl.load(v_scale_ptr + block, mask=some, other=0.0)
        else:
            m, v = m_raw.to(tl.float32), v_raw.to(tl.float32)
        wide = g.to(tl.float32)
        m = beta1 * m + new1 * wide
        v = beta2 * v + new2 * wide * wide
        updated = p.to(tl.float32) * decay - rate * m / (tl.sqrt(v) * root2 + eps)

        bits = _mix(seed + at.to(tl.uint32))
        if STATE == _8BIT:
            m_scale = tl.max(tl.abs(m), axis=1, keep_dims=True)
            v_scale = tl.max(v, axis=1, keep_dims=True)
            tl.store(m_scale_ptr + block, m_scale, mask=some)
            tl.store(v_scale_ptr + block, v_scale, mask=some)
            # A little more than 1 / scale, so that the largest value has the largest code whatever the rounding.
            code = _whole(_encode(tl.abs(m) * (1.000001 / tl.maximum(m_scale, 1e-37)), 6))
            code |= (m.to(tl.int32, bitcast=True) >> 24) & 128
            tl.store(m_ptr + at, code.to(tl.uint8), mask=inside)
            code = _whole(tl.maximum(_encode(v * (1.000001 / tl.maximum(v_scale, 1e-37)), 7), 0.75))
            tl.store(v_ptr + at, tl.where(v > 0, code, 0).to(tl.uint8), mask=inside)
        elif STATE == _BF16:
            more = _mix(bits)
            tl.store(m_ptr + at, _to_bf16(m, more), mask=inside)
            tl.store(v_ptr + at, _to_bf16(v, more >> 16), mask=inside)
        else:
            tl.store(m_ptr + at, m, mask=inside)
            tl.store(v_ptr + at, v, mask=inside)
        if STOCHASTIC:
            tl.store(p_ptr + at, _to_bf16(updated, bits >> 16), mask=inside)
        else:
            tl.store(p_ptr + at, updated.to(P), mask=inside)
        if AHEAD:
            g, p, m_raw, v_raw = next_g, next_p, next_m, next_v


@dataclass(frozen=True)
class _Kind:
    """What all tensors of one launch have in common. The step is that of the first: they differ by unused tensors."""

    p: torch.dtype
    g: torch.dtype
    states: States
    step: int
    aligned: bool


class AdamW(torch.optim.Optimizer):
    """AdamW whose step is one launch per kind of tensor.

    Args:
        params: bf16, fp16 or fp32 tensors on a GPU, contiguous.
        states: see :data:`States`. 8-bit states take 2 + 8 / 256 bytes per value, bf16 ones 4, fp32 ones 8.
        stochastic: round bf16 tensors at random; else to nearest.
        wide: parameters that have fp32 states under ``8bit``: embeddings, whose gradients are far from evenly spread
            (Dettmers et al., section 2.3).
        seed: of the rounding.

    Every option but ``wide`` and ``seed`` may differ by parameter group. A state dictionary restores exactly.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, states: States = "8bit", stochastic: bool = True,
        wide: Collection[torch.Tensor] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        if states not in STATES:
            raise ValueError(f"states are {', '.join(STATES)}, not {states}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "states": states,
                    "stochastic": stochastic}  # fmt: skip
        self._wide = {id(p) for p in wide}
        self._seed = seed
        self._chunks: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient.

        Raises:
            ValueError: a parameter is on no GPU, not contiguous or of another format, or its gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0  # of a tensor among all, which its random bits depend on
        for group in self.param_groups:
            kinds: dict[_Kind, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
            for p in group["params"]:
                place += 1
                if p.grad is not None and p.numel():
                    kind, gradient = self._prepared(p, group)
                    kinds.setdefault(kind, []).append((place, p, gradient))
            for kind, members in kinds.items():
                self._launch(kind, members, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state exactly: the base class would cast 8-bit codes and scales to the parameters' format."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            if i in state_dict["state"]:
                self.state[p] = {
                    name: value.to(p.device, copy=True) if isinstance(value, torch.Tensor) else value
                    for name, value in state_dict["state"][i].items()
                }

    def _prepared(self, p: torch.Tensor, group: dict[str, Any]) -> tuple[_Kind, torch.Tensor]:
        """The kind of a tensor and its gradient as the kernel takes it; its state is made and counted on."""
        gradient = p.grad
        assert gradient is not None
        if why := unavailable(p.device):
            raise ValueError(f"a parameter can't be updated: {why}")
        if p.dtype not in _TYPES or not p.is_contiguous() or gradient.is_sparse:
            raise ValueError(f"a parameter is {p.dtype}, {p.layout}, with strides {p.stride()}; it can't be updated")
        state = self.state[p]
        if not state:
            states = group["states"]
            if states == "8bit" and (p.numel() < SMALLEST or id(p) in self._wide):
                states = "fp32"
            state.update(_zeros(p, states))
        state["step"] += 1
        m = state["exp_avg"]
        stored: States = "8bit" if m.dtype == torch.uint8 else "bf16" if m.dtype == torch.bfloat16 else "fp32"
        gradient = gradient.contiguous()
        touched = (p, gradient, *(t for t in state.values() if isinstance(t, torch.Tensor)))
        aligned = p.numel() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in touched)
        return _Kind(p.dtype, gradient.dtype, stored, int(state["step"]), aligned), gradient

    def _launch(
        self, kind: _Kind, members: list[tuple[int, torch.Tensor, torch.Tensor]], group: dict[str, Any]
    ) -> None:
        rows = []
        for _, p, gradient in members:
            state = self.state[p]
            m, v = state["exp_avg"], state["exp_avg_sq"]
            scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"]) if kind.states == "8bit" else (m, v)
            rows.append([t.data_ptr() for t in (p, gradient, m, v, *scales)] + [p.numel()])
        device = members[0][1].device
        table = torch.tensor(rows, dtype=torch.int64)
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        tensor, chunk = self._chunked(tuple(row[-1] for row in rows), device)
        (beta1, beta2), lr, t = group["betas"], float(group["lr"]), kind.step
        with on(members[0][1]):
            _kernel[(tensor.numel(),)](
                table, tensor, chunk, _both_values(device), lr, beta1, beta2, 1 - beta1, 1 - beta2, group["eps"],
                1 - lr * group["weight_decay"], lr / (1 - beta1**t), (1 - beta2**t) ** -0.5,
                _key(self._seed, t, members[0][0]),
                P=_TYPES[kind.p], G=_TYPES[kind.g], STATE=STATES.index(kind.states),
                STOCHASTIC=group["stochastic"] and kind.p == torch.bfloat16, ALIGNED=kind.aligned,
                ARITHMETIC=_ARITHMETIC, AHEAD=_AHEAD and kind.states == "8bit",
                COLUMNS=_COLUMNS, TILES=_TILES, BLOCKS=_TILE_BLOCKS, BLOCK=BLOCK, num_warps=_WARPS,
            )  # fmt: skip

    def _chunked(self, sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For each program of a launch: its tensor, and which chunk of it."""
        key = (device, sizes)
        if key not in self._chunks:
            counts = torch.tensor([-(-n // (_TILES * _TILE_BLOCKS * BLOCK)) for n in sizes])
            tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
            first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            chunk = torch.arange(tensor.numel()) - first
            self._chunks[key] = (tensor.to(device, torch.int32), chunk.to(device, torch.int32))
        return self._chunks[key]


def _zeros(p: torch.Tensor, states: States) -> dict[str, Any]:
    """The state before the first step; code 0 is the value 0."""
    dtype = {"8bit": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}[states]
    state: dict[str, Any] = {"step": 0}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        if states == "8bit":
            state[f"{name}_scale"] = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)
    return state


def _key(seed: int, step: int, place: int) -> int:
    """31 bits of one launch; the kernel mixes them with the tensor's number and the place in it."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place * 0x94D049BB133111EB) & (2**64 - 1)
    x = ((x ^ (x >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
    return (x ^ (x >> 32)) & 0x7FFFFFFF


@functools.cache
def _both_values(device: torch.device) -> torch.Tensor:
    return torch.cat((values(signed=True), values(signed=False))).to(device)


def values(signed: bool) -> torch.Tensor:
    """What the codes of a state stand for, in units of its block's largest value: 256 of m (signed) or of v."""
    top = 6 if signed else 7
    middle = torch.arange(2 ** (top + 1), dtype=torch.float64) + 0.5
    lines = [(middle - (2.0**j * 8 / 9 - 1)) * (0.9 / (2.0**j * 10.0 ** (top - j))) for j in range(1, top + 1)]
    table = torch.stack(lines).amax(0).clamp(0, 1).float()
    return torch.cat((table, -table)) if signed else table


def dequantised(state: dict[str, Any], name: str) -> torch.Tensor:
    """A state of :class:`AdamW` (``exp_avg`` or ``exp_avg_sq``) as fp32, however it is stored."""
    stored: torch.Tensor = state[name]
    if stored.dtype != torch.uint8:
        return stored.float()
    table = values(signed=name == "exp_avg").to(stored.device)
    flat = table[stored.reshape(-1).long()]
    return (flat * state[f"{name}_scale"].repeat_interleave(BLOCK)[: flat.numel()]).view(stored.shape)


def prove(device: torch.device) -> selfcheck.Verdict:
    """Whether steps on this device are AdamW: with fp32 states against float64, with 8-bit ones within their format."""

    def moved(make: Any, dtype: torch.dtype) -> torch.Tensor:
        p = selfcheck._random((SMALLEST + 32,), dtype, device).requires_grad_()
        before = p.detach().clone()
        optimizer = make([p])
        for seed in (1, 2):
            p.grad = selfcheck._random(p.shape, torch.float32, device, seed=seed).to(dtype)
            optimizer.step()
        return p.detach().double() - before.double()

    def trial() -> selfcheck.Verdict:
        options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
        truth = moved(lambda p: torch.optim.AdamW(p, **options), torch.float64)
        stock = selfcheck._relative_error(moved(lambda p: torch.optim.AdamW(p, **options), torch.float32), truth)
        for states, limit in (("fp32", selfcheck.LIMIT * stock + 1e-6), ("bf16", 2e-2), ("8bit", 0.1)):
            error = selfcheck._relative_error(
                moved(lambda p, s=states: AdamW(p, states=s, **options), torch.float32), truth
            )
            if not error <= limit:
                return selfcheck.Verdict(False, f"with {states} states its steps lie {error:.1e} from float64's")
        return selfcheck.Verdict(True)

    return selfcheck.proven("adamw", __file__, device, "all states", trial)
