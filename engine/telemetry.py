"""NVML and host samples: what the machine does while a run is at work.

NVML is asked from one thread outside the trainer, about once a second: its calls take milliseconds each and some take
a driver lock, so polling from the training loop, or faster, would slow the run that is being watched. Nothing here
raises: a figure the driver does not give is None, and a driver or a GPU that does not answer is said once.
"""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ..planner.cgroup import memory_limit
from .events import EventLog, GpuSample, HostSample, Warn

GIB = 2**30

#: Seconds after which a driver or a GPU that failed is asked again.
RETRY_S = 30.0
#: Seconds between two looks at what is slow to ask or slow to change: traffic, memory errors, limits. The driver counts
#: PCIe traffic for 20 ms per direction while it is asked (nvml.h, nvmlDeviceGetPcieThroughput).
SLOW_INTERVAL_S = 10.0
#: Seconds between two samples of the host.
HOST_INTERVAL_S = 5.0

#: Why the clocks are held down: bit and name, nvml.h ``nvmlClocksEventReasons``. Idle (0x1) is no reason to worry.
_THROTTLE = (
    (0x02, "application clocks"),
    (0x04, "power cap"),
    (0x08, "hardware slowdown"),
    (0x10, "sync boost"),
    (0x20, "software thermal"),
    (0x40, "hardware thermal"),
    (0x80, "power brake"),
    (0x100, "display clocks"),
)

_SLOW_FIGURES = (
    "memory_clock_mhz", "power_limit_w", "pcie_in_gb_s", "pcie_out_gb_s", "nvlink_in_gb_s", "nvlink_out_gb_s",
    "ecc_corrected", "ecc_uncorrected",
)  # fmt: skip
#: nvml.h: ``nvmlPcieUtilCounter_t`` (RX is what the GPU receives), ``NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX``, ``_RX``.
_PCIE_OUT, _PCIE_IN = 0, 1
_NVLINK_OUT, _NVLINK_IN = 138, 139
#: Failures of one figure; any other failure is one of the whole GPU.
_FIGURE_FAILURES = (
    "NVMLError_NotSupported",
    "NVMLError_NoPermission",
    "NVMLError_FunctionNotFound",
    "NVMLError_InvalidArgument",
    "NVMLError_ArgumentVersionMismatch",
    "NVMLError_NoData",
    "NVMLError_NotFound",
)


#: Failures that mean the GPU or its driver is gone, whatever was asked.
_GPU_FAILURES = (
    "NVMLError_GpuIsLost",
    "NVMLError_ResetRequired",
    "NVMLError_Uninitialized",
    "NVMLError_DriverNotLoaded",
)


class GpuMonitor:
    """Reads GPUs through NVML.

    Args:
        indices: NVML indices of the GPUs to read (PCI bus order); None reads all there are.
        load: gives the ``pynvml`` module.
        clock: seconds, for the pause before a GPU that failed is asked again.
    """

    def __init__(
        self,
        indices: Iterable[int] | None = None,
        *,
        load: Callable[[], Any] = lambda: importlib.import_module("pynvml"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wanted = None if indices is None else list(indices)
        self._load, self._clock = load, clock
        self._nvml: Any = None
        self._handles: dict[int, Any] = {}
        self._names: dict[int, str] = {}
        self._slow: dict[int, tuple[float, dict[str, Any]]] = {}  # when asked, and what was answered
        self._links: dict[int, tuple[float, int, int]] = {}  # when counted, KiB in and out since ever
        self._retry_at: dict[int | None, float] = {}  # None is the driver
        self._warnings: list[Warn] = []

    def sample(self) -> list[GpuSample]:
        """One reading of each GPU; of one that does not answer, a reading without figures."""
        if self._nvml is None and not self._connect():
            return [_blank(index, "") for index in self._wanted or []]
        return [self._read(index) for index in self._indices()]

    def take_warnings(self) -> list[Warn]:
        """What went wrong or came back since the last call; each trouble is told once."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def close(self) -> None:
        """Release the driver."""
        if self._nvml is not None:
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as error:
                print(f"nvml: {error}", file=sys.stderr)
            self._nvml = None
        self._handles.clear()

    def _connect(self) -> bool:
        if not self._due(None):
            return False
        try:
            nvml = self._load()
        except ImportError:
            self._failed(None, "GPUs can't be watched: the package nvidia-ml-py is missing", "pip install nvidia-ml-py")
            return False
        try:
            nvml.nvmlInit()
            self._nvml = nvml
        except nvml.NVMLError as error:
            self._failed(None, f"GPUs can't be watched: {_words(error)}", "See whether nvidia-smi works.")
            return False
        self._answered(None, "GPUs can be watched again")
        return True

    def _indices(self) -> list[int]:
        if self._wanted is not None:
            return self._wanted
        try:
            return list(range(self._nvml.nvmlDeviceGetCount()))
        except self._nvml.NVMLError as error:
            self._lost(None, error)
            return []

    def _read(self, index: int) -> GpuSample:
        name = self._names.get(index, "")
        if self._nvml is None or not self._due(index):
            return _blank(index, name)
        nvml = self._nvml
        try:
            if index not in self._handles:
                self._handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
            handle = self._handles[index]
            raw_name = self._figure(nvml.nvmlDeviceGetName, handle)
            name = raw_name.decode() if isinstance(raw_name, bytes) else str(raw_name or name)
            self._names[index] = name
            memory = self._memory(handle)
            use = self._figure(nvml.nvmlDeviceGetUtilizationRates, handle)
            power = self._figure(nvml.nvmlDeviceGetPowerUsage, handle)
            heat = self._figure(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
            clock = self._figure(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
            reasons = self._figure(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
            slow = self._slow_figures(index, handle)
        except nvml.NVMLError as error:
            self._lost(index, error)
            return _blank(index, name)
        self._answered(index, f"GPU {index} answers again")
        return GpuSample(
            index=index,
            name=name,
            memory_used_gib=round(memory.used / GIB, 3) if memory else None,
            memory_total_gib=round(memory.total / GIB, 3) if memory else None,
            sm_percent=float(use.gpu) if use else None,
            power_w=round(power / 1000, 1) if power is not None else None,
            temperature_c=float(heat) if heat is not None else None,
            sm_clock_mhz=float(clock) if clock is not None else None,
            throttle=[word for bit, word in _THROTTLE if reasons & bit],
            **slow,
        )

    def _slow_figures(self, index: int, handle: Any) -> dict[str, Any]:
        """What is asked every few seconds only; in between, the last answer."""
        now = self._clock()
        if index in self._slow and now - self._slow[index][0] < SLOW_INTERVAL_S:
            return self._slow[index][1]
        nvml = self._nvml
        clock = self._optional("nvmlDeviceGetClockInfo", handle, getattr(nvml, "NVML_CLOCK_MEM", 2))
        limit = self._optional("nvmlDeviceGetEnforcedPowerLimit", handle)
        pcie = [self._optional("nvmlDeviceGetPcieThroughput", handle, counter) for counter in (_PCIE_IN, _PCIE_OUT)]
        errors = [self._optional("nvmlDeviceGetTotalEccErrors", handle, kind, 0) for kind in (0, 1)]  # 0: volatile
        nvlink = self._nvlink(index, handle, now)
        figures = {
            "memory_clock_mhz": float(clock) if clock is not None else None,
            "power_limit_w": round(limit / 1000, 1) if limit is not None else None,
            "pcie_in_gb_s": round(pcie[0] * 1e3 / 1e9, 3) if pcie[0] is not None else None,  # the driver says KB/s
            "pcie_out_gb_s": round(pcie[1] * 1e3 / 1e9, 3) if pcie[1] is not None else None,
            "nvlink_in_gb_s": nvlink[0],
            "nvlink_out_gb_s": nvlink[1],
            "ecc_corrected": errors[0],
            "ecc_uncorrected": errors[1],
        }
        self._slow[index] = now, figures
        return figures

    def _nvlink(self, index: int, handle: Any, now: float) -> tuple[float | None, float | None]:
        """Traffic over all links since the last look, in GB/s in and out; the driver counts KiB since it was loaded."""
        every_link = 0xFFFFFFFF
        fields = [(_NVLINK_IN, every_link), (_NVLINK_OUT, every_link)]
        values = self._optional("nvmlDeviceGetFieldValues", handle, fields)
        if values is None or any(value.nvmlReturn != 0 for value in values):
            return None, None
        counted = int(values[0].value.ullVal), int(values[1].value.ullVal)
        before, self._links[index] = self._links.get(index), (now, *counted)
        if before is None or now <= before[0] or counted[0] < before[1] or counted[1] < before[2]:  # counted anew
            return None, None
        rates = [(new - old) * 1024 / (now - before[0]) / 1e9 for new, old in zip(counted, before[1:], strict=True)]
        return round(rates[0], 3), round(rates[1], 3)

    def _optional(self, name: str, *args: Any) -> Any:
        """A figure that many GPUs, drivers and versions of the library do not give; only a lost GPU is a failure."""
        ask = getattr(self._nvml, name, None)
        try:
            return ask(*args) if ask is not None else None
        except self._nvml.NVMLError as error:
            if type(error).__name__ in _GPU_FAILURES:
                raise
            return None

    def _memory(self, handle: Any) -> Any:
        # Version 2 leaves out what the driver keeps for itself, as nvidia-smi does since driver 510.
        version = getattr(self._nvml, "nvmlMemory_v2", None)
        memory = self._figure(self._nvml.nvmlDeviceGetMemoryInfo, handle, version) if version else None
        return memory or self._figure(self._nvml.nvmlDeviceGetMemoryInfo, handle)

    def _figure(self, ask: Callable[..., Any], *args: Any) -> Any:
        """One figure, or None if this GPU, driver or container does not give it."""
        try:
            return ask(*args)
        except self._nvml.NVMLError as error:
            if type(error).__name__ in _FIGURE_FAILURES:
                return None
            raise

    def _lost(self, index: int | None, error: Exception) -> None:
        if index is not None:
            self._handles.pop(index, None)
            self._slow.pop(index, None)
            self._links.pop(index, None)
        if type(error).__name__ in {"NVMLError_Uninitialized", "NVMLError_DriverNotLoaded"}:
            self.close()
            index = None
        whom = "the GPUs do" if index is None else f"GPU {index} does"
        do = "Reset it (nvidia-smi --gpu-reset) or restart the machine; dmesg names the Xid error."
        self._failed(index, f"{whom} not answer: {_words(error)}", do)

    def _due(self, index: int | None) -> bool:
        return self._clock() >= self._retry_at.get(index, -1.0)

    def _failed(self, index: int | None, what: str, do: str) -> None:
        if index not in self._retry_at:
            self._warnings.append(Warn(what, where="telemetry", do=do))
        self._retry_at[index] = self._clock() + RETRY_S

    def _answered(self, index: int | None, what: str) -> None:
        if self._retry_at.pop(index, None) is not None:
            self._warnings.append(Warn(what, where="telemetry"))


class HostMonitor:
    """Reads CPU, memory and disk of this machine; inside a container, memory is that of the container.

    Args:
        disk: a path on the disk whose free space matters: the run directory.
    """

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        psutil.cpu_percent()  # the first call only sets the point that the next one counts from

    def sample(self) -> HostSample:
        """One reading. CPU use is the mean since the last reading, in percent of all cores."""
        memory, limit = psutil.virtual_memory(), memory_limit()
        total, used = memory.total, memory.total - memory.available
        if limit is not None and limit.limit < total:
            total, used = limit.limit, limit.used
        return HostSample(
            cpu_percent=psutil.cpu_percent(),
            memory_used_gib=round(used / GIB, 3),
            disk_free_gib=round(shutil.disk_usage(self._disk).free / GIB, 3),
            memory_total_gib=round(total / GIB, 3),
        )


def gpu_interval_s(age_s: float) -> float:
    """Seconds between two samples of the GPUs: 1 in the first hour, then 5, which keeps a day of 8 GPUs at 45 MB."""
    return 1.0 if age_s < 3600 else 5.0


class Sampler:
    """Appends gpu, host and warning events from a thread of its own until it is stopped.

    Args:
        events: the event file.
        gpus: NVML indices; empty samples the host alone.
    """

    def __init__(self, events: Path, gpus: list[int]) -> None:
        self._events, self._gpus = events, gpus
        self._stop = threading.Event()
        self._told: set[str] = set()
        self._slow_at: dict[int, float] = {}
        self._thread = threading.Thread(target=self._work, name="telemetry", daemon=True)

    def start(self) -> None:
        """Take the first sample at once, and go on."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits two seconds at most, because a driver can hang."""
        self._stop.set()
        self._thread.join(2.0)

    def _work(self) -> None:
        gpus, host = GpuMonitor(self._gpus), HostMonitor(self._events.parent)
        began = time.monotonic()
        gpu_at = host_at = began
        with EventLog(self._events) as log:
            while not self._stop.is_set():
                now = time.monotonic()
                if self._gpus and now >= gpu_at:
                    gpu_at = now + gpu_interval_s(now - began)
                    self._write(log, lambda: [*self._thinned(gpus.sample(), time.monotonic()), *gpus.take_warnings()])
                if now >= host_at:
                    host_at = now + HOST_INTERVAL_S
                    self._write(log, lambda: [host.sample()])
                next_at = min(gpu_at, host_at) if self._gpus else host_at
                self._stop.wait(max(0.01, next_at - time.monotonic()))
        gpus.close()

    def _thinned(self, samples: list[GpuSample], now: float) -> list[GpuSample]:
        """Samples without the slow figures where these were told just now: they are as long as all the others."""
        thinned = []
        for sample in samples:
            if now - self._slow_at.get(sample.index, -math.inf) < SLOW_INTERVAL_S:
                nothing: dict[str, Any] = dict.fromkeys(_SLOW_FIGURES)
                sample = replace(sample, **nothing)
            else:
                self._slow_at[sample.index] = now
            thinned.append(sample)
        return thinned

    def _write(self, log: EventLog, take: Callable[[], list[GpuSample | HostSample | Warn]]) -> None:
        """Append samples; whatever goes wrong, a full disk included, is told once and tried again next time."""
        try:
            for payload in take():
                log.append(payload)
        except Exception as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                print(f"telemetry: {error}", file=sys.stderr)


def _blank(index: int, name: str) -> GpuSample:
    return GpuSample(index, name, None, None, None, None, None, None, [])


def _words(error: Exception) -> str:
    """NVML's own words for an error, without its class."""
    return str(error).strip() or type(error).__name__
