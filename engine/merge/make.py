"""A merge carried out: tensor by tensor, into a folder that is there whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ...planner.errors import ModelError, UserError
from ...planner.inside import inside
from ..modes import give_usual_modes
from ..output import written_whole
from . import record
from .layout import Layout, Part, Piece, lay_out
from .methods import METHODS, Group, seed_of
from .recipe import MergeRecipe
from .sources import Source, find, find_listed
from .vocabulary import with_words
from .write import shards_of, size_of, write_shards

#: What goes along with the weights: config, tokenizer, templates, a model's own code, and what its licence asks for.
_ALONG = (
    "*token*.json", "*vocab*.json", "*_config.json", "chat_template*", "*.jinja", "*.model", "merges.txt", "vocab.txt",
    "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_NOT_ALONG = {"adapter_config.json"}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

Progress = Callable[[int, int], None]
"""Receives the bytes that are written and those that there will be."""


@dataclass(frozen=True)
class Prepared:
    """A merge whose models are at hand and fit on each other."""

    recipe: MergeRecipe
    sources: list[Source]
    layout: Layout

    @property
    def bytes(self) -> int:
        """Of the result's tensors: what the disk needs."""
        return sum(size_of(piece) for piece in self.layout.pieces)


@dataclass(frozen=True)
class Merged:
    """A result: its folder, the SHA-256 of its files, and of a repetition whether these are those of ``made``."""

    path: Path
    files: dict[str, str]
    same: bool | None = None


def prepare(recipe: MergeRecipe, *, listed: bool = False) -> Prepared:
    """Find the models, downloading what is of the Hub, and lay out the result.

    Args:
        listed: download nothing but configs and the names of tensors; the result can be looked at, and not be made.

    Raises:
        UserError: a model is not to be had, or they don't fit on each other.
    """
    sources = [find_listed(name) if listed else find(name) for name in recipe.names]
    return Prepared(recipe, sources, lay_out(recipe, sources))


def merge(prepared: Prepared, destination: str | Path, progress: Progress = lambda done, total: None) -> Merged:
    """Write the result, its config and tokenizer, and merge.yaml.

    Args:
        destination: a folder that does not exist yet, or is empty.

    Raises:
        UserError: the folder is not empty, the disk too small, or a model other than in ``made``.
        ModelError: a tensor can't be read, or the result is not finite.
        TrainingError: the disk is full (cause ``disk``).
    """
    recipe, sources, layout = prepared.recipe, prepared.sources, prepared.layout
    target = free_folder(destination, prepared.bytes)
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(record.hashes_of_all, {source.name: source.weight_files() for source in sources})
        if recipe.made is not None:
            record.check_same(recipe, hashing.result())
        done = 0

        def make(piece: Piece) -> torch.Tensor:
            nonlocal done
            tensor = compute(piece, prepared)
            done += size_of(piece)
            progress(done, prepared.bytes)
            return tensor

        with written_whole(target) as partial:
            copy_along(sources[0].folders, partial)
            config = json.dumps(layout.config, indent=2, ensure_ascii=False) + "\n"
            (partial / "config.json").write_text(config, encoding="utf-8")
            if layout.alignment is not None and layout.alignment.new:
                for name, tree in with_words(partial, layout.alignment.new).items():
                    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
                    (partial / name).write_text(text, encoding="utf-8")
            files = write_shards(partial, shards_of(layout.pieces), make)
            record.write(partial, recipe, hashing.result(), files)
            give_usual_modes(partial)
    return Merged(target, files, None if recipe.made is None else files == recipe.made.output)


def free_folder(destination: str | Path, needed: int) -> Path:
    """A folder for a result of so many bytes.

    Raises:
        UserError: there is something in it, or the disk has too little room.
    """
    target = Path(destination).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("the destination is not empty", where=str(target), do="Choose a new folder.")
    free = shutil.disk_usage(_existing(target)).free
    if free < needed:
        what = f"the result needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free there"
        raise UserError(what, where=str(target), do="Free some space, or choose a folder on another disk.")
    return target


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def compute(piece: Piece, prepared: Prepared) -> torch.Tensor:
    """One tensor of the result, in its format.

    Raises:
        ModelError: it holds numbers that are not finite, or one that can't be merged differs between the models.
    """
    recipe = prepared.recipe
    if piece.copied:
        first, *others = [_read(part, prepared) for part in piece.parts]
        if any(not torch.equal(first, other) for other in others):
            do = "Only models in which it is the same can be merged."
            raise ModelError(f"{piece.name} holds no floating-point numbers and differs", where="merge", do=do)
        return first
    inputs, base = _inputs(piece, prepared)
    group = Group(inputs, list(piece.each), piece.whole, base, seed_of(recipe.seed, piece.name))
    result = METHODS[recipe.method].merge(group).to(_DTYPES[piece.dtype])
    del group, inputs, base
    if result.numel() and not all(math.isfinite(bound) for bound in result.aminmax()):
        what = f"{piece.name} of the result has numbers that are not finite in {piece.dtype}"
        raise ModelError(
            what, where="merge", do="Check the models and weights; bfloat16 holds larger numbers than fp16."
        )
    return result


def _inputs(piece: Piece, prepared: Prepared) -> tuple[Iterator[torch.Tensor], torch.Tensor | None]:
    """The models' tensors in fp32, read as they are asked for, and the base's."""
    alignment = prepared.layout.alignment
    if not piece.by_word or alignment is None:
        base = None if piece.base is None else _read(piece.base, prepared).float()
        return (_read(part, prepared).float() for part in piece.parts), base
    parts = [*piece.parts, *([piece.base] if piece.base is not None else [])]
    tensors = alignment.apply([_read(part, prepared).float() for part in parts], [part.source for part in parts])
    return iter(tensors[: len(piece.parts)]), tensors[-1] if piece.base is not None else None


def _read(part: Part, prepared: Prepared) -> torch.Tensor:
    tensor: torch.Tensor = prepared.sources[part.source].read(part.tensor)
    return tensor


def copy_along(folders: Sequence[Path], target: Path) -> None:
    """Copy what goes along with the weights; of files of one name that of the last folder is taken."""
    for folder in folders:
        for path in sorted({path for pattern in _ALONG for path in folder.glob(pattern)}):
            if path.is_file() and path.name not in _NOT_ALONG:
                shutil.copyfile(inside(folder, path.name, error=ModelError), target / path.name)
