"""Which file of transformers offers what, remembered from one start to the next.

transformers imports the code of a model when it is asked for it. To know where everything is, it reads the source of
all of its models, some 1,600 files, whenever it is imported, and some releases do so twice: more than half a second in
which nothing else can happen. What comes out is the same until a file changes, so it is kept, under a digest of the
names, sizes and times of all these files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .folders import in_cache

#: The module that reads them, and its function for a folder: nested dictionaries, from what an object needs installed
#: (a frozen set) or the name of a subfolder to what is there. Without it, nothing is remembered.
_MODULE, _FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"

Read = Callable[[Any], dict[Any, Any]]


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within, transformers, if it is imported, reads its models only where they have changed."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        if finder.undo is not None:
            finder.undo()


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for one module to be imported, and has its function remember."""

    def __init__(self) -> None:
        self.undo: Callable[[], None] | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path, self)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, finder: _Finder) -> None:
        super().__init__(name, path)
        self._finder: _Finder | None = finder

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        stock = getattr(module, _FUNCTION, None)
        if stock is not None and self._finder is not None:
            setattr(module, _FUNCTION, remembering(stock, Path(self.path)))
            self._finder.undo = functools.partial(setattr, module, _FUNCTION, stock)
        self._finder = None


def remembering(stock: Read, source: Path) -> Read:
    """As ``stock``, which reads a folder; the one with all models is read again only if a file in it has changed.

    Args:
        source: the file that ``stock`` is from.
    """
    models = source.parents[1] / "models"
    whole = {str(models), str(models / "__init__.py")}
    known: list[bytes | None] = []

    def read(path: Any) -> dict[Any, Any]:
        if os.fspath(path) not in whole:
            return stock(path)
        if not known:
            state = _state(models, source)
            known.append(_recalled(models, state))
            if known[0] is None:
                found = stock(path)
                known[0] = _kept(models, state, found) if state == _state(models, source) else None
                return found
        # Anew for each caller, who may change it.
        return stock(path) if known[0] is None else unpacked(json.loads(known[0]))

    return read


def packed(found: dict[Any, Any]) -> list[Any]:
    """What was read of a folder, as JSON has it: pairs of a name, or a list for a set, and what it leads to."""
    return [
        [name, packed(held)]
        if isinstance(name, str)
        else [sorted(name), {file: sorted(names) for file, names in held.items()}]
        for name, held in found.items()
    ]


def unpacked(pairs: list[Any]) -> dict[Any, Any]:
    """The opposite of :func:`packed`."""
    return {
        name if isinstance(name, str) else frozenset(name): unpacked(held)
        if isinstance(name, str)
        else {file: set(names) for file, names in held.items()}
        for name, held in pairs
    }


def _recalled(models: Path, state: bytes) -> bytes | None:
    """What was kept when the files were in this state."""
    if (file := _file(models)) is None:
        return None
    try:
        whole = file.read_bytes()
    except OSError:
        return None
    made = whole[len(state) :]
    return made if whole[: len(state)] == _digest(state, made) else None


def _kept(models: Path, state: bytes, found: dict[Any, Any]) -> bytes | None:
    """What was found, as it is kept; None if that would be something else, as of a release that finds other things."""
    try:
        made = json.dumps(packed(found), separators=(",", ":")).encode()
        if unpacked(json.loads(made)) != found:
            return None
    except (TypeError, ValueError, AttributeError):
        return None
    if (file := _file(models)) is not None:
        fresh = file.with_name(f"{file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a disk that is full: the next start reads them again
            fresh.write_bytes(_digest(state, made) + made)
            fresh.replace(file)
    return made


def _file(models: Path) -> Path | None:
    cache = in_cache(os.environ, "known-models")
    return None if cache is None else cache / hashlib.sha256(str(models).encode()).hexdigest()[:16]


def _state(models: Path, source: Path) -> bytes:
    """A digest of the files as they lie there, and of who reads them."""
    folders = [str(models)]
    facts = [f"{source} {source.stat().st_size} {source.stat().st_mtime_ns}"]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name == "__pycache__":
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.name.endswith(".py"):
                    stat = entry.stat()
                    facts.append(f"{entry.path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(facts)).encode(errors="surrogateescape")).digest()


def _digest(state: bytes, made: bytes) -> bytes:
    return hashlib.sha256(state + made).digest()
