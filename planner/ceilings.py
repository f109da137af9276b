"""What devices of this user were measured to reach, by ``finetui bench``: matrix products, memory, links, disk.

A datasheet says what a chip could do; a plan is better made from what it did. Measurements are kept per device and
driver in ``ceilings.json`` of the state folder; the latest of a device counts. Without one the catalog's figures hold.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import FinetuiError, UserError
from .hardware import Gpu
from .state import state_dir

#: What a copy within a device reaches of the bandwidth on its datasheet: 4,241 of 4,800 GB/s on an H200.
COPY_SHARE = 0.88
#: What a copy from pinned host memory reaches of the bus: 55.3 of 63 GB/s over PCIe 5 x16.
BUS_SHARE = 0.87
#: Bus bandwidth of a large all-reduce over a link's nominal speed in one direction: 235 of 300 GB/s over NVLink 3.
RING_SHARE = 0.78


@dataclass(frozen=True)
class Ceilings:
    """What one kind of device reached on one machine. Zero means that it was not measured, or that it can't do it.

    Args:
        gpu: name of the device as plans name it.
        driver: version of its driver; empty for a CPU.
        date: day of the measurement, as ISO 8601 writes it.
        bf16_tflops: the fastest of several matrix products in the shapes of real layers, on random numbers.
        fp32_tflops: the same with fp32 operands, computed as PyTorch does by default.
        fp8_tflops: the same with e4m3 operands and a scale for each row.
        copy_gb_s: a copy within the device's memory, bytes read plus bytes written.
        to_device_gb_s, to_host_gb_s: copies from and to pinned host memory.
        all_reduce_gb_s: bus bandwidth of an all-reduce over all devices, 2 (n - 1) / n times its size over its time.
        launch_us: microseconds from one kernel to the next of an eager layer that Python starts one by one.
        disk_gb_s: reading a file on the disk of the runs that is not in the page cache.
    """

    gpu: str
    driver: str = ""
    date: str = ""
    bf16_tflops: float = 0.0
    fp32_tflops: float = 0.0
    fp8_tflops: float = 0.0
    copy_gb_s: float = 0.0
    to_device_gb_s: float = 0.0
    to_host_gb_s: float = 0.0
    all_reduce_gb_s: float = 0.0
    launch_us: float = 0.0
    disk_gb_s: float = 0.0

    def on(self, gpu: Gpu) -> Gpu:
        """The device with what was measured in place of what its datasheet or the catalog's table says.

        A GPU's peaks stay, since they define its utilisation, and the share that is achieved changes; peaks of a CPU
        are assumed in the first place, so they change themselves. Nominal links and bandwidths become those of which
        the usual share would give what was measured.
        """
        changes: dict[str, Any] = {}
        if gpu.kind == "cpu":
            changes["bf16_tflops"] = self.bf16_tflops / gpu.achievable or gpu.bf16_tflops
            changes["fp32_tflops"] = self.fp32_tflops / gpu.achievable or gpu.fp32_tflops
        elif self.bf16_tflops:
            changes |= {"achievable": min(1.0, self.bf16_tflops / gpu.bf16_tflops), "measured": True}
        if self.launch_us:
            changes["launch_s"] = self.launch_us / 1e6
        for field, measured, share in (
            ("bandwidth_gb_s", self.copy_gb_s, COPY_SHARE),
            ("pcie_gb_s", min(self.to_device_gb_s, self.to_host_gb_s), BUS_SHARE),
            ("link_gb_s", self.all_reduce_gb_s, RING_SHARE),
        ):
            if measured:
                changes[field] = measured / share
        return replace(gpu, **changes, source=f"measured on {self.date} by finetui bench")


def for_gpu(name: str) -> Ceilings | None:
    """The latest measurement of a device, named as in :attr:`Gpu.name`; None if it was never measured here."""
    found = [ceilings for ceilings in reversed(load()) if ceilings.gpu == name]
    return max(found, key=lambda ceilings: ceilings.date, default=None)


def load() -> list[Ceilings]:
    """All measurements, in the order in which they were made.

    Raises:
        UserError: the file can't be read; it is small and written whole, so something else spoilt it.
    """
    path = _file()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Ceilings)}
        return [Ceilings(**{key: value for key, value in row.items() if key in known}) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        do = "Delete it, then measure again with: finetui bench"
        raise UserError(f"the measured ceilings can't be read ({error})", where=str(path), do=do) from error


def store(measured: Ceilings) -> Path:
    """Keep a measurement in place of an earlier one of the same device and driver; returns the file.

    Raises:
        FinetuiError: the state folder can't be written.
    """
    path = _file()
    kept = [old for old in load() if (old.gpu, old.driver) != (measured.gpu, measured.driver)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump([asdict(ceilings) for ceilings in (*kept, measured)], file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        do = "Set XDG_STATE_HOME to a folder that can be written."
        raise FinetuiError(f"the measurement can't be kept ({error})", where=str(path), do=do) from error
    return path


def _file() -> Path:
    return state_dir() / "ceilings.json"
