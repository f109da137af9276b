"""``finetui import``: a recipe from a training file of Axolotl, LLaMA-Factory, torchtune or TRL."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...engine.durable import write_atomically
from ...planner.errors import RecipeError
from ...planner.importers import Imported, import_file
from .options import JsonFlag

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file that you train with there.")]
OutFlag = Annotated[Path | None, typer.Option("-o", "--out", help="Recipe to write; stdout if left out.")]
FromFlag = Annotated[
    Literal["axolotl", "llamafactory", "torchtune", "trl"] | None,
    typer.Option("--from", help="Whose file it is; known by its keys if left out."),
]
GpusFlag = Annotated[
    int, typer.Option("--gpus", min=1, help="How many GPUs you start it on: its batch is one of each GPU.")
]
MethodFlag = Annotated[
    Literal["sft", "dpo", "kto", "grpo", "rloo", "reward"] | None,
    typer.Option("--method", help="TRL: the command that the file is given to, where its keys don't tell."),
]
ForceFlag = Annotated[bool, typer.Option("--force", help="Write over a recipe that is there.")]


def import_(
    file: FileArgument,
    out: OutFlag = None,
    kind: FromFlag = None,
    gpus: GpusFlag = 1,
    method: MethodFlag = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Axolotl, LLaMA-Factory, torchtune and TRL files as recipes.

    The recipe goes to stdout or a file; what became of each key of theirs is told beside it.
    """
    if out is not None and out.exists():
        if file.exists() and out.samefile(file):
            raise RecipeError("this is the file that is read", where=str(out), do="Give the recipe another name.")
        if not force:
            raise RecipeError("there is a file already", where=str(out), do="Add --force, or give another name.")
    found = import_file(file, kind=kind, gpus=gpus, method=method)
    if out is not None:
        _write(found, out)
    if as_json:
        answer = {
            "from": found.kind,
            "source": found.source,
            "recipe": found.recipe.to_dict(),
            "counts": found.counts,
            "keys": [asdict(fate) for fate in found.fates],
        }
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    if out is None:
        print(found.to_yaml(), end="")
    from ..import_view import print_fates

    print_fates(found)
    if out is not None:
        print(f"\n{out} is written; plan it with: {shlex.join(['finetui', 'plan', str(out)])}", file=sys.stderr)


def _write(found: Imported, out: Path) -> None:
    try:
        write_atomically(out, found.to_yaml())
    except OSError as error:
        what = f"the recipe can't be written ({error.strerror})"
        raise RecipeError(what, where=str(out), do="Give another path.") from None
