"""merge.yaml: what was merged, beside the result, so that the same can be made again bit for bit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...planner.errors import ModelError
from ...planner.version import VERSION
from .recipe import Made, MergeRecipe

FILE = "merge.yaml"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def hashes_of(files: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its name.

    Files of the Hub's cache are links to blobs that huggingface_hub names by it, so that these need not be read
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
    """
    return {file.name: _hash(file) for file in files}


def _hash(file: Path) -> str:
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hashes_of_all(files: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, str]]:
    """Those of the files of each model, by the name that the user gave it."""
    return {name: hashes_of(group) for name, group in files.items()}


def check_same(recipe: MergeRecipe, now: dict[str, dict[str, str]]) -> None:
    """Refuse to repeat a merge with other models than then.

    Raises:
        ModelError: a file is another one than when the merge was made.
    """
    then = recipe.made.sources if recipe.made is not None else {}
    for name, files in then.items():
        found = now.get(name, {})
        changed = sorted(file for file in files.keys() | found.keys() if files.get(file) != found.get(file))
        if changed:
            do = f"Remove `made` from {FILE} to merge what is there now, or get the model of then."
            raise ModelError(f"{changed[0]} is not the file that was merged then", where=name, do=do)


def versions() -> dict[str, str]:
    """What a result rests on beside the recipe: random numbers and sums are those of a release of torch."""
    import torch

    return {"finetui": VERSION, "torch": torch.__version__}


def write(folder: Path, recipe: MergeRecipe, sources: dict[str, dict[str, str]], output: dict[str, str]) -> None:
    """Write merge.yaml into the folder of a result."""
    import yaml

    tree = recipe.model_copy(update={"made": Made(versions=versions(), sources=sources, output=output)}).to_dict()
    (folder / FILE).write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
