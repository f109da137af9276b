"""LLaMA-Factory: what each key becomes, and dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetui.planner.errors import RecipeError
from finetui.planner.importers import Imported, import_file
from finetui.planner.importers.llamafactory_keys import IDLE, LOST
from finetui.planner.importers.training import IDLE_TRAINING, LOST_TRAINING

SFT = """\
model_name_or_path: Qwen/Qwen3-8B
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
use_rslora: true
quantization_bit: 4
quantization_method: bnb
double_quantization: true
dataset: identity, chats
template: qwen3
cutoff_len: 4096
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: wandb
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 100
neftune_noise_alpha: 5
neat_packing: true
packing: true
flash_attn: fa2
enable_liger_kernel: true
deepspeed: ds_z3.json
resume_from_checkpoint: null
"""
INFO = {
    "identity": {"file_name": "identity.json"},
    "chats": {
        "hf_hub_url": "org/chats", "formatting": "sharegpt", "subset": "en", "split": "train_sft", "num_samples": 50,
        "columns": {"messages": "turns", "system": "rules"},
        "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "asker", "assistant_tag": "helper"},
    },
    "openai": {"file_name": "o.jsonl", "formatting": "openai", "columns": {"messages": "messages"}},
    "pairs": {"hf_hub_url": "org/pairs", "ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}},
    "judged": {"hf_hub_url": "org/judged", "columns": {"prompt": "instruction", "kto_tag": "good"}},
    "texts": {"file_name": "t.jsonl", "columns": {"prompt": "content"}},
    "program": {"script_url": "program.py"},
}  # fmt: skip


def imported(tmp_path: Path, text: str, **more: Any) -> Imported:
    file = tmp_path / "sft.yaml"
    file.write_text(text, encoding="utf-8")
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    return import_file(file, **more)


def plain(tmp_path: Path, more: str) -> Imported:
    stage = "" if "stage" in more else "stage: sft\n"
    return imported(tmp_path, f"model_name_or_path: Qwen/Qwen3-8B\n{stage}{more}")


def test_a_whole_file(tmp_path: Path) -> None:
    found = imported(tmp_path, SFT, gpus=4)
    assert found.kind == "llamafactory"
    assert found.recipe.to_dict() == {
        "model": "Qwen/Qwen3-8B",
        "tuning": {"type": "qlora", "rank": 8, "rank_stabilized": True},
        "data": [
            {"path": str(tmp_path / "data" / "identity.json"), "format": "alpaca", "limit": 1000},
            {
                "path": "org/chats", "format": "sharegpt", "subset": "en", "hub_split": "train_sft", "limit": 50,
                "columns": {"messages": "turns", "system": "rules", "role": "who", "content": "text"},
                "roles": {"asker": "user", "helper": "assistant"},
            },
        ],
        "sequence_length": 4096,
        "batch_size": 32,
        "packing": True,
        "chat_template": "qwen3",
        "epochs": 2.0,
        "neftune_alpha": 5.0,
        "trust_remote_code": True,
        "optimizer": {"learning_rate": 1e-4, "warmup_ratio": 0.1},
        "evaluation": {"every": 100, "holdout": 0.1},
        "checkpoint": {"every": 500},
    }  # fmt: skip
    assert found.counts["unknown"] == 0
    what = {fate.key: fate.outcome for fate in found.fates}
    assert what["report_to"] == "not carried"
    for key in ("flash_attn", "enable_liger_kernel", "deepspeed", "bf16", "resume_from_checkpoint", "output_dir"):
        assert what[key] == "not needed", key


def test_what_the_tool_does_where_the_file_is_silent(tmp_path: Path) -> None:
    found = plain(tmp_path, "dataset: identity\n")
    assert found.recipe.to_dict() == {
        "model": "Qwen/Qwen3-8B",
        "tuning": {"rank": 8},
        "data": [{"path": str(tmp_path / "data" / "identity.json"), "format": "alpaca"}],
        "sequence_length": 2048,
        "batch_size": 8,
        "packing": False,
        "epochs": 3.0,
        "optimizer": {"learning_rate": 5e-5, "schedule": "linear", "warmup_ratio": 0.0},
        "evaluation": {"holdout": 0.0},
    }
    told = {fate.to for fate in found.fates if fate.outcome == "default"}
    assert {"tuning.rank", "epochs", "optimizer.schedule", "optimizer.learning_rate", "batch_size"} <= told


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("openai", {"format": "messages"}),
        ("pairs", {"format": "preference", "columns": {"question": "q", "chosen": "c", "rejected": "r"}}),
        ("judged", {"format": "unpaired-preference", "columns": {"label": "good"}}),
        ("texts", {"format": "text", "columns": {"text": "content"}}),
    ],
)
def test_entries_of_dataset_info(name: str, source: dict[str, Any], tmp_path: Path) -> None:
    (got,) = plain(tmp_path, f"dataset: {name}\n").recipe.to_dict()["data"]
    assert {key: value for key, value in got.items() if key != "path"} == source


def test_names_that_stand_for_nothing_are_lost_and_the_rest_is_kept(tmp_path: Path) -> None:
    found = plain(tmp_path, "dataset: identity,program,nobody\neval_dataset: openai\n")
    (fate,) = (fate for fate in found.fates if fate.key == "dataset")
    assert fate.outcome == "not carried"
    assert fate.why.startswith("program, nobody")
    assert [source.split for source in found.recipe.data] == ["train", "eval"]


def test_without_dataset_info_the_names_are_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = tmp_path / "a.yaml"
    file.write_text("model_name_or_path: m/n\nstage: sft\ndataset_dir: nowhere\ndataset: mine\n")
    found = import_file(file)
    assert found.recipe.data == []
    assert "nowhere/dataset_info.json" in next(fate.why for fate in found.fates if fate.key == "dataset")
    file.write_text("model_name_or_path: m/n\nstage: sft\ndataset_dir: nowhere\ndataset: rows.jsonl\n")
    assert [source.path for source in import_file(file).recipe.data] == [str(tmp_path / "rows.jsonl")]
    file.write_text("model_name_or_path: m/n\nstage: sft\ndataset_dir: ONLINE\ndataset: org/rows\nstreaming: true\n")
    (source,) = import_file(file).recipe.data
    assert (source.path, source.streaming) == ("org/rows", True)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "deep", "long"])
def test_a_dataset_info_that_is_none(text: str, tmp_path: Path) -> None:
    text = {"deep": '{"a": ' + "[" * 100_000, "long": "{" + " " * (9 << 20) + "}"}.get(text, text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(text, encoding="latin-1")
    (tmp_path / "a.yaml").write_text("model_name_or_path: m/n\nstage: sft\ndataset: mine\n")
    with pytest.raises(RecipeError, match=r"dataset_info\.json"):
        import_file(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("more", "method", "preference"),
    [
        ("stage: dpo\npref_beta: 0.2\npref_loss: sigmoid\n", "dpo", {"loss": "sigmoid", "beta": 0.2}),
        ("stage: dpo\npref_ftx: 0.5\n", "dpo", {"loss": {"sigmoid": 1.0, "sft": 0.5}}),
        ("stage: dpo\npref_loss: orpo\npref_beta: 0.3\n", "orpo", {"beta": 0.3}),
        ("stage: dpo\npref_loss: simpo\nsimpo_gamma: 0.7\n", "simpo", {"beta": 0.1, "margin": 0.7}),
        ("stage: dpo\nld_alpha: 0.5\n", "dpo", {"loss": "sigmoid", "length_desensitization": 0.5}),
        ("stage: kto\nkto_chosen_weight: 2\n", "kto", {"desirable_weight": 2.0}),
        ("stage: rm\n", "reward", {}),
        ("stage: pt\n", "pretrain", {}),
    ],
)
def test_stages(more: str, method: str, preference: dict[str, Any], tmp_path: Path) -> None:
    recipe = plain(tmp_path, more).recipe
    assert recipe.method == method
    given = recipe.preference.model_dump(exclude_unset=True)
    assert {"loss": "sigmoid", **given} == {"loss": "sigmoid", **preference}


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ("finetuning_type: full\npure_bf16: true\n", "hardware.precision", "bf16"),
        ("finetuning_type: freeze\nfreeze_trainable_layers: 3\n", "tuning.trained_layers", 3),
        ("finetuning_type: freeze\n", "tuning.trained_layers", 2),
        ("finetuning_type: oft\noft_block_size: 16\nquantization_bit: 4\n", "tuning.quantization", "nf4"),
        ("lora_target: q_proj,v_proj\n", "tuning.targets", ["q_proj", "v_proj"]),
        ("additional_target: embed_tokens,lm_head\n", "tuning.modules_to_save", ["embed_tokens", "lm_head"]),
        ("pissa_init: true\npissa_iter: 16\n", "tuning.init", "pissa"),
        ("loraplus_lr_ratio: 16\n", "tuning.lora_plus_ratio", 16.0),
        ("adapter_name_or_path: saves/x\n", "tuning.start_from", "saves/x"),
        ("add_tokens: <a>,<b>\nresize_vocab: true\n", "tuning.new_tokens", ["<a>", "<b>"]),
        ("mask_history: true\n", "train_on", "last-answer"),
        ("train_on_prompt: true\n", "train_on", "all"),
        ("use_dft_loss: true\n", "loss", "dft"),
        ("use_muon: true\noptim: adamw_torch\n", "optimizer.name", "muon"),
        ("finetuning_type: full\nuse_galore: true\ngalore_rank: 64\n", "optimizer.projection_scale", 2.0),
        ("finetuning_type: full\nuse_apollo: true\napollo_scale_type: tensor\n", "optimizer.name", "apollo-mini"),
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n", "optimizer.min_rate", 0.1),
        ("lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 3}\n", "optimizer.cycles", 3),
        ("save_strategy: best\nval_size: 0.1\n", "evaluation.keep_best", True),
    ],
)
def test_single_keys(more: str, key: str, value: Any, tmp_path: Path) -> None:
    got: Any = plain(tmp_path, more).recipe.model_dump()
    for part in key.split("."):
        got = got[part]
    assert got == value


@pytest.mark.parametrize(
    "more",
    [
        "quantization_bit: 8\n", "quantization_bit: 4\nquantization_method: hqq\n", "val_size: 100\n",
        "finetuning_type: freeze\nfreeze_trainable_layers: -2\n", "use_galore: true\n", "template: vicuna\n",
        "pissa_init: true\nquantization_bit: 4\n", "stage: dpo\npref_loss: kto_pair\n", "warmup_steps: 20\n",
        "adapter_name_or_path: a,b\n", "stage: ppo\nreward_model: org/rm\n", "save_strategy: epoch\n",
        "push_to_hub: true\n", "mixture_of_depths: convert\n", "stage: dpo\ndpo_label_smoothing: 0.1\n",
    ],
)  # fmt: skip
def test_what_is_lost_is_told(more: str, tmp_path: Path) -> None:
    key = more.split("\n")[-2].partition(":")[0] if "quantization_bit: 4" not in more else more.partition(":")[0]
    fate = next(fate for fate in plain(tmp_path, more).fates if fate.key == key)
    assert fate.outcome == "not carried"
    assert fate.do


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model_name_or_path: m/n\ntemplate: qwen\ninfer_backend: vllm\n", "it names no stage and no dataset"),
        ("model_name_or_path: m/n\nstage: sft\ndo_predict: true\n", "does not train"),
        ("model_name_or_path: m/n\nstage: grpo\n", "no stage grpo"),
        ("model_name_or_path: m/n\nstage: sft\nfinetuning_type: llama-adapter\n", "no finetuning_type llama-adapter"),
    ],
)
def test_files_that_do_not_train_here(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        imported(tmp_path, text)


def test_each_key_of_the_tables_is_settled(tmp_path: Path) -> None:
    lists = {"add_tokens", "add_special_tokens"}
    keys = {*IDLE, *LOST, *IDLE_TRAINING, *LOST_TRAINING} - {"do_train", "do_predict"} - lists
    found = plain(tmp_path, "stage: sft\n" + "".join(f"{key}: 1\n" for key in sorted(keys)) + "do_train: true\n")
    fates = {fate.key: fate for fate in found.fates}
    assert [key for key in keys if fates[key].outcome == "unknown"] == []
    assert not IDLE.keys() & LOST.keys()
    assert [told for told in LOST.values() if "||" not in told] == []
