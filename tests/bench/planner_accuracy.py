"""Holds the planner against runs that other people measured.

    python -m tests.bench.planner_accuracy [--runs FILE] [--configs DIR] [--json] [--rows]

``--runs`` is a table with the columns of ``data/measured_runs.csv`` (each row with its source), ``--configs`` a folder
of further shapes as ``<org>--<name>/config.json``. A row is answered where its model, settings and framework are known;
all others are refused, each with its reason. Nothing in the planner is fitted to these rows. What finished on a GPU
had room there, so no answer is larger than the GPU. Beside the planner stand
what ``accelerate estimate-memory`` says (8 bytes per parameter for Adam in 16 bits, 0.5 for a 4-bit model; its training
figure knows no adapters) and the rule of thumb of 16, 2 and 0.5 bytes per parameter for full, LoRA and QLoRA.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetui.planner.errors import UserError
from finetui.planner.hardware import GIB
from finetui.planner.memory import context_bytes, peak_memory
from finetui.planner.plan import Memory
from finetui.planner.speed import step_speed

from .measured import Question, Refused, question

RUNS = Path(__file__).parent / "data" / "measured_runs.csv"
_ACCELERATE = {"full": 8.0, "lora": 8.0, "qlora": 0.5}
_RULE = {"full": 16.0, "lora": 2.0, "qlora": 0.5}


@dataclass(frozen=True)
class Answer:
    """One measured run with what was predicted. Memory in GiB, tokens/s per GPU; 0 where not measured."""

    source: str
    framework: str
    metric: str
    measured_gib: float
    predicted_gib: float
    margin_gib: float
    accelerate_gib: float
    rule_gib: float
    measured_speed: float
    predicted_speed: float
    speed_interval: tuple[float, float]
    row: dict[str, str]

    @property
    def error(self) -> float:
        return self.predicted_gib / self.measured_gib - 1

    @property
    def speed_error(self) -> float:
        return self.predicted_speed / self.measured_speed - 1

    @property
    def inside(self) -> bool:
        return abs(self.predicted_gib - self.measured_gib) <= self.margin_gib

    @property
    def speed_inside(self) -> bool:
        low, high = self.speed_interval
        return low <= self.measured_speed <= high


def answer(row: dict[str, str], configs: Path | None) -> Answer:
    """Predict one row.

    Raises:
        Refused: the model, a setting or the framework is not known.
    """
    asked = question(row, configs)
    measured = _number(row["measured_peak_gb"])
    speed = _number(row["measured_tokens_per_s"]) if asked.times else 0.0
    if not measured and not speed:
        raise Refused("nothing was measured that can be predicted: rows of unknown length or device have no speed")
    try:
        memory = peak_memory(asked.architecture, asked.settings, asked.stack, asked.gpu, unknown=asked.unknown)
        predicted = step_speed(asked.architecture, asked.settings, asked.stack, asked.gpu)
    except UserError as error:
        raise Refused(error.what) from None
    world = asked.settings.world_size
    return Answer(
        source="/".join(row["source"].split("@")[0].split("/")[-2:]),
        framework=row["framework"].split(",")[0] + (f" [{row['fused'].strip()[:28]}]" if row["fused"].strip() else ""),
        metric=asked.metric,
        measured_gib=measured,
        predicted_gib=_held(memory, asked),
        margin_gib=memory.margins[asked.metric],
        accelerate_gib=_per_parameter(asked, _ACCELERATE),
        rule_gib=_per_parameter(asked, _RULE),
        measured_speed=speed,
        predicted_speed=predicted.tokens_per_s / world,
        speed_interval=(predicted.low_tokens_per_s / world, predicted.high_tokens_per_s / world),
        row=row,
    )


def _held(memory: Memory, asked: Question) -> float:
    """What the run held by its metric: as predicted, but no more than its GPU has, since it finished there.

    Where memory runs short, the allocator gives back the gaps that :func:`.memory.slack_bytes` counts.
    """
    most = asked.most_gib - (0.0 if asked.metric == "device" else context_bytes(asked.gpu, 1) / GIB)
    loading = asked.loading_gib + (memory.terms["context"] if asked.metric == "device" else 0.0)
    return min(max(getattr(memory, f"{asked.metric}_gib") + asked.beside_gib, loading), most)


def _number(text: str) -> float:
    """A figure, in GiB where it is memory: ``20``, ``~20 GB``, ``20,480 MiB``, ``15-16`` (its middle); 0 for none."""
    words = re.sub(r"\(.*?\)|(?<=\d),(?=\d{3})", "", text.lower()).strip(" ~≈")
    if re.fullmatch(r"|\W+|n/?a|none|not (stated|measured)", words):
        return 0.0
    said = re.fullmatch(r"([\d.]+)(?:\s*[-–]\s*([\d.]+))?\s*(g|gb|gib|m|mb|mib|tok\w*/s\w*)?", words)
    try:
        ends = [float(end) for end in (said.group(1), said.group(2)) if end] if said else []
    except ValueError:
        ends = []
    if not said or not ends:
        raise Refused(f"a measured figure is not one number: {text[:30]!r}")
    return sum(ends) / len(ends) / (1024.0 if (said.group(3) or "").startswith("m") else 1.0)


def _per_parameter(asked: Question, table: dict[str, float]) -> float:
    """What a tool that looks at parameters alone says, shared evenly where the run shards."""
    split = asked.settings.world_size if asked.settings.sharing.weights else 1
    return table[asked.settings.tuning] * asked.architecture.parameters / split / GIB


def score(rows: Iterable[dict[str, str]], configs: Path | None = None) -> tuple[list[Answer], Counter[str]]:
    """Answers, and how many rows were refused for each reason."""
    answers, refusals = [], Counter[str]()
    for row in rows:
        try:
            answers.append(answer(_Row(row), configs))
        except Refused as reason:
            refusals[str(reason)] += 1
    return answers, refusals


class _Row(dict[str, str]):
    """A row whose missing columns are empty."""

    def __missing__(self, key: str) -> str:
        return ""


def summary(answers: list[Answer], refusals: Counter[str]) -> dict[str, Any]:
    """Errors over all answers, per source and per framework, and what was refused."""
    return {
        "answered": len(answers),
        "refused": sum(refusals.values()),
        "refusals": dict(refusals.most_common()),
        "all": _scores(answers),
        "sources": _grouped(answers, lambda item: item.source),
        "frameworks": _grouped(answers, lambda item: item.framework),
    }


def _grouped(answers: list[Answer], key: Callable[[Answer], str]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for item in answers:
        groups[key(item)].append(item)
    return {name: _scores(items) for name, items in sorted(groups.items())}


def _scores(answers: list[Answer]) -> dict[str, float]:
    rows = [item for item in answers if item.measured_gib]
    timed = [item for item in answers if item.measured_speed]
    errors, speeds = [abs(item.error) for item in rows], [abs(item.speed_error) for item in timed]
    widths = [(item.speed_interval[1] - item.speed_interval[0]) / 2 / item.predicted_speed for item in timed]
    return {
        "rows": len(rows),
        "memory_median": _quantile(errors, 0.5),
        "memory_p90": _quantile(errors, 0.9),
        "memory_bias": statistics.median(item.error for item in rows) if rows else 0.0,
        "under_by_5_percent": sum(item.error < -0.05 for item in rows) / max(len(rows), 1),
        "inside_interval": sum(item.inside for item in rows) / max(len(rows), 1),
        "interval_width": _quantile([item.margin_gib / item.predicted_gib for item in rows], 0.5),
        "accelerate_median": _quantile([abs(a.accelerate_gib / a.measured_gib - 1) for a in rows], 0.5),
        "rule_of_thumb_median": _quantile([abs(a.rule_gib / a.measured_gib - 1) for a in rows], 0.5),
        "speed_rows": len(speeds),
        "speed_median": _quantile(speeds, 0.5),
        "speed_p90": _quantile(speeds, 0.9),
        "speed_inside_interval": sum(item.speed_inside for item in timed) / max(len(timed), 1),
        "speed_interval_width": _quantile(widths, 0.5),
    }


def _quantile(values: list[float], share: float) -> float:
    if share == 0.5:
        return statistics.median(values) if values else 0.0
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def main() -> int:
    """Print the table, or with ``--json`` the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="table of measured runs")
    parser.add_argument("--configs", type=Path, help="folder with <org>--<name>/config.json")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--rows", action="store_true", help="print each answered row")
    options = parser.parse_args()
    with options.runs.open(encoding="utf-8-sig", newline="") as file:
        answers, refusals = score(csv.DictReader(file, restval=""), options.configs)
    result = summary(answers, refusals)
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    if options.rows:
        print("\n".join(map(_line, answers)))
    head = "rows  median    90%   bias under inside  ± half | accelerate  16/2/0.5 | "
    head += "tok/s: rows  median    90% inside  ± half"
    print(f"{'memory':56} {head}")
    for name, scores in [("all", result["all"]), *result["sources"].items(), *result["frameworks"].items()]:
        print(
            f"{name[:56]:56} {scores['rows']:4} {scores['memory_median']:7.1%} {scores['memory_p90']:6.1%} "
            f"{scores['memory_bias']:+6.1%} {scores['under_by_5_percent']:5.0%} {scores['inside_interval']:6.0%} "
            f"{scores['interval_width']:7.0%} | {scores['accelerate_median']:10.0%} "
            f"{scores['rule_of_thumb_median']:9.0%} | "
            f"{scores['speed_rows']:11} {scores['speed_median']:7.1%} {scores['speed_p90']:6.1%} "
            f"{scores['speed_inside_interval']:6.0%} {scores['speed_interval_width']:7.0%}"
        )
    print(f"{result['answered']} rows answered, {result['refused']} refused:", file=sys.stderr)
    for reason, count in refusals.most_common():
        print(f"  {count:3}  {reason}", file=sys.stderr)
    return 0


def _line(item: Answer) -> str:
    row = item.row
    memory = f"{item.error:+6.1%}" if item.measured_gib else "   –  "
    speed = f"{item.speed_error:+6.1%} {'' if item.speed_inside else '!'}" if item.measured_speed else ""
    mark = "!" if item.measured_gib and not item.inside else ""
    return (
        f"{row['model'][-20:]:20} {row['method'][:14]:14} n{row['num_gpus']:>2} S{row['seq_len'][:9]:>9} "
        f"b{row['micro_batch']:>2} {item.framework[:34]:34} {item.metric[:5]:5} {item.measured_gib:7.2f} "
        f"{item.predicted_gib:7.2f} ±{item.margin_gib:5.2f} {memory} {mark:1} "
        f"{item.measured_speed:7.0f} {item.predicted_speed:7.0f} {speed}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
