"""What a word of the command line means to an evaluation, and what is said about one that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from finetui.engine.evaluation.subjects import subjects
from finetui.planner.errors import ModelError, RunError


@pytest.mark.parametrize("word", ["./nothere", "/nothere", "~/nothere", "a/b/c"])
def test_a_path_to_nothing_is_no_name_of_a_run(word: str) -> None:
    with pytest.raises(RunError, match="there is no such folder") as caught:
        subjects([word], [], "cpu")
    assert caught.value.where == word
    assert "adapter_config.json" in caught.value.do


def test_a_bare_word_is_the_name_of_a_run() -> None:
    with pytest.raises(RunError, match="there is no run 'nothere'"):
        subjects(["nothere"], [], "cpu")


def test_a_file_is_neither_a_run_nor_a_model(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(RunError, match="this is a file"):
        subjects([str(tmp_path / "rows.jsonl")], [], "cpu")


@pytest.mark.parametrize("text", ["{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": 7}'])
def test_an_adapter_that_names_no_base(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="names no base model"):
        subjects([str(tmp_path)], [], "cpu")


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    for name in ("config.json", "adapter_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").touch()
        (folder / name).write_text(text)
        with pytest.raises(ModelError) as caught:
            subjects([str(folder)], [], "cpu")
        assert str(folder / name) in caught.value.where
