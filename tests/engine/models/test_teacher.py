"""Whether a teacher can be had and shares its student's words, before anything is downloaded or loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from finetui.engine.models.teacher import check_teacher, download_bytes, require_same_words, words_of
from finetui.engine.preflight import checks
from finetui.planner.errors import ModelError, RecipeError
from finetui.planner.recipe import Recipe

Models = Callable[[str], Path]


def recipe(student: Path | str, teacher: Path | str) -> Recipe:
    return Recipe.build({"model": str(student), "method": "distill", "distillation": {"teacher": str(teacher)}})


def copied(model: Path, target: Path, change: Callable[[dict[str, Any]], None], file: str = "tokenizer.json") -> Path:
    shutil.copytree(model, target)
    tree = json.loads((target / file).read_text())
    change(tree)
    (target / file).write_text(json.dumps(tree))
    return target


def test_models_of_one_tokenizer_go_together(model_folder: Models) -> None:
    (found,) = check_teacher(recipe(model_folder("llama"), model_folder("qwen3")))
    assert (found.name, found.status) == ("teacher", "ok")
    assert download_bytes(recipe(model_folder("llama"), model_folder("qwen3"))) == 0
    assert download_bytes(recipe(model_folder("llama"), "Qwen/Qwen3-8B")) == 2 * 8_190_735_360


def test_an_added_token_counts(model_folder: Models, tmp_path: Path) -> None:
    student = model_folder("llama")
    size = len(words_of(student))

    def add(tree: dict[str, Any]) -> None:
        tree["added_tokens"].append({**tree["added_tokens"][0], "id": size, "content": "<think>"})

    other = copied(student, tmp_path / "other", add)
    with pytest.raises(
        RecipeError, match=rf"1 token differs, such as '<think>', number none .* and {size} of"
    ) as error:
        require_same_words(student, other, "other")
    assert error.value.where == "distillation.teacher"
    assert "family" in error.value.do


def test_a_teacher_without_room_for_a_token_is_refused(model_folder: Models, tmp_path: Path) -> None:
    student = model_folder("llama")
    small = copied(student, tmp_path / "small", lambda tree: tree.update(vocab_size=100), "config.json")
    with pytest.raises(RecipeError, match="has 100 words, and its tokenizer more"):
        require_same_words(student, small, "small")


def test_a_damaged_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer can't be read"):
        words_of(tmp_path)


def test_preflight_tells_before_a_run_starts(
    model_folder: Models, tmp_path: Path, make_plan: Callable[..., Any]
) -> None:
    def swap(tree: dict[str, Any]) -> None:
        words = tree["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]

    other = copied(model_folder("llama"), tmp_path / "other", swap)
    asked = recipe(model_folder("llama"), other)
    told = {check.name: check for check in checks(asked, make_plan(method="distill"), tmp_path)}
    assert told["teacher"].status == "fail"
    assert "2 tokens differ" in told["teacher"].detail
    absent = recipe(model_folder("llama"), tmp_path / "nowhere")
    told = {check.name: check for check in checks(absent, make_plan(method="distill"), tmp_path)}
    assert told["teacher"].status == "fail"
