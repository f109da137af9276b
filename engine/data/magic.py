"""Files that are not what their name says, told by their first bytes: packed ones, other types, other encodings."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ...planner.errors import DataError
from .places import Place, suffix_of

#: What files begin with that are no text, and what they then are; the suffix is the one they should have.
_MAGIC = {b"\x1f\x8b": ".gz", b"(\xb5/\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"PAR1": ".parquet",
          b"ARROW1": ".arrow", b"PK\x03\x04": ".zip", b"\x80\x04\x95": ".pkl", b"\x80\x05\x95": ".pkl",
          b"SQLite": ".sqlite", b"%PDF": ".pdf", b"version https://git-lfs": ".lfs"}  # fmt: skip
_KINDS = {".gz": "gzip", ".zst": "Zstandard", ".bz2": "bzip2", ".xz": "xz", ".parquet": "Parquet", ".arrow": "Arrow",
          ".zip": "a ZIP archive", ".pkl": "a Python pickle", ".sqlite": "a database", ".pdf": "a PDF",
          ".lfs": "a pointer of Git LFS, not the data itself"}  # fmt: skip
_ADDED = (".gz", ".zst", ".bz2", ".xz")


def misnaming(path: Place) -> tuple[str, str] | None:
    """What a file on this disk is instead of what its name says, and what to do; None where that is not the trouble."""
    if not isinstance(path, Path):
        return None
    with path.open("rb") as file:
        kind = _kind(file.read(32))
    suffix = path.suffix.lower()
    return None if kind == suffix or not (kind or suffix in _ADDED) else (_is(kind), _rename(path, kind))


def _kind(head: bytes) -> str:
    """The suffix that a file's first bytes call for; empty where they are those of text."""
    return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), "")


def _is(kind: str) -> str:
    return f"the file is {_KINDS.get(kind, 'not packed')}, whatever its name says"


def _rename(path: Place, kind: str) -> str:
    name = PurePosixPath(path.name)
    if kind in _ADDED:
        return f"Call it {name.stem if name.suffix in _ADDED else name}{kind}."
    if kind == ".lfs":
        return "Fetch the data with: git lfs pull"
    if kind:
        return f"Call it {name.with_suffix(kind)}." if kind in (".parquet", ".arrow") else "Give its rows as .jsonl."
    return f"Call it {name.stem}."


def refuse_binary(path: Place, line: bytes) -> None:
    """A file that is no UTF-8 text at all, told by its first line."""
    if kind := _kind(line):
        raise DataError(_is(kind), where=str(path), do=_rename(path, kind))
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16, not UTF-8", where=str(path), do=converted("UTF-16", path))
    if b"\0" in line[1:2]:
        raise DataError("the file is UTF-16, not UTF-8", where=str(path), do=converted("UTF-16LE", path))
    if b"\0" in line[:1]:
        raise DataError("the file is UTF-16, not UTF-8", where=str(path), do=converted("UTF-16BE", path))


def converted(encoding: str, path: Place) -> str:
    """What to do about a text in another encoding."""
    return f"Convert it, for example: iconv -f {encoding} -t UTF-8 {path.name} > fixed{suffix_of(path.name)}"
