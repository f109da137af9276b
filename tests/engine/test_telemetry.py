"""NVML and host samples against a driver that fails in every way a driver can."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetui.engine.events import EventLog, GpuSample, read_events
from finetui.engine.telemetry import RETRY_S, SLOW_INTERVAL_S, GpuMonitor, HostMonitor, Sampler, gpu_interval_s
from finetui.planner.cgroup import MemoryLimit

GIB = 2**30


class NVMLError(Exception):
    """The base of a driver's errors, as in pynvml."""


class NVMLError_NotSupported(NVMLError):
    """A figure that this GPU does not give."""


class NVMLError_NoPermission(NVMLError):
    """A figure that this container does not give."""


class NVMLError_GpuIsLost(NVMLError):
    """The GPU fell off the bus."""


class NVMLError_Uninitialized(NVMLError):
    """The driver was unloaded."""


class NVMLError_LibraryNotFound(NVMLError):
    """There is no driver."""


class FakeNvml:
    """A driver with healthy GPUs; ``fail`` maps a function's name, or (name, index), to the error it raises."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 2
    NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0

    def __init__(self, count: int = 1) -> None:
        self.count, self.fail, self.reasons = count, dict[Any, NVMLError](), 0
        self.asked: list[str] = []
        self.kib = (0, 0)

    def _answer(self, name: str, index: int | None, value: Any) -> Any:
        self.asked.append(name)
        error = self.fail.get(name) or self.fail.get((name, index)) or self.fail.get("*")
        if error is not None:
            raise error
        return value

    def nvmlInit(self) -> None:
        self._answer("init", None, None)

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return self._answer("count", None, self.count)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return self._answer("handle", index, index)

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return self._answer("name", handle, b"NVIDIA Test")

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        return self._answer(f"memory{version or ''}", handle, SimpleNamespace(used=3 * GIB, total=24 * GIB))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return self._answer("use", handle, SimpleNamespace(gpu=97))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._answer("power", handle, 301_440)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return self._answer("temperature", handle, 61)

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        return self._answer("memory clock" if clock == 2 else "clock", handle, 2619 if clock == 2 else 1980)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self._answer("throttle", handle, self.reasons)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return self._answer("limit", handle, 700_000)

    def nvmlDeviceGetPcieThroughput(self, handle: int, counter: int) -> int:
        return self._answer("pcie", handle, [400_000, 1_200_000][counter])

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        return self._answer("ecc", handle, [5, 2][kind])

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[tuple[int, int]]) -> list[Any]:
        out, into = self.kib
        counted = {138: out, 139: into}
        return self._answer(
            "nvlink",
            handle,
            [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(ullVal=counted[number])) for number, _ in fields],
        )


class Clock:
    """Seconds, set by the test."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


def monitor(nvml: FakeNvml, clock: Clock, indices: list[int] | None = None) -> GpuMonitor:
    return GpuMonitor(indices, load=lambda: nvml, clock=clock)


def test_a_healthy_gpu(clock: Clock) -> None:
    nvml = FakeNvml(2)
    nvml.reasons = 0x1 | 0x4 | 0x40
    gpus = monitor(nvml, clock)
    samples = gpus.sample()
    assert [sample.index for sample in samples] == [0, 1]
    first = samples[0]
    assert (first.name, first.memory_used_gib, first.memory_total_gib) == ("NVIDIA Test", 3.0, 24.0)
    assert (first.sm_percent, first.power_w, first.temperature_c, first.sm_clock_mhz) == (97.0, 301.4, 61.0, 1980.0)
    assert first.throttle == ["power cap", "hardware thermal"]
    assert gpus.take_warnings() == []


@pytest.mark.parametrize("error", [NVMLError_NotSupported, NVMLError_NoPermission])
@pytest.mark.parametrize(
    ("figure", "field"),
    [("use", "sm_percent"), ("power", "power_w"), ("temperature", "temperature_c"), ("clock", "sm_clock_mhz")],
)
def test_a_figure_that_is_not_given_is_none_and_the_others_stay(
    clock: Clock, error: type[NVMLError], figure: str, field: str
) -> None:
    nvml = FakeNvml()
    nvml.fail[figure] = error()
    gpus = monitor(nvml, clock)
    (sample,) = gpus.sample()
    assert getattr(sample, field) is None
    others = {"sm_percent", "power_w", "temperature_c", "sm_clock_mhz", "memory_used_gib"} - {field}
    assert all(getattr(sample, other) is not None for other in others)
    assert gpus.take_warnings() == []


SLOW = {"memory clock", "limit", "pcie", "ecc", "nvlink"}


def test_traffic_errors_and_limits(clock: Clock) -> None:
    nvml = FakeNvml()
    gpus = monitor(nvml, clock)
    (first,) = gpus.sample()
    assert (first.memory_clock_mhz, first.power_limit_w) == (2619.0, 700.0)
    assert (first.pcie_in_gb_s, first.pcie_out_gb_s) == (1.2, 0.4)
    assert (first.ecc_corrected, first.ecc_uncorrected) == (5, 2)
    assert (first.nvlink_in_gb_s, first.nvlink_out_gb_s) == (None, None)  # it takes two looks to see traffic
    clock.now += SLOW_INTERVAL_S
    nvml.kib = (10_000_000, 20_000_000)
    (second,) = gpus.sample()
    assert second.nvlink_out_gb_s == pytest.approx(10_000_000 * 1024 / SLOW_INTERVAL_S / 1e9, abs=1e-3)
    assert second.nvlink_in_gb_s == pytest.approx(20_000_000 * 1024 / SLOW_INTERVAL_S / 1e9, abs=1e-3)
    clock.now += SLOW_INTERVAL_S
    nvml.kib = (0, 0)  # the driver was loaded anew
    assert gpus.sample()[0].nvlink_in_gb_s is None


def test_what_is_slow_to_ask_is_asked_every_few_seconds_only(clock: Clock) -> None:
    nvml = FakeNvml()
    gpus = monitor(nvml, clock)
    first = gpus.sample()[0]
    nvml.asked.clear()
    clock.now += SLOW_INTERVAL_S - 0.1
    again = gpus.sample()[0]
    assert not SLOW & set(nvml.asked)
    assert again == first
    clock.now += 0.1
    gpus.sample()
    assert set(nvml.asked) >= SLOW


def test_what_is_slow_is_told_every_few_seconds_only(clock: Clock, tmp_path: Path) -> None:
    gpus, sampler = monitor(FakeNvml(8), clock), Sampler(tmp_path / "events.jsonl", list(range(8)))
    told = []
    for _ in range(30):
        told += sampler._thinned(gpus.sample(), clock.now)
        clock.now += 1.0
    assert len(told) == 30 * 8
    assert sum(sample.pcie_in_gb_s is not None for sample in told) == 3 * 8
    with EventLog(tmp_path / "events.jsonl") as log:
        for sample in told:
            log.append(sample)
    size = (tmp_path / "events.jsonl").stat().st_size
    per_day = size / len(told) * 8 * 3600 + _with_slow(told, tmp_path) / 2 * 8 * (86400 - 3600) / 5
    assert per_day < 46e6  # what gpu_interval_s promises


def _with_slow(told: list[GpuSample], folder: Path) -> float:
    """Bytes of a pair of events, one with the slow figures and one without."""
    with EventLog(folder / "pair.jsonl") as log:
        log.append(told[0])
        log.append(told[8])
    return (folder / "pair.jsonl").stat().st_size


class NVMLError_Unknown(NVMLError):
    """What some virtual GPUs answer to whatever they do not know."""


@pytest.mark.parametrize("error", [NVMLError_NotSupported, NVMLError_NoPermission, NVMLError_Unknown])
def test_figures_that_a_card_does_not_give_are_nothing(clock: Clock, error: type[NVMLError]) -> None:
    nvml = FakeNvml(8)
    nvml.fail |= dict.fromkeys(SLOW, error())
    gpus = monitor(nvml, clock)
    samples = gpus.sample()
    assert len(samples) == 8
    for sample in samples:
        assert (sample.power_w, sample.sm_clock_mhz) == (301.4, 1980.0)
        assert sample.pcie_in_gb_s is sample.ecc_corrected is sample.nvlink_in_gb_s is sample.power_limit_w is None
    assert gpus.take_warnings() == []


def test_an_old_library_without_these_calls(clock: Clock) -> None:
    class Old(FakeNvml):
        nvmlDeviceGetFieldValues = nvmlDeviceGetPcieThroughput = nvmlDeviceGetTotalEccErrors = None  # type: ignore[assignment]
        nvmlDeviceGetEnforcedPowerLimit = None  # type: ignore[assignment]

    (sample,) = monitor(Old(), clock).sample()
    assert (sample.pcie_in_gb_s, sample.power_limit_w, sample.power_w) == (None, None, 301.4)


def test_a_gpu_that_is_lost_while_traffic_is_asked_for(clock: Clock) -> None:
    nvml = FakeNvml(2)
    nvml.fail["pcie", 1] = NVMLError_GpuIsLost()
    gpus = monitor(nvml, clock)
    assert [sample.power_w for sample in gpus.sample()] == [301.4, None]
    assert "GPU 1 does not answer" in gpus.take_warnings()[0].what


def test_memory_falls_back_to_the_first_version_of_the_call(clock: Clock) -> None:
    nvml = FakeNvml()
    nvml.fail["memory2"] = NVMLError_NotSupported()
    assert monitor(nvml, clock).sample()[0].memory_used_gib == 3.0
    nvml.fail["memory"] = NVMLError_NotSupported()
    assert monitor(nvml, clock).sample()[0].memory_used_gib is None


def test_a_lost_gpu_is_told_once_asked_again_later_and_told_when_it_is_back(clock: Clock) -> None:
    nvml = FakeNvml(2)
    gpus = monitor(nvml, clock)
    gpus.sample()
    nvml.fail["use", 1] = NVMLError_GpuIsLost("GPU is lost")
    samples = gpus.sample()
    assert samples[0].sm_percent == 97.0
    assert (samples[1].name, samples[1].sm_percent, samples[1].memory_used_gib) == ("NVIDIA Test", None, None)
    (warning,) = gpus.take_warnings()
    assert "GPU 1 does not answer: GPU is lost" in warning.what
    clock.now += RETRY_S + 1
    gpus.sample()
    assert gpus.take_warnings() == []
    nvml.fail.clear()
    assert gpus.sample()[1].sm_percent is None, "asked again too soon"
    clock.now += RETRY_S + 1
    assert gpus.sample()[1].sm_percent == 97.0
    assert [warning.what for warning in gpus.take_warnings()] == ["GPU 1 answers again"]


def test_a_driver_that_is_unloaded_and_comes_back(clock: Clock) -> None:
    nvml = FakeNvml()
    gpus = monitor(nvml, clock)
    gpus.sample()
    nvml.fail["*"] = NVMLError_Uninitialized("Uninitialized")
    assert gpus.sample() == []
    assert len(gpus.take_warnings()) == 1
    nvml.fail.clear()
    clock.now += RETRY_S + 1
    assert gpus.sample()[0].sm_percent == 97.0
    assert [warning.what for warning in gpus.take_warnings()] == ["GPUs can be watched again"]


def test_no_driver_is_told_once(clock: Clock) -> None:
    nvml = FakeNvml()
    nvml.fail["init"] = NVMLError_LibraryNotFound("NVML Shared Library Not Found")
    gpus = monitor(nvml, clock, [0, 1])
    for _ in range(3):
        assert [sample.memory_used_gib for sample in gpus.sample()] == [None, None]
        clock.now += RETRY_S + 1
    assert [warning.what for warning in gpus.take_warnings()] == [
        "GPUs can't be watched: NVML Shared Library Not Found"
    ]


def test_a_missing_package_is_told_once(clock: Clock) -> None:
    def load() -> Any:
        raise ImportError

    gpus = GpuMonitor(load=load, clock=clock)
    assert gpus.sample() == gpus.sample() == []
    assert [warning.do for warning in gpus.take_warnings()] == ["pip install nvidia-ml-py"]


def test_memory_of_a_container_is_that_of_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostMonitor(tmp_path)
    monkeypatch.setattr("finetui.engine.telemetry.memory_limit", lambda: MemoryLimit(GIB // 2, GIB // 4))
    sample = host.sample()
    assert (sample.memory_total_gib, sample.memory_used_gib) == (0.5, 0.25)
    monkeypatch.setattr("finetui.engine.telemetry.memory_limit", lambda: None)
    assert host.sample().memory_total_gib > 0.5
    assert host.sample().disk_free_gib > 0


def test_sampling_thins_out_with_time() -> None:
    assert gpu_interval_s(0) == 1.0
    assert gpu_interval_s(86_400) == 5.0


def test_the_sampler_goes_on_when_a_monitor_fails_in_an_unforeseen_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetui.engine.telemetry.HOST_INTERVAL_S", 0.05)

    def fail(self: GpuMonitor) -> Any:
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "a name that is no text")

    monkeypatch.setattr(GpuMonitor, "sample", fail)
    monkeypatch.setattr("finetui.engine.telemetry.gpu_interval_s", lambda _: 0.05)
    sampler = Sampler(tmp_path / "events.jsonl", [0])
    sampler.start()
    end = time.monotonic() + 5
    while len(read_events(tmp_path / "events.jsonl")) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    sampler.stop()
    assert capsys.readouterr().err.count("a name that is no text") == 1


def test_the_sampler_goes_on_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetui.engine.telemetry.HOST_INTERVAL_S", 0.05)
    append = EventLog.append
    failed: list[Any] = []

    def full_at_first(self: EventLog, payload: Any) -> Any:
        if len(failed) < 3:
            failed.append(payload)
            raise OSError(28, "No space left on device")
        return append(self, payload)

    monkeypatch.setattr(EventLog, "append", full_at_first)
    sampler = Sampler(tmp_path / "events.jsonl", [])
    sampler.start()
    end = time.monotonic() + 5
    while not read_events(tmp_path / "events.jsonl"):
        assert time.monotonic() < end
        time.sleep(0.01)
    sampler.stop()
    assert {event.type for event in read_events(tmp_path / "events.jsonl")} == {"host"}
    assert capsys.readouterr().err.count("No space left") == 1
