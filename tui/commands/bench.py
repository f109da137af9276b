"""``finetui bench``: what this machine reaches; how fast the kernels and whole training steps are beside others'."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ...planner.errors import HardwareError, MissingExtraError, UserError
from .options import JsonFlag, local_path

WhatArgument = Annotated[str, typer.Argument(metavar="ceilings|kernels|engine", help="What to measure.")]
ChartFlag = Annotated[
    Path | None, typer.Option("--chart", metavar="FILE", help="kernels, engine: also draw the comparison as an SVG.")
]
OnlyFlag = Annotated[str | None, typer.Option("--only", help="kernels: which, with commas.")]
TokensFlag = Annotated[int | None, typer.Option("--tokens", min=128, help="kernels: rows of each input (8192).")]
ModelFlag = Annotated[
    str | None,
    typer.Option("--model", help="engine: a checkpoint folder, or llama-1b, llama-8b, qwen3-4b with random weights."),
]
ArmsFlag = Annotated[str | None, typer.Option("--arms", help="engine: whose runs, with commas (all installed ones).")]
TuningFlag = Annotated[str | None, typer.Option("--tuning", help="engine: lora (default), qlora or full.")]
ModesFlag = Annotated[
    str | None, typer.Option("--checkpointing", help="engine: none, full, … with commas (none,full).")
]
LengthFlag = Annotated[int | None, typer.Option("--seq-len", min=8, help="engine: tokens of each row (2048).")]
BatchFlag = Annotated[int | None, typer.Option("--micro-batch", min=1, help="engine: rows of each step (4).")]
RoundsFlag = Annotated[int | None, typer.Option("--rounds", min=1, help="engine: turns that each arm has (2).")]
TurnFlag = Annotated[int | None, typer.Option("--turn", min=1, help="engine: timed steps of each turn (8).")]


def bench(
    what: WhatArgument = "ceilings",
    model: ModelFlag = None,
    arms: ArmsFlag = None,
    tuning: TuningFlag = None,
    checkpointing: ModesFlag = None,
    seq_len: LengthFlag = None,
    micro_batch: BatchFlag = None,
    rounds: RoundsFlag = None,
    turn: TurnFlag = None,
    only: OnlyFlag = None,
    tokens: TokensFlag = None,
    chart: ChartFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure this machine, so that plans rest on it. Or finetui's kernels and training steps beside others'."""
    if find_spec("torch") is None:
        raise MissingExtraError("bench", "train")
    engine = {
        "model": model, "arms": arms, "tuning": tuning, "checkpointing": checkpointing, "seq-len": seq_len,
        "micro-batch": micro_batch, "rounds": rounds, "turn": turn,
    }  # fmt: skip
    kernels = {"only": only, "tokens": tokens}
    takes = {"ceilings": {}, "kernels": {**kernels, "chart": chart}, "engine": {**engine, "chart": chart}}
    if what not in takes:
        raise UserError(f"there is nothing named {what!r} to measure", do="Use ceilings, kernels or engine.")
    for name, value in {**engine, **kernels, "chart": chart}.items():
        if value is not None and name not in takes[what]:
            raise UserError(
                f"--{name} has no effect on bench {what}", do=f"See: finetui bench --help; leave --{name} out."
            )
    if what == "ceilings":
        _ceilings(as_json)
    elif what == "kernels":
        _kernels(_list(only), tokens or 8192, chart, as_json)
    else:
        _engine({name.replace("-", "_"): value for name, value in engine.items() if value is not None}, chart, as_json)


def _ceilings(as_json: bool) -> None:
    from ...engine.bench.ceilings import as_json as answer
    from ...engine.bench.ceilings import measure
    from ...planner.ceilings import store

    ceilings, figures = measure(_say)
    path = store(ceilings)
    if as_json:
        print(json.dumps(answer(ceilings, figures), indent=2))
        return
    from ..bench_view import print_ceilings

    print_ceilings(ceilings, figures)
    _say(f"kept in {path}: plans for this device use it from now on")


def _kernels(only: list[str] | None, tokens: int, chart: Path | None, as_json: bool) -> None:
    import torch

    if not torch.cuda.is_available():
        what, do = "kernels are measured on a CUDA GPU, and there is none here", "See what is here with: finetui doctor"
        raise HardwareError(what, where="bench kernels", do=do)
    from ...engine.bench.kernels import CHECKS, run

    names = _known(only, list(CHECKS), "--only")
    report = run(names, tokens, _say)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from ..bench_view import print_kernels

        print_kernels(report)
    if chart is not None:
        from ..bench_view import kernels_chart

        _write(chart, kernels_chart(report))
    if any(not verdict["ok"] for verdict in report["verdicts"].values()):
        raise SystemExit(1)


def _engine(given: dict[str, Any], chart: Path | None, as_json: bool) -> None:
    from ...engine.bench.task import ARMS, MODES, Task
    from ...engine.bench.turns import facts, measure, tasks_of

    if "model" not in given:
        raise UserError("no model is named", where="bench engine", do="Try: finetui bench engine --model llama-1b")
    arms = _known(_list(given.pop("arms", None)), list(ARMS), "--arms")
    modes = _known(_list(given.pop("checkpointing", "none,full")), list(MODES), "--checkpointing")
    tuning = _known([given.pop("tuning", "lora")], ["lora", "qlora", "full"], "--tuning")[0]
    length = given.pop("seq_len", 2048)
    task = Task(model=_checkpoint(given.pop("model")), tuning=tuning, sequence_length=length, **given)
    tasks = tasks_of(task, arms, modes, _say)
    if not tasks:
        raise UserError("none of these programs is installed", where="--arms", do="Install one, or name finetui.")
    report = {
        **facts(f"finetui {' '.join(sys.argv[1:])}"),
        "task": {"model": task.model, "tuning": tuning, "sequence_length": length, "micro_batch": task.micro_batch},
        "results": measure(tasks, _say),
    }
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from ..bench_view import print_engine

        print_engine(report)
    if chart is not None and any("failed" not in result for result in report["results"]):
        from ..bench_view import engine_chart

        _write(chart, engine_chart(report))
    if any("failed" in result for result in report["results"]):
        raise SystemExit(1)


def _checkpoint(model: str) -> str:
    """A folder as it is; a shape's name as the folder that it was, or now is, written to."""
    from ...engine.bench.shapes import SHAPES
    from ...engine.folders import cache_folder

    if model not in SHAPES:
        path = local_path(model)
        if not (Path(path) / "config.json").is_file():
            do = f"Give a checkpoint folder, or one of {', '.join(SHAPES)}."
            raise UserError(f"there is no checkpoint at {model}", where="--model", do=do)
        return path
    from ...engine.bench.shapes import make

    folder = cache_folder() / f"bench-{model}"
    if not (folder / "tokenizer.json").is_file():
        _say(f"writing random weights to {folder}")
        make(model, folder)
    return str(folder)


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _known(names: list[str] | None, known: list[str], flag: str) -> list[str]:
    unknown = [name for name in names or [] if name not in known]
    if unknown or names == []:
        raise UserError(
            f"{', '.join(unknown) or 'nothing'} is not to be had", where=flag, do=f"Use {', '.join(known)}."
        )
    return names or known


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"the chart can't be written ({error.strerror})"
        raise UserError(what, where=str(path), do="Give another path.") from error
    _say(f"drawn: {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
