"""Checkpoints in the background hold exactly what the model was when they were begun."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from finetui.engine.checkpoints import store  # noqa: E402
from finetui.engine.run import Run  # noqa: E402
from finetui.engine.trainers import saving  # noqa: E402
from finetui.engine.trainers.saving import Saver, loads_back  # noqa: E402
from finetui.engine.trainers.state import HostMemory, Part, Snapshot, descriptions, weights_of  # noqa: E402
from finetui.engine.worker import attempt  # noqa: E402
from finetui.planner.errors import TrainingError  # noqa: E402

from .conftest import events, losses  # noqa: E402

MakeRun = Callable[..., Run]


def hashes(run: Run) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of every checkpoint."""
    found = {}
    for path in sorted((run.path / "checkpoints").iterdir()):
        files = json.loads((path / store.MANIFEST).read_text())["files"]
        found[path.name] = {name: entry["sha256"] for name, entry in files.items()}
    return found


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_slow_disk_changes_no_bit_and_holds_up_no_step(
    training_run: MakeRun, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"checkpoint": {"every": 3, "keep": 5}}
    waiting, behind = (training_run(tuning=tuning, recipe=recipe, checkpoint_every=3) for _ in range(2))
    with monkeypatch.context() as patched:  # no room for a copy: steps wait until all is written
        patched.setattr(saving, "_SHARE", 0.0)
        assert attempt(waiting) == 0
    assert "steps wait" in events(waiting, "fallback")[0]["what"]
    write, seen = Snapshot.write, list[int]()

    def slowly(self: Snapshot, folder: Path) -> dict[str, str]:
        before = len(events(behind, "step"))
        until = time.monotonic() + 20
        while len(events(behind, "step")) < min(before + 2, 6) and time.monotonic() < until:
            time.sleep(0.01)
        seen.append(len(events(behind, "step")) - before)
        return write(self, folder)

    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "write", slowly)
        assert attempt(behind) == 0
    assert seen[0] == 2, "training went on for two steps before the first byte was written"
    assert losses(behind) == losses(waiting)
    assert hashes(behind) == hashes(waiting)
    assert [told["step"] for told in events(behind, "checkpoint")] == [1, 3, 6]
    assert all(told["waited_s"] == pytest.approx(told["seconds"], abs=0.01) for told in events(waiting, "checkpoint"))


def test_the_first_one_is_loaded_back(training_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training_run()
    assert attempt(run) == 0
    assert any("loaded back" in told["line"] for told in events(run, "log"))
    spoiled = training_run()

    def other(self: Snapshot, folder: Path) -> dict[str, str]:
        part = self.parts["adapter_model.safetensors"]
        wrong = {**self.parts, "adapter_model.safetensors": Part({k: v + 1 for k, v in part.tensors.items()})}
        return write(Snapshot(self.files, wrong), folder)

    write = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", other)
    assert attempt(spoiled) == 1
    failure = events(spoiled, "failure")[0]
    assert failure["cause"] == "disk"
    assert "adapter_model.safetensors is not what was saved" in failure["message"]
    assert events(spoiled, "step")[-1]["step"] <= 2


def test_a_disk_that_gives_back_something_else_is_found_out(tmp_path: Path) -> None:
    partial = store.begin(tmp_path, 1)
    (partial / "model.safetensors").write_bytes(b"what came out")
    with pytest.raises(TrainingError, match="does not give back") as caught:
        store.commit(partial, 1, keep=1, hashes={"model.safetensors": "of what went in"})
    assert caught.value.cause == "disk"
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_ends_the_run_at_the_next_step(training_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training_run(recipe={"checkpoint": {"every": 100}}, checkpoint_every=100, steps=40)

    def full(self: Snapshot, folder: Path) -> dict[str, str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshot, "write", full)
    assert attempt(run) == 1
    assert events(run, "failure")[0]["cause"] == "disk"
    assert events(run, "step")[-1]["step"] < 40, "long before the next checkpoint was due"


def test_on_a_full_disk_an_older_one_makes_way_but_never_the_last(tmp_path: Path) -> None:
    told: list[Any] = []
    saver = Saver(tmp_path, 3, told.append)
    snapshot = Snapshot({"a": b"a"}, {"b": Part({"t": torch.ones(3)})})
    for step in (1, 2, 3):
        saver.save(step, snapshot, {})
    saver.wait()
    room = [1]
    write = snapshot.write

    class Tight(Snapshot):
        def write(self, folder: Path) -> dict[str, str]:
            if len(store.find(tmp_path)) > room[0]:
                raise OSError(28, "No space left on device")
            return write(folder)

        def copied(self, host: HostMemory) -> Snapshot:
            return self

    saver.save(4, Tight(snapshot.files, snapshot.parts), {})
    saver.wait()
    assert [found.step for found in store.find(tmp_path)] == [3, 4]
    room[0] = 0
    saver.save(5, Tight(snapshot.files, snapshot.parts), {})
    with pytest.raises(TrainingError):
        saver.wait()
    assert [found.step for found in store.find(tmp_path)] == [4]


def test_a_copy_has_nothing_in_common_with_what_goes_on(tmp_path: Path) -> None:
    weights = torch.arange(6.0).reshape(2, 3)
    snapshot = Snapshot({}, {"b": Part({"t": weights.T})}, {"w": weights[:, 1:]}, lambda w: {"w": Part(w)})
    copy = snapshot.copied(HostMemory())
    weights.zero_()
    copy.write(tmp_path)
    assert load_file(tmp_path / "b")["t"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert load_file(tmp_path / "w")["w"].tolist() == [[1.0, 2.0], [4.0, 5.0]]
    with pytest.raises(TrainingError, match="not what was saved"):
        loads_back(tmp_path, snapshot)


@pytest.mark.parametrize(
    ("tuning", "options"), [("lora", {}), ("lora", {"init": "pissa"}), ("full", {}), ("ia3", {})], ids=lambda v: str(v)
)
def test_the_last_checkpoint_loads_as_the_result_does(
    training_run: MakeRun, tuning: str, options: dict[str, Any]
) -> None:
    rank = {"rank": 0, "alpha": 0.0} if tuning in ("full", "ia3") else {}
    run = training_run(tuning=tuning, steps=1, tuning_options=options, learning_rate=1e-3, **rank)
    assert attempt(run) == 0
    saved, output = run.path / "checkpoints" / "step-000001", run.output_path
    weights = "model.safetensors" if tuning == "full" else "adapter_model.safetensors"
    ours, theirs = load_file(saved / weights), load_file(output / weights)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = "config.json" if tuning == "full" else "adapter_config.json"
    assert json.loads((saved / config).read_text()) == json.loads((output / config).read_text())
    beside = {"README.md", "training.json", "generation_config.json"}
    assert {path.name for path in output.iterdir()} - beside <= {path.name for path in saved.iterdir()}


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_model_is_stored_as_save_pretrained_stores_it(
    model_folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(family))
    model.save_pretrained(tmp_path / "theirs")
    parts, weights, arrange = weights_of(model)
    (tmp_path / "ours").mkdir()
    Snapshot(descriptions(model), parts, weights, arrange).write(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0] == {**configs[1], "use_cache": True}


@pytest.mark.parametrize(
    ("tuning", "optimizer", "spec"),
    [
        ("lora", "adamw", {}),
        ("lora", "sgd", {}),
        ("lora", "adamw", {"modules_to_save": ["lm_head"]}),
        ("full", "adamw", {}),
        ("full", "lion", {}),
    ],
)
def test_a_plan_knows_the_size_of_a_checkpoint(
    training_run: MakeRun, tuning: str, optimizer: str, spec: dict[str, Any]
) -> None:
    from finetui.engine.planning import plan_for

    asked = {"tuning": {"type": tuning, **spec}, "optimizer": {"name": optimizer}, "hardware": {"precision": "fp32"}}
    options = {"tuning_options": spec, "rank": 16 if tuning == "lora" else 0, "alpha": 32.0}
    run = training_run(tuning=tuning, recipe=asked, steps=1, optimizer=optimizer, learning_rate=1e-4, **options)
    assert attempt(run) == 0
    folder = run.path / "checkpoints" / "step-000001"
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors") if "rank" not in path.name)
    projected = plan_for(run.recipe).disk.checkpoint_gib * 2**30 - 40e6
    # The rest is headers: names and shapes of tensors this small weigh as much as a few rows of them.
    assert projected == pytest.approx(stored, rel=0.02, abs=60_000)
