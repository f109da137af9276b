"""The planner against measured runs: the scorer runs, and its errors stay where they are."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import finetui

ROOT = Path(finetui.__file__).parent


def scored(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.planner_accuracy", "--json", *arguments],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT.parent)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def result() -> dict:
    return scored()


def test_most_measured_runs_are_answered_and_the_rest_refused_with_a_reason(result):
    assert result["answered"] >= 189
    assert result["answered"] + result["refused"] == 200
    assert sum(result["refusals"].values()) == result["refused"]
    assert all(len(reason) > 8 for reason in result["refusals"])


def test_errors_over_all_runs_stay_where_they_are(result):
    scores = result["all"]
    assert scores["memory_median"] <= 0.03
    assert scores["memory_p90"] <= 0.115
    assert scores["speed_median"] <= 0.05
    assert scores["speed_inside_interval"] >= 0.9
    assert scores["speed_interval_width"] <= 0.25
    assert scores["inside_interval"] >= 0.97
    assert scores["under_by_5_percent"] <= 0.05
    assert scores["interval_width"] <= 0.2
    assert scores["memory_median"] < scores["accelerate_median"] / 5
    assert scores["memory_median"] < scores["rule_of_thumb_median"] / 5


@pytest.mark.parametrize(
    ("source", "rows", "median"),
    [("foundation-model-stack/fms-acceleration", 43, 0.02), ("AnswerDotAI/fsdp_qlora", 16, 0.06),
     ("pytorch/torchtune", 12, 0.05), ("Lightning-AI/litgpt", 36, 0.04), ("QwenLM/Qwen", 12, 0.03),
     ("huggingface/peft", 7, 0.04)],
)  # fmt: skip
def test_errors_per_source_stay_where_they_are(result, source, rows, median):
    assert result["sources"][source]["rows"] == rows
    assert result["sources"][source]["memory_median"] <= median


@pytest.mark.parametrize(
    ("table", "rows", "answered", "median", "p90", "inside", "timed"),
    [("more_runs.csv", 580, 578, 0.047, 0.12, 0.95, 0.88), ("further_runs.csv", 234, 230, 0.11, 0.33, 0.7, 0.4)],
)  # fmt: skip
def test_errors_over_rows_gathered_later_stay_where_they_are(table, rows, answered, median, p90, inside, timed):
    result = scored("--runs", f"tests/bench/data/{table}")
    assert result["answered"] + result["refused"] == rows
    assert result["answered"] >= answered
    assert result["all"]["memory_median"] <= median
    assert result["all"]["memory_p90"] <= p90
    assert result["all"]["inside_interval"] >= inside
    assert result["all"]["speed_inside_interval"] >= timed


def test_other_tables_and_shapes_can_be_given(tmp_path):
    with (ROOT / "tests/bench/data/measured_runs.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        row = next(row for row in reader if "fms" in row["framework"])
    shape = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
             "num_attention_heads": 8, "vocab_size": 1000}  # fmt: skip
    (tmp_path / "acme--new-model").mkdir()
    (tmp_path / "acme--new-model" / "config.json").write_text(json.dumps(shape))
    table = tmp_path / "runs.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(
            [
                {**row, "model": "acme/new-model"},
                {**row, "model": "acme/other"},
                {**row, "model": "acme/new-model", "framework": "homemade"},
                {**row, "model": "acme/new-model", "num_gpus": "2", "framework": "TRL", "gpu": ""},
            ]
        )
    answer = scored("--runs", str(table), "--configs", str(tmp_path))
    assert (answer["answered"], answer["refused"]) == (2, 2)
    assert {reason.split(":")[0] for reason in answer["refusals"]} == {
        "no shapes for acme/other", "several GPUs",
    }  # fmt: skip


def test_runs_on_an_h200_are_predicted_to_a_few_percent():
    """Ours and other programs', as measured (tests/bench/results/planner-h200.json)."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "finetui.tests.bench.sweep", "score", "tests/bench/results/planner-h200.json"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT.parent)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    scores = json.loads(done.stdout[done.stdout.index("\n{") :])
    ours = scores["finetui"]
    assert ours["memory_rows"] >= 40
    assert ours["allocated_median"] <= 0.01
    far = {
        line.split()[0]
        for line in done.stdout.splitlines()
        if line.startswith("finetui/") and (off := re.search(r"([+-] *[\d.]+)%", line)) and abs(float(off[1])) > 3
    }
    assert not far
    assert ours["reserved_median"] <= 0.02
    assert ours["speed_median"] <= 0.05
    assert abs(ours["speed_worst"]) <= 0.1
    assert all(score["speed_inside_interval"] == score["speed_rows"] for score in scores.values())
    assert max(abs(scores[name]["allocated_worst"]) for name in ("trl", "trl-liger", "unsloth")) <= 0.06
