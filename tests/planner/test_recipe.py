"""A recipe is strict, and its messages name file, line, field and the way out."""

from pathlib import Path

import pytest

from finetui.planner.errors import RecipeError
from finetui.planner.recipe import Recipe


def test_shorthands_and_defaults() -> None:
    recipe = Recipe.parse("model: org/name\ntuning: qlora\ndata: rows.jsonl\n")
    assert recipe.tuning.type == "qlora"
    assert recipe.tuning.rank == 16
    assert [source.path for source in recipe.data] == ["rows.jsonl"]
    assert recipe.sequence_length == "auto"


def test_floats_without_a_dot_are_numbers() -> None:
    # YAML 1.1 reads 2e-4 as text.
    recipe = Recipe.parse("model: m\noptimizer: {learning_rate: 2e-4}")
    assert recipe.optimizer.learning_rate == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\ntunning: lora", "r.yaml:2: tunning: unknown key 'tunning'. Did you mean 'tuning'?"),
        ("model: m\ntuning:\n  type: lora\n  rnk: 8", "r.yaml:4: tuning.rnk: unknown key 'rnk'. Did you mean 'rank'?"),
        (
            "model: m\ntuning: {type: qlroa}",
            "r.yaml:2: tuning.type: must be full, lora or qlora (not 'qlroa'). Did you mean 'qlora'?",
        ),
        ("method: sft", "r.yaml: model is missing. Add 'model: …'."),
        ("model: m\nepochs: many", "r.yaml:2: epochs: must be a number (not 'many')."),
        ("model: m\nbatch_size: 0", "r.yaml:2: batch_size: 0 is out of range: batch_size must be at least 1."),
        (
            "model: m\nhardware: {gpus: two}",
            "r.yaml:2: hardware.gpus: must be auto, a whole number or a list (not 'two').",
        ),
        ("model: m\ndata: 3", "r.yaml:2: data: must be a list of sources (not 3)."),
        ("model: m\ndata:\n- {path: a}\n- {pth: b}", "r.yaml:4: data.1.pth: unknown key 'pth'. Did you mean 'path'?"),
        ("- a\n- b", "r.yaml: a recipe is a mapping of keys to values."),
        ("model: m\ndata: [a", "r.yaml:2: this is not valid YAML"),
    ],
)
def test_a_mistake_names_file_line_and_field(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, source="r.yaml")
    assert str(caught.value).startswith(expected)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tuning: {type: full, quantization: nf4}", "full fine-tuning can't train 4-bit weights. Use type: qlora"),
        ("tuning: {type: full, rank: 8}", "rank has no effect when type is full"),
        ("tuning: {type: lora, quantization: nf4}", "Use type: qlora"),
        ("method: dpo\npacking: true", "packing can't be used with method dpo. Set packing: false."),
        ("method: pretrain\ntrain_on: answers", "Set train_on: all, or method: sft."),
        ("batch_size: 8\nbatch_tokens: 4096", "Keep one of them."),
        ("data: [{path: a, split: eval}]", "Give at least one source to train on."),
        ("hardware: {strategy: ddp, gpus: 1}", "strategy ddp needs more than one GPU"),
        ("optimizer: {learning_rate: 0}", "learning_rate must be above 0"),
    ],
)
def test_impossible_pairs_are_refused_with_the_way_out(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(f"model: m\n{text}", source="r.yaml")
    assert expected in str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("model: m\nepochs: many\nsead: 3", source="r.yaml")
    message = str(caught.value)
    assert "r.yaml:2: epochs" in message
    assert "r.yaml:3: sead" in message


def test_overrides_reach_into_sections_lists_and_shorthands() -> None:
    recipe = Recipe.parse(
        "model: m\ntuning: lora\ndata: a.jsonl",
        overrides=["tuning.rank=8", "data.0.limit=3", "hardware.gpus=[0,1]", "optimizer.learning_rate=1e-4"],
    )
    assert recipe.tuning.rank == 8
    assert recipe.tuning.type == "lora"
    assert recipe.data[0].limit == 3
    assert recipe.hardware.gpus == [0, 1]
    assert recipe.optimizer.learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize("override", ["tuning.rank", "=3", "model.name=3", "data.5.limit=1"])
def test_a_bad_override_is_named(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("model: m\ndata: a.jsonl", overrides=[override])
    assert "--set" in str(caught.value)


def test_relative_paths_start_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text("model: org/name\ndata: [rows.jsonl, ./later.jsonl, org/dataset]\n")
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.model == "org/name"
    assert [source.path for source in recipe.data] == [
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "later.jsonl"),
        "org/dataset",
    ]


def test_a_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = Recipe.parse("model: m\ntuning: {type: qlora, rank: 8}\ndata: a.jsonl\nepochs: 2\nlimits: {hours: 3}")
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe


def test_a_missing_file_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such recipe"):
        Recipe.load(tmp_path / "none.yaml")
