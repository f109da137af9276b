"""What one layer keeps and needs, followed through the installed libraries, beside what the planner's formula says.

``python -m tests.bench.coefficients`` writes ``results/coefficients-transformers-<version>.csv`` anew, with a row for
each family, framework, tuning and checkpointing policy; ``--only TEXT`` prints the rows whose model or framework holds
a text instead. Each row is a model of the family's real widths with three layers; ``layer`` is what the third of them
added. All bytes are those of one device, allocated, at the fullest instant of a step of 2 x 512 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.memory import cublas_workspaces
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

RESULTS = Path(__file__).parent / "results"
#: Large enough for every row, so that a plan never has to change what was asked for.
GPU = "B200"
GIB = 2**30

#: One model of each family whose layers differ, with the layers of its config that stand for the rest.
MODELS = (
    "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B", "mistralai/Mistral-7B-v0.1", "google/gemma-2-9b",
    "google/gemma-3-12b-pt", "microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-2", "allenai/OLMo-2-1124-7B",
    "ibm-granite/granite-3.3-8b-base", "HuggingFaceTB/SmolLM3-3B", "zai-org/GLM-4-9B-0414",
    "CohereLabs/c4ai-command-r-v01", "stabilityai/stablelm-2-1_6b", "bigcode/starcoder2-3b", "tiiuae/falcon-7b",
    "EleutherAI/pythia-6.9b", "openai-community/gpt2", "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-V2-Lite", "openai/gpt-oss-20b",
)  # fmt: skip
#: Tunings that each framework is followed with.
TUNINGS = {"trl": ("full", "lora"), "finetui": ("full", "lora", "qlora")}
POLICIES = ("none", "full")
#: Families beside which finetui's own layers are of interest; others run transformers' there too.
OWN = (
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen3-8B",
    "mistralai/Mistral-7B-v0.1",
    "google/gemma-3-12b-pt",
    "microsoft/Phi-3-mini-4k-instruct",
    "allenai/OLMo-2-1124-7B",
    "ibm-granite/granite-3.3-8b-base",
    "zai-org/GLM-4-9B-0414",
)


@dataclass(frozen=True)
class Row:
    """One row of the table. ``formula`` is what the planner said when the row was written."""

    model: str
    framework: str
    tuning: str
    checkpointing: str
    moment: str
    allocated: int
    layer: int
    formula: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.model, self.framework, self.tuning, self.checkpointing

    @property
    def error(self) -> float:
        """How far the formula was off, as a share."""
        return self.formula / self.allocated - 1


def keys() -> Iterator[tuple[str, str, str, str]]:
    """Model, framework, tuning and policy of every row."""
    for model in MODELS:
        for framework, tunings in TUNINGS.items():
            if framework == "trl" or model in OWN:
                yield from ((model, framework, tuning, policy) for tuning in tunings for policy in POLICIES)


def shortened(model: str, layers: int) -> dict[str, Any]:
    """A model's config.json with its last few layers alone."""
    config: dict[str, Any] = copy.deepcopy(find_config(model)[1])
    text = config.get("text_config", config)
    for name in ("num_hidden_layers", "n_layer", "n_layers"):
        if name in text:
            text[name] = layers
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][-layers:]
    if "first_k_dense_replace" in text:
        text["first_k_dense_replace"] = min(text["first_k_dense_replace"], 1)
    return config


def planned(key: tuple[str, str, str, str], config: dict[str, Any]) -> Plan:
    """The formula's plan of a row."""
    model, framework, tuning, policy = key
    recipe = Recipe.build(
        {
            "model": model,
            "tuning": {"type": tuning},
            "sequence_length": 512,
            "micro_batch": 2,
            "batch_size": 2,
            "optimizer": {"name": "adamw"},
            "hardware": {"gpu": GPU, "checkpointing": policy, "precision": "bf16"},
        },
        source="coefficients",
    )
    return make_plan(recipe, Architecture.from_config(config, model), Node(find_gpu(GPU)), None, framework=framework)


def formula(key: tuple[str, str, str, str]) -> int:
    """Bytes that the formula has for a row."""
    return round(planned(key, shortened(key[0], 3)).memory.allocated_gib * GIB)


def followed(key: tuple[str, str, str, str]) -> Row:
    """A row, made anew."""
    from finetui.engine.exact.step import follow

    steps = []
    for layers in (2, 3):
        config = shortened(key[0], layers)
        with contextlib.redirect_stdout(io.StringIO()):
            steps.append(follow(config, planned(key, config).resolved, key[0], framework=key[1]))
    last, workspaces = steps[1], round(cublas_workspaces(find_gpu(GPU)))
    grown = last.allocated - steps[0].allocated
    return Row(*key, last.moment, last.allocated + workspaces, grown, formula(key))


def table_of(version: str) -> Path:
    """Where the table of a transformers release lies."""
    return RESULTS / f"coefficients-transformers-{version}.csv"


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    numbers = {"allocated", "layer", "formula"}
    return [Row(**{name: int(text) if name in numbers else text for name, text in line.items()}) for line in lines]


def write(rows: list[Row], path: Path, versions: str) -> None:
    """Write a table, with the libraries it is true for in its first line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# bytes of a step of 2 x 512 tokens through {versions}; python -m tests.bench.coefficients\n")
        out = csv.writer(file, lineterminator="\n")
        out.writerow([field.name for field in fields(Row)])
        out.writerows([getattr(row, field.name) for field in fields(Row)] for row in rows)


def main() -> None:
    """Make the table anew, or print a part of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="print rows whose model or framework holds this text")
    parser.add_argument("--formula", action="store_true", help="only bring the formula's column up to date")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from importlib import metadata

    path = table_of(metadata.version("transformers"))
    if arguments.formula:
        known = read(path)
        head = path.read_text(encoding="utf-8").splitlines()[0]
        write([replace(row, formula=formula(row.key)) for row in known], path, head.split(" through ")[1].split(";")[0])
        return
    from finetui.engine.exact.step import versions

    rows = []
    for key in keys():
        if arguments.only and arguments.only not in key[0] + key[1]:
            continue
        rows.append(row := followed(key))
        print(f"{' '.join(key):64} {row.allocated / GIB:7.3f} GiB {row.moment:9} formula {row.error:+7.1%}", flush=True)
    if not arguments.only:
        write(rows, path, versions())
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
