"""Counts without a tokenizer, and tokens with their labels."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.prepared import DataSettings
from finetui.engine.data.preview import preview, survey
from finetui.planner.errors import DataError
from finetui.planner.recipe import Recipe

ROW = json.dumps({"instruction": "i" * 40, "output": "o" * 80}) + "\n"


def recipe(*data: dict[str, Any], **options: Any) -> Recipe:
    return Recipe.build({"model": "m", "data": list(data), **options})


def test_survey_counts_rows_and_estimates_tokens(write: Any) -> None:
    found = survey(recipe({"path": write("x.jsonl", ROW * 300)}))
    source = found.sources[0]
    assert (source.format, source.rows, source.rows_exact) == ("alpaca", 300, True)
    assert (found.train_rows, found.eval_rows) == (285, 15)
    assert found.mean_tokens == 40 / 4 + 80 / 4 + 10
    assert found.trained_share == pytest.approx(21 / 40)
    assert found.tokens == 285 * 40
    assert "estimate" in found.basis


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_rows_are_counted_in_every_file_type(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"row {i}"} for i in range(250)]
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        path.write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    source = survey(recipe({"path": str(path)})).sources[0]
    assert (source.rows, source.rows_exact) == (250, True)
    assert survey(recipe({"path": str(path), "limit": 120})).sources[0].rows == 120


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_large_files_are_estimated_quickly(tmp_path: Path, suffix: str) -> None:
    count, text = 30_000, "word " * 200
    lines = {"jsonl": json.dumps({"text": text}), "json": json.dumps({"text": text}) + ",", "csv": text}[suffix]
    head, tail = {"jsonl": ("", ""), "json": ("[\n", '{"text": "x"}]'), "csv": ("text\n", "")}[suffix]
    path = tmp_path / f"x.{suffix}"
    path.write_text(head + f"{lines}\n" * count + tail)
    began = time.process_time()  # of the processor: how long it takes depends on who else is at work
    source = survey(recipe({"path": str(path)})).sources[0]
    assert time.process_time() - began < 1.0
    assert source.rows_exact is False
    assert source.rows == pytest.approx(count, rel=0.05)


def test_a_hub_dataset_is_not_touched() -> None:
    found = survey(recipe({"path": "owner/name"}))
    assert (found.train_rows, found.tokens, found.sources[0].rows) == (None, None, None)


def test_survey_tells_bad_data(write: Any) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:2: the line is not valid JSON"):
        survey(recipe({"path": write("x.jsonl", ROW + "{\n")}))


def test_preview_shows_what_is_trained(write: Any, make_tokenizer: Callable[..., Any]) -> None:
    path = write("x.jsonl", json.dumps({"instruction": "What?", "output": "The answer."}) + "\n" + ROW)
    samples = preview(recipe({"path": path}), make_tokenizer(), 1)
    assert [sample.where for sample in samples] == [f"{path}:1"]
    assert "".join(piece.text for piece in samples[0].pieces if piece.trained) == "The answer.<|im_end|>"
    cut = preview(recipe({"path": path}), make_tokenizer(), 2, DataSettings(16))
    assert all(len(sample.pieces) == 16 and sample.cut > 0 for sample in cut)


def test_no_more_is_trained_than_there_is(write: Any) -> None:
    pairs = write("x.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    judged = write("y.jsonl", '{"prompt": "a", "completion": "b", "label": true}\n' * 3)
    for path, method in ((pairs, "dpo"), (judged, "kto")):
        share = survey(Recipe.build({"model": "m", "data": path, "method": method})).trained_share
        assert 0.0 < (share or 0.0) <= 1.0
