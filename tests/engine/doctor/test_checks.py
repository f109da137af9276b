"""The doctor: each trouble is found and told with what to do, and one broken check hides no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetui.engine.check import Check
from finetui.engine.doctor import checks
from finetui.planner.errors import HardwareError


class NvmlError(Exception):
    pass


def nvml(**more: Any) -> Any:
    """A driver with one healthy GPU; ``more`` replaces what it answers."""
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "570.1",
        "nvmlSystemGetCudaDriverVersion": lambda: 12080,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "NVIDIA L4",
        "nvmlDeviceGetMemoryInfo": lambda *_: SimpleNamespace(used=2**30, total=24 * 2**30),
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=0),
        "nvmlDeviceGetPowerUsage": lambda handle: 20_000,
        "nvmlDeviceGetTemperature": lambda *_: 40,
        "nvmlDeviceGetClockInfo": lambda *_: 2000,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0,
        "nvmlDeviceGetTotalEccErrors": lambda *_: 0,
        "nvmlDeviceGetRemappedRows": lambda handle: (0, 0, 0, 0),
        "NVML_TEMPERATURE_GPU": 0, "NVML_CLOCK_SM": 1, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1, "NVML_VOLATILE_ECC": 0,
        "NVMLError": NvmlError,
    }  # fmt: skip
    return lambda: SimpleNamespace(**(answers | more))


def status(checks: list[Check]) -> list[str]:
    return [check.status for check in checks]


def test_one_broken_check_hides_no_other() -> None:
    def broken() -> list[Check]:
        raise ZeroDivisionError("oh")

    def told() -> list[Check]:
        raise HardwareError("no GPU", where="here", do="Buy one.")

    assert checks.guarded("a", broken)[0].detail == "ZeroDivisionError: oh"
    found = checks.guarded("b", told)[0]
    assert (found.status, found.detail, found.do) == ("fail", "here: no GPU", "Buy one.")


def test_a_driver_too_old_for_the_installed_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_cuda_of_torch", lambda: "13.0")
    found = checks._driver(nvml())[0]
    assert found.status == "fail"
    assert "up to 12.8; PyTorch is built for CUDA 13.0" in found.detail
    monkeypatch.setattr(checks, "_cuda_of_torch", lambda: "12.9")
    assert status(checks._driver(nvml())) == ["ok"], "minor versions are compatible"


def test_no_driver_is_no_failure_on_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> None:
        raise NvmlError("no library")

    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert status(checks._driver(nvml(nvmlInit=silent))) == ["warn"]
    assert checks._gpus(nvml(nvmlInit=silent)) == []
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/dev/nvidia0")]))
    assert status(checks._driver(nvml(nvmlInit=silent))) == ["fail"]


@pytest.mark.parametrize(
    ("answers", "expected", "said"),
    [
        ({}, ["ok"], "23.0 of 24.0 GiB free"),
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 0x40}, ["warn"], "hardware thermal"),
        ({"nvmlDeviceGetTemperature": lambda *_: 92}, ["warn"], "92 °C"),
        ({"nvmlDeviceGetTotalEccErrors": lambda *_: 3}, ["ok", "fail"], "3 memory errors"),
        ({"nvmlDeviceGetRemappedRows": lambda _: (0, 0, 1, 0)}, ["ok", "warn"], "waits to be replaced"),
    ],
)
def test_what_ails_a_gpu(answers: dict[str, Callable[..., Any]], expected: list[str], said: str) -> None:
    found = checks._gpus(nvml(**answers))
    assert status(found) == expected
    assert said in " ".join(check.detail for check in found)
    assert all(check.do for check in found if check.status != "ok")


def test_packages_out_of_range_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PACKAGES", {"pytest": ("99", None), "pydantic": ("2", None), "no-such": ("1", None)})
    found = checks._packages()
    assert status(found) == ["ok", "fail", "warn"]
    assert "pytest" in found[1].detail
    assert "no-such" in found[2].detail


def test_few_open_files_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    real = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (256, 8192) if which == resource.RLIMIT_NOFILE else real(which)
    )
    found = checks._limits()[0]
    assert (found.status, found.do) == ("warn", "Raise it: ulimit -n 8192")


def test_a_full_or_forbidden_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(checks, "_write_speed", lambda _: 1e9)
    by_name = {check.name: check for check in checks._disks()}
    assert str(tmp_path / "runs") in by_name["disk runs"].detail
    assert "1.00 GB/s" in by_name["disk runs"].detail
    monkeypatch.setattr(checks, "_LITTLE_DISK", 1 << 60)
    assert {check.name: check.status for check in checks._disks()}["disk runs"] == "warn"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "fail" in status(checks._disks())


def test_a_hub_that_does_not_answer_costs_seconds_not_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import time

    with socket.socket() as deaf:  # accepts and says nothing
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setattr(checks, "HUB_S", 0.3)
        began = time.monotonic()
        assert checks._ask(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        assert time.monotonic() - began < 5
    assert "no_such_host" in checks._ask("http://no_such_host.invalid") or checks._ask("http://no_such_host.invalid")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('print(\'{"name": "a", "status": "ok", "detail": "d"}\')', ["ok"]),
        ('print(\'{"name": "a", "status": "ok", "detail": "d"}\', flush=True); raise SystemExit(3)', ["ok", "fail"]),
        ("import os; os.abort()", ["fail"]),
        ("import time; time.sleep(60)", ["fail"]),
    ],
)
def test_a_library_that_crashes_or_hangs_is_told(code: str, expected: list[str]) -> None:
    assert status(checks.in_child(["-c", code], timeout_s=3.0)) == expected


@pytest.mark.slow
def test_the_part_with_torch_runs_here() -> None:
    pytest.importorskip("torch")
    found = {check.name: check for check in checks.in_child(["-m", "finetui.engine.doctor.pytorch"], 120.0)}
    assert found["torch"].status == "ok"
    assert found["bitsandbytes"].status == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_kernels_of_a_model_from_its_config_alone(tuning: str) -> None:
    pytest.importorskip("triton")
    config = Path(checks.__file__).parents[2] / "presets" / "models" / "Qwen--Qwen3-8B" / "config.json"
    told = checks.kernels_of(json.loads(config.read_text()), tuning)
    assert told["architecture"] == "Qwen3ForCausalLM"
    assert told["layers"] == 36
    replaced = {item["kernel"] for item in told["modules"] if item["replaced"]}
    assert {"decoder_layer", "rms_norm", "rope", "glu"} <= replaced
    assert ("lora" in replaced) == (tuning == "lora")


def test_an_architecture_that_cannot_be_built_is_told() -> None:
    pytest.importorskip("transformers")
    told = checks.kernels_of({"model_type": "no_such_type", "num_hidden_layers": 2}, "lora")
    assert "no_such_type" in told["error"]["what"]
    assert told["error"]["do"]


def test_the_doctor_itself_needs_no_torch() -> None:
    code = (
        "import sys, finetui.engine.doctor.checks; assert not {'torch', 'transformers', 'textual'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
