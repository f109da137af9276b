"""plan, fit, gpus and data: tables for people, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetui.tui.cli import main
from finetui.tui.commands.options import parse_gpus, recipe_from
from finetui.tui.console import Console
from finetui.tui.format import duration, usd


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    out, err = capsys.readouterr()
    assert caught.value.code in (0, None), err
    return out


def test_plan_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "Qwen/Qwen3-8B", "--tuning", "qlora", "--gpu", "RTX4090", "--seq-len", "1024", "--json"]
    plan: dict[str, Any] = json.loads(answer(capsys, *words))
    assert plan["model"]["parameters"] == 8_190_735_360
    assert plan["model"]["trainable"] == 43_646_976
    assert plan["hardware"]["count"] == 1
    assert set(plan["memory"]["terms"]) == {
        "weights", "adapter", "gradients", "optimizer", "activations", "logits", "buffers", "context"
    }  # fmt: skip
    assert sum(plan["memory"]["terms"].values()) == pytest.approx(plan["memory"]["device_gib"], rel=1e-3)
    assert plan["memory"]["low_gib"] < plan["memory"]["device_gib"] < plan["memory"]["high_gib"]
    assert plan["resolved"]["sequence_length"] == 1024
    assert plan["cost"]["usd"] > 0
    assert all(reason["why"] for reason in plan["reasons"])
    assert "auto" not in [value for key, value in plan["resolved"].items() if key != "kernels"]


def test_plan_speaks_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    text = answer(capsys, "plan", "Qwen/Qwen3-8B", "--tuning", "full", "--gpu", "RTX4090")
    assert text.startswith("✘ does not fit on RTX-4090")
    assert "! " in text  # the nearest changes that would fit


def test_fit_lists_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(answer(capsys, "fit", "Qwen/Qwen3-8B", "--gpu", "RTX4090,H100", "--json"))["rows"]
    fits = {(row["gpu"], row["tuning"], row["sequence_length"]): row["fits"] for row in rows}
    assert fits["RTX-4090", "qlora", 2048]
    assert not fits["RTX-4090", "full", 2048]
    assert fits["H100", "full", 2048]
    assert "✔" in answer(capsys, "fit", "Qwen/Qwen3-8B", "--gpu", "RTX4090")


def test_fit_without_a_model_lists_the_models_of_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capsys, "fit", "--gpu", "T4", "--json"))
    assert (found["gpu"], found["sequence_length"]) == ("T4", 2048)
    by_name = {row["name"]: {fit["tuning"]: fit["fits"] for fit in row["fits"]} for row in found["models"]}
    assert by_name["Qwen/Qwen3-8B"] == {"full": False, "lora": False, "qlora": True}
    sizes = [row["parameters"] for row in found["models"]]
    assert sizes == sorted(sizes, reverse=True)
    text = answer(capsys, "fit", "--gpu", "T4", "--seq-len", "1024", "--tuning", "lora")
    assert text.startswith("T4 of 14.7 GiB: GiB at micro batch 1, rows of 1,024 tokens")
    assert "Qwen/Qwen3-8B" not in text
    assert "models do not fit; --all shows them." in text
    assert "Qwen/Qwen3-8B" in answer(capsys, "fit", "--gpu", "T4", "--tuning", "lora", "--all")


def test_offers_are_ranked_by_what_the_run_costs(capsys: pytest.CaptureFixture[str]) -> None:
    offers = json.loads(answer(capsys, "gpus", "Qwen/Qwen3-8B", "--tuning", "lora", "--json"))["offers"]
    costs = [offer["usd"] for offer in offers]
    assert len(costs) == 20
    assert costs == sorted(costs)
    assert all(offer["source"] and offer["as_of"] for offer in offers)


def test_data_shows_which_tokens_are_trained_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Say hi.", "input": "", "output": "hi there"}) + "\n")
    tiny = Path(__file__).parents[3] / "presets" / "tiny"
    text = answer(capsys, "data", str(tiny), "--data", str(rows))
    assert "alpaca" in text
    trained = text[text.index("[[") + 2 : text.index("]]")]
    assert trained.startswith("hi there")
    assert "Say hi." not in trained


@pytest.mark.parametrize(("text", "expected"), [("2", 2), ("0,1", [0, 1]), ("0,", [0]), ("0", [0]), ("auto", "auto")])
def test_gpus_are_a_count_or_indices(text: str, expected: object) -> None:
    assert parse_gpus(text) == expected


def test_flags_go_over_the_recipe_and_set_goes_over_flags(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ntuning: {type: qlora, rank: 8}\nepochs: 3\n")
    recipe = recipe_from(str(path), rank=32, seq_len=512, overrides=["tuning.rank=64"])
    assert (recipe.tuning.type, recipe.tuning.rank, recipe.epochs, recipe.sequence_length) == ("qlora", 64, 3, 512)
    assert recipe_from(str(path), tuning="full").tuning.type == "full"


def test_a_plan_of_stages_keeps_the_time_of_one_apart_from_that_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    tree = json.loads(answer(capsys, "plan", "alignment", "--gpu", "A100-80GB", "--json"))
    said = answer(capsys, "plan", "alignment", "--gpu", "A100-80GB")
    largest = max((one for one in tree["stages"] if one["do"] == "train"), key=lambda one: one["device_gib"])
    (time,) = [line for line in said.splitlines() if line.strip().startswith("time ")]
    assert f"{duration(largest['time_s'])} for {largest['steps']} steps" in time
    assert f"{usd(tree['cost']['usd'])} in all at" in said


@pytest.mark.parametrize(("width", "matrix"), [(60, False), (80, True), (130, True)])
def test_what_fits_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, matrix: bool
) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setattr(Console, "width", width)
    words = ["fit", "meta-llama/Llama-3.1-8B", "--gpu", "T4,H100,RTX-PRO-6000-Server"]
    rows = json.loads(answer(capsys, *words, "--json"))["rows"]
    lines = answer(capsys, *words).splitlines()
    assert ("does not fit" in lines[0] + lines[1]) == matrix
    assert all(len(line) <= width for line in lines)
    speeds = {f"{row['tokens_per_s']:,.0f}" for row in rows if row["fits"]}
    assert all(any(speed in line for line in lines) for speed in speeds)
    assert len([line for line in lines if "H100" in line]) == (1 if matrix else 6)
