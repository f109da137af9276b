"""``finetui export``: what a run made, in the form that others load."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ...engine.run import Run, trained
from ...planner.errors import MissingExtraError, RunError
from ..quiet import hush_libraries
from .options import JsonFlag, RunArgument

FORMATS = ("adapter", "merged", "gguf", "ollama", "vllm")
ToFlag = Annotated[
    str,
    typer.Option(
        "--to",
        help="adapter (PEFT), merged (one model in Hugging Face format), gguf (llama.cpp), ollama (a GGUF and its "
        "Modelfile) or vllm (what vLLM serves, and the command).",
    ),
]
DestinationFlag = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder to write; default: <run>/export/<format>.")
]
QuantFlag = Annotated[
    str | None,
    typer.Option(
        "--quant",
        help="gguf and ollama: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0; default: as the weights are stored.",
    ),
]
SystemFlag = Annotated[str, typer.Option("--system", help="ollama: the system message of the Modelfile.")]


def export(
    run: RunArgument,
    to: ToFlag = "merged",
    out: DestinationFlag = None,
    quant: QuantFlag = None,
    system: SystemFlag = "",
    as_json: JsonFlag = False,
) -> None:
    """What a run made, in the form that others load."""
    found = trained(Run.open(run))
    if to not in FORMATS:
        raise RunError(f"{to!r} is not an export format", where="--to", do=f"Use {', '.join(FORMATS)}.")
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise MissingExtraError("export", "train")
    hush_libraries()
    from ...engine.export import export as write

    status = found.status
    progress = _Progress()
    destination = out or found.path / "export" / (f"{to}-{quant.lower()}" if quant else to)
    made = write(found, to=to, destination=destination, quant=quant, system=system, tell=progress)
    notes = list(made.notes)
    if status.state != "finished":
        notes.insert(0, f"the run is {status.state}: this is what it had learned by its last checkpoint")
    if as_json:
        told = {"checked": list(made.checked), "notes": notes, "use": list(made.use)}
        print(json.dumps({"run": found.name, "format": to, "path": str(made.path), **told}))
        return
    print(made.path)
    for sentence in made.checked:
        print(f"  {sentence}", file=sys.stderr)
    for sentence in notes:
        print(f"! {sentence}", file=sys.stderr)
    for line in made.use:
        print(f"Use it with: {line}", file=sys.stderr)


class _Progress:
    """One line on a terminal that is written over; elsewhere a line for each part, when it begins."""

    def __init__(self) -> None:
        self.moves = sys.stderr.isatty()
        self._part, self._due = "", 0.0

    def __call__(self, what: str, done: int, whole: int) -> None:
        if not self.moves:
            if what != self._part:
                print(f"{what} …", file=sys.stderr, flush=True)
        elif what != self._part or done == whole or time.monotonic() >= self._due:
            self._due = time.monotonic() + 0.1
            line = f"{what} {done} of {whole}"
            end = "\r" + " " * len(line) + "\r" if done == whole else ""
            print(f"\r{line}{end}", end="", file=sys.stderr, flush=True)
        self._part = what
