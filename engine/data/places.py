"""Where files lie: on this disk, or at an address that fsspec opens (s3:// gs:// https:// hf:// ...).

An address may name variables of the environment (``https://host/rows.jsonl?token=${DATA_TOKEN}``). Their values are
put in when it is opened, and stand nowhere else: not in what is shown, and not in what is kept.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ...planner.errors import DataError, MissingExtraError, UserError
from ...planner.secrets import conceal, expand, redact
from .access import why_unreadable

#: File types that are read, by file name; each may also be compressed.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt")
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstd"}
#: What finetui reads, for messages.
READ = f"finetui reads {' '.join(SUFFIXES)}, each also as {' '.join(_COMPRESSED)}."
#: The package that teaches fsspec an address, where it does not come with one.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
             "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "sftp": "paramiko", "ssh": "paramiko", "oci": "ocifs",
             "webhdfs": "requests", "hdfs": "pyarrow", "hf": "huggingface_hub"}  # fmt: skip
#: Addresses that are opened. fsspec knows more: some are this disk under another name, some read a file of references
#: that may lead anywhere, and ``::`` chains them.
_OPENED = {*_PACKAGES, "ftp", "memory"}
_WEB = frozenset({"http", "https"})


def suffix_of(name: str) -> str:
    """The suffix that says how a file is read: ``.jsonl`` of both ``a.jsonl`` and ``a.jsonl.gz``."""
    path = PurePosixPath(name)
    return (PurePosixPath(path.stem) if path.suffix.lower() in _COMPRESSED else path).suffix.lower()


def is_address(path: str) -> bool:
    """Whether a path is an address rather than a name on this disk."""
    return "://" in path or path.startswith("${")


def package_for(address: str) -> str:
    """The package that opens an address, where fsspec does not come with it; empty for others, and for paths."""
    protocol, colon, _ = address.partition("://")
    return _PACKAGES.get(protocol, "") if colon else ""


@dataclass(frozen=True)
class Remote:
    """A file at an address; as much of :class:`pathlib.Path` as its readers need."""

    address: str
    size: int | None = None
    mark: str = ""
    """Changes when the file does: its ETag, or size and time."""

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.address.partition("?")[0]).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem


Place = Path | Remote


def size_of(place: Place) -> int | None:
    """Bytes of a file as it is stored; None where an address does not tell."""
    return place.stat().st_size if isinstance(place, Path) else place.size


@contextmanager
def open_bytes(place: Place) -> Iterator[Any]:
    """The bytes of a file, unpacked if it is compressed."""
    unpack = _unpacker(place)
    if isinstance(place, Path):
        with place.open("rb") if unpack is None else unpack(place, "rb") as file:
            yield file
        return
    with told(place.address):
        filesystem, path = _open(place.address)
        with _reading(filesystem, path) as raw:
            if unpack is None:
                yield raw
                return
            with unpack(raw, "rb") as file:
                yield file


def _unpacker(place: Place) -> Any:
    """``open`` of the module that unpacks a file; None for one that is not compressed."""
    module = _COMPRESSED.get(PurePosixPath(place.name).suffix.lower())
    return _open_zstd if module == "zstd" else import_module(module).open if module else None


def _open_zstd(file: Any, _mode: str) -> Any:
    """Zstandard, which Python's own library has from 3.14 on, by pyarrow."""
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtraError("reading .zst files", "train") from None
    source = pa.OSFile(str(file)) if isinstance(file, Path) else pa.PythonFile(file, "r")
    return io.BufferedReader(pa.CompressedInputStream(source, "zstd"), 1 << 20)


def list_files(address: str) -> list[Remote]:
    """The files of an address: itself, what a pattern fits (``s3://bucket/part-*.jsonl``), or what a folder holds.

    Raises:
        DataError: nothing is there, it can't be reached, or fsspec lacks the package for it.
    """
    with told(address):
        filesystem, path = _open(address)
        if any(sign in path for sign in "*["):
            names = filesystem.glob(path)
        elif filesystem.protocol not in ("http", "https", ("http", "https")) and filesystem.isdir(path):
            names = filesystem.find(path)
        else:
            names = [path]
        kept = sorted(name for name in names if suffix_of(name.partition("?")[0]) in SUFFIXES)
        if not kept:
            raise DataError("the address holds no dataset file", where=address, do=READ)
        return [_remote(filesystem, name, address) for name in kept]


def _remote(filesystem: Any, name: str, address: str) -> Remote:
    about = filesystem.info(name)
    marks = [about.get(k) for k in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created", "size")]
    return Remote(conceal(filesystem.unstrip_protocol(name), address), about.get("size"), str(marks))


def _open(address: str) -> tuple[Any, str]:
    import fsspec

    whole = expand(address)
    protocol, colon, _ = whole.partition("://")
    if not colon or protocol not in _OPENED or "::" in whole:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "https", "hf"))
        shown = conceal(f"{protocol}://" if colon and "::" not in whole else whole, address)
        raise DataError(f"{shown} is no address that can be read", where=address, do=f"Use {known}.")
    if protocol in ("gs", "gcs"):  # it prints a traceback of each refusal that it then raises
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    more = {"client_kwargs": {"timeout": _patience()}} if protocol in _WEB else {}
    filesystem, path = fsspec.core.url_to_fs(whole, **more)
    return filesystem, path


def _patience() -> Any:
    """How long a web server may be silent; the whole file may take as long as its tokens take to be made."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)


def _reading(filesystem: Any, path: str) -> Any:
    """A file to read, in parts wherever its server gives parts: that outlasts a slow reader and can jump."""
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    if not _WEB.intersection(protocols) or _gives_parts(filesystem, path):
        return filesystem.open(path, "rb")
    return io.BufferedReader(filesystem.open(path, "rb", block_size=0), 1 << 20)


def _gives_parts(filesystem: Any, path: str) -> bool:
    """Some web servers give a file from its beginning alone, and few say so."""
    with filesystem.open(path, "rb", block_size=1 << 16) as file:
        try:
            file.seek(1)
            file.read(1)
        except ValueError:
            return False
    return True


@contextmanager
def told(address: str) -> Iterator[None]:
    """Failures of fsspec in plain words."""
    try:
        import fsspec  # noqa: F401
    except ImportError:
        do = "Install it with: pip install fsspec"
        raise DataError("this address needs a package that is not installed", where=address, do=do) from None
    try:
        yield
    except UserError:
        raise
    except (ImportError, ValueError) as error:
        protocol = address.partition("://")[0]
        if isinstance(error, ValueError) and "Cannot seek streaming" in str(error):
            what = "the server gives files from their beginning alone, and this type is read in parts"
            raise Unreadable(what, where=address, do="Fetch the file first.") from None
        if isinstance(error, ValueError) and "rotocol" not in str(error):
            raise
        if isinstance(error, ValueError):
            known = ", ".join(f"{name}://" for name in ("s3", "gs", "https", "hf"))
            raise DataError(
                f"{protocol}:// is no address that can be read", where=address, do=f"Use {known}."
            ) from None
        do = f"Install it with: pip install {_PACKAGES.get(protocol, str(error))}"
        raise DataError(f"{protocol}:// needs a package that is not installed", where=address, do=do) from None
    except FileNotFoundError as error:
        if error.__cause__ is None or getattr(error.__cause__, "status", None) == 404:
            raise DataError("there is nothing at this address", where=address, do="Check it.") from None
        raise _unreadable(address, error.__cause__) from error
    except Exception as error:
        # Every service has exceptions of its own, for the network, for rights and for names.
        if type(error).__module__.partition(".")[0] in ("builtins", "finetui") and not isinstance(error, OSError):
            raise
        raise _unreadable(address, error) from error


class Unreadable(DataError):
    """An address gave nothing, or not all of it."""


def _unreadable(address: str, error: BaseException) -> Unreadable:
    first = (str(error).strip().splitlines() or ["no more is said"])[0]
    what, do = why_unreadable(address, error)
    return Unreadable(f"{what} ({type(error).__name__}: {redact(conceal(first, address))})", where=address, do=do)
