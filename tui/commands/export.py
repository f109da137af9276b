"""``finetui export``: what a run made, in the form that others load."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ...engine.run import Run, trained
from ...planner.errors import MissingExtraError, RunError
from ..quiet import hush_libraries
from .options import JsonFlag, RunArgument

FORMATS = ("adapter", "merged")
ToFlag = Annotated[str, typer.Option("--to", help="adapter (PEFT) or merged (one model in Hugging Face format).")]
DestinationFlag = Annotated[Path | None, typer.Option("--out", help="Folder to write; default: <run>/export/<format>.")]


def export(run: RunArgument, to: ToFlag = "merged", out: DestinationFlag = None, as_json: JsonFlag = False) -> None:
    """Write the adapter, or the model with the adapter merged in."""
    found = trained(Run.open(run))
    if to not in FORMATS:
        raise RunError(f"{to!r} is not an export format", where="--to", do=f"Use {' or '.join(FORMATS)}.")
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise MissingExtraError("export", "train")
    hush_libraries()
    from ...engine.export import export_run

    path = export_run(found, to=to, destination=out or found.path / "export" / to)
    if as_json:
        print(json.dumps({"run": found.name, "format": to, "path": str(path)}))
        return
    print(path)
    loader = (
        "PeftModel.from_pretrained(base, path)" if to == "adapter" else "AutoModelForCausalLM.from_pretrained(path)"
    )
    print(f"Load it with {loader}.", file=sys.stderr)
