"""One program's training run, timed from inside: finetui's, or one of its peers' as their documentation says.

    python -P -m finetui.engine.bench.arms TASK

TASK is a :class:`.task.Task` as JSON; the last line of output is ``RESULT`` and what was measured. A step's time is
that of a whole turn by its number of steps: the device is waited for before a turn and after it, and whatever a trainer
does between two steps (batches, logs) counts. Peak memory is that of steps after the second. After each turn a line
``SO FAR`` says what is known. Every program trains on the same rows, in an order of its own; ours runs as
``finetui run`` does, from recipe to plan to worker, inside this process.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .task import GIB, SETTLE, TARGETS, Task


class Clock:
    """Step times and the peak of memory, told by callbacks of any Hugging Face trainer, and this arm's turns."""

    def __init__(self, task: Task) -> None:
        import torch
        from transformers import TrainerCallback

        clock, self._task, self._began, self._waited = self, task, 0.0, 0.0
        self.seconds: list[float] = []
        self.logged: list[tuple[float, float]] = []
        self.to_first_step_s = 0.0
        self.pool_bytes: Callable[[], int] = lambda: 0
        self._cuda = torch.cuda.is_available()
        profile = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if (turn := task.turn_of(state.global_step)) is not None:
                    clock.wait(turn)
                if task.profile and state.global_step == task.steps - 1:
                    profile.start()
                if turn is not None or state.global_step < SETTLE:
                    clock._began = clock._now()

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                settled = state.global_step > SETTLE
                if settled and task.turn_of(state.global_step) is None and state.global_step < task.steps:
                    return
                steps = task.turn if settled and state.global_step <= SETTLE + task.rounds * task.turn else 1
                clock.seconds.append((clock._now() - clock._began) / steps)
                if len(clock.seconds) > SETTLE:
                    print("SO FAR " + json.dumps(clock.result()), flush=True)  # should it be ended before its end
                if state.global_step == 1:
                    clock.to_first_step_s = time.time() - _process_began() - clock._waited
                if state.global_step == 2 and clock._cuda:
                    torch.cuda.reset_peak_memory_stats()
                if task.profile and state.global_step == task.steps and task.folder is not None:
                    profile.stop()
                    table = _kernel_table(profile, clock.seconds[-1])
                    (task.folder / "profile").write_text(table, encoding="utf-8")

            def on_train_end(self, *_: Any, **__: Any) -> None:
                clock.wait(task.rounds + 1 + task.profile)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "grad_norm" in logs:
                    clock.logged.append((float(logs["loss"]), float(logs["grad_norm"])))

        self.callback = Callback()

    def _now(self) -> float:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def wait(self, turn: int) -> None:
        """Until this arm is told to go on; one that runs alone goes on at once."""
        folder, began = self._task.folder, time.perf_counter()
        if folder is None:
            return
        (folder / f"{turn}.ready").touch()
        while not (folder / f"{turn}.go").exists():
            time.sleep(0.01)
        self._waited += time.perf_counter() - began

    def result(self) -> dict[str, Any]:
        """Figures of the timed turns; times in the units of their names. ``step_s``: steps that settle, then turns."""
        task, allocated, reserved = self._task, 0.0, 0.0
        rounds = self.seconds[SETTLE : SETTLE + task.rounds]
        median = statistics.median(rounds)
        if self._cuda:
            import torch

            # The allocator counts nothing of a step that is replayed.
            peak = max(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + self.pool_bytes())
            allocated, reserved = peak / GIB, torch.cuda.max_memory_reserved() / GIB
        return {
            "tokens_per_s": round(task.tokens / median),
            "rounds_tokens_per_s": [round(task.tokens / seconds) for seconds in rounds],
            "step_ms": round(median * 1e3, 1),
            "spread_ms": round((max(rounds) - min(rounds)) * 1e3, 1),
            "allocated_gib": round(allocated, 2),
            "reserved_gib": round(reserved, 2),
            "first_step_s": round(self.seconds[0], 2),
            "to_first_step_s": round(self.to_first_step_s, 2),
            "step_s": [round(second, 3) for second in self.seconds],
            "loss": [round(loss, 4) for loss, _ in self.logged[:3]],
            "grad_norm": [round(norm, 4) for _, norm in self.logged[:3]],
        }


def _process_began() -> float:
    import psutil

    return float(psutil.Process().create_time())


def _kernel_table(profile: Any, seconds: float) -> str:
    """What ran on the GPU in one step: milliseconds, launches and names, the longest first; then where it was idle."""
    import torch

    rows = [
        (event.self_device_time_total / 1e3, event.count, event.key[:110])
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    busy, launches = sum(row[0] for row in rows), sum(row[1] for row in rows)
    head = f"step {seconds * 1e3:.1f} ms under the profiler, GPU busy {busy:.1f} ms in {launches} launches"
    table = [f"{ms:9.2f} ms {n:5d}  {name}" for ms, n, name in sorted(rows, reverse=True)[:60]]
    return "\n".join([head, *table, *_idle(profile)])


def _idle(profile: Any) -> list[str]:
    """Gaps between what ran on the GPU: how many of which length, and what the longest lie between."""
    import torch

    ran = sorted(
        (event.time_range.start, event.time_range.end, event.name[:48])
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    gaps, end, last = [], ran[0][1] if ran else 0.0, ran[0][2] if ran else ""
    for start, until, name in ran[1:]:
        if start > end:
            gaps.append((start - end, f"{last} … {name}"))
        if until > end:
            end, last = until, name
    lines = ["idle between launches:"]
    for low, high in ((0, 2), (2, 5), (5, 20), (20, 1e9)):
        some = [gap for gap, _ in gaps if low <= gap < high]
        lines.append(f"{sum(some) / 1e3:9.2f} ms {len(some):5d}  of {low} to {high:.0f} us")
    return [*lines, *(f"{gap / 1e3:9.2f} ms        {where}" for gap, where in sorted(gaps, reverse=True)[:12])]


def ours(task: Task) -> dict[str, Any]:
    """finetui: recipe, plan, worker."""
    from .. import worker
    from ..planning import plan_for
    from ..run import Run
    from ..trainers import sft

    recipe = _recipe(task, Path(tempfile.mkdtemp(prefix="finetui-bench-")))
    run = Run.create(recipe, plan_for(recipe), root=Path(tempfile.mkdtemp(prefix="finetui-bench-")))
    clock, stock = Clock(task), sft.TokenMeanTrainer.__init__

    def listened(self: Any, **rest: Any) -> None:
        stock(self, **(rest | {"callbacks": [clock.callback, *rest["callbacks"]]}))
        clock.pool_bytes = lambda: self.pool_bytes

    sft.TokenMeanTrainer.__init__ = listened  # type: ignore[method-assign]
    if worker.attempt(run):
        raise SystemExit("the run failed")
    told = [json.loads(line) for line in run.events_path.read_text(encoding="utf-8").splitlines()]
    for event in told:
        if event["type"] == "fallback":
            print(f"fallback: {event['what']} ({event['why']})")
    phases = [(round(event["time"] - told[0]["time"], 1), event["phase"]) for event in told if event["type"] == "phase"]
    print(f"phases: {phases}")
    steps = [event for event in told if event["type"] == "step"]
    if (seen := steps[-1]["tokens"] / len(steps)) != task.tokens:
        do = "use a tokenizer of single letters, as that of a named shape"
        raise SystemExit(f"a step had {seen} tokens, not {task.tokens}: {do}")
    return clock.result()


def _recipe(task: Task, folder: Path) -> Any:
    import torch

    from ...planner.recipe import Recipe

    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": row}) + "\n" for row in _rows(task))
    tuning: dict[str, Any] = {"type": task.tuning}
    if task.tuning != "full":
        tuning |= {"rank": 16, "targets": TARGETS}
    optimizer = {
        "name": "adamw-8bit" if torch.cuda.is_available() else "adamw",
        "learning_rate": 1e-5,
        "schedule": "constant",
    }
    checkpointing, _, graphs = task.mode.partition("+")
    return Recipe.build({
        "model": task.model, "method": "pretrain", "tuning": tuning,
        "data": [{"path": str(folder / "rows.jsonl"), "format": "text"}],
        "sequence_length": task.sequence_length, "batch_size": task.micro_batch, "micro_batch": task.micro_batch,
        "packing": False, "max_steps": task.steps, "evaluation": {"holdout": 0.0}, "epochs": 10,
        "optimizer": optimizer, "track": [],
        "hardware": {
            "checkpointing": checkpointing, "kernels": task.kernels, "precision": "bf16", "graphs": bool(graphs),
        },
        "checkpoint": {"every": 10**6},
    })  # fmt: skip


def _rows(task: Task) -> list[str]:
    """Texts that fill a row each with the space before and the end after: of letters, for a tokenizer of such."""
    draw, letters = random.Random(0), string.ascii_letters
    rows = task.micro_batch * (task.steps + 2)
    return ["".join(draw.choices(letters, k=task.sequence_length - 2)) for _ in range(rows)]


def theirs(task: Task) -> dict[str, Any]:
    """Unsloth, or TRL's trainer with or without Liger's kernels."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    unsloth = task.arm == "unsloth"
    if unsloth:
        import unsloth as package  # before torch and trl, which it changes
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, default_data_collator
    from trl import SFTConfig, SFTTrainer

    checkpointing, peft_config = task.mode == "full", None
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(_rows(task), add_special_tokens=False).input_ids]
    if any(len(row) != task.sequence_length for row in ids):
        raise SystemExit("rows are not full: use a tokenizer of single letters, as that of a named shape")
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": ids})
    if unsloth:
        model = _unsloth_model(package, task)
    else:
        from peft import LoraConfig

        model = _stock_model(task)
        if task.tuning != "full":
            peft_config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    clock, cuda = Clock(task), torch.cuda.is_available()
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=task.micro_batch, max_steps=task.steps, bf16=True,
        gradient_accumulation_steps=1,  # unsloth makes it 2 by default
        learning_rate=1e-5, logging_steps=1, report_to="none", save_strategy="no",
        optim="adamw_8bit" if cuda else "adamw_torch",
        max_length=task.sequence_length, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        gradient_checkpointing=checkpointing, packing=False, lr_scheduler_type="constant", warmup_steps=0,
        disable_tqdm=True, use_liger_kernel=task.arm == "trl-liger", use_cpu=not cuda,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing and not unsloth else None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft_config,
        data_collator=default_data_collator, callbacks=[clock.callback],
    )  # fmt: skip
    trainer.train()
    return clock.result()


def _unsloth_model(package: Any, task: Task) -> Any:
    import torch

    model, _ = package.FastLanguageModel.from_pretrained(
        task.model, max_seq_length=task.sequence_length, dtype=torch.bfloat16, load_in_4bit=task.tuning == "qlora",
        full_finetuning=task.tuning == "full",
        use_gradient_checkpointing="unsloth" if task.mode == "full" else False,
    )  # fmt: skip
    if task.tuning == "full":
        return model
    return package.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if task.mode == "full" else False,
    )  # fmt: skip


def _stock_model(task: Task) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    if task.tuning == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16, attn_implementation="sdpa", **options)


def main() -> int:
    """Run the one task that the command line holds."""
    task = Task.from_json(sys.argv[1])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    print("RESULT " + json.dumps((ours if task.arm == "finetui" else theirs)(task)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
