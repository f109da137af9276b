"""torchtune: components, interpolation, and what each key becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetui.planner.errors import RecipeError
from finetui.planner.importers import Imported, import_file
from finetui.planner.importers.torchtune import IDLE, LOST
from finetui.planner.importers.torchtune_models import DATASETS, MODELS

LORA = """\
output_dir: /tmp/torchtune/lora
model_dir: /nowhere/Llama-3.1-8B-Instruct
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: ${model_dir}/original/tokenizer.model
  max_seq_len: 4096
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ${model_dir}
  checkpoint_files: [model.safetensors]
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: True
seed: null
shuffle: True
batch_size: 2
gradient_accumulation_steps: 8
epochs: 2
max_steps_per_epoch: 100
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  weight_decay: 0.05
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 20
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
clip_grad_norm: null
compile: False
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
"""


def imported(tmp_path: Path, text: str, **more: Any) -> Imported:
    file = tmp_path / "8B.yaml"
    file.write_text(text, encoding="utf-8")
    return import_file(file, **more)


def changed(tmp_path: Path, *changes: tuple[str, str], more: str = "") -> Imported:
    text = LORA
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return imported(tmp_path, text + more)


def test_a_whole_file(tmp_path: Path) -> None:
    found = imported(tmp_path, LORA, gpus=2)
    assert found.kind == "torchtune"
    assert found.recipe.to_dict() == {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "tuning": {
            "rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        },
        "data": [{"path": "yahma/alpaca-cleaned", "format": "alpaca"}],
        "sequence_length": 4096,
        "batch_size": 32,
        "packing": True,
        "train_on": "all",
        "epochs": 2.0,
        "max_steps": 200,
        "optimizer": {
            "name": "adamw", "learning_rate": 3e-4, "warmup_ratio": 0.1, "weight_decay": 0.05, "max_grad_norm": 0.0
        },
        "evaluation": {"holdout": 0.0},
    }  # fmt: skip
    assert found.counts["unknown"] == 0
    what = {fate.key: (fate.outcome, fate.to) for fate in found.fates}
    assert what["model._component_"] == ("carried", "model, tuning.type")
    assert what["max_steps_per_epoch"] == ("carried", "max_steps")
    assert what["checkpointer.checkpoint_dir"] == ("not needed", "")
    assert what["enable_activation_checkpointing"] == ("not needed", "")


@pytest.mark.parametrize(
    ("before", "after", "key", "value"),
    [
        ("lora_llama3_1_8b", "qlora_llama3_1_8b", "tuning.type", "qlora"),
        ("lora_dropout: 0.0", "use_dora: true", "tuning.use_dora", True),
        ("lora_dropout: 0.0", "quantize_base: true", "tuning.type", "qlora"),
        ("Llama-3.1-8B-Instruct", "Llama-3.1-8B", "model", "meta-llama/Llama-3.1-8B"),
        ("torch.optim.AdamW", "bitsandbytes.optim.PagedAdamW8bit", "optimizer.name", "paged-adamw-8bit"),
        ("clip_grad_norm: null", "clip_grad_norm: 1.0", "optimizer.max_grad_norm", 1.0),
        ("packed: True", "train_on_input: false", "train_on", "auto"),
        ("alpaca_cleaned_dataset", "text_completion_dataset\n  source: a/b\n  column: page", "method", "pretrain"),
        ("dtype: bf16", "dtype: fp32", "hardware.precision", "fp32"),
        ("device: cuda", "device: cpu", "hardware.device", "cpu"),
        ("seed: null", "seed: 3", "seed", 3),
        ("modules.loss.CEWithChunkedOutputLoss", "rlhf.loss.DPOLoss\n  beta: 0.3", "preference.beta", 0.3),
        ("modules.loss.CEWithChunkedOutputLoss", "rlhf.loss.RSOLoss\n  gamma: 0.3", "preference.loss", "hinge"),
        ("modules.loss.CEWithChunkedOutputLoss", "rlhf.loss.SimPOLoss", "preference.margin", 0.5),
    ],
)
def test_single_keys(before: str, after: str, key: str, value: Any, tmp_path: Path) -> None:
    got: Any = changed(tmp_path, (before, after)).recipe.model_dump()
    for part in key.split("."):
        got = got[part]
    assert got == value


def test_full_fine_tuning_without_a_schedule(tmp_path: Path) -> None:
    start, end = LORA.index("lr_scheduler:"), LORA.index("loss:")
    text = LORA[:start] + LORA[end:]
    start, end = text.index("  lora_attn"), text.index("tokenizer:")
    text = (text[:start] + text[end:]).replace("lora_llama3_1_8b", "llama3_1_8b").replace("  weight_decay: 0.05\n", "")
    recipe = imported(tmp_path, text).recipe
    assert recipe.tuning.type == "full"
    assert (recipe.optimizer.schedule, recipe.optimizer.warmup_ratio) == ("constant", 0.0)
    assert recipe.optimizer.weight_decay == 0.01
    assert recipe.hardware.precision == "bf16"


def test_phi_keeps_its_projections_in_one(tmp_path: Path) -> None:
    found = changed(tmp_path, ("llama3_1.lora_llama3_1_8b", "phi3.lora_phi3_mini"), ("Llama-3.1-8B-Instruct", "phi"))
    assert found.recipe.model == "microsoft/Phi-3-mini-4k-instruct"
    assert found.recipe.tuning.targets == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_weights_that_are_here_are_taken(tmp_path: Path) -> None:
    found = changed(tmp_path, ("/nowhere/Llama-3.1-8B-Instruct", str(tmp_path)))
    assert found.recipe.model == str(tmp_path.resolve())


@pytest.mark.parametrize(
    ("dataset", "source"),
    [
        (
            "chat_dataset\n  source: json\n  data_files: a.jsonl\n  conversation_column: talk\n"
            "  conversation_style: sharegpt\n  split: train",
            {"path": "a.jsonl", "format": "sharegpt", "columns": {"messages": "talk"}},
        ),
        (
            "instruct_dataset\n  source: a/b\n  column_map: {input: q, output: r}\n  split: train[:5%]",
            {"path": "a/b", "format": "question-answer", "columns": {"question": "q", "answer": "r"},
             "hub_split": "train[:5%]"},
        ),
        (
            "wikitext_dataset\n  subset: wikitext-2",
            {"path": "EleutherAI/wikitext_document_level", "format": "text", "columns": {"text": "page"},
             "subset": "wikitext-2"},
        ),
    ],
)  # fmt: skip
def test_datasets(dataset: str, source: dict[str, Any], tmp_path: Path) -> None:
    found = changed(tmp_path, ("alpaca_cleaned_dataset\n  packed: True", dataset))
    assert found.recipe.to_dict()["data"] == [source]
    assert found.recipe.packing is False


def test_a_dataset_of_ones_own_and_a_held_out_one(tmp_path: Path) -> None:
    more = "dataset_val: {_component_: torchtune.datasets.alpaca_dataset, split: 'train[95%:]'}\n"
    more += "run_val_every_n_steps: 9\n"
    found = changed(tmp_path, more=more)
    splits = [(source.split, source.hub_split) for source in found.recipe.data]
    assert splits == [("train", None), ("eval", "train[95%:]")]
    assert found.recipe.evaluation.every == 9
    found = changed(tmp_path, ("torchtune.datasets.alpaca_cleaned_dataset", "mine.rows\n  path: x"), more=more)
    what = {fate.key: fate.outcome for fate in found.fates}
    assert what["dataset._component_"] == what["dataset.path"] == "not carried"
    assert what["dataset_val._component_"] == what["dataset_val.split"] == "not carried"  # for want of the other
    assert found.recipe.data == []


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("apply_lora_to_output: False", "apply_lora_to_output: True", "model.apply_lora_to_output"),
        ("max_steps_per_epoch: 100", "max_steps_per_epoch: null", "lr_scheduler.num_warmup_steps"),
        ("torch.optim.AdamW", "torchao.prototype.low_bit_optim.CPUOffloadOptimizer", "optimizer._component_"),
        ("  max_seq_len: 4096", "  prompt_template: torchtune.data.ChatMLTemplate", "tokenizer.prompt_template"),
        ("resume_from_checkpoint: False", "resume_from_checkpoint: True", "resume_from_checkpoint"),
        ("lora_dropout: 0.0", "encoder_trainable: lora", "model.encoder_trainable"),
    ],
)
def test_what_is_lost_is_told(before: str, after: str, key: str, tmp_path: Path) -> None:
    fate = next(fate for fate in changed(tmp_path, (before, after)).fates if fate.key == key)
    assert fate.outcome == "not carried"
    assert fate.do


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ("dataset:", "dataset_: ", "does not train: it has no dataset"),
        ("output_dir: /tmp/torchtune/lora", "teacher_model: {_component_: a.b}", "learns from a teacher"),
        ("CEWithChunkedOutputLoss", "PPOLoss", "trains with PPOLoss"),
        ("model_dir: /nowhere/Llama-3.1-8B-Instruct", "model_dir: ${model_dir}", "stands for itself"),
    ],
)
def test_files_that_do_not_train_here(before: str, after: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        imported(tmp_path, LORA.replace(before, after, 1))


def test_a_list_of_datasets(tmp_path: Path) -> None:
    listed = "dataset:\n  - {_component_: torchtune.datasets.alpaca_dataset, packed: true}\n  - {_component_: a.b}\n"
    start, end = LORA.index("dataset:"), LORA.index("seed:")
    found = imported(tmp_path, LORA[:start] + listed + LORA[end:])
    assert [source.path for source in found.recipe.data] == ["tatsu-lab/alpaca"]
    assert (found.recipe.packing, found.recipe.train_on) == (True, "all")


def test_the_tables_are_whole(tmp_path: Path) -> None:
    found = changed(tmp_path, more="".join(f"{key}: 1\n" for key in {*IDLE, *LOST} if f"\n{key}:" not in "\n" + LORA))
    assert found.counts["unknown"] == 0
    assert all("/" in base and "/" in chat for base, chat in MODELS.values())
    assert {kind[1] for kind in DATASETS.values()} <= {"alpaca", "messages", "sharegpt", "question-answer", "text",
                                                       "preference"}  # fmt: skip
