"""The files of a checkpoint: which of a folder belong to it, and whether each is whole; told from headers alone.

Nothing here imports torch: a checkpoint is looked at before a run is started.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...planner.errors import ModelError, first_line
from ...planner.hub import read_config
from ...planner.inside import inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: Files that hold a JSON object where they are there.
_CONFIGS = ("config.json", "generation_config.json", ADAPTER_CONFIG)


def require_sound(folder: Path) -> None:
    """Refuse a checkpoint or an adapter that is damaged or not all there.

    Raises:
        ModelError: a config is no JSON object or names a size that no model has, the index names a file that is not
            there, or a file of weights is damaged, cut short or something else by its header.
    """
    for name in _CONFIGS:
        if (folder / name).exists():
            read_config(folder / name)
    files, adapter = weight_files(folder), inside(folder, ADAPTER, error=ModelError)
    if adapter.is_file():
        files.append(adapter)
    elif (folder / ADAPTER_CONFIG).exists() and not files:
        raise ModelError(f"{ADAPTER} is missing", where=str(folder), do="Fetch the adapter again.")
    for file in files:
        opened(file, framework="np")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that ``from_pretrained`` reads: the single one, else those of the index; none is neither.

    Raises:
        ModelError: the index can't be read, or names a file that is not there or lies elsewhere.
    """
    index = folder / INDEX
    files = []
    if index.is_file():
        files = [inside(folder, name, error=ModelError, where=str(index)) for name in indexed(index)]
    if (folder / SINGLE).is_file():
        return [inside(folder, SINGLE, error=ModelError)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f", and so are {len(missing) - 1} more of the {len(files)} files" if len(missing) > 1 else ""
        what = f"{missing[0]} is missing, which {INDEX} names{more}"
        raise ModelError(what, where=str(folder), do="Fetch the model again.")
    return files


def indexed(index: Path) -> list[str]:
    """The names of the files of a checkpoint, as its index gives them.

    Raises:
        ModelError: it is no index.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(name) for name in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError("this is no index of a checkpoint", where=str(index), do="Fetch the model again.") from None


def opened(file: Path, framework: str = "pt") -> Any:
    """A safetensors file whose tensors are read when they are asked for.

    Args:
        framework: whose tensors: ``pt``, or ``np`` where torch is not to be imported.

    Raises:
        ModelError: it is damaged, or can't be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework=framework)
    except (OSError, SafetensorError) as error:
        what, do = _instead(file) or (f"this file can't be read ({first_line(error)})", "Fetch or copy the file again.")
        raise ModelError(what, where=str(file), do=do) from None


#: How files begin that people have in the place of weights.
_OTHERS = {
    b"version https://git-lfs": ("this is the pointer of Git LFS to a file, and not the file", "Run: git lfs pull"),
    b"<!": ("this is a web page, and no safetensors file", "Fetch the file again."),
    b"<h": ("this is a web page, and no safetensors file", "Fetch the file again."),
    b"PK\x03\x04": (
        "this is a zip archive or a pickle, and no safetensors file",
        "Fetch the model's safetensors files.",
    ),
}


def _instead(file: Path) -> tuple[str, str] | None:
    """What a file is that is no safetensors file, and what to do about it, where that can be told."""
    try:
        with open(file, "rb") as raw:
            begin = raw.read(64)
    except OSError:
        return None
    if not begin:
        return "this file is empty", "Fetch or copy the file again."
    return next((told for mark, told in _OTHERS.items() if begin.lstrip().startswith(mark)), None)
