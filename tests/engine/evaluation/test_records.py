"""Evaluations on disk: whole or not at all, for their user alone, and read back."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

pytest.importorskip("torch")

from finetui.engine.evaluation.answers import Answer
from finetui.engine.evaluation.evaluation import Entry, Evaluation, Wanted
from finetui.engine.evaluation.records import as_tree, evaluations_of, save
from finetui.engine.evaluation.rows import Question
from finetui.engine.evaluation.statistics import PerRow, difference
from finetui.engine.evaluation.subjects import Subject
from finetui.engine.run import Run


@pytest.fixture
def evaluation(make_run: Callable[..., Run]) -> Evaluation:
    run = make_run(name="one")
    subject = Subject("one", run.output_path, "tiny", run.plan.resolved, run, "result")
    marks = {"exact_match": [1.0, None]}
    loss = PerRow((2.0, 4.0), (1.0, 2.0), lower_is_better=True)
    entries = [
        Entry(label, label == "base", subject, {"loss": loss, "exact_match": PerRow.of(marks["exact_match"])},
              [Answer(said, 1, False), Answer("…", 1, True)], marks) for label, said in (("base", "no"), ("one", "yes"))
    ]  # fmt: skip
    questions = [Question([1], "p", "why?", ["yes"]), Question([2], "p", "what?", [])]
    differences = [("one", "base", "loss", difference(loss, loss))]
    return Evaluation("rows", Wanted(), entries, 2, questions, differences, ["a note"])


def test_what_is_kept(evaluation: Evaluation) -> None:
    run = evaluation.entries[0].subject.run
    assert run is not None
    path = save(evaluation, run, "my rows/2")
    assert path.parent == run.path / "evaluations"
    assert path.name.endswith("-my-rows-2.json")
    assert [path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777] == [0o700, 0o600]
    tree = json.loads(path.read_text())
    base, tuned = tree["models"]
    assert (base["base"], base["checkpoint"], tuned["checkpoint"]) == (True, None, "result")
    assert tuned["figures"]["loss"]["value"] == 2.0
    assert tuned["figures"]["perplexity"]["value"] == pytest.approx(7.389056)
    assert tuned["figures"]["exact_match"] == {
        "value": 1.0, "low": pytest.approx(0.206549, abs=1e-6), "high": 1.0, "rows": 1, "lower_is_better": False,
        "interval": "wilson",
    }  # fmt: skip
    assert tree["differences"][0] == {
        "model": "one", "against": "base", "figure": "loss", "value": 0.0, "low": 0.0, "high": 0.0, "rows": 2,
        "verdict": "too few rows",
    }  # fmt: skip
    lines = [json.loads(line) for line in (path.parent / tree["samples"]).read_text().splitlines()]
    assert lines[0] == {
        "row": 0, "prompt": "why?", "expected": ["yes"], "answers": {"base": "no", "one": "yes"},
        "scores": {"base": {"exact_match": 1.0}, "one": {"exact_match": 1.0}},
    }  # fmt: skip
    assert lines[1]["scores"]["one"] == {"exact_match": None}
    assert tree["notes"] == ["a note"]


def test_names_that_are_taken_and_files_that_are_none(evaluation: Evaluation) -> None:
    run = evaluation.entries[0].subject.run
    assert run is not None
    assert evaluations_of(run) == []
    paths = {save(evaluation, run, "x") for _ in range(3)}
    assert len(paths) == 3
    (run.path / "evaluations" / "junk.json").write_text("{")
    (run.path / "evaluations" / "other.json").write_text("[]")
    found = evaluations_of(run)
    assert {name for name, _ in found} == {path.stem for path in paths}
    assert found[0][1]["rows"] == {"source": "rows", "count": 2, "answered": 2}


def test_no_figures_without_their_samples(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    run = evaluation.entries[0].subject.run
    assert run is not None
    from finetui.engine.evaluation import records

    def fail(path: object, text: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(records, "write_atomically", fail)
    with pytest.raises(records.RunError, match="can't be written"):
        save(evaluation, run, "x")
    assert list((run.path / "evaluations").iterdir()) == []


def test_figures_that_are_none_are_null(evaluation: Evaluation) -> None:
    evaluation.entries[0].figures["loss"] = PerRow((), (), lower_is_better=True)
    figure = as_tree(evaluation)["models"][0]["figures"]["loss"]
    assert (figure["value"], figure["low"]) == (None, None)
    json.dumps(as_tree(evaluation), allow_nan=False)
