"""Time and money of a run: its steps, and what stands around them; the prices of machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .architecture import Architecture
from .hardware import Node, Offer, load_offers
from .plan import Cost, Plan
from .settings import Settings
from .storage import optimizer_bytes

if TYPE_CHECKING:
    from .teacher import Teacher

#: Imports, tokenizing the first rows, warming up kernels and the allocator.
_START_S = 25.0
#: Reading weights from local disk to the device, and from the Hub onto a rented disk, in bytes per second.
_LOAD_BYTES_S, _DOWNLOAD_BYTES_S = 1.0e9, 200e6
#: Getting a rented machine and installing what it needs.
_RENT_S = 240.0
#: How often an interruptible machine is taken back: assumed, once in a day of use. Providers publish a share of
#: machines per month (AWS: under 5% to over 20%) or nothing.
_INTERRUPTIONS_PER_H = 1 / 24
#: Copying a checkpoint to host memory, which steps wait for, and writing the last one, which the end of a run waits
#: for; in bytes per second. The others are written while training goes on.
_COPY_BYTES_S, _SAVE_BYTES_S = 10e9, 0.8e9


@dataclass(frozen=True)
class Overhead:
    """Seconds of a run beside its steps."""

    start_s: float
    download_s: float
    evaluation_s: float
    checkpoint_s: float
    reference_s: float = 0.0
    """Probabilities of the reference, once for each row."""

    @property
    def total_s(self) -> float:
        return self.start_s + self.download_s + self.evaluation_s + self.checkpoint_s + self.reference_s


def overhead(
    architecture: Architecture,
    node: Node,
    *,
    teacher: Teacher | None = None,
    step_s: float,
    steps: int,
    batch_size: int,
    eval_examples: int,
    reference_examples: int = 0,
    eval_every: int,
    checkpoint_every: int,
    checkpoint_bytes: float,
) -> Overhead:
    """What a run spends beside its steps: a pass without gradients is a third of a training pass over the same rows.

    Args:
        teacher: a second model that is downloaded and loaded too.
    """
    size = 2.0 * (architecture.parameters + (0 if teacher is None else teacher.architecture.parameters))
    passes = 2 + max(steps - 1, 0) // max(eval_every, 1) if eval_examples else 0
    saves = 2 + max(steps - 1, 0) // max(checkpoint_every, 1)  # the first one after the first step
    rented = not node.local
    return Overhead(
        start_s=_START_S * (0.5 if node.gpu.kind == "cpu" else 1.0)
        + size / _LOAD_BYTES_S
        + (_RENT_S if rented else 0.0),
        download_s=size / _DOWNLOAD_BYTES_S if rented else 0.0,
        evaluation_s=passes * eval_examples / max(batch_size, 1) * step_s / 3,
        checkpoint_s=saves * checkpoint_bytes / _COPY_BYTES_S + checkpoint_bytes / _SAVE_BYTES_S,
        reference_s=reference_examples / max(batch_size, 1) * step_s / 3,
    )


def cheapest_offers(offers: Iterable[Offer] | None = None, *, spot: bool = False) -> dict[tuple[str, int], Offer]:
    """The cheapest offer with a price of each GPU and number of them.

    An undated price stands for what something once cost: it counts only where no dated one is known. Free quotas are
    no offers.
    """
    best: dict[tuple[str, int], Offer] = {}
    for offer in load_offers() if offers is None else offers:
        key = (offer.gpu, offer.count)
        if price_of(offer, spot=spot) and (key not in best or _rank(offer, spot) < _rank(best[key], spot)):
            best[key] = offer
    return best


@cache
def _cheapest(offers: tuple[Offer, ...]) -> dict[tuple[str, int], Offer]:
    return cheapest_offers(offers)


def _rank(offer: Offer, spot: bool) -> tuple[bool, float]:
    return offer.as_of == "unknown", price_of(offer, spot=spot) or 0.0


def cost_of(
    time_s: float, node: Node, offers: Iterable[Offer] | None = None, *, usd_per_h: float | None = None
) -> Cost:
    """What a run of this length costs on this node: at the price given, else nothing here and the cheapest offer on
    demand elsewhere.

    Where nobody offers so many of the GPU in one machine, single ones of the cheapest offer stand for it.
    """
    if usd_per_h is not None:
        provider = "this machine" if node.local else "your price"
        return Cost(usd=usd_per_h * time_s / 3600, usd_per_h=usd_per_h, provider=provider)
    if node.local:
        return Cost()
    best = _cheapest(load_offers()) if offers is None else cheapest_offers(offers)
    offer, factor = best.get((node.gpu.name, node.count)), 1
    if offer is None:
        offer, factor = best.get((node.gpu.name, 1)), node.count
    if offer is None:
        return Cost()
    price = factor * (offer.usd_per_h or 0.0)
    return Cost(
        usd=price * time_s / 3600, usd_per_h=price, provider=offer.provider, as_of=offer.as_of, stale=offer.is_stale()
    )


def price_of(offer: Offer, *, spot: bool) -> float | None:
    """USD per hour for the whole machine; None where it is not offered that way."""
    return offer.usd_per_h_spot if spot else offer.usd_per_h


def duration(seconds: float) -> str:
    """A time in the words of messages: ``45 s``, ``12 min``, ``3.4 h``, ``22.4 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def restart_s(plan: Plan) -> float:
    """Seconds that interruptions add to a run on an interruptible machine: a new one is rented, the model loaded, and
    half of what lies between two checkpoints done again."""
    lost = plan.resolved.checkpoint_every * plan.speed.step_s / 2
    size = 2.0 * plan.model.parameters
    each = _RENT_S + _START_S + size / _DOWNLOAD_BYTES_S + size / _LOAD_BYTES_S + lost
    return plan.time_s / 3600 * _INTERRUPTIONS_PER_H * each


def checkpoint_bytes(settings: Settings, trainable: int) -> float:
    """Bytes of one checkpoint: what is trained in its own dtype (adapters in fp32), and the optimiser's states."""
    width = settings.weight_bytes if settings.tuning == "full" else 4
    return trainable * (width + optimizer_bytes(settings.optimizer.removeprefix("paged-"), width)[0])
