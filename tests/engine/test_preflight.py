"""What is found wrong before a run starts, and what is told to do about it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import finetui
from finetui.engine import preflight as module
from finetui.engine.check import PACKAGES, Check
from finetui.engine.preflight import GIB, preflight
from finetui.planner.plan import Disk, HardwareSummary, Memory, Plan
from finetui.planner.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A model folder and a dataset that are all right."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    (model / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one", "completion": "two"}\n' * 30)
    return Recipe.build({"model": str(model), "data": str(rows)})


def found(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def with_(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, **changes)


def test_all_is_well_within_a_second(recipe: Recipe, make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    began = time.process_time()  # of the processor: how long it takes depends on who else is at work
    checks = preflight(recipe, make_plan(), tmp_path / "runs")
    assert time.process_time() - began < 1.0
    assert {check.status for check in checks} == {"ok"}, checks
    assert {check.name for check in checks} == {"plan", "packages", "memory", "run folder", "data", "model", "disk"}
    assert not (tmp_path / "runs").exists()


def test_it_imports_neither_torch_nor_textual(recipe: Recipe, make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    make_plan().save(tmp_path / "plan.json")
    probe = (
        "import sys; from finetui.engine.preflight import preflight; from finetui.planner.recipe import Recipe;"
        "from finetui.planner.plan import Plan; import finetui.engine.launcher;"
        f"preflight(Recipe.load({str(tmp_path / 'recipe.yaml')!r}), Plan.load({str(tmp_path / 'plan.json')!r}));"
        "print([name for name in ('torch', 'textual', 'transformers', 'datasets') if name in sys.modules])"
    )
    folder = str(Path(finetui.__file__).parent.parent)
    answer = subprocess.run(
        [sys.executable, "-P", "-c", probe], env={"PYTHONPATH": folder}, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "[]", answer.stderr


def test_weights_that_are_cut_short_are_found_before_the_start(
    recipe: Recipe, make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    weights = Path(recipe.model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    check = found(preflight(recipe, make_plan(), tmp_path / "runs"), "model")
    assert (check.status, check.do) == ("fail", "Fetch or copy the file again.")
    assert str(weights) in check.detail


def test_the_packages_are_those_of_the_extra() -> None:
    project = tomllib.loads((Path(finetui.__file__).parent / "pyproject.toml").read_text())
    extra = [requirement.partition(";")[0] for requirement in project["project"]["optional-dependencies"]["train"]]
    stated = {}
    for requirement in extra:
        name, _, bounds = requirement.partition(">=")
        first, _, beyond = bounds.partition(",<")
        stated[name.strip()] = (first.strip(), beyond.strip() or None)
    assert stated == PACKAGES


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"peft": None, "trl": None}, "not installed: peft, trl"),
        ({"torch": "2.10.1"}, "torch 2.10.1 (needed: 2.11 or later, before 2.14)"),
        ({"torch": "2.14.0"}, "torch 2.14.0"),
        ({"transformers": "5.9"}, "transformers 5.9"),
    ],
)
def test_packages_that_are_missing_or_out_of_range(
    recipe: Recipe,
    make_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str | None],
    words: str,
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        known = versions.get(name, real(name))
        if known is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return known

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = found(preflight(recipe, make_plan()), "packages")
    assert check.status == "fail"
    assert words in check.detail
    assert "finetui[train]" in check.do


def test_a_cpu_build_of_torch_is_told_where_the_plan_wants_a_gpu(
    recipe: Recipe, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {**dict.fromkeys(PACKAGES, "9"), "torch": "2.13.0+cpu"}.get)
    plan = make_plan(device="cuda", gpus=[0])
    monkeypatch.setattr(module, "PACKAGES", {"torch": ("2.11", "2.14"), "transformers": ("5", None)})
    assert "build for the CPU alone" in module._packages(recipe, plan)[0].detail


def test_a_plan_that_does_not_fit_or_is_for_another_machine(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    bad = with_(plan, fits=False, warnings=["Use qlora."], memory=Memory(30, 31, 32, 31, 33))
    assert module._fits(bad) == [Check("plan", "fail", "the plan does not fit: 32.0 of 8.0 GiB on CPU", "Use qlora.")]
    elsewhere = with_(plan, hardware=HardwareSummary("H100", 1, 79.1))
    assert module._fits(elsewhere)[0].status == "fail"
    assert "for H100, not for this machine" in module._fits(elsewhere)[0].detail
    tight = with_(plan, memory=Memory(7, 7, 7.5, 7, 8.5, lever="micro_batch: 1"))
    assert (module._fits(tight)[0].status, "micro_batch: 1" in module._fits(tight)[0].do) == ("warn", True)


class FakeNvml:
    """Two GPUs of 24 GiB; the second is used by process 77."""

    class NVMLError(Exception):
        """As in pynvml."""

    def __init__(self, driver: bool = True) -> None:
        self.driver = driver

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA Test"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(free=(23 if handle == 0 else 10) * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [] if handle == 0 else [SimpleNamespace(pid=77)]


def gpus(plan: Plan, need_gib: float, nvml: Any) -> list[Check]:
    return module._gpus(with_(plan, memory=Memory(1, 1, need_gib, 1, 1)), lambda: nvml)


def test_gpus(make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    both = make_plan(device="cuda", gpus=[0, 1])
    assert [check.status for check in gpus(both, 8.0, FakeNvml())] == ["ok", "warn"]
    idle, busy = gpus(both, 20.0, FakeNvml())
    assert (idle.status, busy.status) == ("ok", "fail")
    assert busy.detail == "GPU 1 (NVIDIA Test): 10.0 GiB free of the 20.0 needed, used by process 77"
    (absent,) = gpus(make_plan(device="cuda", gpus=[1, 2]), 8.0, FakeNvml())
    assert (absent.status, absent.detail) == ("fail", "there is no GPU 2")
    (driverless,) = gpus(both, 8.0, FakeNvml(driver=False))
    assert "driver does not answer (Driver Not Loaded)" in driverless.detail
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "leaves out GPU 0" in gpus(both, 8.0, FakeNvml())[-1].detail


def test_a_machine_without_driver_says_so(recipe: Recipe, make_plan: Callable[..., Plan]) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    assert found(preflight(recipe, make_plan(device="cuda", gpus=[0])), "gpu").status == "fail"


def test_a_run_folder_that_can_not_be_written(recipe: Recipe, make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = found(preflight(recipe, make_plan(), tmp_path / "file" / "runs"), "run folder")
    assert (check.status, "file can't be written (Not a directory)" in check.detail) == ("fail", True)
    assert module._writable(Path("/proc/runs"))[0].status == "fail"


@pytest.mark.parametrize(
    ("content", "words"), [(None, "there is no such file"), ("", "empty"), ('{"a": 1}\n{"b"\n', "rows.jsonl:2")]
)
def test_data_that_can_not_be_read(
    recipe: Recipe, make_plan: Callable[..., Plan], tmp_path: Path, content: str | None, words: str
) -> None:
    (tmp_path / "rows.jsonl").unlink() if content is None else (tmp_path / "rows.jsonl").write_text(content)
    check = found(preflight(recipe, make_plan()), "data")
    assert check.status == "fail"
    assert words in check.detail


def test_a_recipe_without_data(recipe: Recipe, make_plan: Callable[..., Plan]) -> None:
    assert "no dataset" in found(preflight(Recipe.build({"model": recipe.model}), make_plan()), "data").detail


def test_disk(recipe: Recipe, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = make_plan()
    plan = with_(plan, disk=Disk(checkpoint_gib=12.0, checkpoints_gib=36.0, output_gib=4.0))
    need = 40 * GIB + 2**26
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    (check,) = module._disk(recipe, plan, tmp_path)
    assert check.status == "fail"
    assert "40.1 needed (3 checkpoints of 12.0 GiB, and the result)" in check.detail
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    assert module._disk(recipe, plan, tmp_path)[0].status == "ok"


def test_shared_memory_matters_to_several_ranks(
    make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    assert module._shared_memory(make_plan()) == []
    (check,) = module._shared_memory(make_plan(gpus=[0, 1]))
    assert (check.status, "--shm-size" in check.do) == ("warn", True)


def test_data_in_which_nothing_would_be_trained(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(finetui.__file__).parent / "presets" / "tiny", model)
    rows = tmp_path / "rows.jsonl"

    def check(*lines: dict[str, Any]) -> Check:
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines * 20))
        return found(preflight(Recipe.build({"model": str(model), "data": str(rows)}), make_plan()), "data")

    length = make_plan().resolved.sequence_length
    long, short = {"prompt": "word " * length, "completion": "a"}, {"prompt": "word", "completion": "a"}
    assert check(long).status == "fail"
    assert f"begins within {length} tokens" in check(long).detail
    assert check(long, short).status == "ok"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    assert check({"messages": chat}).status == "fail"
    assert check({"messages": [*chat, chat[0], {**chat[1], "weight": 1}]}).status == "ok"


def test_a_split_model_has_to_pass_through_host_memory(
    recipe: Recipe, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "memory_limit", lambda: SimpleNamespace(limit=64 * GIB, used=0))
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=64 * GIB))
    knobs: dict[str, Any] = {"strategy": "fsdp", "gpus": [0, 1], "device": "cuda", "precision": "bf16"}
    large = dataclasses.replace(make_plan().model, parameters=20 * 2**30)
    full, lora = (with_(make_plan(**knobs, tuning=tuning), model=large) for tuning in ("full", "lora"))
    assert found(preflight(recipe, full), "memory").status == "fail"  # 120 GiB
    assert found(preflight(recipe, lora), "memory").status == "ok"  # 40 GiB
