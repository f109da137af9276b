"""Files as users have them: misnamed, packed, in other encodings, with columns twice, in folders with splits."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.sources import read_rows, splits_told
from finetui.planner.datasource import DataSource
from finetui.planner.errors import DataError

ROWS = [{"text": f"row {i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def values(path: str, **more: Any) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(DataSource(path=path, **more))]


def zstandard(data: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def parquet(table: Any) -> bytes:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def test_zstandard_here_and_at_an_address(write: Any) -> None:
    fsspec = pytest.importorskip("fsspec")
    packed = zstandard(LINES)
    assert values(write("x.jsonl.zst", packed + packed)) == ROWS * 2  # two frames, as tools that work in parallel write
    fsspec.filesystem("memory").pipe("/packed/x.jsonl.zst", packed)
    assert values("memory://packed/x.jsonl.zst") == ROWS
    with pytest.raises(DataError, match=r"x\.jsonl\.zst: the file can't be read on after \d+ rows .*cut off"):
        values(write("x.jsonl.zst", zstandard(LINES * 100)[:-8]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", gzip.compress(LINES), r"the file is gzip, whatever its name says\. Call it x\.jsonl\.gz\."),
        ("x.jsonl.gz", LINES, r"the file is not packed, whatever its name says\. Call it x\.jsonl\."),
        ("x.jsonl.bz2", gzip.compress(LINES), r"the file is gzip, .* Call it x\.jsonl\.gz\."),
        ("x.jsonl.xz", LINES, r"the file is not packed, .* Call it x\.jsonl\."),
        ("x.csv", b"PAR1\x15\x04\x15", r"the file is Parquet, .* Call it x\.parquet\."),
        ("x.csv", b"PK\x03\x04\x14", r"the file is a ZIP archive, .* Give its rows as \.jsonl\."),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"a pointer of Git LFS, .*git lfs pull"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\n", r"a pointer of Git LFS, .*git lfs pull"),
        ("x.jsonl", LINES.decode().encode("utf-16-le"), r"UTF-16, not UTF-8.*iconv -f UTF-16LE"),
        ("x.jsonl", LINES.decode().encode("utf-16-be"), r"UTF-16, not UTF-8.*iconv -f UTF-16BE"),
    ],
    ids=[
        "gzip", "plain as gzip", "gzip as bzip2", "plain as xz", "Parquet as CSV", "ZIP as CSV", "LFS as JSONL",
        "LFS as Parquet", "UTF-16, low byte first", "UTF-16, high byte first",
    ],
)  # fmt: skip
def test_what_is_not_what_its_name_says(write: Any, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        values(write(name, content))


def test_lines_that_end_in_a_carriage_return_alone(write: Any) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:1: .*carriage return alone: tr '\\r' '\\n' < x\.jsonl"):
        values(write("x.jsonl", LINES.replace(b"\n", b"\r")))


def test_a_line_that_breaks_off_is_told_by_where_it_ends(write: Any) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:1: the line is not valid JSON: expecting value at column 6, near"):
        values(write("x.jsonl", b'{"a":\n{"a": 1}\n'))


def test_a_key_that_stands_twice(write: Any) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:2: the key 'b' stands twice in one object"):
        values(write("x.jsonl", b'{"a": 1}\n{"a": {"b": 1, "b": 2}}\n'))


def test_a_column_that_stands_twice_in_parquet(write: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match=r"x\.parquet: two columns are called 'text'"):
        values(write("x.parquet", parquet(table)))


def test_csv_with_a_space_after_each_comma(write: Any) -> None:
    assert values(write("x.csv", 'q, a\n1, "two, three"\n')) == [{"q": "1", "a": "two, three"}]
    assert values(write("y.csv", "q,a\n1, two\n")) == [{"q": "1", "a": " two"}]  # here it belongs to the value


def test_large_strings_structs_and_dictionaries_of_arrow(write: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    turns = pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.large_string())]))
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "kind": "x"}]
    schema = pa.schema([("messages", turns), ("kind", pa.dictionary(pa.int32(), pa.string()))])
    table = pa.Table.from_pylist(rows, schema=schema)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    assert values(write("x.feather", sink.getvalue())) == rows
    assert values(write("x.parquet", parquet(table))) == rows


def test_when_no_line_can_be_read_the_first_is_named_even_where_they_are_skipped(write: Any) -> None:
    path = write("x.jsonl", b"[1]\n[2]\n")
    with pytest.raises(DataError, match=r"x\.jsonl:1: not one row can be read; the first: the row is a list"):
        list(read_rows(DataSource(path=path), refuse=lambda _: None))


@pytest.mark.parametrize(
    ("names", "train", "held"),
    [
        (("train.jsonl", "test.jsonl"), ["train"], ["test"]),
        (("data/train-00000-of-00002.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-0.jsonl"),
         ["train-00000-of-00002"], ["validation-00000-of-00001"]),
        (("a.jsonl", "eval/b.jsonl"), ["a"], ["b"]),
        (("latest.jsonl", "testimony.jsonl"), ["latest", "testimony"], ["latest", "testimony"]),
        (("test-1.jsonl", "test-2.jsonl"), ["test-1", "test-2"], ["test-1", "test-2"]),
    ],
)  # fmt: skip
def test_the_splits_of_a_folder(
    write: Any, tmp_path: Path, names: tuple[str, ...], train: list[str], held: list[str]
) -> None:
    for name in names:
        write(f"folder/{name}", json.dumps({"name": Path(name).stem}) + "\n")
    folder = str(tmp_path / "folder")
    assert [row["name"] for row in values(folder)] == train
    assert [row["name"] for row in values(folder, split="eval")] == held


def test_splits_at_an_address() -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("train", "test"):
        store.pipe(f"/split/set/{name}.jsonl", json.dumps({"name": name}).encode() + b"\n")
    assert values("memory://split/set") == [{"name": "train"}]
    assert splits_told(DataSource(path="memory://split/set")) == "test.jsonl left out, by name of another split"
    assert splits_told(DataSource(path="memory://split/set/test.jsonl")) == ""
    assert values("memory://split/set", split="eval") == values("memory://split/set/test.jsonl") == [{"name": "test"}]


@pytest.mark.parametrize("key", ["subset", "hub_split"])
def test_keys_of_the_hub_have_no_effect_on_files(write: Any, key: str) -> None:
    with pytest.raises(DataError, match=f"{key} is for hub datasets, and this is files"):
        values(write("x.jsonl", LINES), **{key: "x"})
