"""finetui import: the recipe on stdout, the talk on stderr, and one answer in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetui.planner.recipe import Recipe
from finetui.tui.cli import main

TEXT = """\
base_model: Qwen/Qwen3-8B
adapter: lora
lora_r: 8
lora_target_linear: true
datasets: [{path: org/rows, type: alpaca}]
sequence_len: 1024
micro_batch_size: 2
learning_rate: 1e-4
flash_attention: true
wandb_project: mine
wandb_entity:
gradient_checkpoint: true
"""


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "axolotl.yml"
    path.write_text(TEXT)
    return path


def test_the_recipe_is_data_and_the_table_is_talk(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "import", str(file), "--gpus", "4", "--plain")
    assert code == 0
    recipe = Recipe.parse(out)
    assert (recipe.model, recipe.tuning.rank, recipe.batch_size) == ("Qwen/Qwen3-8B", 8, 8)
    lines = [" ".join(line.split()) for line in err.splitlines()]
    assert "✔ lora_r: 8 → tuning.rank" in lines
    assert "· wandb_entity it is empty" in lines
    assert any(line.startswith("· flash_attention: true finetui's own kernels are on by default") for line in lines)
    assert any(line.startswith("! wandb_project: mine would log there.") for line in lines)
    assert any("gradient_checkpoint: true" in line and "Did you mean gradient_checkpointing?" in line for line in lines)
    assert lines[-1] == "Axolotl: 13 keys: 9 carried, 2 not needed, 1 not carried, 1 unknown"
    assert "\x1b" not in out + err


def test_a_file_that_can_be_planned_is_written_once(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "recipe.yaml"
    code, out, err = call(capsys, "import", str(file), "-o", str(target))
    assert (code, out) == (0, "")
    assert f"finetui plan {target}" in err.replace("\n", "")
    assert Recipe.load(target).sequence_length == 1024
    code, out, err = call(capsys, "import", str(file), "-o", str(target))
    assert code == 2
    assert "--force" in err
    assert call(capsys, "import", str(file), "-o", str(target), "--force")[0] == 0
    code, out, err = call(capsys, "import", str(file), "-o", str(file), "--force")
    assert (code, file.read_text()) == (2, TEXT)
    assert "the file that is read" in err
    code, out, _ = call(capsys, "plan", str(target), "--gpu", "H100", "--json")
    assert code == 0
    assert json.loads(out)["resolved"]["rank"] == 8
    assert call(capsys, "import", str(file), "-o", str(tmp_path / "none" / "r.yaml"))[0] == 2


def test_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "import", str(file), "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["from"] == "axolotl"
    assert Recipe.build(answer["recipe"]).tuning.rank == 8
    assert answer["counts"] == {"carried": 9, "default": len(answer["keys"]) - 13, "not needed": 2, "not carried": 1,
                                "unknown": 1}  # fmt: skip
    (rank,) = (key for key in answer["keys"] if key["key"] == "lora_r")
    assert rank == {"key": "lora_r", "line": 3, "value": "8", "outcome": "carried", "to": "tuning.rank", "why": "",
                    "do": ""}  # fmt: skip


def test_mistakes_are_told_with_file_and_key(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(TEXT.replace("lora_r: 8", "lora_r: many"))
    code, out, err = call(capsys, "import", str(file))
    assert (code, out) == (2, "")
    assert f"{file}:3: lora_r: must be a number (not many)" in err
    code, out, _ = call(capsys, "import", str(file), "--json")
    assert json.loads(out)["error"]["where"] == f"{file}:3: lora_r"
    file.write_text(TEXT)
    code, _, err = call(capsys, "plan", str(file))
    assert code == 2
    assert f"finetui import {file}" in err
