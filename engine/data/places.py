"""Where files lie: on this disk, or at an address that fsspec opens (s3:// gs:// https:// hf:// ...)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ...planner.errors import DataError, UserError

#: File types that are read, by file name; each may also be compressed.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt")
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
#: The package that teaches fsspec an address, where it does not come with one.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
             "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}  # fmt: skip


def suffix_of(name: str) -> str:
    """The suffix that says how a file is read: ``.jsonl`` of both ``a.jsonl`` and ``a.jsonl.gz``."""
    path = PurePosixPath(name)
    return (PurePosixPath(path.stem) if path.suffix.lower() in _COMPRESSED else path).suffix.lower()


def is_address(path: str) -> bool:
    """Whether a path is an address rather than a name on this disk."""
    return "://" in path


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
    module = _COMPRESSED.get(PurePosixPath(place.name).suffix.lower())
    unpack = import_module(module).open if module else None
    if isinstance(place, Path):
        with place.open("rb") if unpack is None else unpack(place, "rb") as file:
            yield file
        return
    with told(place.address):
        filesystem, path = _open(place.address)
        with filesystem.open(path, "rb") as raw:
            if unpack is None:
                yield raw
                return
            with unpack(raw, "rb") as file:
                yield file


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
            do = "finetui reads " + " ".join(SUFFIXES) + "."
            raise DataError("the address holds no dataset file", where=address, do=do)
        return [_remote(filesystem, name) for name in kept]


def _remote(filesystem: Any, name: str) -> Remote:
    about = filesystem.info(name)
    marks = [about.get(k) for k in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created", "size")]
    return Remote(filesystem.unstrip_protocol(name), about.get("size"), str(marks))


def _open(address: str) -> tuple[Any, str]:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(address)
    return filesystem, path


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
        if isinstance(error, ValueError) and "rotocol" not in str(error):
            raise
        if isinstance(error, ValueError):
            known = ", ".join(f"{name}://" for name in ("s3", "gs", "https", "hf"))
            raise DataError(
                f"{protocol}:// is no address that can be read", where=address, do=f"Use {known}."
            ) from None
        do = f"Install it with: pip install {_PACKAGES.get(protocol, 'the one it names: ' + str(error))}"
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


def _unreadable(address: str, error: BaseException) -> DataError:
    first = (str(error).strip().splitlines() or ["no more is said"])[0]
    what = f"the address can't be read ({type(error).__name__}: {first})"
    return DataError(what, where=address, do="Check the network, the address and your credentials.")
