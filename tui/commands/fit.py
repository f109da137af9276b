"""``finetui fit``: what fits where, for one model."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from ...planner.architecture import Architecture
from ...planner.errors import RecipeError
from ...planner.fit import fit_table
from ...planner.hardware import find_gpu, load_catalog
from ...planner.hub import find_config
from .options import JsonFlag, local_path

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or config.json.")]
GpuListFlag = Annotated[str | None, typer.Option("--gpu", help="Only these GPUs, with commas.")]
TuningListFlag = Annotated[str, typer.Option("--tuning", help="Which tunings, with commas.")]
LengthsFlag = Annotated[str, typer.Option("--seq-len", help="Which sequence lengths, with commas.")]
AllFlag = Annotated[bool, typer.Option("--all", help="Show what does not fit, too.")]


def fit(
    model: ModelArgument,
    gpu: GpuListFlag = None,
    tuning: TuningListFlag = "qlora,lora,full",
    seq_len: LengthsFlag = "2048,8192",
    everything: AllFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """What fits: tunings × GPUs × lengths, each with its speed. Of one GPU, at micro batch 1."""
    name, config, _origin = find_config(local_path(model))
    architecture = Architecture.from_config(config, name)
    lengths = [part.strip() for part in seq_len.split(",")]
    if not all(part.isdigit() and int(part) >= 8 for part in lengths):
        raise RecipeError(f"{seq_len!r} holds something that is no length", where="--seq-len", do="Try 2048,8192.")
    tunings = [part.strip() for part in tuning.split(",")]
    unknown = set(tunings) - {"full", "lora", "qlora"}
    if unknown:
        raise RecipeError(f"unknown tuning {min(unknown)!r}", where="--tuning", do="Use full, lora, qlora.")
    gpus = [find_gpu(part.strip()) for part in gpu.split(",")] if gpu else list(load_catalog().values())
    rows = fit_table(architecture, gpus, tunings=tunings, sequence_lengths=[int(part) for part in lengths])
    if as_json:
        answer = {
            "model": name,
            "parameters": architecture.parameters,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(answer, indent=2))
        return
    from ..fit_view import print_fit

    print_fit(name, architecture.parameters, rows, everything=everything)
