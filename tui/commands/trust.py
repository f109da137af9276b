"""``finetui trust``: allow the Python files that a model brings with it to run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...planner.errors import ModelError, UserError

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id.")]
YesFlag = Annotated[bool, typer.Option("--yes", help="Allow them without being asked: you have read them.")]


def trust(model: ModelArgument, yes: YesFlag = False) -> None:
    """Show the Python files of a model, and let them run. Only these very files, and only once you agree."""
    from ...engine.models.remote_code import allow, code_of, trusted

    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model)
    files = code_of(folder)
    if not files:
        raise ModelError("this model brings no code", where=model, do="It needs no permission.")
    if trusted(folder):
        print(f"These {len(files)} files are allowed already.", file=sys.stderr)
        return
    for file in files:
        print(f"{file.sha256[:16]}  {file.bytes:>9,}  {folder / file.name}")
    print("These programs run with all your rights: your files, your keys, your network.", file=sys.stderr)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("there is nobody to ask", where="finetui trust", do="Read the files, then add --yes.")
        print("Have you read them, and may they run? Type yes: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() != "yes":
            raise UserError("they may not run", where=model, do="Give a model that needs none of its own.")
    allow(files, model)
    print("Allowed, for as long as no byte of them changes. A recipe needs trust_remote_code: true.", file=sys.stderr)


def _download(model: str) -> Path:
    """The configs and Python files of a hub model, and nothing else of it."""
    from ...planner import hub

    if not hub.is_hub_id(model):
        raise ModelError("there is no such folder", where=model, do="Give a folder or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.py"]))
    except Exception as error:
        raise hub.explained(error, model) from None
