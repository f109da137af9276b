"""Clouds that a system of jobs rents from, and what it calls their GPUs: ``presets/cluster_*.csv``, with sources."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ...planner.errors import HardwareError
from ...planner.hardware import PRESETS, Offer, load_offers

System = Literal["skypilot", "slurm", "modal"]
#: What a GPU may be called on the command line: it comes to stand in job files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._!+-]{0,63}")


@dataclass(frozen=True)
class Cloud:
    """A provider as a system rents from it.

    ``prices`` are the providers of the price list whose offers it is, the one that counts first; ``name`` is what the
    system calls it. ``mounts``: a bucket can be mounted there; ``spot``: interruptible machines can be asked for;
    ``ends_itself``: an idle machine can be given back by the system.
    """

    provider: str
    prices: tuple[str, ...]
    name: str
    mounts: bool
    spot: bool
    ends_itself: bool


@dataclass(frozen=True)
class Named:
    """What a system calls a GPU; ``most`` of them are in one machine, where that is known."""

    name: str
    most: int | None = None


@cache
def clouds_of(system: str) -> tuple[Cloud, ...]:
    """The clouds that a system rents from; Slurm rents nothing."""
    with (PRESETS / "cluster_clouds.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Cloud(
                row["provider"], tuple(row["prices"].split(";")), row["name"], row["mounts"] == "yes",
                row["spot"] == "yes", row["ends_itself"] == "yes",
            )
            for row in csv.DictReader(file)
            if row["system"] == system
        )  # fmt: skip


@cache
def _names() -> dict[tuple[str, str, str], Named]:
    with (PRESETS / "cluster_gpus.csv").open(encoding="utf-8", newline="") as file:
        return {
            (row["system"], row["provider"], row["gpu"]): Named(row["name"], int(row["most"]) if row["most"] else None)
            for row in csv.DictReader(file)
        }


def find_cloud(system: str, provider: str) -> Cloud:
    """A cloud by its provider's name, or by what the system calls it.

    Raises:
        HardwareError: the system does not rent there.
    """
    for cloud in clouds_of(system):
        if provider.lower() in {cloud.provider, cloud.name, *cloud.prices}:
            return cloud
    known = ", ".join(cloud.provider for cloud in clouds_of(system))
    do = f"Use one of {known}." if known else "Leave it out."
    raise HardwareError(f"{system} rents no machines at {provider!r} that finetui knows", where="--provider", do=do)


def name_of(system: str, provider: str, gpu: str, count: int, given: str | None = None) -> str:
    """What a system calls a GPU at a provider.

    Args:
        gpu: its name in the catalog.
        given: the name by the user's word, which counts unless it can't be one.

    Raises:
        HardwareError: the name is not known, or no machine there has so many.
    """
    if given is not None:
        if not _NAME.fullmatch(given):
            do = "Use letters, digits and . _ - only."
            raise HardwareError(f"{given!r} can't be the name of a GPU", where="--gpu-name", do=do)
        return given
    found = _names().get((system, provider, gpu))
    at = f" at {provider}" if provider and provider != system else ""
    if found is None:
        others = sorted(at for of, at, known in _names() if (of, known) == (system, gpu) and at)
        do = f"Rent it at {' or '.join(others)}, or say" if others else "Say"
        do = f"{do} what it is called there with --gpu-name."
        raise HardwareError(f"finetui does not know what {system} calls a {gpu}{at}", where="hardware.gpu", do=do)
    if found.most is not None and count > found.most:
        what = f"{system}{at} has at most {found.most} × {gpu} in one machine, and the plan wants {count}"
        raise HardwareError(what, where="hardware.gpus", do="Plan for fewer with --gpus, or for larger GPUs.")
    return found.name


def is_known(system: str, provider: str, gpu: str, count: int) -> bool:
    """Whether a job for so many of a GPU can be written."""
    found = _names().get((system, provider, gpu))
    return found is not None and (found.most is None or count <= found.most)


def offers_of(system: str, cloud: Cloud | None = None, *, any_gpu: bool = False) -> dict[Offer, Cloud]:
    """The offers that jobs of a system can take, each with its cloud.

    Of a provider that the price list has more than once, the offers of the kind that the system rents count.

    Args:
        cloud: only those of this one.
        any_gpu: also of GPUs whose name there is not known.
    """
    found: dict[Offer, Cloud] = {}
    every = load_offers()
    for one in (cloud,) if cloud is not None else clouds_of(system):
        seen: set[tuple[str, int]] = set()
        for provider in one.prices:
            fresh = [o for o in every if o.provider == provider and (o.gpu, o.count) not in seen]
            found |= {o: one for o in fresh if any_gpu or is_known(system, one.provider, o.gpu, o.count)}
            seen |= {(o.gpu, o.count) for o in fresh}
    return found
