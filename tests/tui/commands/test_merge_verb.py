"""The verb: flags and files, what it says before and after, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from finetui.planner.errors import FinetuiError, RecipeError
from finetui.tui.verbs import build


def call(*words: object) -> Any:
    arguments = ["merge", *map(str, words)]
    return CliRunner().invoke(build({"merge": "merge"}), arguments, catch_exceptions=False)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        draw = torch.Generator().manual_seed(seed)
        save_file({"w": torch.randn(6, 4, generator=draw)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    return ["a", "b"]


def test_a_merge_by_flags_and_again_by_its_file(models: list[str], tmp_path: Path) -> None:
    flags = ("--method", "task-arithmetic", "--base", "base", "--weights", "0.5,0.25", "-o", "out", "--json")
    answer = json.loads(call(*models, *flags).stdout)
    assert answer["path"] == str(tmp_path / "out")
    o, a, b = (load_file(tmp_path / name / "model.safetensors")["w"] for name in ("base", "a", "b"))
    got = load_file(tmp_path / "out" / "model.safetensors")["w"]
    torch.testing.assert_close(got, o + 0.5 * (a - o) + 0.25 * (b - o))
    assert f"finetui merge {tmp_path / 'other' / 'merge.yaml'} -o NEW" in call(*models, "-o", "other").stderr
    again = call("out/merge.yaml", "-o", "again")
    assert again.stdout.strip() == str(tmp_path / "again")
    assert "The same bits as then" in again.stderr
    tree = yaml.safe_load((tmp_path / "out" / "merge.yaml").read_text())
    assert tree["models"][0] == {"model": str(tmp_path / "a"), "weight": 0.5}


def test_a_dry_run_writes_nothing(models: list[str], tmp_path: Path) -> None:
    flags = ("--method", "dare_ties", "--base", "base", "--density", "0.5", "--dtype", "bfloat16", "-o", "out")
    answer = json.loads(call(*models, *flags, "--dry-run", "--json").stdout)
    assert (answer["parameters"], answer["tensors"], answer["dtypes"]) == (24, 1, ["BF16"])
    assert answer["disk_gib"] == 48 / 2**30
    assert answer["fits"] is True
    plain = call(*models, *flags, "--dry-run").stdout
    assert "parameters   24" in plain
    assert "disk" in plain
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("a", "b", "--weights", "1,2,3"), "3 values are given for 2 models"),
        (("a", "b", "--weights", "much"), "no list of numbers"),
        (("a", "b", "--density", "0.5"), "density has no effect on linear"),
        (("m.yaml", "--method", "ties"), "no effect beside a file"),
        (("a",), "at least 2 models"),
    ],
)
def test_what_is_refused(models: list[str], words: tuple[str, ...], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        call(*words)
    with pytest.raises(FinetuiError):
        call("a", "nothing-here")


def test_differences_are_told(models: list[str], tmp_path: Path) -> None:
    for name, theta in (("a", 1.0), ("b", 5.0)):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": theta}))
    done = call(*models, "-o", "out")
    assert "rope_theta is 1.0 in" in done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
