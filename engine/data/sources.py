"""Rows of a dataset, each with the place it came from, read as a stream.

A source is a file (.jsonl .json .csv .tsv .parquet .txt), a folder of such files, or the id of a hub dataset. Whatever
is wrong with a row is a :class:`DataError` whose ``where`` is ``file:line``. Reading files needs the standard library
alone; only Parquet (pyarrow) and hub datasets (datasets) need the ``train`` extra.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from ...planner.datasource import DataSource
from ...planner.errors import DataError
from .files import Row, read_file
from .hub import read_hub

#: What :func:`read_rows` reads, by file name.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
#: JSON files that lie beside a dataset and describe it.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ACCEPTED = "finetui reads " + " ".join(SUFFIXES) + "."


def is_local(path: str) -> bool:
    """Whether a source's path means a file or folder, rather than a hub dataset."""
    local = Path(path).expanduser()
    if path.startswith(("/", "./", "../", "~")) or local.exists() or local.suffix.lower() in SUFFIXES:
        return True
    return _HUB_ID.fullmatch(path) is None or ("/" not in path and "." in path)


def source_files(source: DataSource) -> list[Path]:
    """The files of a local source, sorted by name.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found = [p for p in found if p.name not in _METADATA and not p.relative_to(path).as_posix().startswith(".")]
        if not found:
            raise DataError("the folder holds no dataset file", where=str(path), do=_ACCEPTED)
        return found
    if not path.exists():
        raise DataError("there is no such file", where=str(path), do=_near(path))
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path.suffix or 'a file without suffix'} is no known dataset type", where=str(path), do=_ACCEPTED
        )
    return [path]


def read_rows(source: DataSource, limit: int | None = None) -> Iterator[Row]:
    """Yield the rows of a source in order, never more than ``limit`` or ``source.limit``.

    Raises:
        DataError: a missing, empty or unreadable file; a broken row, with file and line.
        HubError: a hub dataset that is gated, not found, or out of reach.
        MissingExtraError: Parquet or a hub dataset without the ``train`` extra.
    """
    limits = [n for n in (limit, source.limit) if n is not None]
    stop = min(limits) if limits else None
    rows: Iterator[Row]
    if is_local(source.path):
        rows = chain.from_iterable(read_file(path) for path in source_files(source))
    else:
        rows = read_hub(source, streaming=stop is not None)
    return islice(rows, stop)


def _near(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder} either; check the path."
    names = [p.name for p in folder.iterdir() if p.is_dir() or p.suffix.lower() in SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"{folder} holds {', '.join(sorted(names)[:6])}." if names else f"{folder} holds no dataset file."
