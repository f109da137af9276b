"""Rows from files: what is read, and what is said about files that can't be."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from finetui.engine.data.hub import explain
from finetui.engine.data.sources import is_local, read_rows
from finetui.planner.datasource import DataSource
from finetui.planner.errors import DataError, HubError

Write = Callable[[str, str | bytes], str]


def rows_of(path: str, **options: object) -> list[tuple[dict[str, object], str]]:
    source = DataSource(path=path, **options)
    return [(row.values, row.where.removeprefix(str(Path(path).parent) + "/")) for row in read_rows(source)]


GOOD = {
    "jsonl": ('{"a": 1}\n\n{"a": 2}\n', ["x:1", "x:3"]),
    "jsonl with BOM and CRLF": ('\ufeff{"a": 1}\r\n{"a": 2}', ["x:1", "x:2"]),
    "json list": ('[\n {"a": 1},\n {"a":\n 2}\n]\n', ["x:2", "x:3"]),
    "json object": ('{"version": 1, "data": [{"a": 1}, {"a": 2}]}', ["x:data[0]", "x:data[1]"]),
    "json lines named json": ('\n{"a": 1}\n\n{"a": 2}\n', ["x:2", "x:4"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_json_in_its_shapes(write: Write, name: str) -> None:
    text, places = GOOD[name]
    path = write("x.jsonl" if name.startswith("jsonl") else "x.json", text)
    expected = [place.replace("x:", Path(path).name + ":") for place in places]
    assert rows_of(path) == [({"a": 1}, expected[0]), ({"a": 2}, expected[1])]


def test_csv_with_quotes_line_breaks_and_bom(write: Write) -> None:
    path = write("x.csv", '\ufeffq,a\r\n1,"two\r\nlines, one comma"\r\n\r\n3,4\r\n')
    assert rows_of(path) == [({"q": "1", "a": "two\r\nlines, one comma"}, "x.csv:2"), ({"q": "3", "a": "4"}, "x.csv:5")]
    assert rows_of(write("y.csv", "q;a\n1;2\n"))[0][0] == {"q": "1", "a": "2"}
    assert rows_of(write("y.tsv", "q\ta\n1,1\t2\n"))[0][0] == {"q": "1,1", "a": "2"}


def test_text_is_split_at_blank_lines(write: Write) -> None:
    path = write("x.txt", "\none\ntwo\n\n\nthree\n")
    assert rows_of(path) == [({"text": "one\ntwo"}, "x.txt:2"), ({"text": "three"}, "x.txt:6")]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    parquet.write_table(pa.table({"a": [1, 2]}), tmp_path / "x.parquet")
    assert rows_of(str(tmp_path / "x.parquet")) == [({"a": 1}, "x.parquet:1"), ({"a": 2}, "x.parquet:2")]
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"x\.parquet: the file is not valid Parquet"):
        rows_of(str(tmp_path / "x.parquet"))


def test_a_folder_is_its_files_without_what_describes_them(write: Write, tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/c.jsonl", "a.jsonl", ".git/d.jsonl", "dataset_info.json"):
        write(name, json.dumps({"n": name}) + "\n")
    names = [row.values["n"] for row in read_rows(DataSource(path=str(tmp_path)))]
    assert names == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_limit(write: Write) -> None:
    path = write("x.jsonl", '{"a": 1}\n' * 5)
    assert len(rows_of(path, limit=3)) == 3
    assert len(list(read_rows(DataSource(path=path, limit=3), limit=2))) == 2


BAD: dict[str, tuple[str, str | bytes, str]] = {
    "broken line": ("x.jsonl", '{"a": 1}\n' * 730 + '{"a": \n', r"x\.jsonl:731: the line is not valid JSON"),
    "no object": ("x.jsonl", '{"a": 1}\n[1]\n', r"x\.jsonl:2: the row is a list, not an object"),
    "list named jsonl": ("x.jsonl", '[\n{"a": 1}]', r"x\.jsonl:1: .* name the file x\.json\."),
    "empty": ("x.jsonl", "", r"x\.jsonl: the file is empty"),
    "blank": ("x.jsonl", "\n \n", r"x\.jsonl: the file holds no row"),
    "empty list": ("x.json", "[]", r"x\.json: the file holds no row"),
    "latin-1": ("x.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"x\.jsonl:2: byte 0xe9 at column 11 is not UTF-8.*iconv"),
    "utf-16": ("x.csv", "a,b\n1,2\n".encode("utf-16"), r"x\.csv: the file is UTF-16"),
    "missing comma": ("x.json", '[{"a": 1}\n{"a": 2}]', r"x\.json:2: expected ',' or '\]'"),
    "trailing comma": ("x.json", '[{"a": 1},\n\n]', r"x\.json:3: a comma stands before"),
    "cut off": ("x.json", '[{"a": 1},\n{"a": 2}', r"x\.json:2: expected .* the end of the file"),
    "broken item": ("x.json", '[{"a": 1},\n{"a": 2x}]', r"x\.json:2: the file is not valid JSON"),
    "number in list": ("x.json", '[{"a": 1},\n 7]', r"x\.json:2: the row is a number"),
    "two tables": (
        "x.json",
        '{"p": [{"a": 1}], "q": [{"a": 1}]}',
        r"x\.json: the file has 2 lists of objects \(p, q\)",
    ),
    "no table": ("x.json", '{\n"p": 1\n}', r"x\.json: the file holds no list of objects"),
    "broken object": ("x.json", '{\n"p": [}\n', r"x\.json:2: the file is not valid JSON"),
    "too few fields": ("x.csv", "a,b\n1,2\n3\n", r"x\.csv:3: the row has 1 fields, but the header has 2"),
    "open quote": ("x.csv", 'a,b\n1,"2\n', r"x\.csv:2: the row is not valid CSV"),
    "same column": ("x.csv", "a,a\n1,2\n", r"x\.csv:1: two columns are called 'a'"),
    "header only": ("x.csv", "a,b\n", r"x\.csv: the file holds no row"),
    "other suffix": ("x.xlsx", "PK", r"x\.xlsx: \.xlsx is no known dataset type"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_with_their_line(write: Write, name: str) -> None:
    file, content, message = BAD[name]
    with pytest.raises(DataError, match=message):
        rows_of(write(file, content))


def test_a_missing_file_names_its_neighbours(write: Write, tmp_path: Path) -> None:
    write("support.jsonl", "{}\n")
    with pytest.raises(DataError, match=r"there is no such file\. Did you mean support\.jsonl\?"):
        rows_of(str(tmp_path / "suport.jsonl"))
    with pytest.raises(DataError, match="There is no folder"):
        rows_of(str(tmp_path / "nowhere" / "x.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no dataset file"):
        rows_of(str(tmp_path / "empty"))


def test_what_counts_as_a_hub_dataset() -> None:
    assert not is_local("squad")
    assert not is_local("HuggingFaceH4/ultrachat_200k")
    assert all(map(is_local, ("rows.jsonl", "./x", "~/x", "/x/y", "a/b/c", "rows.xlsx")))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_the_first_rows_of_a_large_file_are_cheap(tmp_path: Path, suffix: str) -> None:
    row = {"a": "x" * 1000}
    line = json.dumps(row)
    lines = {
        "jsonl": [line] * 20_000,
        "json": ["[", *[line + ","] * 20_000, "{}]"],
        "csv": ["a", *["x" * 1000] * 20_000],
    }
    (tmp_path / f"x.{suffix}").write_text("\n".join(lines[suffix]) + "\n")
    tracemalloc.start()
    first = list(islice(read_rows(DataSource(path=str(tmp_path / f"x.{suffix}"))), 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.values for item in first] == [row] * 10
    assert peak < 2 << 20


def test_failures_of_the_hub_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    gated = GatedRepoError.__new__(GatedRepoError)
    error = explain(gated, "o/d")
    assert isinstance(error, HubError)
    assert "Accept its terms at https://hub.example/datasets/o/d" in error.do
    assert "can't be reached" in str(explain(ConnectionError("Couldn't reach the Hub"), "o/d"))
    assert "switched off" in str(explain(OfflineModeIsEnabled("offline"), "o/d"))
    missing = ValueError("Config name is missing. Please pick one among the available configs: ['en', 'de']")
    assert "['en', 'de']" in explain(missing, "o/d").do
    assert isinstance(explain(missing, "o/d"), DataError)


def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "from finetui.engine.data.sources import read_rows\nfrom finetui.planner.datasource import DataSource\n"
        "try: next(iter(read_rows(DataSource(path='some/dataset'))))\nexcept Exception as e: print(type(e).__name__, e)"
    )
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("HubError some/dataset: the hub can't be reached"), done.stdout + done.stderr


def test_reading_rows_needs_no_extra() -> None:
    code = (
        "import sys; import finetui.engine.data.preview, finetui.engine.data.prepare\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'textual', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
