"""Hardware: GPUs of the catalog, this machine, and offers of machines for rent.

The catalog is ``presets/gpus.csv``, the prices ``presets/prices.csv``; both carry source and date with every row.
``memory_gib`` is what torch can really use (``torch.cuda.get_device_properties().total_memory``), which is less than
the box says: where no such figure was seen it is 98.5% of the nominal GB taken as GiB, and 15/16 of that again on
cards whose GDDR memory pays for ECC. Checked against figures seen: H200 139.81, B200 178.35, A100-80GB 79.15, H100
79.11, A10G 22.20, T4 14.74 GiB; the rule is within 1.5% of each but the H200 (whose 141 GB are 144 GB of memory).
"""

from __future__ import annotations

import csv
import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import HardwareError
from .host import cores, host_memory
from .state import state_dir

if TYPE_CHECKING:
    from .limits import HardwareRequest

PRESETS = Path(__file__).resolve().parent.parent / "presets"
#: Prices older than this many days are marked as old.
STALE_DAYS = 90
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of device. Peaks are dense, without sparsity; links are GB/s in one direction.

    ``achievable`` is the share of ``bf16_tflops`` that the best matrix multiplication reaches: measured where the
    catalog says so (MAMF of stas00/ml-engineering), else assumed.
    """

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    bf16_tflops: float
    fp32_tflops: float
    bf16: bool = True
    compute_capability: str = ""
    achievable: float = 0.8
    link_gb_s: float = 0.0
    pcie_gb_s: float = 16.0
    kind: Literal["cuda", "cpu"] = "cuda"
    launch_s: float = 0.0
    """Seconds from one kernel to the next where Python starts them, if its host was measured."""
    measured: bool = False
    """Whether ``achievable`` was measured, on this device or on one of the same chip."""
    source: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """One machine: ``count`` equal devices. ``local`` is this machine, which costs nothing and needs no start-up."""

    gpu: Gpu
    count: int = 1
    indices: tuple[int, ...] = ()
    host_memory_gib: float = 0.0
    local: bool = False

    @property
    def devices(self) -> tuple[int, ...]:
        """Indices of the devices; 0 to ``count`` - 1 where none were given."""
        return self.indices or tuple(range(self.count))


@dataclass(frozen=True)
class Offer:
    """A machine for rent. Prices are USD per hour for the whole of it; 0 on demand is a free quota."""

    provider: str
    gpu: str
    count: int
    usd_per_h: float | None
    usd_per_h_spot: float | None
    region: str
    as_of: str
    source: str

    def is_stale(self, today: date | None = None) -> bool:
        """Whether the price is undated or older than 90 days."""
        return is_stale(self.as_of, today)


def is_stale(as_of: str, today: date | None = None) -> bool:
    """Whether a price of this day is old; one of an unknown day is."""
    try:
        age = (today or date.today()) - date.fromisoformat(as_of)
    except ValueError:
        return True
    return age.days > STALE_DAYS


@cache
def load_catalog() -> dict[str, Gpu]:
    """The GPUs of ``presets/gpus.csv`` by name, in the catalog's order."""
    catalog = {}
    with (PRESETS / "gpus.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            catalog[row["name"]] = Gpu(
                name=row["name"],
                memory_gib=float(row["memory_gib"]),
                bandwidth_gb_s=float(row["bandwidth_gb_s"]),
                bf16_tflops=float(row["bf16_tflops"]),
                fp32_tflops=float(row["fp32_tflops"]),
                bf16=row["bf16"] == "yes",
                compute_capability=row["compute_capability"],
                achievable=float(row["achievable"]),
                measured=row["achievable_basis"].startswith("measured"),
                link_gb_s=float(row["link_gb_s"] or 0),
                pcie_gb_s=float(row["pcie_gb_s"]),
                source=row["source"],
                aliases=tuple(row["aliases"].split(";")),
            )
    return catalog


def refreshed_prices() -> Path:
    """Where prices that a user refreshed are kept (:mod:`.prices`)."""
    return state_dir() / "prices.csv"


def load_offers() -> tuple[Offer, ...]:
    """The offers of ``presets/prices.csv``, but of the providers whose prices were refreshed those; and only those of
    the providers that the user's settings name, where they name some that there are."""
    from .preferences import load

    wanted = {provider.lower() for provider in load().providers}
    offers = all_offers()
    if not wanted:
        return offers
    return tuple(offer for offer in offers if offer.provider.lower() in wanted) or offers


@cache
def all_offers() -> tuple[Offer, ...]:
    """The offers of every provider."""
    shipped = _read_offers(PRESETS / "prices.csv")
    if not refreshed_prices().is_file():
        return shipped
    try:
        fresh = _read_offers(refreshed_prices())
    except (OSError, ValueError, KeyError):  # of another release: what is shipped holds
        return shipped
    known = {offer.provider for offer in fresh}
    return (*(offer for offer in shipped if offer.provider.split(" (")[0] not in known), *fresh)


def _read_offers(path: Path) -> tuple[Offer, ...]:
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            Offer(
                provider=row["provider"],
                gpu=row["gpu"],
                count=int(row["count"]),
                usd_per_h=float(row["usd_per_h"]) if row["usd_per_h"] else None,
                usd_per_h_spot=float(row["usd_per_h_spot"]) if row["usd_per_h_spot"] else None,
                region=row["region"],
                as_of=row["as_of"],
                source=row["source"],
            )
            for row in csv.DictReader(file)
        )


def _plain(name: str) -> str:
    """A name without maker, case and punctuation: 'NVIDIA GeForce RTX 4090' is 'rtx4090'."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\b(nvidia|geforce|tesla|amd|instinct|generation)\b", "", name.lower()))


@cache
def _names() -> dict[str, str]:
    names = {}
    for gpu in load_catalog().values():
        for alias in (gpu.name, *gpu.aliases):
            names[_plain(alias)] = gpu.name
    # "4090" and "rtx4090" are the same card to those who own one.
    short = {plain.removeprefix("rtx"): name for plain, name in names.items() if plain.startswith("rtx")}
    return {**short, **names}


def find_gpu(name: str) -> Gpu:
    """A GPU of the catalog by name or alias; case and punctuation don't matter.

    Raises:
        HardwareError: there is none; the message names the nearest.
    """
    found = _names().get(_plain(name))
    if found:
        return load_catalog()[found]
    from .gpu_names import unknown_gpu

    what, do = unknown_gpu(name, load_catalog().values(), _names(), _plain(name))
    raise HardwareError(what, where="hardware.gpu", do=do)


def this_machine() -> Node:
    """The GPUs of this machine as NVML shows them, or its CPU when there is no driver.

    ``CUDA_VISIBLE_DEVICES`` is kept to, as CUDA does: a scheduler sets it to what is ours. Different GPUs in one
    machine: the first kind counts, since ranks of one run need equal memory.

    Raises:
        HardwareError: the driver is there but doesn't answer, or only slices of a GPU (MIG) are visible.
    """
    return _nvml_node() or cpu_node()


def _has_driver() -> bool:
    """Whether the driver's library is here; asking takes a tenth of the time that importing pynvml does."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _nvml_node() -> Node | None:
    if not _has_driver():
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        seen = []
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        for index in _visible(len(handles), lambda index: pynvml.nvmlDeviceGetUUID(handles[index])):
            handle = handles[index]
            name = pynvml.nvmlDeviceGetName(handle)
            total = pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            seen.append((index, name if isinstance(name, str) else name.decode(), total, f"{major}.{minor}"))
    except pynvml.NVMLError as error:
        what = f"the NVIDIA driver answers, but not about its GPUs ({error})"
        raise HardwareError(what, do="Look at nvidia-smi, or plan with --gpu NAME.") from None
    finally:
        pynvml.nvmlShutdown()
    if not seen:
        return None
    first = seen[0][1]
    indices = tuple(index for index, name, _, _ in seen if name == first)
    return Node(
        known_or_assumed(first, seen[0][2], seen[0][3]),
        len(indices),
        indices,
        round(host_memory()[0] / GIB, 2),
        local=True,
    )


def _visible(count: int, uuid: Callable[[int], str | bytes]) -> list[int]:
    """The NVML indices that ``CUDA_VISIBLE_DEVICES`` leaves, in its order.

    Indices, or the beginnings of UUIDs; the first that names no device ends the list (CUDA C++ programming guide,
    "CUDA environment variables"). Indices count in the order of the PCI bus, which is NVML's.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return list(range(count))
    chosen: list[int] = []
    for part in map(str.strip, given.split(",")):
        if part.startswith("MIG-"):
            do = "Make whole GPUs visible, or plan with --gpu NAME."
            raise HardwareError("runs on slices of a GPU (MIG) are not supported", where="CUDA_VISIBLE_DEVICES", do=do)
        if part.isdigit():
            found = [int(part)] if int(part) < count else []
        else:
            uuids = {index: uuid(index) for index in range(count)}
            names = {index: u.decode() if isinstance(u, bytes) else u for index, u in uuids.items()}
            found = [index for index, name in names.items() if part and name.startswith(part)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen


def known_or_assumed(name: str, total_gib: float, compute_capability: str) -> Gpu:
    """The catalog's GPU for an NVML name, or one assumed from its memory; memory is NVML's either way.

    Torch sees a little less than NVML's total (an H100: 79.11 of 79.65 GiB), so 1% is taken off.
    """
    catalogued = _names().get(_plain(name))
    usable = round(0.99 * total_gib, 2)
    if catalogued:
        return replace(load_catalog()[catalogued], memory_gib=usable)
    bf16 = float(compute_capability or 0) >= 8.0
    return Gpu(
        name=name.removeprefix("NVIDIA ").strip(),
        memory_gib=usable,
        bandwidth_gb_s=500.0,
        bf16_tflops=60.0,
        fp32_tflops=15.0,
        bf16=bf16,
        compute_capability=compute_capability,
        source="not in the catalog: speed assumed, memory from NVML",
    )


#: fp32 GFLOP/s of one core in torch's matrix multiplication: 30 to 40 were measured on an EPYC of 2023.
_CORE_GFLOPS = 40.0


def cpu_node() -> Node:
    """This machine's CPU as a device, with its free memory; speed is assumed from the number of physical cores."""
    count, (total, free) = cores(), host_memory()
    gpu = Gpu(
        name=f"CPU ({count} core{'s' if count > 1 else ''})",
        memory_gib=round(free / GIB, 2),
        bandwidth_gb_s=min(10.0 * count, 80.0),
        bf16_tflops=count * _CORE_GFLOPS / 1000,
        fp32_tflops=count * _CORE_GFLOPS / 1000,
        bf16=True,
        achievable=0.8,
        kind="cpu",
        source="this machine; speed assumed",
    )
    return Node(gpu, 1, (0,), round(total / GIB, 2), local=True)


def node_for(request: HardwareRequest) -> Node:
    """The machine that a recipe's ``hardware`` section asks to plan for.

    Raises:
        HardwareError: the GPU is not in the catalog, or this machine has no CUDA GPU, or not so many.
    """
    if request.gpu:
        if request.device == "cpu":
            do = "Keep one of the two."
            raise HardwareError("hardware.gpu and device: cpu contradict each other", where="hardware.device", do=do)
        gpu = find_gpu(request.gpu)
        if request.gpus == "auto":
            return Node(gpu)
        indices = tuple(range(request.gpus)) if isinstance(request.gpus, int) else tuple(request.gpus)
        return Node(gpu, len(indices), indices)
    node = cpu_node() if request.device == "cpu" else this_machine()
    if request.device == "cuda" and node.gpu.kind != "cuda":
        do = "Install its driver, name a GPU to plan for (hardware.gpu), or set hardware.device: cpu."
        raise HardwareError("this machine has no CUDA GPU that NVML can see", where="hardware.device", do=do)
    return node
