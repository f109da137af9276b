"""``finetui fit``: what fits where, for one model; or which models fit, on one GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import typer

from ...planner.architecture import Architecture
from ...planner.errors import RecipeError
from ...planner.fit import fit_table
from ...planner.hardware import Gpu, find_gpu, load_catalog, this_machine
from ...planner.hub import find_config
from .options import JsonFlag, local_path

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Hub id, folder or config.json; all known ones if left out.")
]
GpuListFlag = Annotated[
    str | None, typer.Option("--gpu", help="Only these GPUs, with commas; without MODEL one, else this machine's.")
]
TuningListFlag = Annotated[str, typer.Option("--tuning", help="Which tunings, with commas.")]
LengthsFlag = Annotated[
    str, typer.Option("--seq-len", help="Which sequence lengths, with commas; without MODEL the first.")
]
AllFlag = Annotated[bool, typer.Option("--all", help="Show what does not fit, too.")]


def fit(
    model: ModelArgument = None,
    gpu: GpuListFlag = None,
    tuning: TuningListFlag = "qlora,lora,full",
    seq_len: LengthsFlag = "2048,8192",
    everything: AllFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """What fits: tunings × GPUs × lengths, or all models on one GPU. Each at micro batch 1."""
    lengths = [part.strip() for part in seq_len.split(",")]
    if not all(part.isdigit() and int(part) >= 8 for part in lengths):
        raise RecipeError(f"{seq_len!r} holds something that is no length", where="--seq-len", do="Try 2048,8192.")
    tunings = [part.strip() for part in tuning.split(",")]
    unknown = set(tunings) - {"full", "lora", "qlora"}
    if unknown:
        raise RecipeError(f"unknown tuning {min(unknown)!r}", where="--tuning", do="Use full, lora, qlora.")
    gpus = [find_gpu(part.strip()) for part in gpu.split(",")] if gpu else []
    if model is None:
        _models(gpus, tunings, int(lengths[0]), everything=everything, as_json=as_json)
        return
    name, config, _origin = find_config(local_path(model))
    architecture = Architecture.from_config(config, name)
    rows = fit_table(
        architecture, gpus or load_catalog().values(), tunings=tunings, sequence_lengths=[int(part) for part in lengths]
    )
    if as_json:
        answer = {
            "model": name,
            "parameters": architecture.parameters,
            "rows": [vars(row) for row in rows],
        }
        print(json.dumps(answer, indent=2))
        return
    from ..fit_view import print_fit

    print_fit(name, architecture.parameters, rows, everything=everything)


def _models(gpus: Sequence[Gpu], tunings: Sequence[str], length: int, *, everything: bool, as_json: bool) -> None:
    """All known models on one GPU, the largest first."""
    from ..model_list import listed, models_on

    if len(gpus) > 1:
        names = ", ".join(gpu.name for gpu in gpus)
        raise RecipeError(
            f"without a model there can be one GPU, not {names}", where="--gpu", do="Name a model or one GPU."
        )
    found = models_on(gpus[0] if gpus else this_machine().gpu, length, tunings=tunings)
    rows = listed(found.rows, everything=everything)
    if as_json:
        shown = [
            dataclasses.asdict(row) | {"fits": [dataclasses.asdict(fit) for fit in row.fits.values()]} for row in rows
        ]
        answer = {"gpu": found.gpu, "memory_gib": found.memory_gib, "sequence_length": length, "models": shown}
        print(json.dumps(answer, indent=2))
        return
    from ..fit_view import print_models

    print_models(found, rows)
