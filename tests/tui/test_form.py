"""The form: every field round-trips, and what makes no sense beside it is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from finetui.planner.errors import RecipeError
from finetui.planner.limits import HardwareRequest
from finetui.planner.optimizer import OptimizerName
from finetui.planner.options import SHORT
from finetui.planner.recipe import PACKABLE_METHODS, RUNNABLE_METHODS, Recipe
from finetui.planner.tuning import TuningType
from finetui.tui.form import CPU, FIELDS, THIS_MACHINE, Tree, disabled, field_of, get, put, recipe_of, step

SPECS = {spec.key: spec for spec in FIELDS}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model", "meta-llama/Llama-3.1-8B"), ("method", "pretrain"), ("tuning.type", "qlora"), ("tuning.rank", "64"),
        ("tuning.alpha", "32"), ("data", "/data/# odd: name.jsonl"), ("sequence_length", "4096"), ("batch_size", "32"),
        ("epochs", "2.5"), ("optimizer.learning_rate", "2e-05"), ("optimizer.name", "adamw-8bit"),
        ("hardware.checkpointing", "full"), ("hardware.gpu", "H100"), ("hardware.gpus", "4"), ("loss", "dft"),
        ("hardware.strategy", "fsdp"), ("hardware.graphs", "false"),
    ],
)  # fmt: skip
def test_what_is_typed_is_what_the_recipe_says(key: str, text: str) -> None:
    tree = put({"model": "a/b"}, key, text)
    assert get(tree, key) == text
    assert get(recipe_of(tree).to_dict(), key) == text


@pytest.mark.parametrize("key", [spec.key for spec in FIELDS if spec.auto])
def test_auto_takes_a_value_back(key: str) -> None:
    value = next(value for value in SPECS[key].steps if value != "auto")
    tree = put({"model": "a/b"}, key, value)
    assert put(tree, key, "auto") == {"model": "a/b"}


def test_the_methods_are_those_that_can_be_run() -> None:
    assert set(SPECS["method"].steps) == RUNNABLE_METHODS


def test_the_optimizers_are_those_that_a_recipe_may_name() -> None:
    assert set(SPECS["optimizer.name"].steps) == set(get_args(OptimizerName))


def choices(model: Any, name: str) -> set[str]:
    """The words that a recipe's key may be."""
    return {word for word in get_args(model.model_fields[name].annotation) if isinstance(word, str)}


def test_losses_and_strategies_are_those_of_a_recipe() -> None:
    assert set(SPECS["loss"].steps) == choices(Recipe, "loss")
    assert set(SPECS["hardware.strategy"].steps) == choices(HardwareRequest, "strategy")
    assert set(SPECS["hardware.checkpointing"].steps) == choices(HardwareRequest, "checkpointing")


@pytest.mark.parametrize("method", SPECS["method"].steps)
def test_a_loss_of_tokens_goes_with_the_method_that_has_it(method: str) -> None:
    tree: Tree = {"model": "a/b", "loss": "dft"}
    changed = put(tree, "method", method)
    weighs = method in PACKABLE_METHODS - {"distill"}  # which has a teacher for that
    if method == "distill":
        changed = put(changed, "distillation.teacher", "c/d")
    assert recipe_of(changed).loss == ("dft" if weighs else "nll")
    assert disabled(changed, "loss") != weighs


def test_a_teacher_goes_with_its_student() -> None:
    student = put(put({"model": "a/b"}, "method", "distill"), "distillation.teacher", "c/d")
    assert recipe_of(student).distillation.teacher == "c/d"
    assert not disabled(student, "distillation.teacher")
    plain = put(student, "method", "sft")
    assert recipe_of(plain).to_dict() == {"model": "a/b"}
    assert disabled(plain, "distillation.teacher")


def test_the_tunings_are_those_that_need_nothing_more_to_be_said() -> None:
    """What asks for a second key (xlora: its adapters) is for the editor."""

    def stands_alone(name: str) -> bool:
        try:
            Recipe.build({"model": "a/b", "tuning": name})
        except RecipeError:
            return False
        return True

    assert set(SPECS["tuning.type"].steps) == {name for name in {*get_args(TuningType), *SHORT} if stands_alone(name)}


def test_full_tuning_has_no_rank() -> None:
    tree = put(put({"model": "a/b"}, "tuning.rank", "64"), "tuning.type", "full")
    assert recipe_of(tree).tuning.type == "full"
    assert "rank" not in tree["tuning"]


@pytest.mark.parametrize(
    ("tuning", "useless"),
    [
        ("full", {"rank", "alpha"}),
        ("qdora", set()),
        ("vera", {"alpha"}),
        ("ia3", {"rank", "alpha"}),
        ("qoft", {"rank", "alpha"}),
    ],
)
def test_a_field_that_a_tuning_has_no_use_for_is_off(tuning: str, useless: set[str]) -> None:
    tree = put({"model": "a/b"}, "tuning.type", tuning)
    assert {key for key in ("rank", "alpha") if disabled(tree, f"tuning.{key}")} == useless


def test_a_path_that_is_there_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert get(put({"model": "a/b"}, "data", "rows.jsonl"), "data") == str(tmp_path / "rows.jsonl")
    assert get(put({"model": "a/b"}, "data", "org/rows"), "data") == "org/rows"
    assert "data" not in put({"model": "a/b"}, "data", "")


def test_held_out_data_stays_when_the_data_changes() -> None:
    tree: Tree = {"model": "a/b", "data": [{"path": "x.jsonl"}, {"path": "e.jsonl", "split": "eval"}]}
    changed = put(tree, "data", "y.jsonl")
    assert [source["path"] for source in changed["data"]] == ["y.jsonl", "e.jsonl"]
    assert tree["data"][0]["path"] == "x.jsonl"


def test_hardware_is_one_of_three() -> None:
    tree = put({"model": "a/b", "hardware": {"gpus": [0, 1]}}, "hardware.gpu", CPU)
    assert recipe_of(tree).hardware.device == "cpu"
    back = put(tree, "hardware.gpu", THIS_MACHINE)
    assert back == {"model": "a/b"}


def test_a_batch_size_takes_the_place_of_batch_tokens() -> None:
    assert recipe_of(put({"model": "a/b", "batch_tokens": 8192}, "batch_size", "8")).batch_size == 8


def test_stepping() -> None:
    length = SPECS["sequence_length"]
    assert step(length, "2048", 1) == "4096"
    assert step(length, "3000", 1) == "4096"
    assert step(length, "3000", -1) == "2048"
    assert step(length, "auto", -1) == "auto"
    assert step(length, "32768", 1) == "32768"
    assert step(SPECS["hardware.gpu"], "gone", 1, ["a", "b"]) == "a"
    assert step(SPECS["model"], "x", 1) == "x"


@pytest.mark.parametrize(
    ("key", "text"),
    [("tuning.rank", "0"), ("tuning.rank", "many"), ("epochs", "-1"), ("optimizer.learning_rate", "fast"),
     ("sequence_length", "3"), ("batch_size", "[1"), ("hardware.gpus", "0")],
)  # fmt: skip
def test_an_error_points_at_its_field(key: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of(put({"model": "a/b"}, key, text))
    assert field_of(caught.value.where) == key or key in str(caught.value)


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "x" * 300])
@pytest.mark.parametrize("key", ["model", "data"])
def test_what_can_not_be_a_path_stays_as_it_is_typed(key: str, text: str) -> None:
    assert text in str(put({"model": "a/b"}, key, text)[key])
