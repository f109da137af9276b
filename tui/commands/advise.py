"""``finetui advise``: whether to fine-tune, with which method and adapter, on which card, and in which stages."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from typing import Annotated, Any, cast

import typer

from ...planner.advisor import GOALS, Advice, Goal
from ...planner.advisor import advise as advise_on
from ...planner.errors import RecipeError
from ...planner.survey import DataKind, Remark, kind_of_rows, survey
from ..format import sentence
from .options import JsonFlag, local_path

ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help="Hub id, folder or config.json.")]
GoalFlag = Annotated[str | None, typer.Option("--goal", help=f"What it is for: {', '.join(GOALS)}.")]
DataFlag = Annotated[str | None, typer.Option("--data", help="File or folder: its rows say which method fits.")]
ExamplesFlag = Annotated[int | None, typer.Option("--examples", min=0, help="How many examples there are.")]
GpuFlag = Annotated[str | None, typer.Option("--gpu", help="The card that is there already.")]
LengthFlag = Annotated[int, typer.Option("--seq-len", min=8, help="Tokens per row, for the question of the card.")]

#: Rules tell apart fewer than a hundred rows, up to a hundred thousand, and more.
_COUNTED = 100_001
#: Rows that are looked at for what they say.
_SURVEYED = 2_000


def advise(
    model: ModelArgument = None,
    goal: GoalFlag = None,
    data: DataFlag = None,
    examples: ExamplesFlag = None,
    gpu: GpuFlag = None,
    seq_len: LengthFlag = 2048,
    as_json: JsonFlag = False,
) -> None:
    """Fine-tune or not, which method, adapter and card, and why. Every answer names its source."""
    if goal is not None and goal not in GOALS:
        raise RecipeError(f"{goal!r} is no goal", where="--goal", do=f"Use one of: {', '.join(GOALS)}.")
    kind: DataKind = "unknown"
    remarks: list[Remark] = []
    if data is not None:
        kind, counted, remarks = _look_at(data)
        examples = counted if examples is None else examples
    answers = advise_on(
        _architecture(model),
        goal=cast(Goal, goal or "unknown"),
        data=kind,
        examples=examples,
        gpu=_gpu(gpu),
        sequence_length=seq_len,
        remarks=remarks,
    )
    if as_json:
        about = {"model": model, "goal": goal, "data": kind, "examples": examples, "gpu": gpu}
        print(json.dumps({**about, "advice": [dataclasses.asdict(item) for item in answers]}, indent=2))
        return
    _print(answers)


def _architecture(model: str | None) -> Any:
    if model is None:
        return None
    from ...planner.architecture import Architecture
    from ...planner.hub import find_config

    name, config, _origin = find_config(local_path(model))
    return Architecture.from_config(config, name)


def _gpu(name: str | None) -> Any:
    if name is None:
        return None
    from ...planner.hardware import find_gpu

    return find_gpu(name)


def _look_at(path: str) -> tuple[DataKind, int | None, list[Remark]]:
    """What the first rows are and what can be said of them, and how many there are; beyond the most that are counted,
    advice is the same."""
    from ...engine.data.sources import read_rows
    from ...planner.datasource import DataSource

    rows = read_rows(DataSource(path=local_path(path)), limit=_COUNTED)
    first = [row.values for row in islice(rows, _SURVEYED)]
    return kind_of_rows(first[:20]), len(first) + sum(1 for _ in rows), survey(first)


def _print(answers: list[Advice]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from ..console import Console

    console = Console(highlight=False)
    for item in answers:
        console.print(Text(item.question, style="dim"))
        console.print(Padding(Text(sentence(item.answer), style="bold"), (0, 0, 0, 2)))
        console.print(Padding(Text(sentence(item.why)), (0, 0, 0, 2)))
        if item.settings:
            console.print(Text("  " + " ".join(f"--set {key}={value}" for key, value in item.settings.items())))
        console.print(Padding(Text(item.source, style="dim"), (0, 0, 0, 2)))
