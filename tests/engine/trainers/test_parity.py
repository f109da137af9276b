"""Ten steps of every method through finetui and through plain TRL: the same model, rows and seed, the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import torch
from datasets import Dataset

from finetui.engine.run import Run
from finetui.engine.trainers import cpu_head
from finetui.engine.trainers.order import Order, RolloutOrder
from finetui.engine.worker import attempt

from .conftest import events, judged, losses, pairs, write_rows

pytestmark = pytest.mark.skipif(
    cpu_head.needed(torch.device("cpu")), reason="this TRL's own trainers can't train on the CPU"
)
STEPS, MICRO, RATE = 10, 4, 1e-2
MakeRun = Callable[..., Run]


def plain_trl(
    method: str, tuning: str, folder: str, rows: list[dict[str, Any]], output: Path, **options: Any
) -> list[float]:
    """The losses of TRL's own trainer over rows that it tokenises itself, in the order of a run."""
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainers: dict[str, tuple[Any, Any]] = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "ipo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
        "cpo": (CPOTrainer, CPOConfig),
        "simpo": (CPOTrainer, CPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }
    kind, config = trainers[method]
    if method == "reward":
        torch.manual_seed(0)
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    order = Order(rows=len(rows), steps=STEPS, micro_batch=MICRO, accumulation=1, seed=0)
    dataset = Dataset.from_list([rows[i] for batch in order for i in batch])
    args = config(
        output_dir=str(output), per_device_train_batch_size=MICRO, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="linear", warmup_steps=0, optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
        seed=0, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=128,
        **options,
    )  # fmt: skip
    adapters = None
    if tuning == "lora":
        task = "SEQ_CLS" if method == "reward" else "CAUSAL_LM"
        adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = kind(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=adapters)
    told: list[float] = []
    step = trainer.training_step

    def listened(*arguments: Any, **more: Any) -> torch.Tensor:
        loss: torch.Tensor = step(*arguments, **more)
        told.append(float(loss))
        return loss

    trainer.training_step = listened
    trainer.train()
    return told


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("dpo", "lora", {}, {}),
    ("dpo", "full", {}, {}),
    ("dpo", "lora", {"loss": "sigmoid_norm", "beta": 0.5}, {"loss_type": "sigmoid_norm", "beta": 0.5}),
    ("dpo", "lora", {"loss": "robust", "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}),
    (
        "dpo",
        "lora",
        {"loss": {"sigmoid": 0.8, "sft": 0.5}, "reference": "precomputed"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5]},
    ),
    ("dpo", "lora", {"length_desensitization": 0.5}, {"ld_alpha": 0.5}),
    ("ipo", "lora", {}, {"loss_type": "ipo"}),
    ("kto", "lora", {}, {}),
    ("kto", "full", {"undesirable_weight": 2.0}, {"undesirable_weight": 2.0}),
    ("kto", "lora", {"loss": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
    ("orpo", "lora", {}, {}),
    ("orpo", "full", {"beta": 0.5}, {"beta": 0.5}),
    ("cpo", "lora", {}, {}),
    ("cpo", "lora", {"loss": "hinge", "nll_weight": 0.3}, {"loss_type": "hinge", "cpo_alpha": 0.3}),
    ("cpo", "lora", {"loss": "ipo"}, {"loss_type": "ipo"}),
    ("simpo", "lora", {}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    ("simpo", "full", {"label_smoothing": 0.1, "nll_weight": 0.5, "beta": 2.5, "margin": 0.5},
     {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.5, "cpo_alpha": 0.5, "label_smoothing": 0.1}),
    ("reward", "lora", {}, {}),
    ("reward", "full", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "tuning", "preference", "options"), CASES)
def test_ten_steps_are_those_of_plain_trl(
    method_run: MakeRun, tmp_path: Path, method: str, tuning: str, preference: dict[str, Any], options: dict[str, Any]
) -> None:
    rows = judged() if method == "kto" else pairs()
    if method in ("orpo", "cpo", "simpo"):
        # TRL's experimental trainers put the beginning token before every prompt, whatever the tokenizer does.
        rows = [{**row, "prompt": f"<s>{row['prompt']}"} for row in rows]
    recipe = {"preference": preference} if preference else {}
    run = method_run(method, tuning, recipe, rows=rows, steps=STEPS, learning_rate=RATE)
    assert attempt(run) == 0, run.events_path.read_text()
    theirs = plain_trl(method, tuning, run.recipe.model, rows, tmp_path / "trl", **options)
    assert losses(run) == pytest.approx(theirs, rel=2e-5, abs=2e-6)
    assert len(theirs) == STEPS


@pytest.mark.parametrize(
    ("method", "tuning", "loss"),
    [("sft", "lora", "nll"), ("sft", "full", "nll"), ("pretrain", "full", "nll"), ("sft", "lora", "dft")],
)
def test_ten_steps_of_supervised_training_are_those_of_plain_trl(
    method_run: MakeRun, tmp_path: Path, method: str, tuning: str, loss: str
) -> None:
    """Two micro-batches of unequal length make a step, so that the mean over its tokens is no mean of means."""
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]
    if method == "pretrain":
        asked = [{"text": row["prompt"] + row["completion"]} for row in asked]
    run = method_run(
        method, tuning, {"loss": loss}, rows=asked, steps=STEPS, accumulation=2, learning_rate=RATE,
        train_on="all" if method == "pretrain" else "answers",
    )  # fmt: skip
    assert attempt(run) == 0, run.events_path.read_text()

    order = Order(rows=len(asked), steps=STEPS, micro_batch=MICRO, accumulation=2, seed=0)
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=MICRO, gradient_accumulation_steps=2,
        max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=0, optim="adamw_torch_fused",
        weight_decay=0.0, max_grad_norm=1.0, seed=0, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_strategy="steps", logging_steps=1, disable_tqdm=True, gradient_checkpointing=False,
        train_sampling_strategy="sequential", max_length=128, loss_type=loss,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list([asked[i] for batch in order for i in batch]),
        processing_class=AutoTokenizer.from_pretrained(run.recipe.model),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if tuning == "lora"
        else None,
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == STEPS
    assert losses(run) == pytest.approx(theirs, rel=2e-5, abs=2e-6)


def test_weights_act_on_training_and_not_on_held_out_loss(method_run: MakeRun) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]
    runs = {}
    for loss in ("nll", "dft", "eaft"):
        recipe = {"loss": loss, "evaluation": {"holdout": 0.2, "every": 100}}
        runs[loss] = method_run("sft", "lora", recipe, rows=rows, steps=2, learning_rate=RATE)
        assert attempt(runs[loss]) == 0, runs[loss].events_path.read_text()
    before = {events(run, "eval")[0]["loss"] for run in runs.values()}
    after = {events(run, "eval")[-1]["loss"] for run in runs.values()}
    assert (len(before), len(after)) == (1, 3)
    # With random weights all of 320 words are about as likely: dft weighs by 1/320, and 20 of them are undecided.
    first = {loss: losses(run)[0] for loss, run in runs.items()}
    assert first["dft"] == pytest.approx(first["nll"] / 320, rel=0.5)
    assert 0.95 * first["nll"] < first["eaft"] < first["nll"]


@pytest.mark.parametrize(
    ("method", "tuning", "rollout", "options"),
    [
        ("grpo", "lora", {}, {}),
        ("grpo", "full", {"beta": 0.1, "loss": "grpo", "scale_rewards": "none"},
         {"beta": 0.1, "loss_type": "grpo", "scale_rewards": "none"}),
        ("grpo", "full", {"num_iterations": 2, "epsilon": 0.05}, {"num_iterations": 2, "epsilon": 0.05}),
        ("grpo", "full", {"num_iterations": 2, "epsilon": 0.0003, "epsilon_high": 0.004, "importance": "sequence"},
         {"num_iterations": 2, "epsilon": 0.0003, "epsilon_high": 0.004, "importance_sampling_level": "sequence",
          "loss_type": "grpo"}),
        ("rloo", "lora", {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2},
         {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "beta": 0.05}),
        ("rloo", "lora", {"beta": 0.1}, {"beta": 0.1}),
    ],
)  # fmt: skip
def test_ten_steps_of_rollouts_are_those_of_plain_trl(
    training_run: MakeRun, tmp_path: Path, method: str, tuning: str, rollout: dict[str, Any], options: dict[str, Any]
) -> None:
    """The same random numbers, so the same completions, rewards and losses."""
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "mine.py").write_text(
        "def vowels(completions):\n    return [sum(letter in 'aeiou' for letter in text) for text in completions]\n"
    )
    prompts = [{"prompt": f"colour {i}?", "answer": "red"} for i in range(8)]
    path = write_rows(tmp_path / "prompts.jsonl", prompts)
    recipe = {
        "method": method, "data": str(path), "evaluation": {"holdout": 0.0, "every": 100},
        "rewards": [f"{tmp_path}/mine.py:vowels"], "checkpoint": {"every": 100},
        "rollout": {"max_completion_length": 6, "num_generations": 4, **rollout},
    }  # fmt: skip
    run = training_run(
        "llama", tuning, recipe, method=method, micro_batch=8, accumulation=1, steps=STEPS, learning_rate=1e-3
    )
    assert attempt(run) == 0, run.events_path.read_text()

    folder = run.recipe.model
    kind, config = (trl.GRPOTrainer, trl.GRPOConfig) if method == "grpo" else (trl.RLOOTrainer, trl.RLOOConfig)
    iterations = rollout.get("num_iterations", 1)
    order = RolloutOrder(8, STEPS, 8, 1, seed=0, generations=4, iterations=iterations)
    asked = [prompts[i] for number, batch in enumerate(order) if number % iterations == 0 for i in batch[::4]]
    args = config(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, max_steps=STEPS, learning_rate=1e-3,
        lr_scheduler_type="linear", warmup_steps=0, optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
        seed=0, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_strategy="steps",
        logging_steps=1, disable_tqdm=True, gradient_checkpointing=False, shuffle_dataset=False, num_generations=4,
        max_completion_length=6, **options,
    )  # fmt: skip
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

    trainer: Any = kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=vowels,
        args=args,
        train_dataset=Dataset.from_list(asked),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapters if tuning == "lora" else None,
    )
    torch.manual_seed(0)
    trainer.train()
    told = [entry for entry in trainer.state.log_history if "loss" in entry]
    ours = [event["values"] for event in events(run, "metrics")]
    rewards = [values["reward"] for values in ours if "reward" in values]
    assert rewards == pytest.approx([entry["reward"] for entry in told if "reward" in entry], rel=1e-5)
    assert losses(run) == pytest.approx([entry["loss"] for entry in told], rel=1e-4, abs=1e-5)
    entropies = [values["entropy"] for values in ours]
    assert entropies == pytest.approx([entry["entropy"] for entry in told], rel=1e-5)
