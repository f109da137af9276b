"""Whole training runs beside those of other programs: tokens/s, peak memory, and how long the first step takes.

    python -P tests/bench/engine.py MODEL [--arms finetui unsloth trl-liger trl] [--checkpointing full none]
        [--tuning lora] [--sequence-length 2048] [--micro-batch 4] [--steps 10] [--rounds 1] [--json FILE]

MODEL is a checkpoint folder (``--make llama-8b`` writes one there with random weights of that shape). Each arm is a
process of its own, arms take turns in each round, and programs that are not installed are left out with a word. All
train LoRA pairs of rank 16 on every linear layer with 8-bit AdamW on rows of full length, so that every token counts.
A step's time runs from the trainer's ``on_step_begin`` to its ``on_step_end`` with the device synchronised at both;
the median leaves out the first six. Peak memory is that of steps after the second. Ours runs as ``finetui run``
does, from recipe to plan to worker, inside the arm's process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = ("finetui", "unsloth", "trl-liger", "trl")
NEEDS = {"unsloth": "unsloth", "trl-liger": "liger_kernel", "trl": "trl", "finetui": "finetui"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 2**30
#: Steps in which a program may still be compiling.
SETTLE = 6


class Clock:
    """Step times and the peak of memory, told by callbacks of any Hugging Face trainer."""

    def __init__(self) -> None:
        import torch
        from transformers import TrainerCallback

        clock, self._began = self, 0.0
        self.seconds: list[float] = []
        self.gradients: list[tuple[float, float]] = []

        class Callback(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                torch.cuda.synchronize()
                clock._began = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                torch.cuda.synchronize()
                clock.seconds.append(time.perf_counter() - clock._began)
                if state.global_step == 2:
                    torch.cuda.reset_peak_memory_stats()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "grad_norm" in logs:
                    clock.gradients.append((float(logs["loss"]), float(logs["grad_norm"])))

        self.callback = Callback()

    def result(self, tokens: int) -> dict[str, Any]:
        import torch

        steady = self.seconds[SETTLE:]
        median = statistics.median(steady)
        return {
            "tokens_per_s": round(tokens / median),
            "step_ms": round(median * 1e3, 1),
            "spread_ms": round((max(steady) - min(steady)) * 1e3, 1),
            "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
            "first_step_s": round(self.seconds[0], 2),
            "step_s": [round(second, 3) for second in self.seconds],
            "loss": round(self.gradients[-1][0], 4),
            "grad_norm": round(self.gradients[-1][1], 4),
        }


def ours(a: argparse.Namespace) -> dict[str, Any]:
    """finetui: recipe, plan, worker."""
    from finetui.engine import worker
    from finetui.engine.planning import plan_for
    from finetui.engine.run import Run
    from finetui.engine.trainers import sft
    from finetui.planner.recipe import Recipe

    folder = Path(tempfile.mkdtemp(prefix="finetui-bench-"))
    draw = random.Random(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(a.micro_batch * (a.steps + 2)):
            letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=a.sequence_length - 2))  # and its two ends
            file.write(json.dumps({"text": letters}) + "\n")
    tree: dict[str, Any] = {
        "model": a.model, "method": "pretrain", "tuning": {"type": a.tuning},
        "data": [{"path": str(folder / "rows.jsonl"), "format": "text"}],
        "sequence_length": a.sequence_length, "batch_size": a.micro_batch, "micro_batch": a.micro_batch,
        "packing": False, "max_steps": a.steps, "evaluation": {"holdout": 0.0}, "epochs": 10,
        "optimizer": {"name": "adamw-8bit", "learning_rate": 1e-5, "schedule": "constant"}, "track": [],
        "hardware": {"checkpointing": a.mode, "kernels": a.kernels, "precision": "bf16"},
        "checkpoint": {"every": 10**6},
    }  # fmt: skip
    if a.tuning != "full":
        tree["tuning"] |= {"rank": 16, "targets": TARGETS}
    recipe = Recipe.build(tree)
    run = Run.create(recipe, plan_for(recipe), root=folder / "runs")
    clock, stock = Clock(), sft.TokenMeanTrainer.__init__

    def listened(self: Any, **rest: Any) -> None:
        stock(self, **(rest | {"callbacks": [clock.callback, *rest["callbacks"]]}))

    sft.TokenMeanTrainer.__init__ = listened
    began = time.perf_counter()
    if worker.attempt(run):
        raise SystemExit("the run failed")
    told = [json.loads(line) for line in run.events_path.read_text(encoding="utf-8").splitlines()]
    for event in told:
        if event["type"] == "fallback":
            print(f"fallback: {event['what']} ({event['why']})", file=sys.stderr)
    steps = [event for event in told if event["type"] == "step"]
    phases = [(round(event["time"] - told[0]["time"], 1), event["phase"]) for event in told if event["type"] == "phase"]
    result = clock.result(a.micro_batch * a.sequence_length)
    result["whole_run_s"] = round(time.perf_counter() - began, 1)
    seen = steps[-1]["tokens"] / len(steps)
    if seen != a.micro_batch * a.sequence_length:
        raise SystemExit(f"a step had {seen} tokens, not {a.micro_batch * a.sequence_length}")
    between = [float(step["step_s"]) for step in steps[SETTLE:]]
    result["told_tokens_per_s"] = round(a.micro_batch * a.sequence_length / statistics.median(between))
    print(f"phases: {phases}", file=sys.stderr)
    return result


def theirs(a: argparse.Namespace) -> dict[str, Any]:
    """Unsloth, or TRL's trainer with or without Liger's kernels, as their documentation says."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    unsloth = a.arm == "unsloth"
    if unsloth:
        import unsloth as package  # before torch and trl, which it changes
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator
    from trl import SFTConfig, SFTTrainer

    checkpointing = a.mode == "full"
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    rows = a.micro_batch * (a.steps + 2)
    ids = torch.randint(3, 200, (rows, a.sequence_length), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * a.sequence_length] * rows, "labels": ids})
    peft_config = None
    options: dict[str, Any] = {}
    if unsloth:
        model, _ = package.FastLanguageModel.from_pretrained(
            a.model, max_seq_length=a.sequence_length, dtype=torch.bfloat16, load_in_4bit=a.tuning == "qlora",
            full_finetuning=a.tuning == "full",
        )  # fmt: skip
        if a.tuning != "full":
            model = package.FastLanguageModel.get_peft_model(
                model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
                use_gradient_checkpointing="unsloth" if checkpointing else False,
            )  # fmt: skip
    else:
        from peft import LoraConfig

        if a.tuning == "qlora":
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            a.model, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0}, **options
        )
        if a.tuning != "full":
            peft_config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    clock = Clock()
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=a.micro_batch, max_steps=a.steps, bf16=True,
        learning_rate=1e-5, logging_steps=1, report_to="none", optim="adamw_8bit", save_strategy="no",
        max_length=a.sequence_length, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        gradient_checkpointing=checkpointing, packing=False, lr_scheduler_type="constant", warmup_steps=0,
        disable_tqdm=True, use_liger_kernel=a.arm == "trl-liger",
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing and not unsloth else None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft_config,
        data_collator=default_data_collator, callbacks=[clock.callback],
    )  # fmt: skip
    trainer.train()
    return clock.result(a.micro_batch * a.sequence_length)


def make(shape: str, folder: str) -> None:
    """A checkpoint of a public shape with random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

    llama: dict[str, Any] = {
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    }
    configs: dict[str, Any] = {
        "llama-1b": lambda: LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True,
            max_position_embeddings=131072, **llama,
        ),
        "llama-8b": lambda: LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128,
            max_position_embeddings=131072, **llama,
        ),
        "qwen3-4b": lambda: Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
        ),
    }  # fmt: skip
    config = configs[shape]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = {"<s>": 0, "</s>": 1, "<pad>": 2}
    words |= {letter: 3 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=131072
    ).save_pretrained(folder)


def _measure(a: argparse.Namespace, arm: str, mode: str) -> dict[str, Any]:
    """One arm in a process of its own."""
    # Not as a script: its folder would come first on the path, and a file there is named as a package of Hugging Face.
    start = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        start,
        str(Path(__file__).resolve()),
        str(Path(a.model).resolve()),
        "--arm",
        arm,
        "--mode",
        mode,
        "--tuning",
        a.tuning,
    ]
    command += ["--sequence-length", str(a.sequence_length), "--micro-batch", str(a.micro_batch)]
    command += ["--steps", str(a.steps), "--kernels", a.kernels]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=a.timeout, cwd=tempfile.mkdtemp()
        )
    except subprocess.TimeoutExpired:
        return {"arm": arm, "checkpointing": mode, "failed": f"not done after {a.timeout:g} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    for line in done.stderr.splitlines():
        if line.startswith(("fallback:", "phases:")):
            print(f"  {line}", file=sys.stderr)
    if not lines:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        print(f"{arm} {mode} failed:\n{tail}", file=sys.stderr)
        return {"arm": arm, "checkpointing": mode, "failed": tail.splitlines()[-1] if tail else "no output"}
    return {"arm": arm, "checkpointing": mode, **json.loads(lines[-1].removeprefix("RESULT "))}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Measure and print a table; with ``--arm`` run that one here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--make", choices=("llama-1b", "llama-8b", "qwen3-4b"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--checkpointing", nargs="+", default=["full", "none"], choices=("full", "none"))
    parser.add_argument("--tuning", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kernels", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--timeout", type=float, default=240)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=("full", "none"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if a.arm:
        print("RESULT " + json.dumps((ours if a.arm == "finetui" else theirs)(a)), flush=True)
        return 0
    if a.make and not (Path(a.model) / "config.json").is_file():
        make(a.make, a.model)
    arms = [arm for arm in a.arms if importlib.util.find_spec(NEEDS[arm])]
    for arm in sorted(set(a.arms) - set(arms)):
        print(f"{arm} is not installed here", file=sys.stderr)
    results = []
    for _ in range(a.rounds):
        for mode in a.checkpointing:
            for arm in arms:
                results.append(_measure(a, arm, mode))
                print(json.dumps(results[-1]), flush=True)
    if a.json:
        import torch

        facts = {
            "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "gpu": torch.cuda.get_device_name(),
            "versions": _versions(), "results": results,
        }  # fmt: skip
        a.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
