"""Tokenised rows on disk: the key they are kept under, their Arrow files, and folders made whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.datasource import DataSource
from .hub import load_hub
from .sources import is_local, source_files

if TYPE_CHECKING:
    import datasets

#: Part of every key: raise it when the same input gives other tokens.
VERSION = 1
#: Files up to this size are told apart by their content, larger ones by size and time of change.
_HASHED_BYTES = 64 << 20


def key(tokenizer: Any, sources: list[DataSource], *settings: Any) -> str:
    """A hash of the data's content, the tokenizer with its template, and the given settings (JSON values)."""
    parts = [VERSION, settings, [[source.model_dump(), _content(source)] for source in sources], _state(tokenizer)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _content(source: DataSource) -> list[Any]:
    if not is_local(source.path):
        return [load_hub(source)._fingerprint]
    marks: list[Any] = []
    for path in source_files(source):
        stat = path.stat()
        if stat.st_size > _HASHED_BYTES:
            marks.append([path.name, stat.st_size, stat.st_mtime_ns])
        else:
            marks.append([path.name, hashlib.sha256(path.read_bytes()).hexdigest()])
    return marks


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
        work.chmod(0o755)
        try:
            work.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster, and made the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


class RowWriter:
    """Rows of token ids into an Arrow stream, a batch at a time."""

    def __init__(self, path: Path, *, packed: bool) -> None:
        import pyarrow as pa

        names = ["input_ids", "labels", *(["seq_lengths"] if packed else [])]
        self._schema = pa.schema([(name, pa.list_(pa.int32())) for name in names])
        self._rows: list[dict[str, Any]] = []
        self._stream = pa.ipc.new_stream(str(path), self._schema)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._stream.close()

    def write(self, row: dict[str, Any]) -> None:
        """Add one row: ``input_ids``, ``labels`` and, if packed, ``seq_lengths``."""
        self._rows.append(row)
        if len(self._rows) >= 1024:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def read_arrow(path: Path) -> datasets.Dataset:
    """The rows of an Arrow stream, mapped into memory."""
    import datasets

    return datasets.Dataset.from_file(str(path))


def lengths(rows: datasets.Dataset) -> list[int]:
    """Tokens of each row, without reading the tokens."""
    import pyarrow.compute as pc

    return pc.list_value_length(rows.data.column("input_ids")).to_pylist() if len(rows) else []
