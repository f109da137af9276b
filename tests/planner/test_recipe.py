"""A recipe is strict, and its messages name file, line, field and the way out."""

import os
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
            "r.yaml:2: tuning.type: must be full, freeze, lora, qlora, lora-fp8, adalora, ia3, vera, oft, loha, lokr, "
            "xlora, prompt or prefix (not 'qlroa'). Did you mean 'qlora'?",
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
        ("method: dpo\nloss: dft", "loss: dft weighs single tokens, and method dpo learns from whole answers. Remove"),
        ("loss: eaft\nhardware: {kernels: 'off'}", "off takes away. Set hardware.kernels: auto, or loss: dft."),
        ("loss: dtf", "loss: must be nll, dft or eaft (not 'dtf'). Did you mean 'dft'?"),
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


@pytest.mark.parametrize(
    ("tuning", "stands_for"),
    [
        ("dora", {"type": "lora", "use_dora": True}),
        ({"type": "dora", "rank": 8}, {"type": "lora", "use_dora": True, "rank": 8}),
        ("rslora", {"type": "lora", "rank_stabilized": True}),
        ("lora+", {"type": "lora", "lora_plus_ratio": 16.0}),
        ({"type": "lora+", "lora_plus_ratio": 4}, {"type": "lora", "lora_plus_ratio": 4}),
        ("pissa", {"type": "lora", "init": "pissa"}),
        ("olora", {"type": "lora", "init": "olora"}),
        ("eva", {"type": "lora", "init": "eva"}),
        ("loftq", {"type": "qlora", "init": "loftq"}),
        ("qdora", {"type": "qlora", "use_dora": True}),
        ("qoft", {"type": "oft", "quantization": "nf4"}),
        ("vera", {"type": "vera", "rank": 256}),
        ({"type": "vera", "rank": 16}, {"type": "vera", "rank": 16}),
    ],
)
def test_names_of_the_literature_are_a_type_with_a_key(tuning: object, stands_for: dict) -> None:
    recipe = Recipe.build({"model": "m", "tuning": tuning})
    assert recipe == Recipe.build({"model": "m", "tuning": stands_for})
    assert Recipe.build(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"tuning": {"type": "full", "rank": 16}}, "rank has no effect when type is full"),
        ({"tuning": {"type": "ia3", "alpha": 8, "use_dora": True}}, "alpha, use_dora have no effect when type is ia3"),
        ({"tuning": {"type": "loha", "dropout": 0.1}}, "dropout has no effect"),
        ({"tuning": {"type": "lora", "block_size": 8}}, "block_size has no effect"),
        ({"tuning": {"type": "dora", "use_dora": False}}, "type dora is use_dora: True"),
        ({"tuning": "freeze"}, "freeze trains nothing so far"),
        ({"tuning": {"type": "qlora", "init": "pissa"}}, "which 4-bit ones don't allow"),
        ({"tuning": {"type": "lora", "init": "loftq"}}, "makes up for what NF4 loses"),
        ({"tuning": {"type": "lokr", "quantization": "nf4"}}, "lokr can't be put on NF4 weights"),
        ({"tuning": {"type": "vera", "quantization": "fp8"}}, "vera can't be put on fp8 weights"),
        ({"tuning": {"type": "lora", "quantization": "fp8"}}, "called lora-fp8"),
        ({"tuning": {"type": "adalora", "rank": 16, "initial_rank": 8}}, "initial_rank must be above rank"),
        ({"tuning": {"type": "lora", "dropout": 0.1, "target_parameters": ["a"]}}, "dropout can't be used"),
        ({"tuning": {"type": "lora", "new_tokens": ["a", "a"]}}, "an empty or a repeated name"),
        ({"tuning": {"type": "pissa", "start_from": "x"}}, "no effect on an adapter that goes on"),
        ({"tuning": "prompt", "packing": True}, "packing can't be used with prompt tuning"),
        ({"tuning": "prefix", "hardware": {"checkpointing": "full"}}, "prefix tuning feeds layers through a cache"),
        ({"tuning": "lora", "optimizer": {"name": "galore"}}, "galore keeps states of whole weights"),
        ({"tuning": "ia3", "optimizer": {"name": "muon"}}, "muon updates matrices"),
        ({"method": "dpo", "tuning": "pissa"}, "weights below it are no reference"),
        ({"method": "dpo", "tuning": "eva"}, "eva looks at rows of sft"),
        ({"optimizer": {"name": "sgd", "betas": [0.9, 0.9]}}, "betas has no effect on sgd"),
        ({"optimizer": {"decay_ratio": 0.5}}, "decay_ratio has no effect on schedule cosine"),
        ({"optimizer": {"name": "schedule-free", "schedule": "linear"}}, "schedule-free has no schedule"),
        ({"optimizer": {"schedule": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.6}}, "more than all steps"),
    ],
)
def test_a_key_without_effect_or_sense_is_an_error(recipe: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.build({"model": "m", **recipe})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("epochs=.inf", "epochs: must be a number"),
        ("epochs=.nan", "epochs: must be a number"),
        ("epochs=1e300", "epochs must be at most"),
        ("max_steps=1000000000000000000000", "max_steps must be at most"),
        ("batch_size=1000000000000000", "batch_size must be at most"),
        ("sequence_length=1000000000000", "sequence_length is above"),
        ("seed=100000000000000000000000000000", r"seed is 100000000000… \(30 digits\), larger than any"),
        ("seed=4294967296", r"seed is above 2\*\*32 - 1"),
        ("hardware.gpus=100000000", "hardware.gpus must be at most"),
        ("hardware.gpus=[0, 100000000]", "hardware.gpus"),
        ("optimizer.learning_rate=.nan", "learning_rate: must be a number"),
        ("optimizer.learning_rate=1000", "learning_rate is above 100"),
        ("tuning.alpha=1e300", "alpha is 1e\\+300, larger than any"),
        ("limits.hours=1e300", "hours is 1e\\+300"),
        ("checkpoint.every=100000000000000000000", "every is 100000000000"),
    ],
)
def test_numbers_that_no_run_can_come_to(change: str, told: str) -> None:
    recipe = Recipe.build({"model": "m"})
    with pytest.raises(RecipeError, match=told):
        recipe.with_overrides([change])


def test_a_name_that_is_not_utf_8_is_refused_in_words(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"by\xfftes")
    folder.mkdir()
    (folder / "rows.jsonl").touch()
    (folder / "recipe.yaml").write_text("model: Qwen/Qwen3-8B\ndata: rows.jsonl\n")
    with pytest.raises(RecipeError, match=r"data\S* holds a name that is not UTF-8") as refused:
        Recipe.load(folder / "recipe.yaml")
    assert refused.value.do.startswith("Rename")
