"""Rows of a dataset, each with the place it came from, read as a stream.

A source is a file (.jsonl .json .csv .tsv .parquet .arrow .txt, or one of these compressed), a folder of such files, an
address of either, or the id of a hub dataset. Whatever is wrong with a row is a :class:`DataError` whose ``where`` is
``file:line``. Reading local text files needs the standard library alone; Parquet and Arrow need pyarrow, hub datasets
``datasets`` and addresses fsspec, which all come with the ``train`` extra.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...planner.datasource import DataSource
from ...planner.errors import DataError
from ...planner.inside import inside, local_path
from ..pickles import SUFFIXES as PICKLES
from .files import Refuse, Row, read_file, stop
from .hub import EVAL_SPLITS, hub_mark, read_hub
from .places import READ, SUFFIXES, Place, is_address, list_files, suffix_of

#: JSON files that lie beside a dataset and describe it.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
#: What stands between the words of a file's name.
_WORDS = re.compile(r"[^a-z]+")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
#: Files up to this size are told apart by their content, larger ones by size and time of change.
_HASHED_BYTES = 64 << 20


def is_local(path: str) -> bool:
    """Whether a source's path means a file or folder, rather than a hub dataset."""
    if is_address(path):
        return False
    local = local_path(path, error=DataError)
    if path.startswith(("/", "./", "../", "~")) or local.exists() or suffix_of(path) in SUFFIXES:
        return True
    return _HUB_ID.fullmatch(path) is None or ("/" not in path and "." in path)


def source_files(source: DataSource) -> list[Path]:
    """The files of a local source, sorted by name; of a folder with splits, those of the source's own.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    path = local_path(source.path, error=DataError)
    if path.is_dir():
        found = _dataset_files(path)
        if not found:
            _refuse_pickles(sorted(p for p in path.rglob("*") if p.suffix.lower() in PICKLES))
            _refuse_scripts(path)
            raise DataError("the folder holds no dataset file", where=str(path), do=READ)
        for file in found:
            inside(path, file.relative_to(path).as_posix(), error=DataError)
        return of_split(source, found, [file.relative_to(path).as_posix() for file in found])
    if not path.exists():
        raise DataError("there is no such file", where=str(path), do=_near(path))
    if suffix_of(path.name) not in SUFFIXES:
        _refuse_pickles([path] if path.suffix.lower() in PICKLES else [])
        raise DataError(
            f"{suffix_of(path.name) or 'a file without suffix'} is no known dataset type", where=str(path), do=READ
        )
    return [path]


def _dataset_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if suffix_of(p.name) in SUFFIXES and p.is_file())
    return [p for p in found if p.name not in _METADATA and not p.relative_to(folder).as_posix().startswith(".")]


def of_split(source: DataSource, files: Sequence[Place], names: Sequence[str]) -> list[Any]:
    """The files of a folder that belong to a source's split, where their names tell them apart as the hub's do
    (``train.jsonl`` and ``test.jsonl``, ``data/validation-00000-of-00001.parquet``); otherwise all of them."""
    apart: dict[str, list[Place]] = {}
    for file, name in zip(files, names, strict=True):
        words = _WORDS.split(name.lower())
        apart.setdefault(next((split for split in EVAL_SPLITS if split in words), "train"), []).append(file)
    wanted = ("train",) if source.split == "train" else EVAL_SPLITS
    return list(next((apart[split] for split in wanted if split in apart), files))


def splits_told(source: DataSource) -> str:
    """What is left out of a folder since its name is that of another split; empty where nothing is."""
    path = Path(source.path).expanduser()
    if is_address(source.path):
        every, kept = list_files(source.path), _addressed(source)
        left = [file.name for file in every if file not in kept]
    elif is_local(source.path) and path.is_dir():
        files = source_files(source)
        left = [file.relative_to(path).as_posix() for file in _dataset_files(path) if file not in files]
    else:
        return ""
    if not left:
        return ""
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return f"{', '.join(left[:3])}{more} left out, by name of another split"


def _addressed(source: DataSource) -> list[Any]:
    found = list_files(source.path)
    base = source.path.rstrip("/").partition("://")[2]
    return of_split(source, found, [file.address.partition("://")[2].removeprefix(base) for file in found])


def _refuse_pickles(files: Sequence[Path]) -> None:
    if files:
        what = "this is a pickle, which can run any program when it is read"
        do = "Have whoever made it write its rows as .jsonl or .parquet, such as with DataFrame.to_parquet."
        raise DataError(what, where=str(files[0]), do=do)


def _refuse_scripts(folder: Path) -> None:
    script = next(iter(sorted(folder.glob("*.py"))), None)
    if script is not None:
        what = "the folder holds no data but a program that makes it, and finetui runs none"
        do = "Run it yourself if you trust it, and give what it writes as .jsonl or .parquet."
        raise DataError(what, where=str(script), do=do)


def mark_of(source: DataSource) -> list[Any]:
    """What changes when the content of a source does."""
    if is_address(source.path):
        return [[str(file), file.mark] for file in list_files(source.path)]
    if not is_local(source.path):
        return [hub_mark(source)]
    marks: list[Any] = []
    for path in source_files(source):
        stat = path.stat()
        if stat.st_size > _HASHED_BYTES:
            marks.append([path.name, stat.st_size, stat.st_mtime_ns])
        else:
            marks.append([path.name, hashlib.sha256(path.read_bytes()).hexdigest()])
    return marks


def read_rows(source: DataSource, limit: int | None = None, refuse: Refuse = stop) -> Iterator[Row]:
    """Yield the rows of a source in order, never more than ``limit`` or ``source.limit``.

    Args:
        source: a dataset of the recipe.
        limit: the most rows to read.
        refuse: told of rows that can't be read; by default the first of them is an error.

    Raises:
        DataError: a missing, empty or unreadable file; a broken row, with file and line.
        HubError: a hub dataset that is gated, not found, or out of reach.
        MissingExtraError: Parquet, Arrow or a hub dataset without the ``train`` extra.
    """
    limits = [n for n in (limit, source.limit) if n is not None]
    most = min(limits) if limits else None
    files: Sequence[Place]
    if is_address(source.path):
        files = _addressed(source)
    elif is_local(source.path):
        files = source_files(source)
    else:
        return islice(read_hub(source, streaming=source.streaming or most is not None), most)
    _refuse_hub_keys(source)
    return islice(chain.from_iterable(read_file(file, refuse) for file in files), most)


def _refuse_hub_keys(source: DataSource) -> None:
    if source.streaming:
        do = "Leave it out: files are read row by row in any case, and only their tokens are stored."
        raise DataError("streaming is for hub datasets", where=source.path, do=do)
    for key in ("subset", "hub_split"):
        if getattr(source, key) is not None:
            do = "Remove it; name a folder or a file of what you want."
            raise DataError(f"{key} is for hub datasets, and this is files", where=source.path, do=do)


def _near(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder} either; check the path."
    names = [p.name for p in folder.iterdir() if p.is_dir() or suffix_of(p.name) in SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"{folder} holds {', '.join(sorted(names)[:6])}." if names else f"{folder} holds no dataset file."
