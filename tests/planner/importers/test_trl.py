"""TRL: what each key becomes, for each of its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetui.planner.errors import RecipeError
from finetui.planner.importers import Imported, import_file

SFT = """\
model_name_or_path: Qwen/Qwen3-8B
dtype: bfloat16
use_peft: true
load_in_4bit: true
lora_r: 32
lora_target_modules: all-linear
dataset_name: org/chats
dataset_config: en
dataset_train_split: train_sft
dataset_test_split: test_sft
max_length: 2048
packing: true
packing_strategy: bfd
assistant_only_loss: true
eval_strategy: steps
eval_steps: 50
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
learning_rate: 2.0e-4
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 2.0e-5}
warmup_steps: 0.1
num_train_epochs: 1
optim: paged_adamw_8bit
max_grad_norm: 0.3
gradient_checkpointing: true
use_liger_kernel: true
logging_steps: 1
save_strategy: steps
save_steps: 200
output_dir: out
report_to: [wandb, tensorboard]
push_to_hub: true
seed: 7
"""


def imported(tmp_path: Path, text: str, **more: Any) -> Imported:
    file = tmp_path / "sft.yaml"
    file.write_text(text, encoding="utf-8")
    return import_file(file, **more)


def plain(tmp_path: Path, more: str, **flags: Any) -> Imported:
    return imported(tmp_path, "model_name_or_path: Qwen/Qwen3-8B\ndataset_name: org/rows\n" + more, **flags)


def test_a_whole_file(tmp_path: Path) -> None:
    found = imported(tmp_path, SFT)
    assert found.kind == "trl"
    assert found.recipe.to_dict() == {
        "model": "Qwen/Qwen3-8B",
        "tuning": {"type": "qlora", "rank": 32, "alpha": 32.0, "dropout": 0.05},
        "data": [
            {"path": "org/chats", "subset": "en", "hub_split": "train_sft"},
            {"path": "org/chats", "subset": "en", "hub_split": "test_sft", "split": "eval"},
        ],
        "sequence_length": 2048,
        "batch_size": 8,
        "packing": True,
        "seed": 7,
        "optimizer": {
            "name": "paged-adamw-8bit", "learning_rate": 2e-4, "min_rate": 0.1, "warmup_ratio": 0.1,
            "max_grad_norm": 0.3,
        },
        "evaluation": {"every": 50},
        "checkpoint": {"every": 200},
    }  # fmt: skip
    assert found.counts["unknown"] == 0
    assert {fate.key for fate in found.fates if fate.outcome == "not carried"} == {"report_to", "push_to_hub"}


def test_what_the_tool_does_where_the_file_is_silent(tmp_path: Path) -> None:
    assert plain(tmp_path, "", method="dpo").recipe.to_dict() == {
        "model": "Qwen/Qwen3-8B",
        "method": "dpo",
        "tuning": {"type": "full"},
        "data": [{"path": "org/rows"}],
        "sequence_length": 1024,
        "batch_size": 8,
        "epochs": 3.0,
        "optimizer": {"learning_rate": 1e-6, "schedule": "linear", "warmup_ratio": 0.0},
        "evaluation": {"holdout": 0.0},
    }


@pytest.mark.parametrize(
    ("more", "method", "section", "expected"),
    [
        ("beta: 0.2\nloss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]\n", "dpo", "preference",
         {"beta": 0.2, "loss": {"sigmoid": 1.0, "sft": 0.5}}),
        ("ld_alpha: 0.5\nprecompute_ref_log_probs: true\n", "dpo", "preference",
         {"length_desensitization": 0.5, "reference": "precomputed"}),
        ("loss_type: robust\nlabel_smoothing: 0.1\nbeta: 0.1\n", "dpo", "preference",
         {"loss": "robust", "label_smoothing": 0.1}),
        ("desirable_weight: 2\nbeta: 0.2\n", "kto", "preference", {"desirable_weight": 2.0, "beta": 0.2}),
        ("num_generations: 4\nloss_type: dr_grpo\nscale_rewards: batch\ntop_p: 0.9\n", "grpo", "rollout",
         {"num_generations": 4, "loss": "dr_grpo", "scale_rewards": "batch", "top_p": 0.9}),
        ("delta: 2\nbeta: 0.04\nimportance_sampling_level: sequence\nnum_iterations: 2\n", "grpo", "rollout",
         {"delta": 2.0, "beta": 0.04, "importance": "sequence"}),
        ("loss_type: sapo\ndelta: null\nnum_iterations: 2\nsapo_temperature_pos: 1\nsapo_temperature_neg: 2\n",
         "grpo", "rollout", {"loss": "sapo", "num_iterations": 2, "sapo_temperatures": [1.0, 2.0]}),
        ("normalize_advantages: false\n", "rloo", "rollout", {"num_generations": 2}),
        ("center_rewards_coefficient: 0.01\n", "reward", "preference", {}),
    ],
)  # fmt: skip
def test_methods(more: str, method: str, section: str, expected: dict[str, Any], tmp_path: Path) -> None:
    recipe = plain(tmp_path, more).recipe
    given = getattr(recipe, section).model_dump(exclude_unset=True)
    assert recipe.method == method
    assert expected.items() <= given.items()


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ("packing: false\ncompletion_only_loss: false\n", "train_on", "all"),
        ("packing: false\nloss_type: dft\n", "loss", "dft"),
        ("packing: false\nuse_peft: true\nlora_target_modules: [q_proj]\n", "tuning.targets", ["q_proj"]),
        ("packing: false\nuse_peft: true\nuse_dora: true\n", "tuning.use_dora", True),
        ("packing: false\nfp16: true\n", "hardware.precision", "fp16"),
        ("packing: false\ndataset_streaming: true\n", "data.0.streaming", True),
        ("packing: false\nchat_template_path: ./x.jinja\n", "chat_template", "./x.jinja"),
        ("packing: false\nmax_steps: 100\neval_steps: 0.1\n", "evaluation.every", 10),
    ],
)
def test_single_keys(more: str, key: str, value: Any, tmp_path: Path) -> None:
    got: Any = plain(tmp_path, more).recipe.model_dump()
    for part in key.split("."):
        got = got[int(part)] if part.isdigit() else got[part]
    assert got == value


def test_options_without_effect_are_left_out(tmp_path: Path) -> None:
    found = plain(tmp_path, "loss_type: sapo\nepsilon: 0.2\nnum_generations: 4\nadam_beta1: 0.9\noptim: adafactor\n")
    assert found.recipe.rollout.model_dump(exclude_unset=True) == {"loss": "sapo", "num_generations": 4}
    what = {fate.key: (fate.outcome, fate.why) for fate in found.fates}
    assert what["epsilon"] == ("not needed", "rollout.epsilon has no effect on loss sapo")
    assert what["adam_beta1"][0] == "not needed"


def test_training_on_whole_chats_is_spoken_of(tmp_path: Path) -> None:
    told = {fate.to: fate.why for fate in plain(tmp_path, "packing: true\n").fates if fate.outcome == "default"}
    assert "set train_on: all" in told["train_on"]


def test_a_mixture(tmp_path: Path) -> None:
    one, other = "{path: a/b, name: en, split: 'train[:10]', fraction: 0.5}", "{path: json, data_files: c.jsonl}"
    text = f"model_name_or_path: m/n\npacking: true\ntest_split_size: 0.1\ndatasets: [{one}, {other}]\n"
    found = imported(tmp_path, text)
    assert found.recipe.to_dict()["data"] == [
        {"path": "a/b", "subset": "en", "hub_split": "train[:10]", "weight": 0.5},
        {"path": "c.jsonl"},
    ]
    assert found.recipe.evaluation.holdout == 0.1


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("", "--method sft"),
        ("desirable_weight: 1\npacking: true\n", "several commands: desirable_weight is of kto; packing is of sft"),
        ("packing: true\ndatasets: [{split: train}]\n", r"datasets\[0\]\.path: must be the dataset"),
    ],
)
def test_files_that_can_not_be_told(more: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        plain(tmp_path, more)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("packing: true\npacking_strategy: wrapped\n", "packing_strategy"),
        ("packing: true\nassistant_only_loss: false\n", "assistant_only_loss"),
        ("packing: true\nchat_template_path: org/model\n", "chat_template_path"),
        ("packing: true\nuse_peft: true\nload_in_8bit: true\n", "load_in_8bit"),
        ("packing: true\nload_in_4bit: true\n", "load_in_4bit"),
        ("beta: 1\nloss_type: bogus\n", "loss_type"),
        ("num_generations: 8\nreward_funcs: [accuracy_reward]\n", "reward_funcs"),
        ("num_generations: 8\nreward_model_name_or_path: org/rm\n", "reward_model_name_or_path"),
        ("desirable_weight: 1\nsync_ref_model: true\n", "sync_ref_model"),
    ],
)
def test_what_is_lost_is_told(more: str, key: str, tmp_path: Path) -> None:
    fate = next(fate for fate in plain(tmp_path, more).fates if fate.key == key)
    assert fate.outcome == "not carried"
    assert fate.do
