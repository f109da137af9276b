"""Files at addresses, compressed files and Arrow files, and what is said of those that can't be had."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.places import suffix_of
from finetui.engine.data.preview import survey
from finetui.engine.data.sources import is_local, mark_of, read_rows
from finetui.planner.datasource import DataSource
from finetui.planner.errors import DataError
from finetui.planner.recipe import Recipe

ROWS = [{"text": f"row {i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A file system in memory, which fsspec reaches under ``memory://``."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a.jsonl", LINES)
    store.pipe("/bucket/more/b.jsonl.gz", gzip.compress(LINES))
    store.pipe("/bucket/notes.md", b"no data")
    yield store
    store.rm("/bucket", recursive=True)


def texts(path: str, **more: Any) -> list[str]:
    return [row.values["text"] for row in read_rows(DataSource(path=path, **more))]


def test_a_file_a_folder_and_a_pattern_at_an_address(bucket: Any) -> None:
    one = [row["text"] for row in ROWS]
    assert texts("memory://bucket/a.jsonl") == one
    assert texts("memory://bucket") == one * 2
    assert texts("memory://bucket/*.jsonl") == one
    assert texts("memory://bucket/a.jsonl", limit=2) == one[:2]
    assert next(read_rows(DataSource(path="memory://bucket/a.jsonl"))).where.endswith("bucket/a.jsonl:1")
    assert not is_local("memory://bucket/a.jsonl")


def test_parquet_at_an_address(bucket: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    bucket.pipe("/bucket/x.parquet", (tmp_path / "x.parquet").read_bytes())
    assert texts("memory://bucket/x.parquet") == [row["text"] for row in ROWS]


def test_the_mark_changes_with_the_content(bucket: Any) -> None:
    source = DataSource(path="memory://bucket/a.jsonl")
    before = mark_of(source)
    assert before == mark_of(source)
    bucket.pipe("/bucket/a.jsonl", LINES * 2)
    assert mark_of(source) != before


def test_a_plan_does_not_reach_out(bucket: Any) -> None:
    found = survey(Recipe.build({"model": "m", "data": "memory://bucket/a.jsonl"}))
    assert (found.train_rows, found.sources[0].why) == (None, "not looked at before it is downloaded")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://bucket/none.jsonl", r"none\.jsonl: there is nothing at this address"),
        ("memory://bucket/notes.md", r"holds no dataset file\. finetui reads \.jsonl"),
        ("nowhere://bucket/a.jsonl", r"nowhere:// is no address that can be read\. Use s3://"),
        ("http://127.0.0.1:9/a.jsonl", r"can't be reached|needs a package that is not installed"),
    ],
)
def test_addresses_that_can_not_be_read(bucket: Any, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(path)


def test_a_file_over_http(tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

    (tmp_path / "x.jsonl").write_bytes(LINES)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/x.jsonl"
        assert texts(address) == [row["text"] for row in ROWS]
        assert mark_of(DataSource(path=address)) == mark_of(DataSource(path=address))
        with pytest.raises(DataError, match=r"y\.jsonl: there is nothing at this address"):
            texts(address.replace("x.jsonl", "y.jsonl"))
        server.shutdown()


class Whole(BaseHTTPRequestHandler):
    """A server that gives a file from its beginning alone, and of ``broken.jsonl`` a half."""

    body = b""

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # who asked for a part has heard enough
                self.wfile.write(self.body[: len(self.body) // 2] if "broken" in self.path else self.body)

    do_HEAD = do_GET


def test_a_server_that_gives_no_parts_is_read_from_the_beginning(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    wide = [{"text": f"{i}" + "x" * 980} for i in range(8_000)]  # 8 MB: more than is asked for at a time
    with ThreadingHTTPServer(("127.0.0.1", 0), Whole) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        Whole.body = "".join(json.dumps(row) + "\n" for row in wide).encode()
        assert texts(f"{address}/x.jsonl") == [row["text"] for row in wide]
        with pytest.raises(DataError, match=r"broken\.jsonl: the stream broke off after [\d,]+ rows: ") as told:
            texts(f"{address}/broken.jsonl")
        count = int(str(told.value).partition("after ")[2].partition(" rows")[0].replace(",", ""))
        assert 0 < count <= 4_000  # as much as had come through when it broke
        Whole.body = gzip.compress(Whole.body)
        assert texts(f"{address}/y.jsonl.gz", limit=7000)[-1] == wide[6999]["text"]
        table = pa.table({"a": list(range(200_000))})
        parquet.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
        Whole.body = (tmp_path / "x.parquet").read_bytes()
        with pytest.raises(DataError, match=r"this type is read in parts\. Fetch the file first"):
            texts(f"{address}/x.parquet")
        server.shutdown()


def test_local_files_are_not_streamed_by_wish(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=r"streaming is for hub datasets\. Leave it out: files are read row by row"):
        texts(str(tmp_path / "x.jsonl"), streaming=True)


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, pack: Any) -> None:
    path = tmp_path / f"x.jsonl.{suffix}"
    path.write_bytes(pack(LINES))
    assert texts(str(path)) == [row["text"] for row in ROWS]
    assert survey(Recipe.build({"model": "m", "data": str(path)})).sources[0].rows == 5
    path.write_bytes(pack(LINES * 200)[:-12])
    with pytest.raises(DataError, match=r"can't be read on .*may have been cut off"):
        texts(str(path))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / "x.arrow"
    with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert texts(str(path)) == [row["text"] for row in ROWS]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not valid Arrow"):
        texts(str(path))


def test_a_saved_dataset_is_a_folder_of_arrow_files(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert texts(str(tmp_path / "saved")) == [row["text"] for row in ROWS]


def test_suffixes() -> None:
    assert [suffix_of(name) for name in ("a.JSONL", "a.jsonl.gz", "a.parquet", "a.gz", "a")] == [
        ".jsonl",
        ".jsonl",
        ".parquet",
        "",
        "",
    ]
