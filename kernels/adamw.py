"""AdamW in one launch for many tensors, with states in 8, 16 or 32 bits and stochastic rounding.

    m ← β₁·m + (1 − β₁)·g          v ← β₂·v + (1 − β₂)·g²
    p ← p·(1 − lr·λ) − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101. All of it in fp32, whatever
the formats of p, g, m and v. Two things make pure 16-bit training work:

- What is stored in bf16 (weights, and states of that kind) is rounded up or down at random, with the probabilities that
  make the mean right. Rounded to nearest, an update below half a step of the weight is lost every time.
- 8-bit states are stored block by block (:mod:`.blockwise`).

The random bits are a function of (seed, step, tensor, place), so a step is repeatable, also after a resume and on every
rank of a data-parallel run.
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

from . import blockwise, selfcheck
from .blockwise import BLOCK
from .launch import INTERPRETED, on, unavailable

#: How m and v are stored. Tensors below :data:`SMALLEST` values have fp32 states under ``8bit``.
States = Literal["8bit", "bf16", "fp32"]
STATES: tuple[States, ...] = get_args(States)
#: What 8-bit states of a smaller tensor would save is nothing, and norms are sensitive.
SMALLEST = 4096

_TILES = 16  # per program
#: Blocks of a tile and warps that work on it, by how states are stored.
_TILE: dict[States, tuple[int, int]] = {"8bit": (2, 2), "bf16": (8, 8), "fp32": (8, 8)}
#: Of a thread that works on 8-bit states: twelve programs share a processor then, and some compute while others wait
#: for memory. With fewer registers random rounding spills some; with more, or two tiles at a time, fewer programs fit:
#: either was slower on an H200.
_REGISTERS = 80
_STAGES = 1  # tiles with 8-bit states that are read or worked on at a time; more than one lie in shared memory
_COLUMNS = 7  # of the table: addresses of p, g, m, v and the scales of m and v; number of values
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_8BIT, _BF16 = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _mix(x):
    """A 32-bit integer hash whose every output bit depends on every input bit (xor-shift and multiply, twice)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _to_bf16(x, bits):
    """fp32 rounded to bf16: up with the probability of what is cut off, by the upper 16 of random ``bits``."""
    moved = (x.to(tl.uint32, bitcast=True) + (bits >> 16)).to(tl.float32, bitcast=True)
    moved += x * 0.0  # the bits of a NaN might have been carried over into those of a number
    return (moved.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _pointer(table_ptr, tensor, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + tensor * COLUMNS + COLUMN).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["key"])
def _kernel(
    table_ptr, tensor_ptr, chunk_ptr, values_ptr, factor_ptr, beta1, beta2, new1, new2, eps, decay, root2, key,
    P: tl.constexpr, G: tl.constexpr, STATE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
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
    factor = tl.load(factor_ptr)
    left = tl.where(factor == factor, left, 0)  # a factor that is no number leaves everything as it is
    new1 *= factor
    new2 *= factor * factor
    if ALIGNED:  # so that 16 bytes lie within the mask or outside it as one
        left = tl.multiple_of(left, 16)
    seed = _mix(_mix(key.to(tl.uint32) + tensor.to(tl.uint32)) + chunk.to(tl.uint32))
    p_ptr += first * BLOCK
    g_ptr += first * BLOCK
    m_ptr += first * BLOCK
    v_ptr += first * BLOCK
    m_scale_ptr += first
    v_scale_ptr += first
    place = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # A linear congruence per place, begun at a random number, of which the upper half is used.
    bits = _mix(seed + place.to(tl.uint32))
    if STATE == _8BIT:
        table = tl.load(values_ptr + tl.arange(0, 512))
    for tile in tl.range(TILES, num_stages=STAGES):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)[:, None]
        some = block * BLOCK < left
        at = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = at < left
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        p = tl.load(p_ptr + at, mask=inside, other=0.0)
        if STATE == _8BIT:
            m_codes = blockwise.read_codes(m_ptr, block, left, BLOCKS, BLOCK, ALIGNED)
            v_codes = blockwise.read_codes(v_ptr, block, left, BLOCKS, BLOCK, ALIGNED)
            m, v = blockwise.look_up(table, m_codes, v_codes, BLOCKS, BLOCK)
            m *= beta1 * tl.load(m_scale_ptr + block, mask=some, other=0.0)
            v *= beta2 * tl.load(v_scale_ptr + block, mask=some, other=0.0)
        else:
            m = beta1 * tl.load(m_ptr + at, mask=inside, other=0).to(tl.float32)
            v = beta2 * tl.load(v_ptr + at, mask=inside, other=0).to(tl.float32)
        wide = g.to(tl.float32)
        m += new1 * wide
        v += new2 * wide * wide
        below = tl.sqrt(v) * root2 + eps
        # 1 / x as 1 / √x²: one instruction and its product instead of a division's seven.
        updated = p.to(tl.float32) * decay - m * tl.rsqrt(below * below)

        bits = bits * 0x2C9277B5 + 0xAC564B05
        if STATE == _8BIT:
            m_top = blockwise.largest(m, True, BLOCKS, BLOCK)
            v_top = blockwise.largest(v, False, BLOCKS, BLOCK)
            blockwise.store_scales(m_scale_ptr, m_top, block, left, BLOCKS, BLOCK)
            blockwise.store_scales(v_scale_ptr, v_top, block, left, BLOCKS, BLOCK)
            tl.store(m_ptr + at, blockwise.signed_codes(m, m_top), mask=inside)
            tl.store(v_ptr + at, blockwise.positive_codes(v, v_top), mask=inside)
        elif STATE == _BF16:
            more = _mix(bits)
            tl.store(m_ptr + at, _to_bf16(m, more), mask=inside)
            tl.store(v_ptr + at, _to_bf16(v, more << 16), mask=inside)
        else:
            tl.store(m_ptr + at, m, mask=inside)
            tl.store(v_ptr + at, v, mask=inside)
        if STOCHASTIC:
            tl.store(p_ptr + at, _to_bf16(updated, bits), mask=inside)
        else:
            tl.store(p_ptr + at, updated.to(P), mask=inside)


@dataclass(frozen=True)
class _Fixed:
    """What stays the same of one tensor from step to step: its first state, where all of it lies, and how."""

    m: torch.Tensor
    addresses: tuple[int, ...]
    states: States
    aligned: bool


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
        self._fixed: dict[int, _Fixed] = {}
        self._tables: dict[tuple[Any, ...], tuple[list[tuple[int, ...]], torch.Tensor]] = {}
        self._factor: torch.Tensor | None = None
        super().__init__(params, defaults)

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply gradients by ``factor`` in the next step, as clipping does; NaN leaves that step out.

        Clipped by themselves, gradients are read and written once more, and rounded.

        Args:
            factor: a scalar in fp32 on the parameters' device; nobody waits for it.
        """
        self._factor = factor

    def leave_out_if(self, condition: torch.Tensor) -> None:
        """Leave the next step out where this holds, on top of what :meth:`scale_gradients` said.

        Args:
            condition: a scalar on the parameters' device; nobody waits for it.
        """
        factor = _one(condition.device) if self._factor is None else self._factor
        self._factor = torch.where(condition, torch.nan, factor)

    def uncount(self) -> None:
        """The latest step was left out, as is known now, and does not count: bias corrections go by the number."""
        for state in self.state.values():
            state["step"] -= 1

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
            kinds: dict[_Kind, list[tuple[int, _Fixed, torch.Tensor]]] = {}
            for p in group["params"]:
                place += 1
                if p.grad is not None and p.numel():
                    kind, fixed, gradient = self._prepared(p, group)
                    kinds.setdefault(kind, []).append((place, fixed, gradient))
            for kind, members in kinds.items():
                self._launch(kind, members, group)
        self._factor = None
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state exactly: the base class would cast 8-bit codes and scales to the parameters' format.

        Raises:
            ValueError: states of another optimiser, or 8-bit ones of a version of this whose codes meant other values.
        """
        if any(state and "exp_avg" not in state for state in state_dict["state"].values()):
            raise ValueError("these states are of another optimiser")
        if any(getattr(s.get("exp_avg"), "dtype", None) == torch.uint8 for s in state_dict["state"].values()):
            raise ValueError("these 8-bit states are of an earlier version of AdamW, whose codes meant other values")
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            if i in state_dict["state"]:
                self.state[p] = {
                    name: value.to(p.device, copy=True) if isinstance(value, torch.Tensor) else value
                    for name, value in state_dict["state"][i].items()
                }
                self.state[p]["step"] = int(state_dict["state"][i]["step"])  # torch's own keeps a tensor

    def _prepared(self, p: torch.Tensor, group: dict[str, Any]) -> tuple[_Kind, _Fixed, torch.Tensor]:
        """The kind of a tensor, its places, and its gradient as the kernel takes it; its state is counted on."""
        gradient = p.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError("a parameter's gradient is sparse; it can't be updated")
        state, fixed = self.state[p], self._fixed.get(id(p))
        if fixed is None or fixed.m is not state.get("exp_avg") or fixed.addresses[0] != p.data_ptr():
            fixed = self._fixed[id(p)] = self._found(p, state, group)
        state["step"] += 1
        gradient = gradient.contiguous()
        aligned = fixed.aligned and gradient.data_ptr() % 16 == 0
        return _Kind(p.dtype, gradient.dtype, fixed.states, int(state["step"]), aligned), fixed, gradient

    def _found(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> _Fixed:
        """What the kernel needs of a tensor and its state, which is made if there is none."""
        if why := unavailable(p.device):
            raise ValueError(f"a parameter can't be updated: {why}")
        if p.dtype not in _TYPES or not p.is_contiguous():
            raise ValueError(f"a parameter is {p.dtype}, {p.layout}, with strides {p.stride()}; it can't be updated")
        if not state:
            states = group["states"]
            if states == "8bit" and (p.numel() < SMALLEST or id(p) in self._wide):
                states = "fp32"
            state.update(_zeros(p, states))
        m, v = state["exp_avg"], state["exp_avg_sq"]
        stored: States = "8bit" if m.dtype == torch.int8 else "bf16" if m.dtype == torch.bfloat16 else "fp32"
        scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"]) if stored == "8bit" else (m, v)
        addresses = tuple(t.data_ptr() for t in (p, m, v, *scales))
        aligned = p.numel() % 16 == 0 and all(address % 16 == 0 for address in addresses)
        return _Fixed(m, addresses, stored, aligned)

    def _launch(self, kind: _Kind, members: list[tuple[int, _Fixed, torch.Tensor]], group: dict[str, Any]) -> None:
        rows = []
        for _, fixed, gradient in members:
            first, *states = fixed.addresses
            rows.append((first, gradient.data_ptr(), *states, gradient.numel()))
        device, (blocks, warps) = members[0][2].device, _TILE[kind.states]
        table = self._table((id(group), kind.p, kind.g, kind.states, kind.aligned), rows, device)
        tensor, chunk = self._chunked(tuple(row[-1] for row in rows), blocks, device)
        (beta1, beta2), lr, t = group["betas"], float(group["lr"]), kind.step
        rate = max(lr / (1 - beta1**t), 1e-30)  # it divides the denominator, where it costs no instruction
        limited = kind.states == "8bit" and not INTERPRETED and torch.version.hip is None
        factor = _one(device) if self._factor is None else self._factor
        with on(members[0][2]):
            _kernel[(tensor.numel(),)](
                table, tensor, chunk, blockwise.table(device), factor, beta1, beta2, 1 - beta1, 1 - beta2,
                max(group["eps"], 1e-18) / rate, 1 - lr * group["weight_decay"], (1 - beta2**t) ** -0.5 / rate,
                _key(self._seed, t, members[0][0]),
                P=_TYPES[kind.p], G=_TYPES[kind.g], STATE=STATES.index(kind.states),
                STOCHASTIC=group["stochastic"] and kind.p == torch.bfloat16, ALIGNED=kind.aligned,
                COLUMNS=_COLUMNS, TILES=_TILES, BLOCKS=blocks, BLOCK=BLOCK,
                STAGES=_STAGES if kind.states == "8bit" else 1, num_warps=warps,
                **({"maxnreg": _REGISTERS} if limited else {}),
            )  # fmt: skip

    def _table(self, key: tuple[Any, ...], rows: list[tuple[int, ...]], device: torch.device) -> torch.Tensor:
        """Where all tensors of a launch lie; mostly where they lay at the step before."""
        before, table = self._tables.get(key, ([], None))
        if table is None or before != rows:
            table = torch.tensor(rows, dtype=torch.int64)
            if device.type == "cuda":
                table = table.pin_memory().to(device, non_blocking=True)
            self._tables[key] = rows, table
        return table

    def _chunked(self, sizes: tuple[int, ...], blocks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For each program of a launch: its tensor, and which chunk of it."""
        key = (device, sizes, blocks)
        if key not in self._chunks:
            counts = torch.tensor([-(-n // (_TILES * blocks * BLOCK)) for n in sizes])
            tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
            first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            chunk = torch.arange(tensor.numel()) - first
            self._chunks[key] = (tensor.to(device, torch.int32), chunk.to(device, torch.int32))
        return self._chunks[key]


def _zeros(p: torch.Tensor, states: States) -> dict[str, Any]:
    """The state before the first step; code 0 is the value 0."""
    wide = torch.bfloat16 if states == "bf16" else torch.float32
    state: dict[str, Any] = {"step": 0}
    for name, code in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        dtype = code if states == "8bit" else wide
        state[name] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        if states == "8bit":
            state[f"{name}_scale"] = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)
    return state


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def _key(seed: int, step: int, place: int) -> int:
    """31 bits of one launch; the kernel mixes them with the tensor's number and the place in it."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place * 0x94D049BB133111EB) & (2**64 - 1)
    x = ((x ^ (x >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
    return (x ^ (x >> 32)) & 0x7FFFFFFF


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

    return selfcheck.proven("adamw", (__file__, blockwise.__file__), device, "all states", trial)
