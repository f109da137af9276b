"""``finetui data``: what a recipe's data is, and exactly which of its tokens are trained on."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...planner.errors import DataError
from ...planner.recipe import Recipe
from ..data_look import ROWS, look_at, report_facts, troubles
from .options import JsonFlag, takes_recipe

if TYPE_CHECKING:
    from ...engine.data.preview import Sample, Survey
    from ...engine.data.report import Report

SamplesFlag = Annotated[
    int, typer.Option("--samples", "--sample", "-n", min=0, help="How many examples to show token by token.")
]
RowsFlag = Annotated[int, typer.Option("--rows", min=1, help="How many rows of each source to tokenise and count.")]
#: Columns of a histogram's longest bar.
_BAR = 40


@takes_recipe(without={"tuning", "rank", "targets", "gpu", "gpus", "micro_batch", "checkpointing", "optimizer"})
def data(recipe: Recipe, samples: SamplesFlag = 2, rows: RowsFlag = ROWS, as_json: JsonFlag = False) -> None:
    """Formats, rows and lengths of a recipe's data, what is wrong with it, and the tokens that count for the loss."""
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
    if report is not None and report.examples and not report.trained_tokens and recipe.method not in _PROMPTS:
        what = "no token would be trained: no example has an answer with loss"
        raise DataError(what, where="data", do=f"Rows are cut at {report.sequence_length} tokens; see sequence_length.")


#: Methods whose answers are yet to be generated.
_PROMPTS = ("grpo", "rloo", "ppo")


def _sources(found: Survey) -> None:
    from rich.table import Table

    from ..console import Console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("source", "split", "format"):
        table.add_column(heading)
    for heading in ("rows", "tokens/row", "longest", "trained"):
        table.add_column(heading, justify="right")
    table.add_column("because")
    for item in found.sources:
        about = "" if item.rows_exact else "≈ "
        table.add_row(
            item.path,
            item.split,
            item.format or "?",
            "?" if item.rows is None else f"{about}{item.rows:,}",
            "?" if item.mean_tokens is None else f"≈ {item.mean_tokens:,.0f}",
            "?" if item.max_tokens is None else f"≈ {item.max_tokens:,}",
            "?" if item.trained_share is None else f"≈ {item.trained_share:.0%}",
            f"{item.confidence:.0%} sure: {item.why}" if item.confidence else item.why,
        )
    Console(highlight=False).print(table)


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
