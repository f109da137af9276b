"""From a run to files that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from ...planner.errors import RunError
from ..run import Run
from .exported import Exported, Tell, say_nothing

Target = Literal["adapter", "merged", "gguf", "ollama", "vllm"]
__all__ = ["Exported", "Target", "export", "export_run"]


def export_run(run: Run, to: Target, destination: str | Path) -> Path:
    """:func:`export` for whoever wants the folder alone."""
    return export(run, to, destination).path


def export(
    run: Run,
    to: Target,
    destination: str | Path,
    *,
    quant: str | None = None,
    system: str = "",
    tell: Tell = say_nothing,
) -> Exported:
    """Write what a run made to ``destination``, whole or not at all.

    Args:
        to: ``adapter`` (PEFT format; the base is needed beside it), ``merged`` (a model that stands alone), ``gguf``
            (one file for llama.cpp), ``ollama`` (that and a Modelfile) or ``vllm`` (an adapter if vLLM takes it, else
            merged).
        destination: a folder that does not exist yet, or is empty.
        quant: gguf and ollama: the number format of the weights; None keeps that which they are stored in.
        system: ollama: the system message of the Modelfile.
        tell: hears how far it is.

    Raises:
        RunError: the run has no model yet, can't be exported this way, or the folder is not empty.
        TrainingError: the disk is full (cause ``disk``).
    """
    destination = Path(destination).expanduser().resolve()
    if to not in get_args(Target):
        raise RunError(f"{to!r} is not a form of export", where="--to", do=f"Use {', '.join(get_args(Target))}.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise RunError("the destination is not empty", where=str(destination), do="Choose a new folder.")
    if quant is not None and to not in ("gguf", "ollama"):
        raise RunError(f"--to {to} keeps the format of the weights", where="--quant", do="Leave --quant out.")
    if system and to != "ollama":
        raise RunError(f"--to {to} has no place for a system message", where="--system", do="Leave --system out.")
    if to == "adapter":
        from .adapter import export_adapter

        return export_adapter(run, destination)
    if to == "merged":
        from .merged import export_merged

        return export_merged(run, destination, tell)
    if to == "gguf":
        from .gguf import export_gguf

        return export_gguf(run, destination, tell, quant=quant or "auto")
    if to == "ollama":
        from .ollama import export_ollama

        return export_ollama(run, destination, tell, quant=quant or "auto", system=system)
    from .vllm import export_vllm

    return export_vllm(run, destination, tell)
