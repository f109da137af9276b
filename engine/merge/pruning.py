"""Which numbers of a task vector are kept: the pruning of TIES, DARE, DELLA and Model Breadcrumbs.

A task vector is what fine-tuning changed, ``delta = model - base`` (Ilharco et al. 2022, arXiv:2212.04089). Each
function takes one in fp32 and puts zeros in place of what it drops; the tensor is changed, for want of memory for two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Numbers that are looked at at a time: what there is beside the tensors themselves stays below 100 MiB.
CHUNK = 1 << 22


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """TIES: keep the ``density`` of numbers that are largest in magnitude (arXiv:2306.01708, section 4, "Trim")."""
    return delta.masked_fill_(largest(delta, _count(delta, density)).logical_not_(), 0.0)


def drop(delta: torch.Tensor, density: float, random: torch.Generator, *, rescale: bool = True) -> torch.Tensor:
    """DARE: keep each number with probability ``density``, times 1 / density (arXiv:2311.03099, equation 2).

    Rescaled, the expected value of each number is what it was.
    """
    for part in chunks(delta):
        part.masked_fill_(torch.rand(part.shape, generator=random) >= density, 0.0)
    return delta.div_(density) if rescale else delta


def magnitude_drop(delta: torch.Tensor, density: float, epsilon: float, random: torch.Generator) -> torch.Tensor:
    """DELLA's MagPrune (arXiv:2406.11617, section 3.1): large numbers are kept more often, times 1 / their own chance.

    Within each row of n numbers the one of rank r (0 is the smallest in magnitude) is kept with probability
    ``density - epsilon + 2 epsilon r / (n - 1)``; ``epsilon`` is half of the paper's, as in mergekit. A vector is one
    row.
    """
    if not delta.numel():
        return delta
    rows = delta.view(1, -1) if delta.dim() < 2 else delta.view(-1, delta.shape[-1])
    length = rows.shape[1]
    for part in rows.split(max(1, CHUNK // length)):
        order = part.abs().argsort(dim=-1, stable=True)
        chances = (
            torch.linspace(density - epsilon, density + epsilon, length) if length > 1 else torch.tensor([density])
        )
        chance = torch.empty_like(part).scatter_(-1, order, chances.expand_as(part))
        part.div_(chance).masked_fill_(torch.rand(part.shape, generator=random) >= chance, 0.0)
    return delta


def middle(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Model Breadcrumbs (arXiv:2312.06795, section 3.2): drop the ``gamma`` of largest numbers and the smallest.

    So many of the smallest go that ``density`` of all are left. The masks are made for each tensor, as in the paper.
    Where ``gamma`` is above ``1 - density`` only ``1 - density`` of the largest are dropped, and none of the smallest.
    """
    kept, outliers = _count(delta, density), int(gamma * delta.numel())
    outliers = min(outliers, delta.numel() - kept)
    dropped = largest(delta, kept + outliers).logical_not_().logical_or_(largest(delta, outliers))
    return delta.masked_fill_(dropped, 0.0)


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of exactly ``count`` numbers of the largest magnitude; of equal ones the first are taken.

    Magnitudes are counted by the upper and then the lower half of their bits, whose order is that of the numbers
    (IEEE 754 was made so): no sorting, no copy of the tensor, and the same mask on every machine.

    Args:
        values: fp32, any shape.
        count: 0 to the number of values.
    """
    if not 0 <= count <= values.numel():
        raise ValueError(f"{count} of {values.numel()}")
    mask = torch.full(values.shape, bool(count))
    if count in (0, values.numel()):
        return mask
    upper, above = _bin_of(_histogram(((bits >> 16) for bits in _magnitudes(values)), 1 << 15), count)
    lower, more = _bin_of(
        _histogram((bits[bits >> 16 == upper] & 0xFFFF for bits in _magnitudes(values)), 1 << 16), count - above
    )
    threshold, left = upper << 16 | lower, count - above - more
    for bits, part in zip(_magnitudes(values), chunks(mask), strict=True):
        torch.gt(bits, threshold, out=part)
        if left:
            equal = (bits == threshold).nonzero()[:left, 0]
            part[equal] = True
            left -= len(equal)
    return mask


def chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of a contiguous tensor, flat, one after the other."""
    return tensor.view(-1).split(CHUNK)


def _magnitudes(values: torch.Tensor) -> Iterator[torch.Tensor]:
    for part in chunks(values.contiguous()):
        yield part.view(torch.int32) & 0x7FFFFFFF


def _histogram(parts: Iterator[torch.Tensor], bins: int) -> torch.Tensor:
    total = torch.zeros(bins, dtype=torch.int64)
    for part in parts:
        total += torch.bincount(part, minlength=bins)
    return total


def _bin_of(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the ``count``-th largest value, and how many values lie in the bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int((from_top < count).sum())
    number = len(histogram) - 1 - place
    return number, int(from_top[place] - histogram[number])


def _count(delta: torch.Tensor, density: float) -> int:
    # A tensor of a few numbers keeps one of them: rounding it away would undo the fine-tune there.
    return min(delta.numel(), max(1, int(density * delta.numel()))) if delta.numel() else 0
