"""``finetui data``: what a recipe's data is, and exactly which of its tokens are trained on."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...planner.errors import DataError
from ...planner.recipe import Recipe
from ..columns import Column
from ..data_look import ROWS, look_at, report_facts, troubles
from .options import JsonFlag, takes_recipe

if TYPE_CHECKING:
    from ...engine.data.preview import Sample, SourceSurvey, Survey
    from ...engine.data.report import Report

SamplesFlag = Annotated[
    int, typer.Option("--samples", "--sample", "-n", min=0, help="How many examples to show token by token.")
]
RowsFlag = Annotated[int, typer.Option("--rows", min=1, help="How many rows of each source to tokenise and count.")]
#: Columns of a histogram's longest bar.
_BAR = 40


@takes_recipe(without={"tuning", "rank", "targets", "gpu", "gpus", "micro_batch", "checkpointing", "optimizer"})
def data(recipe: Recipe, samples: SamplesFlag = 2, rows: RowsFlag = ROWS, as_json: JsonFlag = False) -> None:
    """What is in a recipe's data, and which tokens are trained on. Its formats, rows and lengths, and what is wrong."""
    seen = look_at(recipe, samples, rows)
    found, report, shown = seen.survey, seen.report, seen.samples
    for note in seen.notes:
        print(note, file=sys.stderr)
    if as_json:
        answer: dict[str, Any] = dataclasses.asdict(found)
        answer["report"] = dataclasses.asdict(report) if report else None
        answer["samples"] = [dataclasses.asdict(sample) for sample in shown]
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        _sources(found)
        if report is not None:
            _report(report)
        for sample in shown:
            _show(sample)
    if report is not None:
        _refuse(recipe, report)


def _refuse(recipe: Recipe, report: Report) -> None:
    """End as a run with this data would: nothing to train on, or a bad row in a source that stops at one."""
    if report.examples and not report.trained_tokens and recipe.method not in _PROMPTS:
        what = "no token would be trained: no example has an answer with loss"
        raise DataError(what, where="data", do=f"Rows are cut at {report.sequence_length} tokens; see sequence_length.")
    bad = sum(problem.count for problem in report.problems)
    if bad and not report.examples:
        raise DataError("not one row can be used", where="data", do="See why above.")
    if bad and any(source.on_bad_row == "stop" for source in recipe.data):
        rows = "1 row can't" if bad == 1 else f"{bad:,} rows can't"
        do = "Mend them, or set on_bad_row: skip, to leave them out and have them counted."
        raise DataError(f"{rows} be used, and a run would stop at the first", where="data", do=do)
    if report.whole and report.good_share in (0.0, 1.0):
        what = f"all {report.examples:,} answers are judged {'good' if report.good_share else 'bad'}"
        raise DataError(what, where="data", do="KTO learns from the difference: give it answers of both kinds.")
    if report.examples and report.planned_tokens == 0:
        raise DataError("the weights leave no example to train on", where="data", do="Raise weight.")


#: Methods whose answers are yet to be generated.
_PROMPTS = ("grpo", "rloo", "ppo")


def _sources(found: Survey) -> None:
    from ..console import Console
    from ..fit_view import print_table

    console = Console(highlight=False)
    rows = [_source(item) for item in found.sources]
    print_table(_COLUMNS, rows, console)
    for row, item in zip(rows, found.sources, strict=True):
        sure = f"{item.confidence:.0%} sure: " if item.confidence else ""
        if item.why:
            name = f"{row['source']}: " if len(rows) > 1 else ""
            console.print(f"{name}{sure}{item.why}", style="dim", markup=False)


_COLUMNS = (
    Column("source", least=12), Column("split", rank=2), Column("format"), Column("rows", right=True),
    Column("tokens/row", right=True), Column("longest", right=True, rank=1), Column("trained", right=True),
)  # fmt: skip


def _source(item: SourceSurvey) -> dict[str, str]:
    about = "" if item.rows_exact else "≈ "
    return {
        "source": _shown(item.path),
        "split": item.split,
        "format": item.format or "?",
        "rows": "?" if item.rows is None else f"{about}{item.rows:,}",
        "tokens/row": "?" if item.mean_tokens is None else f"≈ {item.mean_tokens:,.0f}",
        "longest": "?" if item.max_tokens is None else f"≈ {item.max_tokens:,}",
        "trained": "?" if item.trained_share is None else f"≈ {item.trained_share:.0%}",
    }


def _shown(path: str) -> str:
    """A path from here, where it lies here."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return path


def _report(report: Report) -> None:
    """The counts in words, the histogram, what is wrong."""
    from ..console import Console

    console = Console(highlight=False)
    lines = [f"{label:11}{text}" for label, text in report_facts(report)]
    console.print("\n" + "\n".join(lines) + "\n", soft_wrap=True)
    most = max((item.count for item in report.histogram), default=0)
    for item in report.histogram:
        bar = "█" * round(_BAR * item.count / most) or ("▏" if item.count else "")
        style = "yellow" if item.start >= report.sequence_length else ""
        console.print(f"{item.start:>7,} to {item.stop - 1:<7,} {bar} {item.count:,}", style=style)
    for trouble in troubles(report):
        console.print(f"! {trouble}", style="yellow", soft_wrap=True)


def _show(sample: Sample) -> None:
    """One example: trained tokens are underlined and green on a terminal, in [[ ]] elsewhere."""
    from rich.text import Text

    from ..console import Console

    console = Console(highlight=False)
    cut = f", {sample.cut} tokens cut off" if sample.cut else ""
    part = f" ({sample.part})" if sample.part else ""
    console.print(f"\n{sample.where}{part}: {len(sample.pieces)} tokens, {sample.trained} trained{cut}", style="bold")
    text, inside = Text(), False
    for piece in sample.pieces:
        if console.is_terminal:
            text.append(piece.text, style="green underline" if piece.trained else "dim")
            continue
        if piece.trained != inside:
            text.append("[[" if piece.trained else "]]")
            inside = piece.trained
        text.append(piece.text)
    if inside:
        text.append("]]")
    console.print(text, soft_wrap=True)
