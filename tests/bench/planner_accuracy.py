"""Holds the planner against runs that other people measured.

    python -m tests.bench.planner_accuracy [--runs FILE] [--configs DIR] [--json] [--rows]

``--runs`` is a table with the columns of ``data/measured_runs.csv`` (each row with its source), ``--configs`` a folder
of further shapes as ``<org>--<name>/config.json``. A row is answered where its model, settings and framework are known;
all others are refused, each with its reason. Nothing in the planner is fitted to these rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from finetui.planner.architecture import Architecture
from finetui.planner.errors import UserError
from finetui.planner.hardware import Gpu, find_gpu
from finetui.planner.hub import find_config, known_models
from finetui.planner.memory import Settings, peak_memory
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS, Stack

RUNS = Path(__file__).parent / "data" / "measured_runs.csv"

#: transformers 4.45 to 4.48 as fms-acceleration ran them: the loss copies its shifted logits (14 B per logit in all),
#: AdamW is the foreach series (torch 2.4), and the model's own forward runs under autocast.
_TRANSFORMERS_4 = replace(
    STACKS["transformers"], logit_forward=14.0, logit_backward=14.0, fused_optimizer=False, kbit_upcast=True
)
#: The fast kernels of the same repository: fused cross-entropy over 16-bit logits, fused norms and rotary embedding.
_FOAK = replace(_TRANSFORMERS_4, logit_forward=8.1, logit_backward=8.1, fused_norm=True, kbit_upcast=False)
_FOAK_LIGER = replace(_FOAK, loss="chunks", logit_forward=8.0, logit_backward=8.0)
_PLAIN = replace(STACKS["transformers"], autocast=False, fused_optimizer=False)
_TORCHTUNE = STACKS["torchtune"]

#: (framework begins with, fused) to the stack; ``None`` matches any.
_STACKS: list[tuple[str, str | None, Stack]] = [
    ("HF Trainer/TRL (fms-hf-tuning)", "none", _TRANSFORMERS_4),
    ("HF Trainer/TRL (fms-hf-tuning)", "baseline-peft-bnb", _TRANSFORMERS_4),
    ("HF Trainer/TRL (fms-hf-tuning)", "accelerated-peft-bnb", replace(_TRANSFORMERS_4, kbit_upcast=False)),
    ("HF Trainer/TRL (fms-hf-tuning)", "foak", _FOAK),
    ("HF Trainer/TRL (fms-hf-tuning)", "foak liger-FLCE", _FOAK_LIGER),
    ("HF Trainer/TRL (fms-hf-tuning)", "liger", _FOAK_LIGER),
    ("HF transformers 5.13.1 + PEFT", None, _PLAIN),
    ("torchtune", None, _TORCHTUNE),
    ("axolotl", None, STACKS["axolotl"]),
    ("TRL", None, STACKS["trl"]),
    ("Unsloth", None, STACKS["unsloth"]),
]
_TARGETS = {
    "all-linear": "all-linear",
    "q,v": ("q_proj", "v_proj"),
    "q_proj+v_proj": ("q_proj", "v_proj"),
    "q,k,v,o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "q_proj,v_proj,k_proj,o_proj": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


class Refused(Exception):
    """A row that can't be answered; its text is the reason."""


@dataclass(frozen=True)
class Answer:
    """One measured run with what was predicted. Memory in GiB; tokens/s per GPU; 0 where not measured."""

    source: str
    framework: str
    measured_gib: float
    predicted_gib: float
    low_gib: float
    high_gib: float
    measured_speed: float
    predicted_speed: float
    row: dict[str, str]

    @property
    def error(self) -> float:
        return self.predicted_gib / self.measured_gib - 1

    @property
    def speed_error(self) -> float:
        return self.predicted_speed / self.measured_speed - 1


def answer(row: dict[str, str], configs: Path | None) -> Answer:
    """Predict one row.

    Raises:
        Refused: the model, a setting or the framework is not known.
    """
    stack = _stack(row)
    architecture = _architecture(row["model"], configs)
    gpu = _gpu(row["gpu"])
    settings = _settings(row)
    try:
        memory = peak_memory(architecture, settings, stack, gpu)
    except UserError as error:
        raise Refused(error.what) from None
    speed = step_speed(architecture, settings, stack, gpu)
    metric = "device" if re.search(r"metric=nvidia-smi|NVML", row["notes"]) else "allocated"
    metric = "reserved" if re.search(r"metric=[^;]*reserved", row["notes"]) else metric
    predicted = {"device": memory.device_gib, "reserved": memory.reserved_gib, "allocated": memory.allocated_gib}[
        metric
    ]
    shift = predicted - memory.device_gib
    measured_speed = float(row["measured_tokens_per_s"] or 0)
    return Answer(
        source=row["source"].split("/")[1] + "/" + row["source"].split("/")[2].split("@")[0],
        framework=row["framework"] + (f" [{row['fused'].strip()}]" if row["fused"].strip() else ""),
        measured_gib=float(row["measured_peak_gb"]),
        predicted_gib=predicted,
        low_gib=memory.low_gib + shift,
        high_gib=memory.high_gib + shift,
        measured_speed=measured_speed,
        predicted_speed=speed.tokens_per_s / settings.world_size,
        row=row,
    )


def _stack(row: dict[str, str]) -> Stack:
    for prefix, fused, stack in _STACKS:
        if row["framework"].startswith(prefix) and fused in (None, row["fused"].strip()):
            return stack
    raise Refused(f"framework not modelled: {row['framework'].split(',')[0]}")


def _architecture(model: str, configs: Path | None) -> Architecture:
    path = (configs / model.replace("/", "--") / "config.json") if configs else None
    if path and path.is_file():
        return Architecture.from_config(json.loads(path.read_text()), model)
    tails = {name.split("/")[-1].lower(): name for name, _ in known_models().values()}
    name = known_models().get(model.lower(), (tails.get(model.split("/")[-1].lower()), None))[0]
    if name is None:
        raise Refused(f"no shapes for {model}")
    return Architecture.from_config(find_config(name)[1], name)


def _gpu(name: str) -> Gpu:
    try:
        return find_gpu(re.sub(r"\s*\(.*", "", name))
    except UserError:
        raise Refused(f"GPU not stated or unknown: {name}") from None


def _settings(row: dict[str, str]) -> Settings:
    method = row["method"].split("(")[0].strip()
    tuning = {"full-finetuning": "full", "qlora-nf4-dq": "qlora", "qlora-nf4": "qlora"}.get(method, method)
    if tuning not in ("full", "lora", "qlora"):
        raise Refused(f"method not modelled: {row['method']}")
    if not row["seq_len"].isdigit() or not row["micro_batch"].isdigit():
        raise Refused("sequence length or micro batch is not one number")
    if int(row["num_gpus"] or 1) > 1:
        raise Refused("several GPUs: how they share is not modelled or not stated")
    checkpointing = {"yes": "full", "true": "full", "no": "none"}.get(row["grad_ckpt"].split(" unless")[0])
    if checkpointing is None or "in backward" in row["optimizer"] or "in_bwd" in row["optimizer"]:
        raise Refused("checkpointing or optimiser not modelled: " + row["grad_ckpt"] + ", " + row["optimizer"])
    targets = _TARGETS.get(re.sub(r"\s*\(.*", "", row["targets"]).strip())
    if tuning != "full" and targets is None:
        raise Refused(f"adapter targets not modelled: {row['targets'][:40]}")
    low = row["optimizer"].lower()
    if "unclear" in low:
        raise Refused("the optimiser is not stated")
    optimizer = "paged-adamw-8bit" if "paged" in low else "adamw-8bit" if "8" in low else "adamw"
    return Settings(
        tuning=tuning,
        sequence_length=int(row["seq_len"]),
        micro_batch=int(row["micro_batch"]),
        dropout="lora_dropout=0.1" in row["notes"] and tuning != "full",
        rank=int(float(row["lora_r"] or 16)),
        targets=targets or "all-linear",
        quantization="nf4" if tuning == "qlora" else "none",
        precision="bf16",
        optimizer=optimizer,
        checkpointing=checkpointing,
    )


def summary(answers: list[Answer], refusals: Counter[str]) -> dict[str, object]:
    """Errors over all answers and per framework, and what was refused."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for item in answers:
        groups[item.framework].append(item)
    return {
        "answered": len(answers),
        "refused": sum(refusals.values()),
        "refusals": dict(refusals.most_common()),
        "all": _scores(answers),
        "frameworks": {name: _scores(items) for name, items in sorted(groups.items())},
    }


def _scores(answers: list[Answer]) -> dict[str, float]:
    errors = sorted(abs(item.error) for item in answers)
    speeds = sorted(abs(item.speed_error) for item in answers if item.measured_speed)
    inside = [item.low_gib <= item.measured_gib <= item.high_gib for item in answers]
    return {
        "rows": len(answers),
        "memory_median": statistics.median(errors) if errors else 0.0,
        "memory_p90": errors[int(0.9 * (len(errors) - 1))] if errors else 0.0,
        "memory_bias": statistics.median(item.error for item in answers) if errors else 0.0,
        "under_by_5_percent": sum(item.error < -0.05 for item in answers),
        "inside_interval": sum(inside) / max(len(inside), 1),
        "speed_rows": len(speeds),
        "speed_median": statistics.median(speeds) if speeds else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--configs", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", action="store_true", help="print each answered row")
    options = parser.parse_args()
    answers, refusals = [], Counter[str]()
    with options.runs.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                answers.append(answer(row, options.configs))
            except Refused as reason:
                refusals[str(reason)] += 1
    result = summary(answers, refusals)
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    if options.rows:
        for item in answers:
            row = item.row
            print(
                f"{row['model'][-22:]:22} {row['method']:10} S{row['seq_len']:>5} b{row['micro_batch']:>2} "
                f"{item.framework[-28:]:28} {item.measured_gib:7.2f} {item.predicted_gib:7.2f} {item.error:+6.1%} "
                f"[{item.low_gib:.1f} {item.high_gib:.1f}] {item.measured_speed:7.0f} {item.predicted_speed:7.0f}"
            )
    print(f"{'':60} rows  median    90%   bias  inside  tok/s median")
    for name, scores in [("all", result["all"]), *result["frameworks"].items()]:  # type: ignore[attr-defined]
        print(
            f"{name[:60]:60} {scores['rows']:4} {scores['memory_median']:7.1%} {scores['memory_p90']:6.1%} "
            f"{scores['memory_bias']:+6.1%} {scores['inside_interval']:7.0%} {scores['speed_median']:7.1%}"
        )
    print(f"{result['answered']} rows answered, {result['refused']} refused:", file=sys.stderr)
    for reason, count in refusals.most_common():
        print(f"  {count:3}  {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
