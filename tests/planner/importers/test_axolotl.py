"""Axolotl: what each key becomes, and what they mean together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetui.planner.errors import RecipeError
from finetui.planner.importers import Imported, import_file
from finetui.planner.importers.axolotl_keys import IDLE, LOST

QLORA = """\
base_model: Qwen/Qwen3-8B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
    split: train[:1%]
  - path: org/chats
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: who, content: said}
    roles: {user: [customer, human], assistant: [agent]}
    roles_to_train: [assistant]
    train_on_eos: turn
chat_template: chatml
train_on_inputs: false
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 2e-4
warmup_steps: 10
max_steps: 100
weight_decay: 0.01
bf16: auto
gradient_checkpointing: true
flash_attention: true
deepspeed: deepspeed_configs/zero2.json
plugins: [axolotl.integrations.liger.LigerPlugin]
liger_rope: true
special_tokens: {pad_token: <|endoftext|>}
wandb_project: mine
wandb_entity:
hub_model_id: me/model
save_steps: 50
save_total_limit: 3
evals_per_epoch: 4
early_stopping_patience: 2
neftune_noise_alpha: 5
"""


def imported(tmp_path: Path, text: str, **more: Any) -> Imported:
    file = tmp_path / "axolotl.yml"
    file.write_text(text, encoding="utf-8")
    return import_file(file, **more)


def became(found: Imported) -> dict[str, tuple[str, str]]:
    return {fate.key: (fate.outcome, fate.to) for fate in found.fates if fate.key}


def plain(tmp_path: Path, more: str) -> Imported:
    return imported(tmp_path, "base_model: Qwen/Qwen3-8B\nmicro_batch_size: 1\nlearning_rate: 1e-5\n" + more)


def test_a_whole_file(tmp_path: Path) -> None:
    found = imported(tmp_path, QLORA, gpus=2)
    assert found.kind == "axolotl"
    assert found.recipe.to_dict() == {
        "model": "Qwen/Qwen3-8B",
        "tuning": {"type": "qlora", "rank": 32, "alpha": 16.0, "dropout": 0.05},
        "data": [
            {"path": "mhenrichsen/alpaca_2k_test", "format": "alpaca", "hub_split": "train[:1%]", "too_long": "drop"},
            {
                "path": "org/chats", "format": "messages", "too_long": "drop",
                "columns": {"messages": "turns", "role": "who", "content": "said"},
                "roles": {"customer": "user", "agent": "assistant"},
            },
        ],
        "sequence_length": 4096,
        "batch_size": 16,
        "packing": True,
        "chat_template": "chatml",
        "epochs": 3.0,
        "max_steps": 100,
        "neftune_alpha": 5.0,
        "optimizer": {
            "name": "adamw-8bit", "learning_rate": 2e-4, "warmup_ratio": 0.1, "weight_decay": 0.01, "min_rate": 0.1
        },
        "evaluation": {"holdout": 0.05, "patience": 2},
        "checkpoint": {"every": 50, "keep": 3},
    }  # fmt: skip
    what = became(found)
    assert found.counts["unknown"] == 0
    assert what["micro_batch_size"] == what["gradient_accumulation_steps"] == ("carried", "batch_size")
    assert what["adapter"] == what["load_in_4bit"] == ("carried", "tuning.type")
    for key in ("flash_attention", "liger_rope", "plugins", "deepspeed", "bf16", "gradient_checkpointing",
                "special_tokens.pad_token", "wandb_entity", "load_in_8bit", "datasets[1].roles_to_train"):  # fmt: skip
        assert what[key] == ("not needed", ""), key
    for key in ("wandb_project", "hub_model_id", "evals_per_epoch"):
        assert what[key][0] == "not carried", key
    lost = {fate.key: fate for fate in found.fates if fate.outcome == "not carried"}
    assert lost["hub_model_id"].do.endswith("hf upload")
    assert lost["wandb_project"].line == QLORA[: QLORA.index("wandb_project")].count("\n") + 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("rl: dpo\nrl_beta: 0.2\ndpo_loss_type: [hinge]\n", {"loss": "hinge", "beta": 0.2}),
        ("rl: dpo\nrpo_alpha: 0.5\n", {"loss": {"sigmoid": 1.0, "sft": 0.5}}),
        (
            "rl: dpo\ndpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1, 0.1]\n",
            {"loss": {"sigmoid": 1.0, "sft": 0.1}},
        ),
        ("rl: ipo\ndpo_beta: 0.3\n", {"beta": 0.3}),
        ("rl: kto\nkto_desirable_weight: 0.2\n", {"desirable_weight": 0.2}),
        ("rl: orpo\norpo_alpha: 0.3\n", {"beta": 0.3}),
        ("rl: simpo\nsimpo_gamma: 0.7\n", {"beta": 0.1, "margin": 0.7, "nll_weight": 1.0}),
    ],
)
def test_preferences(more: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found = plain(tmp_path, more + "datasets: [{path: a/b, type: chatml.intel}]\n")
    assert found.recipe.method == more.split()[1]
    assert found.recipe.preference.model_dump(exclude_unset=True) == expected
    assert found.recipe.data[0].format == ("unpaired-preference" if "kto" in more else "preference")
    assert found.recipe.chat_template == "chatml"


def test_grpo_and_its_rewards(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    text = """\
rl: grpo
trl: {num_generations: 4, max_completion_length: 64, beta: 0.001, use_vllm: true, vllm_server_host: gpu2,
      reward_funcs: [mine.score, x], reward_weights: [2, 1], scale_rewards: false, sync_ref_model: true}
"""
    found = imported(tmp_path, f"base_model: Qwen/Qwen3-8B\nmicro_batch_size: 2\n{text}", gpus=2)
    assert found.recipe.rollout.model_dump(exclude_unset=True) == {
        "num_generations": 4, "max_completion_length": 64, "beta": 0.001, "scale_rewards": "none", "engine": "vllm",
        "server": "http://gpu2:8000",
    }  # fmt: skip
    assert [(reward.function, reward.weight) for reward in found.recipe.rewards] == [(f"{tmp_path}/mine.py:score", 2.0)]
    assert became(found)["trl.reward_funcs"] == ("not carried", "rewards")
    assert became(found)["trl.sync_ref_model"][0] == "not carried"
    with pytest.raises(RecipeError, match=r"2 answers per step are no multiple of the 4 .* --gpus N"):
        imported(tmp_path, f"base_model: Qwen/Qwen3-8B\nmicro_batch_size: 2\n{text}")


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ("adapter: lora\nlora_target_modules: [q_proj, v_proj]\n", "tuning.targets", ["q_proj", "v_proj"]),
        ("adapter: lora\nload_in_4bit: true\n", "tuning.type", "qlora"),
        ("adapter: lora\npeft_use_dora: true\n", "tuning.use_dora", True),
        ("adapter: lora\npeft_init_lora_weights: pissa_niter_16\n", "tuning.init", "pissa"),
        ("adapter: qlora\npeft: {loftq_config: {loftq_bits: 4}}\n", "tuning.init", "loftq"),
        ("adapter: lora\nloraplus_lr_ratio: 16\n", "tuning.lora_plus_ratio", 16.0),
        ("adapter: lora\nlora_modules_to_save: [embed_tokens]\n", "tuning.modules_to_save", ["embed_tokens"]),
        ("adapter: lora\ntokens: [<a>, <b>]\n", "tuning.new_tokens", ["<a>", "<b>"]),
        ("", "tuning.type", "full"),
        ("train_on_inputs: true\n", "train_on", "all"),
        ("use_eaft: true\n", "loss", "eaft"),
        ("fp16: true\n", "hardware.precision", "fp16"),
        ("lr_scheduler: constant_with_warmup\nwarmup_ratio: 0.2\n", "optimizer.warmup_ratio", 0.2),
        ("lr_scheduler: constant\nwarmup_ratio: 0.2\n", "optimizer.warmup_ratio", 0.0),
        ("warmup_steps: 0.1\n", "optimizer.warmup_ratio", 0.1),
        ("optimizer: paged_adamw_32bit\n", "optimizer.name", "paged-adamw"),
        ("optimizer: came_pytorch\nadam_beta1: 0.8\n", "optimizer.betas", [0.8, 0.999]),
        ("optimizer: schedule_free_adamw\nlr_scheduler: cosine\n", "optimizer.schedule", "constant"),
        ("batch_size: 8\n", "batch_size", 8),
        ("test_datasets: [{path: a/b, split: test}]\n", "data.1.split", "eval"),
        ("excess_length_strategy: truncate\n", "data.0.too_long", "cut"),
        ("seed: 7\n", "seed", 7),
    ],
)
def test_single_keys(more: str, key: str, value: Any, tmp_path: Path) -> None:
    got: Any = plain(tmp_path, "datasets: [{path: org/rows, type: alpaca}]\n" + more).recipe.model_dump()
    for part in key.split("."):
        got = got[int(part)] if part.isdigit() else got[part]
    assert got == value


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("lora_target_modules: 'model.layers.[0-9]+.mlp'\nadapter: lora\n", "lora_target_modules"),
        ("load_in_8bit: true\nadapter: lora\n", "load_in_8bit"),
        ("load_in_4bit: true\n", "load_in_4bit"),
        ("peft_init_lora_weights: pissa\nadapter: qlora\n", "peft_init_lora_weights"),
        ("optimizer: galore_adamw\nadapter: lora\n", "optimizer"),
        ("optimizer: sinkgd\n", "optimizer"),
        ("lr_scheduler: rex\n", "lr_scheduler"),
        ("val_set_size: 200\n", "val_set_size"),
        ("early_stopping_patience: 3\n", "early_stopping_patience"),
        ("warmup_steps: 10\n", "warmup_steps"),
        ("rl: dpo\ndpo_loss_type: [wpo]\n", "dpo_loss_type"),
        ("plugins: [mine.Plugin]\n", "plugins"),
        ("chat_template: mistral_v7_tekken\n", "chat_template"),
        ("chat_template: jinja\nchat_template_jinja: '{{ messages }}'\n", "chat_template"),
        ("shuffle_merged_datasets: false\n", "shuffle_merged_datasets"),
        ("unfrozen_parameters: [lm_head]\n", "unfrozen_parameters"),
    ],
)
def test_what_is_lost_is_told(more: str, key: str, tmp_path: Path) -> None:
    found = plain(tmp_path, more)
    fate = next(fate for fate in found.fates if fate.key == key)
    assert fate.outcome == "not carried"
    assert fate.why
    assert fate.do


def test_plain_text_is_pretraining(tmp_path: Path) -> None:
    found = plain(tmp_path, "pretraining_dataset: [{path: allenai/c4, name: en, type: pretrain}]\nmax_steps: 10\n")
    assert found.recipe.method == "pretrain"
    source = found.recipe.data[0]
    assert (source.subset, source.format, source.streaming, source.too_long) == ("en", "text", True, "cut")
    books = plain(tmp_path, "datasets: [{path: ./books.jsonl, type: completion, field: chapter}]\n").recipe
    assert (books.method, books.data[0].columns) == ("pretrain", {"text": "chapter"})


def test_a_type_of_ones_own(tmp_path: Path) -> None:
    found = plain(
        tmp_path, "datasets: [{path: a/b, type: {field_instruction: q, field_output: a, format: 'Q: {instruction}'}}]\n"
    )
    assert found.recipe.data[0].columns == {"instruction": "q", "output": "a"}
    assert became(found)["datasets[0].type.format"][0] == "not carried"


def test_files_that_are_here_are_found(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    found = plain(tmp_path, "datasets: [{path: rows.jsonl, type: alpaca}, {path: not_here.jsonl, type: alpaca}]\n")
    assert [source.path for source in found.recipe.data] == [str(tmp_path / "rows.jsonl"), "not_here.jsonl"]


@pytest.mark.parametrize("key", ["rl: ebft", "process_reward_model: true", "diffusion: {eps: 0.1}", "adapter: mora"])
def test_methods_that_there_are_not(key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"axolotl.yml:4: {key.partition(':')[0]}: finetui has no"):
        plain(tmp_path, key + "\n")


def test_each_key_of_the_tables_is_settled(tmp_path: Path) -> None:
    found = plain(tmp_path, "".join(f"{key}: 1\n" for key in sorted({*IDLE, *LOST})))
    fates = {fate.key: fate for fate in found.fates}
    assert [key for key in (*IDLE, *LOST) if fates[key].outcome not in ("not needed", "not carried")] == []
    assert [key for key in LOST if fates[key].outcome == "not carried" and not fates[key].do] == []


def test_the_tables_say_one_thing_of_a_key() -> None:
    assert not IDLE.keys() & LOST.keys()
    assert [key for key, told in LOST.items() if "||" not in told] == []


def test_misspelt_keys_are_unknown(tmp_path: Path) -> None:
    found = plain(tmp_path, "gradient_checkpoint: true\nlora_rank_of: 3\n")
    unknown = {fate.key: fate.do for fate in found.fates if fate.outcome == "unknown"}
    assert unknown["gradient_checkpoint"] == "Did you mean gradient_checkpointing?"
    assert "lora_rank_of" in became(found)
