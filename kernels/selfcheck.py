"""Proof that a kernel may stand in for the stock operation: on this device, in this dtype, at this width.

Both are run forward and backward on the same random input and held against float64. The kernel passes if for the
output and for each gradient

    ‖ours − exact‖ ≤ 1.2 · ‖stock − exact‖ + floor · ‖exact‖        (Frobenius)

and if no gradient is zero or non-finite: a wrong kernel most often trains nothing. A verdict is kept for the process
and on disk, keyed by everything it depends on, so that a start pays for it once per machine and version.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from . import attention, glu, launch, rms_norm, rope

#: How much worse than stock a kernel may be.
LIMIT = 1.2
#: Relative error that passes whatever stock does: where stock is all but exact, a ratio says nothing. The interpreter
#: cuts fp32 to bf16 where a GPU rounds, so there it is two roundings of one unit in the last place.
FLOOR = {torch.float32: 5e-7, torch.float16: 1e-5, torch.bfloat16: 1.2e-2 if launch.INTERPRETED else 1e-4}

#: Up to how much worse than stock luck may be the reason, and how many draws decide then.
_CLOSE, _DRAWS = 2.0, 5

Operation = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel may be used, and why not. ``worst`` is the largest ratio of our error to stock's."""

    ok: bool
    why: str = ""
    worst: float = 0.0

    def __post_init__(self) -> None:
        if not self.ok and not self.why:
            raise ValueError("a failed verdict says why")


_verdicts: dict[str, Verdict] = {}


def compare(
    ours: Operation, stock: Operation, exact: Operation, inputs: Sequence[torch.Tensor], *, floor: float = 0.0
) -> Verdict:
    """Run three versions of one operation, forward and backward, and judge the first by the second.

    Args:
        inputs: the differentiable inputs; ``exact`` gets them in float64.
        floor: relative error that passes in any case, if that of the dtype is too strict for a long computation.
    """
    tried = [_errors(ours, stock, exact, inputs, seed=17)]
    verdict, close = _judge(tried, inputs, floor)
    if close:  # a gradient may be a small difference of large sums, of which one draw says little
        for seed in range(117, 17 + 100 * _DRAWS, 100):
            tried.append(_errors(ours, stock, exact, [_varied(tensor, seed) for tensor in inputs], seed))
        verdict, _ = _judge(tried, inputs, floor)
    return verdict


def _varied(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """About the same numbers, each of which is rounded otherwise: what forward rounds weighs on every gradient."""
    return tensor * (1 + 0.1 * _random(tensor.shape, tensor.dtype, tensor.device, seed=seed))


@dataclass(frozen=True)
class _Error:
    """One output or gradient: its relative errors against float64, ours and stock's."""

    name: str
    dtype: torch.dtype
    mine: float
    theirs: float
    number: bool
    wrong: str = ""


def _errors(
    ours: Operation, stock: Operation, exact: Operation, inputs: Sequence[torch.Tensor], seed: int
) -> list[_Error]:
    """Every output and gradient of one draw of the outputs' gradients."""
    device = inputs[0].device
    results: list[list[torch.Tensor]] = []
    seeds: list[torch.Tensor] = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for operation, dtype in ((ours, None), (stock, None), (exact, torch.float64)):
            leaves = [tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in inputs]
            out = operation(*leaves)
            outs = [out] if isinstance(out, torch.Tensor) else list(out)
            # The same output gradient for all three, in the first one's dtype; a scalar is a loss, so 1.
            seeds = seeds or [
                _random(o.shape, o.dtype, device, seed=seed + i) if o.dim() else torch.ones_like(o)
                for i, o in enumerate(outs)
            ]
            given = [drawn.to(o.dtype) for drawn, o in zip(seeds, outs, strict=True)]
            results.append([*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, given)])
    found, n_out = [], len(results[0]) - len(inputs)
    for i, (mine, theirs, truth) in enumerate(zip(*results, strict=True)):
        name, wrong = f"output {i}" if i < n_out else f"gradient {i - n_out}", ""
        error = stock_error = float("inf")
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            wrong = f"{name} is {mine.dtype} {tuple(mine.shape)}, stock's {theirs.dtype}"
        else:
            error, stock_error = _relative_error(mine, truth), _relative_error(theirs, truth)
            if not error < float("inf"):
                wrong = f"{name} is not finite"
            elif i >= n_out and not mine.any():
                wrong = f"{name} is zero"
        found.append(_Error(name, mine.dtype, error, stock_error, not mine.dim(), wrong))
    return found


def _judge(tried: Sequence[list[_Error]], inputs: Sequence[torch.Tensor], floor: float) -> tuple[Verdict, bool]:
    """The verdict on root mean squares over all draws, and whether it is a failure that luck may have made."""
    worst, close = 0.0, True
    failed: Verdict | None = None
    for draws in zip(*tried, strict=True):
        first = draws[0]
        if wrong := next((draw.wrong for draw in draws if draw.wrong), ""):
            return Verdict(False, wrong), False
        error, stock_error = (
            (sum(getattr(draw, whose) ** 2 for draw in draws) / len(draws)) ** 0.5 for whose in ("mine", "theirs")
        )
        allowed = max(floor, FLOOR[first.dtype])
        if launch.INTERPRETED and any(tensor.dtype == torch.bfloat16 for tensor in inputs):
            allowed = max(allowed, FLOOR[torch.bfloat16])  # an fp32 output carries a cut within it
        if first.number:  # one number: which of two equally good sums lies closer is luck
            allowed = max(allowed, torch.finfo(inputs[0].dtype).eps / 4)
        if error > LIMIT * stock_error + allowed:
            why = f"{first.name}: error {error:.2e} against float64, stock {stock_error:.2e}"
            failed, close = failed or Verdict(False, why), close and error < _CLOSE * stock_error + allowed
        worst = max(worst, error / max(stock_error, allowed))
    return (failed, close) if failed else (Verdict(True, worst=worst), False)


def proven(
    kernel: str, source: str | tuple[str, ...], device: torch.device, shape: str, trial: Callable[[], Verdict]
) -> Verdict:
    """The verdict on ``kernel`` for a device and a shape class, from memory, from disk, or from ``trial``.

    Args:
        source: path of the kernel's file or files; a changed kernel is proven again.
        shape: everything about dtype and size that the outcome depends on, as text.

    A trial that raises (a compiler error, no memory) is a failed verdict, kept for this process only.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    key = " | ".join((kernel, name, shape, versions, _fingerprint(source)))
    if key in _verdicts:
        return _verdicts[key]
    stored = _read().get(key)
    if isinstance(stored, dict) and isinstance(stored.get("ok"), bool):
        why = "" if stored["ok"] else str(stored.get("why") or "it failed its check")
        verdict = Verdict(stored["ok"], why, float(stored.get("worst", 0.0)))
    else:
        try:
            # A first input may come in the midst of a checkpointed, autocast forward. What those set (saved-tensor
            # hooks, grad mode, dtype) belongs to a thread, so a trial in its own neither sees nor disturbs them.
            with ThreadPoolExecutor(max_workers=1) as thread:
                verdict = thread.submit(trial).result()
        except Exception as error:  # whatever a compiler may raise: the answer is stock, and the reason is told
            verdict = Verdict(False, f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300])
        else:
            _write(key, verdict)
    _verdicts[key] = verdict
    return verdict


def prove_rms_norm(
    device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, columns: int, eps: float, form: rms_norm.Form
) -> Verdict:
    """RMSNorm of one width, in the model's casting form."""

    def trial() -> Verdict:
        x = _random((_rows(), columns), dtype, device)
        weight = _random((columns,), weight_dtype, device, seed=1) * 0.2 + (0.0 if form == "one-plus" else 1.0)
        return compare(
            lambda x, w: rms_norm.rms_norm(x, w, eps, form),
            lambda x, w: rms_norm.rms_norm_reference(x, w, eps, form),
            lambda x, w: rms_norm.rms_norm_reference(x, w, eps, form),
            (x, weight),
        )

    shape = f"{form} {dtype} x {weight_dtype} [{columns}]"
    return proven("rms_norm", rms_norm.__file__, device, shape, trial)


def prove_glu(device: torch.device, dtype: torch.dtype, columns: int, activation: glu.Activation) -> Verdict:
    """A gated unit; its width matters only for where rows end."""

    def trial() -> Verdict:
        gate, up = (_random((_rows(), columns), dtype, device, seed=seed) * 2 for seed in (0, 1))
        return compare(
            lambda g, u: glu.glu(g, u, activation),
            lambda g, u: glu.glu_reference(g, u, activation),
            lambda g, u: glu.glu_reference(g, u, activation),
            (gate, up),
        )

    return proven("glu", glu.__file__, device, f"{activation} {dtype} [{columns}]", trial)


def prove_rope(device: torch.device, dtype: torch.dtype, dim: int, rotary: int, layout: rope.Layout) -> Verdict:
    """A rotary embedding of one head size; the number of heads matters only for where tiles end."""

    def trial() -> Verdict:
        q, k = (_random((2, heads, _rows(), dim), dtype, device, seed=heads) for heads in (3, 1))
        cos, sin = (_random((2, _rows(), rotary), dtype, device, seed=seed) for seed in (5, 6))

        def reference(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rope.rope_reference(q, k, cos.to(q.dtype), sin.to(q.dtype), layout)

        return compare(lambda q, k: rope.rope(q, k, cos, sin, layout), reference, reference, (q, k))

    return proven("rope", rope.__file__, device, f"{layout} {dtype} [{rotary} of {dim}]", trial)


def prove_documents(
    device: torch.device, dtype: torch.dtype, dim: int, groups: int, *, windowed: bool = False
) -> Verdict:
    """Attention within documents, for heads of one size of which ``groups`` share a key head.

    Args:
        windowed: with a window that is narrower than some documents.
    """

    def trial() -> Verdict:
        lengths = (40, 24, 64) if not launch.INTERPRETED else (3, 1, 4)
        total = sum(lengths)
        inputs = [
            _random((1, total, heads, dim), dtype, device, seed=seed).transpose(1, 2)
            for seed, heads in enumerate((2 * groups, 2, 2))
        ]
        dout = _random((1, total, 2 * groups, dim), dtype, device, seed=9).transpose(1, 2)
        window = None if not windowed else 3 if launch.INTERPRETED else 33
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        documents = attention.Documents(lengths, starts)
        mask = documents.mask(1, total, window)

        def run(documents: attention.Documents | None, dtype: torch.dtype) -> list[torch.Tensor]:
            q, k, v = (t.to(dtype) for t in inputs)
            out, attended = attention.attend(q, k, v, mask, dim**-0.5, documents, window)
            return [out, *attention.gradients(attended, q, k, v, out, dout.to(dtype))]

        worst = 0.0
        for name, mine, theirs, truth in zip(
            ("output", "dq", "dk", "dv"), run(documents, dtype), run(None, dtype), run(None, torch.float64), strict=True
        ):
            error, stock = _relative_error(mine, truth), _relative_error(theirs, truth)
            # Two flash kernels order their sums otherwise; neither is exact.
            if not error <= 1.5 * stock + max(FLOOR[dtype], torch.finfo(dtype).eps / 8):
                return Verdict(False, f"{name}: error {error:.2e} against float64, with a mask {stock:.2e}")
            worst = max(worst, error / max(stock, FLOOR[dtype]))
        return Verdict(True, worst=worst)

    shape = f"{dtype} [{dim}] {groups} per key head{' in a window' if windowed else ''}"
    return proven("documents", attention.__file__, device, shape, trial)


def cache_file() -> Path:
    """Where verdicts are kept: ``$FINETUI_CACHE``, or finetui's folder in the user's cache."""
    folder = os.environ.get("FINETUI_CACHE")
    base = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetui"
    return base / "kernels.json"


def forget() -> None:
    """Drop the verdicts of this process (not those on disk)."""
    _verdicts.clear()


def _rows() -> int:
    return 5 if launch.INTERPRETED else 131


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normal values that leave the global random state alone: a check must not change what is trained."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(device=device, dtype=dtype)


def _relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    scale = truth.double().norm()
    error = ((value.double() - truth.double()).norm() / scale.clamp_min(1e-300)).item()
    return error if error == error else float("inf")


def origins(module: torch.nn.Module) -> tuple[str, ...]:
    """Whose code a module and its parts are: packages with their versions, or files with their hashes.

    A verdict on such code is one on that version of it: a newer one of the same name may compute something else.
    """
    found = set()
    for name in {type(part).__module__ for part in module.modules()}:
        package = name.partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", "")
        file = getattr(sys.modules.get(name), "__file__", None)
        if not version and file:
            package, version = name, _hash(file)
        found.add(f"{package} {version}")
    return tuple(sorted(found))


@functools.cache
def _hash(*files: str) -> str:
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


@functools.cache
def _fingerprint(source: str | tuple[str, ...]) -> str:
    sources = (source,) if isinstance(source, str) else source
    return _hash(*sources, str(launch.__file__), __file__)  # the judge is part of the judgement


def _read() -> dict[str, object]:
    """The stored verdicts; none if the file is missing or spoilt, as then they are simply found again."""
    try:
        stored = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _write(key: str, verdict: Verdict) -> None:
    """Add one verdict by replacing the file whole, so that ranks that start together can't spoil it."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = _read() | {key: asdict(verdict)}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(stored, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        return  # a read-only or full home: the next process proves it again
