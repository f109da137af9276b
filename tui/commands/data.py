"""``finetui data``: what a recipe's data is, and exactly which of its tokens are trained on."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from ...engine.data.preview import survey
from ...engine.planning import plan_for
from ...planner.errors import DataError
from ...planner.recipe import Recipe
from .options import JsonFlag, takes_recipe

if TYPE_CHECKING:
    from ...engine.data.preview import Sample

SamplesFlag = Annotated[int, typer.Option("--samples", "-n", min=0, help="How many examples to show token by token.")]


@takes_recipe(without={"tuning", "rank", "targets", "gpu", "gpus", "micro_batch", "checkpointing", "optimizer"})
def data(recipe: Recipe, samples: SamplesFlag = 2, as_json: JsonFlag = False) -> None:
    """Formats, rows and lengths of a recipe's data, and the tokens that count for the loss."""
    if not recipe.data:
        raise DataError("the recipe names no data", where="data", do="Add 'data: rows.jsonl', or give --data.")
    found = survey(recipe)
    shown = _samples(recipe, samples) if samples else []
    if as_json:
        answer = {**dataclasses.asdict(found), "samples": [dataclasses.asdict(sample) for sample in shown]}
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
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
            item.why,
        )
    console.print(table)
    for sample in shown:
        _show(sample)


def _samples(recipe: Recipe, count: int) -> list[Sample]:
    if find_spec("transformers") is None:
        print("Install finetui[train] to see single tokens; counts below are estimates.", file=sys.stderr)
        return []
    from ...engine.data.prepare import DataSettings
    from ...engine.data.preview import preview
    from ...engine.model import load_tokenizer, locate

    resolved = plan_for(recipe).resolved
    settings = DataSettings(resolved.sequence_length, train_on=resolved.train_on, seed=resolved.seed)
    tokenizer, notes = load_tokenizer(locate(recipe.model), recipe.chat_template)
    for note in notes:
        print(note, file=sys.stderr)
    return preview(recipe, tokenizer, count, settings)


def _show(sample: Sample) -> None:
    """One example: trained tokens are underlined and green on a terminal, in [[ ]] elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    cut = f", {sample.cut} tokens cut off" if sample.cut else ""
    console.print(f"\n{sample.where}: {len(sample.pieces)} tokens, {sample.trained} trained{cut}", style="bold")
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
