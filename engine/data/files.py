"""The readers of file types: JSON lines, JSON, CSV, plain text and Parquet, each a stream of rows.

Whatever is wrong is a :class:`DataError` with file and line, and with what to do about it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ...planner.errors import DataError, MissingExtraError

_MEND = "Mend it there."


@dataclass(frozen=True, slots=True)
class Row:
    """One record, and its place as ``file:line``."""

    values: dict[str, Any]
    where: str


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of one file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    reader: Callable[[Path, Iterator[str]], Iterator[Row]] = {
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".txt": _read_text,
    }.get(suffix, _read_jsonl)
    empty = True
    try:
        with path.open("rb") as file:
            for row in reader(path, _decoded(path, file)):
                empty = False
                yield row
    except OSError as error:
        raise DataError(f"the file can't be read ({error.strerror})", where=str(path)) from None
    if empty:
        what = "the file is empty" if path.stat().st_size == 0 else "the file holds no row"
        raise DataError(what, where=str(path), do="Leave it out, or give it rows.")


def _decoded(path: Path, file: IO[bytes]) -> Iterator[str]:
    """The lines of a UTF-8 file, line ends kept, without the byte order mark."""
    for number, line in enumerate(file, 1):
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError("the file is UTF-16, not UTF-8", where=str(path), do=_convert("UTF-16", path))
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8"
            raise DataError(what, where=f"{path}:{number}", do=_convert("LATIN1", path)) from None


def _convert(encoding: str, path: Path) -> str:
    return f"Convert it, for example: iconv -f {encoding} -t UTF-8 {path.name} > fixed{path.suffix}"


def _read_jsonl(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == 1 and line.lstrip().startswith("["):
                do = f"This looks like one JSON list; name the file {path.stem}.json."
            else:
                do = "Every line must be one whole JSON object."
            raise DataError(f"the line is not valid JSON: {_explain(error)}", where=where, do=do) from None
        except RecursionError:
            raise DataError("the line is nested too deeply", where=where) from None
        yield _row(values, where)


def _explain(error: json.JSONDecodeError, *, column: bool = True) -> str:
    near = error.doc[max(0, error.pos - 10) : error.pos + 20].strip()
    what = error.msg[0].lower() + error.msg[1:]
    return what + (f" at column {error.colno}" if column else "") + (f", near {near!r}" if near else "")


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
        what = f"the row is {names.get(type(values), 'null')}, not an object"
        raise DataError(what, where=where, do='A row looks like {"messages": [...]} or {"instruction": "...", ...}.')
    return Row(values, where)


def _read_json(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    """A list of objects; an object in which one value is such a list; or JSON lines under a .json name."""
    read: list[str] = []
    for line in lines:
        read.append(line)
        if line.strip():
            break
    lead = "".join(read)
    first = lead.lstrip()[:1]
    if first == "[":
        yield from _JsonList(path, lead, lines).items()
    elif first == "{" and _is_json(lead):
        for line in lines:
            read.append(line)
            if line.strip():
                yield from _read_jsonl(path, chain(read, lines))
                return
        yield from _read_json_object(path, lead)
    elif first:
        yield from _read_json_object(path, lead + "".join(lines))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _read_json_object(path: Path, text: str) -> Iterator[Row]:
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"the file is not valid JSON: {_explain(error)}"
        raise DataError(what, where=f"{path}:{error.lineno}", do=_MEND) from None
    fields = tree.items() if isinstance(tree, dict) else ()
    tables = [key for key, value in fields if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(tables) != 1:
        found = f"has {len(tables)} lists of objects ({', '.join(tables)})" if tables else "holds no list of objects"
        do = "Make it one JSON list of objects."
        raise DataError(f"the file {found}, so its rows are not clear", where=str(path), do=do)
    for index, values in enumerate(tree[tables[0]]):
        yield _row(values, f"{path}:{tables[0]}[{index}]")


class _JsonList:
    """A JSON list decoded item by item, so that neither the text nor the items need to be whole in memory."""

    def __init__(self, path: Path, text: str, lines: Iterator[str]) -> None:
        self.path, self.text, self.lines = path, text, lines
        self.pos = text.index("[") + 1
        self.line, self._counted = 1, 0
        self._decode = json.JSONDecoder().raw_decode

    def items(self) -> Iterator[Row]:
        more = self._peek() != "]"
        while more:
            where = self.where()
            yield _row(self._value(), where)
            follower = self._peek()
            if follower not in (",", "]"):
                found = repr(follower) if follower else "the end of the file"
                raise DataError(f"expected ',' or ']' after an item, found {found}", where=self.where(), do=_MEND)
            self.pos += 1
            more = follower == ","
            if more and self._peek() == "]":
                raise DataError("a comma stands before the closing ']'", where=self.where(), do="Remove it.")

    def where(self) -> str:
        self.line += self.text.count("\n", self._counted, self.pos)
        self._counted = self.pos
        return f"{self.path}:{self.line}"

    def _peek(self) -> str:
        """The next character that is no white space; '' at the end."""
        while True:
            while self.pos < len(self.text) and self.text[self.pos] in " \t\r\n":
                self.pos += 1
            if self.pos < len(self.text):
                return self.text[self.pos]
            if not self._grow(1 << 16):
                return ""

    def _grow(self, characters: int) -> bool:
        self.where()  # counts the lines that are about to be dropped
        parts, size = [self.text[self.pos :]], 0
        for line in self.lines:
            parts.append(line)
            size += len(line)
            if size >= characters:
                break
        self.text, self.pos, self._counted = "".join(parts), 0, 0
        return size > 0

    def _value(self) -> Any:
        while True:
            try:
                value, self.pos = self._decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                # The item may just not be read whole yet; doubling keeps the work linear.
                if self._grow(max(1 << 16, 2 * len(self.text))):
                    continue
                self.pos = error.pos
                what = f"the file is not valid JSON: {_explain(error, column=False)}"
                raise DataError(what, where=self.where(), do=_MEND) from None
            return value


def _read_csv(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    header_line = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header_line.count)
    reader = csv.reader(chain([header_line], lines), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(reader, [])
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"two columns are called {twice!r}", where=f"{path}:1", do="Rename one of them.")
        line = reader.line_num + 1
        for record in reader:
            if record:
                if len(record) != len(header):
                    what = f"the row has {len(record)} fields, but the header has {len(header)}"
                    raise DataError(what, where=f"{path}:{line}", do='Put text with commas or line breaks in "quotes".')
                yield Row(dict(zip(header, record, strict=True)), f"{path}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"the row is not valid CSV: {error}", where=f"{path}:{line}", do="Check the quotes there."
        ) from None


def _read_text(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    """Documents of plain text: a blank line ends one, as in the text corpora of BERT and its successors."""
    document: list[str] = []
    start = 1
    for number, line in enumerate(chain(lines, [""]), 1):
        if line.strip():
            if not document:
                start = number
            document.append(line)
        elif document:
            yield Row({"text": "".join(document).rstrip()}, f"{path}:{start}")
            document = []


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtraError(f"reading {path.name}", "train") from None
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                raise DataError("the file holds no row", where=str(path), do="Leave it out, or give it rows.")
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}:{number}")
    except (pa.ArrowException, OSError) as error:
        what = f"the file is not valid Parquet ({str(error).splitlines()[0]})"
        raise DataError(what, where=str(path), do="Write it again.") from None
