"""The methods of merging: from the tensors of one name in several models to one tensor, with formula and source.

All of them compute in fp32 on the CPU and see one tensor at a time; :data:`METHODS` says what each of them takes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from . import pruning

REQUIRED = math.nan
"""In place of a default: the value has to be given, because no one value suits most merges."""


@dataclass(frozen=True)
class Group:
    """What one tensor of the result is made of.

    Args:
        models: the models' tensors in fp32, one after the other; can be read once, so that a sum holds one at a time.
        each: for each model its weight, density and so on, whichever the method takes.
        whole: the values that hold for all of them.
        base: the base's tensor, for methods that use one.
        seed: where DARE and DELLA begin to draw; see :func:`seed_of`.
    """

    models: Iterator[torch.Tensor]
    each: list[dict[str, float]]
    whole: dict[str, Any] = field(default_factory=dict)
    base: torch.Tensor | None = None
    seed: int = 0

    @property
    def weights(self) -> list[float]:
        """Of each model."""
        return [values["weight"] for values in self.each]

    def deltas(self) -> Iterator[torch.Tensor]:
        """Each model's task vector, ``model - base``, which is the caller's to change."""
        assert self.base is not None, "the method needs a base"
        for _ in self.each:
            yield next(self.models) - self.base  # of which nobody else holds the first


def seed_of(seed: int, name: str) -> int:
    """The seed for one tensor of a merge: neither the order of tensors nor their number changes what others get."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


# --- means


def linear(group: Group) -> torch.Tensor:
    """``sum(w x) / sum(w)``, the model soup (arXiv:2203.05482); with ``normalize: false`` without the division."""
    # The weights are divided, not the tensor: 1 and 3 become exact, and the result is rounded once less.
    whole = sum(group.weights) if group.whole["normalize"] else 1.0
    return _sum(next(group.models) * (w / whole) for w in group.weights)


def passthrough(group: Group) -> torch.Tensor:
    """``w x``: the tensor of one model, for stacks of layers."""
    (w,) = group.weights
    return next(group.models) * w


def slerp(group: Group) -> torch.Tensor:
    """``sin((1 - t) o) / sin(o) a + sin(t o) / sin(o) b`` with o the angle between a and b (Shoemake 1985, SIGGRAPH).

    The tensors are taken as vectors. Their lengths are interpolated with them, as they are not unit vectors.
    """
    return spherical(next(group.models), next(group.models), float(group.whole["t"]))


def nuslerp(group: Group) -> torch.Tensor:
    """Slerp with ``t = w2 / (w1 + w2)``; with a base it runs between the two task vectors and is added to the base.

    ``per: row`` and ``per: column`` interpolate the vectors of a matrix one by one.
    """
    vectors = group.models if group.base is None else group.deltas()
    t = group.weights[1] / sum(group.weights)
    found = spherical(next(vectors), next(vectors), t, group.whole["per"])
    return found if group.base is None else found.add_(group.base)


def spherical(a: torch.Tensor, b: torch.Tensor, t: float, per: str = "tensor") -> torch.Tensor:
    """Spherical interpolation from ``a`` (t = 0) to ``b`` (t = 1), of tensors, their rows or their columns.

    Where the angle is 0 or 180 degrees, or a vector is zero, there is no one great circle, and the way is straight.
    The angle is ``2 atan2(|u - v|, |u + v|)`` of the unit vectors (W. Kahan, "How Futile are Mindless Assessments of
    Roundoff", section 12), which is exact where the arc cosine of their product has lost half of its digits:
    at the small angles between fine-tunes of one base.
    """
    one, two = _vectors(a, per), _vectors(b, per)
    lengths = [_sums(one, one).sqrt(), _sums(two, two).sqrt()]
    straight = (lengths[0] == 0) | (lengths[1] == 0)
    u, v = (torch.where(length == 0, 1.0, length) for length in lengths)
    apart, together = torch.zeros_like(u), torch.zeros_like(u)
    for rows, x, y in _pieces(one, two):
        x, y = x / u[rows], y / v[rows]
        apart[rows] += (x - y).square().sum(1, keepdim=True)
        together[rows] += (x + y).square().sum(1, keepdim=True)
    angle = 2.0 * torch.atan2(apart.sqrt(), together.sqrt())
    straight |= angle.sin() < 1e-6
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1.0 - t, ((1.0 - t) * angle).sin() / sine).float()
    second = torch.where(straight, t, (t * angle).sin() / sine).float()
    found = one * first
    found += two * second
    return (found.T if per == "column" and a.dim() > 1 else found).reshape(a.shape)


def model_stock(group: Group) -> torch.Tensor:
    """``t mean(x) + (1 - t) base`` with ``t = N c / (1 + (N - 1) c)`` (arXiv:2403.19522, equation 3).

    c is the cosine between two task vectors, the mean over all pairs of the N models, for each tensor or each row.
    """
    assert group.base is not None
    deltas = [_vectors(delta, group.whole["per"]) for delta in group.deltas()]
    count, lengths = len(deltas), [_sums(delta, delta).sqrt() for delta in deltas]
    cosines = []
    for (i, x), (j, y) in itertools.combinations(enumerate(deltas), 2):
        product = lengths[i] * lengths[j]
        cosines.append(torch.where(product == 0, 0.0, _sums(x, y) / torch.where(product == 0, 1.0, product)))
    cosine = _sum(iter(cosines)) / len(cosines)
    t = count * cosine / (1.0 + (count - 1.0) * cosine)
    return _sum(iter(deltas)).mul_((t / count).float()).reshape(group.base.shape).add_(group.base)


def nearswap(group: Group) -> torch.Tensor:
    """``base + min(1, t / |x - base|) (x - base)``: the model where it is within t of the base, else a step of t.

    Source: the card of alchemonaut/QuartetAnemoi-70B-t0.0001 on Hugging Face.
    """
    assert group.base is not None
    step = abs(float(group.whole["t"]))
    return next(group.deltas()).clamp_(-step, step).add_(group.base)


def _vectors(tensor: torch.Tensor, per: str) -> torch.Tensor:
    """The vectors that angles are taken between, as the rows of a matrix: a view where one is possible."""
    if per == "tensor" or tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(tensor.shape[0], -1).T if per == "column" else tensor.reshape(-1, tensor.shape[-1])


def _sums(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """The products of rows, [rows, 1], in float64: sums of millions of numbers lose digits in fp32."""
    total = torch.zeros(one.shape[0], 1, dtype=torch.float64)
    for rows, x, y in _pieces(one, two):
        total[rows] += (x * y).sum(1, keepdim=True)
    return total


def _pieces(one: torch.Tensor, two: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Two matrices piece by piece in float64, and which rows the piece is of."""
    count, length = one.shape
    wide = max(1, min(length, pruning.CHUNK))
    high = max(1, pruning.CHUNK // wide)
    for row in range(0, count, high):
        for column in range(0, length, wide):
            rows, columns = slice(row, row + high), slice(column, column + wide)
            yield rows, one[rows, columns].double(), two[rows, columns].double()


def _sum(tensors: Iterator[torch.Tensor]) -> torch.Tensor:
    """The sum, in the memory of the first, which is changed."""
    total = next(tensors)
    for tensor in tensors:
        total += tensor
    return total


# --- task vectors

Prune = Callable[[torch.Tensor, dict[str, Any], torch.Generator], torch.Tensor]


def _keep_all(delta: torch.Tensor, *_: Any) -> torch.Tensor:
    return delta


def _trim(delta: torch.Tensor, values: dict[str, Any], _: torch.Generator) -> torch.Tensor:
    return pruning.trim(delta, values["density"])


def _drop(delta: torch.Tensor, values: dict[str, Any], random: torch.Generator) -> torch.Tensor:
    return pruning.drop(delta, values["density"], random, rescale=values["rescale"])


def _magnitude_drop(delta: torch.Tensor, values: dict[str, Any], random: torch.Generator) -> torch.Tensor:
    return pruning.magnitude_drop(delta, values["density"], values["epsilon"], random)


def _middle(delta: torch.Tensor, values: dict[str, Any], _: torch.Generator) -> torch.Tensor:
    return pruning.middle(delta, values["density"], values["gamma"])


def task_vectors(prune: Prune, *, elect: bool) -> Callable[[Group], torch.Tensor]:
    """The family of methods that add up pruned task vectors: ``base + scale sum(w prune(x - base))``.

    ``normalize`` divides by the sum of the weights that took part.

    Args:
        prune: which numbers of a task vector are kept; :mod:`.pruning`.
        elect: whether only those take part, place by place, whose sign is that of the weighted sum (TIES,
            arXiv:2306.01708, section 4, "Elect" and "Disjoint Merge"). Normalised and with equal weights, what is left
            is the mean over them, as in the paper.
    """

    def pruned(group: Group) -> Iterator[torch.Tensor]:
        deltas = group.deltas()
        for number, values in enumerate(group.each):
            random = torch.Generator().manual_seed(seed_of(group.seed, str(number)))
            yield prune(next(deltas), values | group.whole, random).mul_(values["weight"])

    def merge(group: Group) -> torch.Tensor:
        assert group.base is not None
        if elect:
            total = _elected(list(pruned(group)), group.weights, normalize=group.whole["normalize"])
        else:
            total = _sum(pruned(group))
            if group.whole["normalize"]:
                total.div_(sum(group.weights))
        return total.mul_(float(group.whole["scale"])).add_(group.base)

    return merge


def _elected(deltas: list[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """The sum over those task vectors, weighted already, that have the sign of the sum; in the memory of the first."""
    for parts in zip(*(pruning.chunks(delta) for delta in deltas), strict=True):
        sign = torch.sign(_sum(iter([parts[0].clone(), *parts[1:]])))
        total, share = torch.zeros_like(sign), torch.zeros_like(sign)
        for part, weight in zip(parts, weights, strict=True):
            agrees = (torch.sign(part) == sign) & (sign != 0)
            total += torch.where(agrees, part, 0.0)
            share += weight * agrees
        parts[0].copy_(total / torch.where(share == 0, 1.0, share) if normalize else total)
    return deltas[0]


# --- the table


@dataclass(frozen=True)
class Method:
    """A method: its function, how many models it takes beside the base, and its parameters with their defaults."""

    merge: Callable[[Group], torch.Tensor]
    base: Literal["none", "optional", "required"]
    least: int
    most: int | None
    each: dict[str, float] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    random: bool = False


_WEIGHT, _DENSITY = {"weight": 1.0}, {"density": REQUIRED}
_SUM, _MEAN = {"scale": 1.0, "normalize": False}, {"scale": 1.0, "normalize": True}


def _family(
    prune: Prune, each: dict[str, float], whole: dict[str, Any], *, elect: bool, random: bool = False
) -> Method:
    return Method(task_vectors(prune, elect=elect), "required", 1, None, _WEIGHT | each, whole, random)


#: Defaults are mergekit's, so that a file for it means the same here, but that ``weight`` has one and ``density`` none.
METHODS: dict[str, Method] = {
    "linear": Method(linear, "none", 2, None, _WEIGHT, {"normalize": True}),
    "slerp": Method(slerp, "none", 2, 2, {}, {"t": 0.5}),
    "nuslerp": Method(nuslerp, "optional", 2, 2, _WEIGHT, {"per": "tensor"}),
    "task_arithmetic": _family(_keep_all, {}, _SUM, elect=False),
    "ties": _family(_trim, _DENSITY, _MEAN, elect=True),
    "dare_linear": _family(_drop, _DENSITY, _SUM | {"rescale": True}, elect=False, random=True),
    "dare_ties": _family(_drop, _DENSITY, _SUM | {"rescale": True}, elect=True, random=True),
    "della_linear": _family(_magnitude_drop, _DENSITY | {"epsilon": 0.15}, _SUM, elect=False, random=True),
    "della": _family(_magnitude_drop, _DENSITY | {"epsilon": 0.15}, _SUM, elect=True, random=True),
    "breadcrumbs": _family(_middle, _DENSITY | {"gamma": 0.01}, _SUM, elect=False),
    "breadcrumbs_ties": _family(_middle, _DENSITY | {"gamma": 0.01}, _SUM, elect=True),
    "model_stock": Method(model_stock, "required", 2, None, {}, {"per": "tensor"}),
    "nearswap": Method(nearswap, "required", 1, 1, {}, {"t": REQUIRED}),
    "passthrough": Method(passthrough, "none", 1, 1, _WEIGHT),
}
