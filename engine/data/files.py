"""The readers of file types: JSON lines, JSON, CSV, plain text, Parquet and Arrow, each a stream of rows.

Whatever is wrong is a :class:`DataError` with file and line, and with what to do about it. A single bad row is
handed to ``refuse``, which raises or takes note of it; a file that can't be read on is an error in any case.
"""

from __future__ import annotations

import csv
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from ...planner.errors import DataError, MissingExtraError
from .magic import converted, misnaming, refuse_binary
from .places import Place, Unreadable, open_bytes, size_of, suffix_of

_MEND = "Mend it there."


class Row(NamedTuple):
    """One record, and its place as ``file:line``."""

    values: dict[str, Any]
    where: str


#: Told of a row that can't be used.
Refuse = Callable[[DataError], None]


def stop(error: DataError) -> None:
    """The strict :data:`Refuse`: the first bad row ends it all."""
    raise error


def read_file(path: Place, refuse: Refuse = stop) -> Iterator[Row]:
    """Yield the rows of one file, by its suffix."""
    suffix = suffix_of(path.name)
    if suffix in (".parquet", ".arrow", ".feather"):
        yield from _read_arrow(path, _parquet_batches if suffix == ".parquet" else _arrow_batches)
        return
    reader: Callable[[Place, Iterator[str], Refuse], Iterator[Row]] = {
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".txt": _read_text,
    }.get(suffix, _read_jsonl)
    rows = 0
    first: list[DataError] = []

    def note(error: DataError) -> None:
        refuse(error)
        if not first:
            first.append(error)

    try:
        with open_bytes(path) as file:
            for row in reader(path, _decoded(path, file, note), note):
                rows += 1
                yield row
    except (OSError, EOFError, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        what = f"the file can't be read on after {rows:,} rows ({why})"
        do = "Fetch it again; it may have been cut off."
        if not rows and (misnamed := misnaming(path)):
            what, do = misnamed
        raise DataError(what, where=str(path), do=do) from None
    except Unreadable as error:
        if not rows:
            raise
        do = "Start again when the network is steady, or fetch the file first."
        raise DataError(f"the stream broke off after {rows:,} rows: {error.what}", where=str(path), do=do) from None
    if not rows and first:
        what = f"not one row can be read; the first: {first[0].what}"
        raise DataError(what, where=first[0].where, do=first[0].do)
    if not rows:
        what = "the file is empty" if size_of(path) == 0 else "the file holds no row"
        raise DataError(what, where=str(path), do="Leave it out, or give it rows.")


def _decoded(path: Place, file: Any, refuse: Refuse) -> Iterator[str]:
    """The lines of a UTF-8 file, line ends kept, without the byte order mark."""
    for number, line in enumerate(file, 1):
        if number == 1:
            refuse_binary(path, line)
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8"
            refuse(DataError(what, where=f"{path}:{number}", do=converted("LATIN1", path)))
            yield "\n"  # so that the lines after it keep their numbers


def _read_jsonl(path: Place, lines: Iterator[str], refuse: Refuse) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line) if number > _CLOSELY else json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            if number == 1 and line.lstrip().startswith("["):
                do = f"This looks like one JSON list; name the file {path.stem}.json."
                raise DataError(f"the line is not valid JSON: {_explain(error)}", where=where, do=do) from None
            do = "Every line must be one whole JSON object."
            if "\r" in line.rstrip("\r\n"):
                do = f"Its lines end in a carriage return alone: tr '\\r' '\\n' < {path.name} > fixed.jsonl"
            refuse(DataError(f"the line is not valid JSON: {_explain(error)}", where=where, do=do))
        except RecursionError:
            refuse(DataError("the line is nested too deeply", where=where))
        except _Twice as error:
            what = f"the key {error.key!r} stands twice in one object"
            refuse(DataError(what, where=where, do="Remove one of them."))
        else:
            yield from _row(values, where, refuse)


#: Lines whose keys are looked at one by one, which takes longer: whoever writes a key twice does so from the start.
_CLOSELY = 100


class _Twice(Exception):
    """A key stands twice in an object."""

    def __init__(self, key: str) -> None:
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return made


def _explain(error: json.JSONDecodeError, *, column: bool = True) -> str:
    pos = min(error.pos, len(error.doc.rstrip()))  # the end of a line that breaks off, not the beginning of the next
    near = error.doc[max(0, pos - 10) : pos + 20].strip()
    what = (error.msg[0].lower() + error.msg[1:]).removesuffix(" at")
    at = pos - error.doc.rfind("\n", 0, pos)
    return what + (f" at column {at}" if column else "") + (f", near {near!r}" if near else "")


def _row(values: Any, where: str, refuse: Refuse) -> Iterator[Row]:
    if isinstance(values, dict):
        yield Row(values, where)
        return
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    what = f"the row is {names.get(type(values), 'null')}, not an object"
    refuse(DataError(what, where=where, do='A row looks like {"messages": [...]} or {"instruction": "...", ...}.'))


def _read_json(path: Place, lines: Iterator[str], refuse: Refuse) -> Iterator[Row]:
    """A list of objects; an object in which one value is such a list; or JSON lines under a .json name."""
    read: list[str] = []
    for line in lines:
        read.append(line)
        if line.strip():
            break
    lead = "".join(read)
    first = lead.lstrip()[:1]
    if first == "[":
        yield from _JsonList(path, lead, lines).items(refuse)
    elif first == "{" and _is_json(lead):
        for line in lines:
            read.append(line)
            if line.strip():
                yield from _read_jsonl(path, chain(read, lines), refuse)
                return
        yield from _read_json_object(path, lead, refuse)
    elif first:
        yield from _read_json_object(path, lead + "".join(lines), refuse)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _read_json_object(path: Place, text: str, refuse: Refuse) -> Iterator[Row]:
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
        if not tables and isinstance(tree, dict) and any(isinstance(value, list | dict) for value in tree.values()):
            do = "Make it one JSON list of objects; pandas writes one with to_json(orient='records')."
        raise DataError(f"the file {found}, so its rows are not clear", where=str(path), do=do)
    for index, values in enumerate(tree[tables[0]]):
        yield from _row(values, f"{path}:{tables[0]}[{index}]", refuse)


class _JsonList:
    """A JSON list decoded item by item, so that neither the text nor the items need to be whole in memory."""

    def __init__(self, path: Place, text: str, lines: Iterator[str]) -> None:
        self.path, self.text, self.lines = path, text, lines
        self.pos = text.index("[") + 1
        self.line, self._counted = 1, 0
        self._decode = json.JSONDecoder().raw_decode

    def items(self, refuse: Refuse) -> Iterator[Row]:
        more = self._peek() != "]"
        while more:
            where = self.where()
            yield from _row(self._value(), where, refuse)
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


def _read_csv(path: Place, lines: Iterator[str], refuse: Refuse) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    header_line = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if suffix_of(path.name) == ".tsv" else max(",;\t", key=header_line.count)
    spaced = all(name.startswith(" ") for name in header_line.split(delimiter)[1:])  # "question, answer"
    reader = csv.reader(chain([header_line], lines), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    line = 1
    try:
        header = next(reader, [])
        _refuse_twice(f"{path}:1", header)
        line = reader.line_num + 1
        for record in reader:
            if len(record) == len(header):
                yield Row(dict(zip(header, record, strict=True)), f"{path}:{line}")
            elif record:
                what = f"the row has {len(record)} fields, but the header has {len(header)}"
                do = 'Put text with commas or line breaks in "quotes".'
                refuse(DataError(what, where=f"{path}:{line}", do=do))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"the row is not valid CSV: {error}", where=f"{path}:{line}", do="Check the quotes there."
        ) from None


def _refuse_twice(where: str, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two columns are called {twice!r}", where=where, do="Rename one of them.")


def _read_text(path: Place, lines: Iterator[str], _refuse: Refuse) -> Iterator[Row]:
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


def _read_arrow(path: Place, batches: Callable[[Any], Iterator[Any]]) -> Iterator[Row]:
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtraError(f"reading {path.name}", "train") from None
    number = 0
    try:
        with open_bytes(path) as file:
            for batch in batches(file):
                if not number:
                    _refuse_twice(str(path), batch.schema.names)
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}:{number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        named = "Parquet" if suffix_of(path.name) == ".parquet" else "Arrow"
        where = f"{path}:{number}" if number else str(path)
        what = f"the file is not valid {named}{', or ends too soon' if number else ''} ({str(error).splitlines()[0]})"
        what, do = (None if number else misnaming(path)) or (what, "Write it again.")
        raise DataError(what, where=where, do=do) from None
    if not number:
        raise DataError("the file holds no row", where=str(path), do="Leave it out, or give it rows.")


def _parquet_batches(file: Any) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as table:
        yield from table.iter_batches(batch_size=1024)


def _arrow_batches(file: Any) -> Iterator[Any]:
    """Both kinds of Arrow file: the stream that ``datasets`` writes, and the one with a footer (Feather)."""
    import pyarrow as pa

    head = file.read(6)
    file.seek(0)
    if head == b"ARROW1":
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)
