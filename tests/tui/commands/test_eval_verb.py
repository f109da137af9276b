"""``finetui eval`` as a user meets it: what it refuses, what it prints, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetui.engine import durable
from finetui.planner.printable import is_printable
from finetui.tui.cli import main
from finetui.tui.evaluation_view import samples_of, summary_of, table_of


def figure(
    value: float, low: float | None = None, high: float | None = None, kind: str = "bootstrap"
) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "rows": 20, "lower_is_better": False, "interval": kind}


def model(label: str, **figures: Any) -> dict[str, Any]:
    return {"label": label, "base": label == "base", "figures": figures}


def against(label: str, name: str, verdict: str, *edges: float) -> dict[str, Any]:
    value, low, high = edges or (None, None, None)
    return {"model": label, "against": "base", "figure": name, "value": value, "low": low, "high": high, "rows": 20,
            "verdict": verdict}  # fmt: skip


def test_one_model_beside_its_base() -> None:
    tree = {
        "models": [
            model("base", loss=figure(2.5), exact_match=figure(0.1, 0.03, 0.3, "wilson")),
            model("mine", loss=figure(1.25), exact_match=figure(0.9, 0.7, 0.97, "wilson"), f1=figure(0.95)),
        ],
        "differences": [
            against("mine", "loss", "better", -1.25, -1.5, -1.0),
            against("mine", "exact_match", "no difference", 0.8, -0.1, 0.9),
        ],
    }
    columns, rows = table_of(tree)
    assert [column.name for column in columns] == ["figure", "base", "mine", "difference", "verdict"]
    assert rows[0] == {
        "figure": "loss", "base": "2.5", "mine": "1.25", "difference": "-1.25 (-1.5 … -1)", "verdict": "▲ better",
    }  # fmt: skip
    assert rows[1]["base"] == "10.0% (3–30)"
    assert rows[1]["difference"] == "+80.0 (-10.0 … +90.0)"
    assert rows[2] == {"figure": "word F1", "base": "–", "mine": "95.0%", "difference": "", "verdict": ""}
    assert summary_of(tree) == ["mine against base: better: loss; no difference: exact match"]


def test_several_models_say_whose_verdict_it_is() -> None:
    name = "also/wiki.txt/loss"
    tree = {
        "models": [model(label, **{name: figure(2.0)}) for label in ("base", "a", "b")],
        "differences": [against("a", name, "worse", 0.1, 0.05, 0.2), against("b", name, "too few rows")],
    }
    columns, rows = table_of(tree)
    assert [column.name for column in columns] == ["figure", "base", "a", "b", "verdict"]
    assert rows[0]["figure"] == "wiki.txt: loss"
    assert rows[0]["verdict"] == "▼ worse (a)  ? few rows (b)"


def test_answers_side_by_side() -> None:
    sample = {
        "prompt": "2 + 2?\n", "expected": ["4"], "answers": {"base": "five", "mine": "4"},
        "scores": {"base": {"score/numeric": None, "f1": 0.0}, "mine": {"score/numeric": 1.0, "f1": 1.0}},
    }  # fmt: skip
    assert list(samples_of([sample] * 3, 1)) == [
        "", "asked     2 + 2?", "expected  4", "base  five  [f1 0]", "mine  4  [numeric 1, f1 1]",
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["eval", *words])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--format", "alpaca"], "--format has no effect without --data"),
        (["--fewshot", "5"], "--fewshot has no effect without --tasks"),
        (["--answers", "0", "--show", "2"], "--show has no effect without --answers"),
        (["--seed", "3"], "--seed has no effect without --temperature"),
        (["--score", "rouge"], "there is no reward 'rouge'"),
        (["--score", "{function: regex}"], "the reward regex needs a pattern"),
        (["--out", "absent/x.json"], "absent: there is no such folder"),
        (["--out", "."], "this is a folder"),
        (["--tasks", ","], "no task is named"),
        ([], "there is no run 'x'"),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    code, out, err = told(capsys, "x", *words)
    assert (code, out) == (2, "")
    assert expected in err


def test_a_model_on_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Path(__file__).parents[3] / "presets" / "tiny"
    rows = [{"prompt": f"{i}\x1b[2J + 1 =", "completion": f" {i + 1}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(tiny), "--data", "rows.jsonl", "--answers", "2", "--max-new-tokens", "3", "--device", "cpu",
             "--score", "numeric", "--out", "figures.json"]  # fmt: skip
    code, out, err = told(capsys, *words, "--show", "1")
    assert code == 0, err
    assert "12 rows, 2 answered" in out
    assert "bits per byte" in out
    assert "numeric, pass@1" in out
    assert "expected  1" in out
    assert "asked     0\\u001b[2J + 1 =" in out
    assert is_printable(out + err)
    assert "tiny: loss …" in err
    code, out, err = told(capsys, *words, "--json")
    assert code == 0, err
    tree, kept = json.loads(out), json.loads((folder / "figures.json").read_text())
    assert tree["models"] == kept["models"]
    assert tree["models"][0]["figures"]["loss"]["rows"] == 12
    assert tree["files"] == []


def test_figures_that_can_not_be_written_are_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Path(__file__).parents[3] / "presets" / "tiny"
    (folder / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 4)
    words = [str(tiny), "--data", "rows.jsonl", "--answers", "0", "--device", "cpu"]
    code, _, err = told(capsys, *words, "--also", "absent.jsonl")
    assert code == 2
    assert "loss …" not in err  # before anything is measured

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write_atomically", full)
    code, out, err = told(capsys, *words, "--out", "figures.json")
    assert code == 1
    assert "bits per byte" in out
    assert "figures.json: the figures can't be written (No space left on device)." in err
    assert "wrote" not in err


def test_a_report_shows_the_evaluations_of_its_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "quickstart"
    shutil.copytree(Path(__file__).parents[1] / "data" / "quickstart", run)
    tree = {
        "rows": {"source": "held-out | rows", "count": 20, "answered": 0},
        "models": [model("base", loss=figure(2.5)), model("mine", loss=figure(1.25))],
        "differences": [against("mine", "loss", "better", -1.25, -1.5, -1.0)],
    }
    (run / "evaluations").mkdir()
    for name, content in (("one", tree), ("half", {"models": [{"label": "base"}]})):
        (run / "evaluations" / f"{name}.json").write_text(json.dumps(content))
    main_ended(capsys, "report", str(run))
    text = capsys.readouterr().out
    assert "## Evaluation one" in text
    assert "held-out \\| rows: 20 rows." in text
    assert "| loss | 2.5 | 1.25 | -1.25 (-1.5 … -1) | ▲ better |" in text
    assert "- mine against base: better: loss" in text
    assert "half" not in text
    main_ended(capsys, "report", str(run), "--json")
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["evaluations"]] == ["one"]


def main_ended(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert not caught.value.code
