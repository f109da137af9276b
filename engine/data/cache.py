"""Prepared rows on disk: the key they are kept under, the arrays they are gathered in, and folders whole or not at all.

While data is read, each column of token ids is one flat file of int32, so that millions of rows cost neither memory nor
time; the finished rows are an Arrow stream that every rank maps into memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.datasource import DataSource
from ..modes import FOLDER
from .sources import mark_of
from .tokens import IGNORED, Encoded

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa

#: Part of every key: raise it when the same input gives other tokens.
VERSION = 3
#: Tokens that are gathered or written in one go.
_CHUNK = 1 << 20
#: Rows of a batch of the Arrow stream.
_ROWS = 4096


def key(tokenizer: Any, sources: list[DataSource], *settings: Any) -> str:
    """A hash of the data's content, the tokenizer with its template, and the given settings (JSON values)."""
    parts = [VERSION, settings, [[source.model_dump(), mark_of(source)] for source in sources], _state(tokenizer)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _state(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation are set by calls and belong to those, not to the tokenizer.
    tree = json.loads(backend.to_str()) | {"padding": None, "truncation": None} if backend else tokenizer.get_vocab()
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    return [digest, str(tokenizer.chat_template), tokenizer.special_tokens_map]


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends well and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".part-", dir=path.parent))
    try:
        yield work
        work.chmod(FOLDER)
        try:
            work.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster, and made the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Gathered:
    """Examples as they come, a flat file per column of token ids; single values and lengths stay in memory.

    Args:
        folder: where the files are made.
        names: columns of token ids. ``labels`` follows from the trained spans of ``input_ids``.
        values: columns of one value, ``b`` for true and false, ``d`` for numbers.
    """

    def __init__(self, folder: Path, names: Sequence[str], values: Mapping[str, str] | None = None) -> None:
        self.names = list(names)
        self.lengths = {name: array("i") for name in names}
        self.values: dict[str, array[Any]] = {name: array(code) for name, code in (values or {}).items()}
        self._paths = {name: folder / f"{name}.bin" for name in [*names, "labels"]}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        self._waiting = {name: array("i") for name in names}
        self._edges = array("q")

    def __len__(self) -> int:
        return len(self.lengths[self.names[0]])

    def learn(self, row: Encoded) -> None:
        """Add one example of the columns ``input_ids`` and ``labels``."""
        begin = len(self._waiting["input_ids"])
        for start, stop in row.spans:
            self._edges.extend((begin + start, begin + stop))
        self.add({"input_ids": row.input_ids})

    def add(self, columns: dict[str, list[int]], values: Mapping[str, float] | None = None) -> None:
        """Add one example."""
        for name, ids in columns.items():
            self._waiting[name] += array("i", ids)  # four times as fast as to extend it by the list
            self.lengths[name].append(len(ids))
        for name, value in (values or {}).items():
            self.values[name].append(value)
        if len(self._waiting[self.names[-1]]) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        import numpy as np

        if self.names == ["input_ids"]:
            ids = np.frombuffer(self._waiting["input_ids"], dtype=np.int32)
            inside = np.zeros(len(ids) + 1, dtype=np.int8)
            edges = np.frombuffer(self._edges, dtype=np.int64)
            np.add.at(inside, edges[0::2], 1)
            np.add.at(inside, edges[1::2], -1)
            labels = np.where(np.cumsum(inside[:-1], dtype=np.int8) > 0, ids, np.int32(IGNORED))
            labels.astype(np.int32).tofile(self._files["labels"])
            del ids, edges
            self._edges = array("q")
        for name, waiting in self._waiting.items():
            waiting.tofile(self._files[name])
            self._waiting[name] = array("i")

    def close(self) -> None:
        """Write out what is left and remove the files that hold nothing."""
        self._flush()
        for file in self._files.values():
            file.close()

    def remove(self) -> None:
        """Delete the files."""
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def columns(self) -> dict[str, Column]:
        """The columns, mapped into memory."""
        names = [*self.names, "labels"] if self.names == ["input_ids"] else self.names
        return {name: Column(self._paths[name], self.lengths.get(name, self.lengths[self.names[0]])) for name in names}


class Column:
    """Rows of int32 of different length, end to end in a file."""

    def __init__(self, path: Path, lengths: Sequence[int]) -> None:
        import numpy as np

        self.lengths = np.asarray(lengths, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._values = np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of these rows end to end, and their lengths."""
        import numpy as np

        # Rows that follow each other are copied together.
        firsts = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1, [len(rows)]])
        begins, ends = self._starts[rows[firsts[:-1]]].tolist(), self._starts[rows[firsts[1:] - 1] + 1].tolist()
        values = [self._values[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return np.concatenate(values), self.lengths[rows]


def write_rows(path: Path, gathered: Gathered, rows: Iterable[Sequence[int]], *, packed: bool) -> str:
    """Write examples as the rows of an Arrow stream.

    Args:
        path: the file.
        gathered: the examples.
        rows: for each row the examples in it, which without packing is one.
        packed: join the examples of a row; the first label of each is masked, since it would be predicted from the
            last token of the one before, and ``seq_lengths`` says where each ends.

    Returns:
        A mark of all that the rows hold, whatever the version of Arrow that wrote them.
    """
    import numpy as np
    import pyarrow as pa

    columns = gathered.columns()
    lists = [*columns, *(["seq_lengths"] if packed else [])]
    # A value that some examples lack is of no use to a trainer.
    singles = {name: array for name, array in gathered.values.items() if not np.isnan(array).any()}
    types = {"b": pa.bool_(), "d": pa.float64()}
    fields = [(name, pa.list_(pa.int32())) for name in lists]
    schema = pa.schema(fields + [(name, types[array.typecode]) for name, array in singles.items()])
    remaining = iter(rows)
    marks = {name: hashlib.sha256() for name in ("rows", *columns, *singles)}
    with pa.ipc.new_stream(str(path), schema) as stream:
        while chosen := list(islice(remaining, _ROWS)):
            counts = np.array([len(row) for row in chosen])
            examples = np.fromiter((index for row in chosen for index in row), np.int64, int(counts.sum()))
            arrays = []
            marks["rows"].update(counts.astype("<i8").data)
            for name, column in columns.items():
                values, lengths = column.take(examples)
                if packed and name == "labels":
                    values[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = IGNORED
                marks["rows"].update(lengths.astype("<i8").data)
                marks[name].update(values.astype("<i4").data)
                arrays.append(_lists(values, np.add.reduceat(lengths, np.cumsum(counts) - counts)))
            if packed:
                arrays.append(_lists(lengths, counts))
            for name, array in singles.items():
                kept = np.frombuffer(array, dtype=array.typecode)[examples]
                marks[name].update(kept.data)
                arrays.append(pa.array(kept.astype(bool) if array.typecode == "b" else kept))
            stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return hashlib.sha256(b"".join(name.encode() + mark.digest() for name, mark in marks.items())).hexdigest()[:24]


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    import numpy as np
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))


def read_arrow(path: Path) -> datasets.Dataset:
    """The rows of an Arrow stream, mapped into memory."""
    import datasets

    return datasets.Dataset.from_file(str(path))
