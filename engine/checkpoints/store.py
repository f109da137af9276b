"""Checkpoints: the state of a run on disk, written whole or not at all, verified, and found again.

A checkpoint is a folder ``checkpoints/step-000200`` that exists only when it is complete: everything is written into
the hidden folder ``.partial-step-000200``, flushed to disk and read back, then ``manifest.json`` with the size and
SHA-256 of each file, and only then is the folder given its name; after that, older ones go. A process that is killed
at any instant therefore leaves behind the older checkpoints, untouched, and at most one partial folder that the next
write removes.

Nothing here imports torch: the app and ``finetui runs`` read checkpoints too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...planner.errors import TrainingError, UserError
from ...planner.inside import inside
from ..durable import flush, reported_as_disk_error

MANIFEST = "manifest.json"
PARTIAL_PREFIX = ".partial-"
_NAME = re.compile(r"step-(\d{6,})")
#: Bytes of a file that are read and hashed at a time.
_PIECE = 32 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    Args:
        path: its folder.
        step: optimiser steps done when it was written.
        bytes: size of all its files.
        facts: what the writer noted down: tokens so far, rows and batch size of the data.
    """

    path: Path
    step: int
    bytes: int
    facts: dict[str, Any] = field(default_factory=dict)


def folder_name(step: int) -> str:
    """The name of the checkpoint after ``step`` optimiser steps."""
    return f"step-{step:06d}"


def find(directory: str | Path) -> list[Checkpoint]:
    """All checkpoints of a folder that have a manifest and all their files at full size, oldest first.

    Cheap: contents are not read. :func:`damage` does that.
    """
    directory = Path(directory)
    found: list[Checkpoint] = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if _NAME.fullmatch(path.name) and _shallow_damage(path) is None:
            with contextlib.suppress(FileNotFoundError):  # the run has just removed it
                found.append(_read(path))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as it was written (sizes and SHA-256)."""
    path = Path(path)
    shallow = _shallow_damage(path)
    if shallow is not None:
        return shallow
    try:
        expected = _read_manifest(path)["files"]
        for name, entry in _hash_files(path, sorted(expected)).items():
            if entry["sha256"] != expected[name]["sha256"]:
                return f"{name} has other content than was written"
    except OSError as error:  # a disk that fails, or the run has just removed it
        return f"{Path(error.filename or path).name} can't be read ({error.strerror})"
    return None


@dataclass(frozen=True)
class Latest:
    """The newest sound checkpoint, if there is one, and why newer ones were passed over."""

    checkpoint: Checkpoint | None
    skipped: list[str]


def latest(directory: str | Path) -> Latest:
    """The newest checkpoint whose content is verified, and a line for each damaged one that is newer."""
    directory = Path(directory)
    skipped: list[str] = []
    names = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    for path in sorted(names, key=lambda path: -int(path.name.removeprefix("step-"))):
        wrong = damage(path)
        if wrong is None:
            return Latest(_read(path), skipped)
        skipped.append(f"{path.name}: {wrong}")
    return Latest(None, skipped)


# --- writing


def begin(directory: str | Path, step: int) -> Path:
    """An empty hidden folder to write a checkpoint into; whatever a killed process left behind is removed."""
    directory = Path(directory)
    with reported_as_disk_error("the checkpoint can't be written", directory):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{PARTIAL_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = directory / f"{PARTIAL_PREFIX}{folder_name(step)}"
        partial.mkdir()
    return partial


def commit(
    partial: Path,
    step: int,
    *,
    keep: int,
    facts: dict[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Make a filled folder a checkpoint, then remove all but the ``keep`` newest complete ones up to this step.

    Checkpoints of later steps go too: training went on from an older one because these are damaged.

    Args:
        hashes: SHA-256 of what was to be written, by file, taken before it was; of other files their content counts.

    Raises:
        TrainingError: the disk is full, or does not give back what was written (cause ``disk``); the partial folder
            is gone and older checkpoints stay.
    """
    directory, target = partial.parent, partial.parent / folder_name(step)
    try:
        with reported_as_disk_error("the checkpoint can't be written", directory):
            files = _verified(partial, hashes or {})
            manifest = {"step": step, "written": round(time.time(), 3), "facts": facts or {}, "files": files}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            flush(partial / MANIFEST)
            for folder in [*sorted((path for path in partial.rglob("*") if path.is_dir()), reverse=True), partial]:
                flush(folder)
            if target.exists() and damage(target) is None:
                discard(partial)  # training came by here before, and leaves the same
            else:
                if target.exists():
                    _remove(target)
                os.rename(partial, target)
            flush(directory)
    except BaseException:
        discard(partial)
        raise
    prune(directory, keep, newest=step)
    return _read(target)


def _verified(partial: Path, hashes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file as the disk gives it back."""
    names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    missing = sorted(set(hashes) - set(names))
    meant = dict(hashes)
    rest = [name for name in names if name not in hashes]
    meant |= {name: entry["sha256"] for name, entry in _hash_files(partial, rest).items()}
    for name in names:
        flush(partial / name, forget=True)
    files = _hash_files(partial, names)
    wrong = missing + [name for name in names if files[name]["sha256"] != meant[name]]
    if wrong:
        raise TrainingError(
            f"the disk does not give back what was written to it ({', '.join(wrong[:3])})",
            cause="disk",
            where=str(partial.parent),
            do="Do not trust this disk: put the run on another with FINETUI_RUNS=FOLDER. Older checkpoints stay.",
        )
    return files


def discard(partial: Path) -> None:
    """Remove a folder that will not become a checkpoint."""
    shutil.rmtree(partial, ignore_errors=True)


def prune(directory: str | Path, keep: int, *, newest: int | None = None) -> None:
    """Remove all but the ``keep`` newest complete checkpoints; folders that are not complete are left for a look.

    Args:
        newest: the step of the one that was just written and verified: what claims to be later goes, so that it never
            takes the place of a sound one.
    """
    found = find(directory)
    later = [c for c in found if newest is not None and c.step > newest]
    for doomed in later + [c for c in found if c not in later][: -max(keep, 1)]:
        with contextlib.suppress(OSError):
            _remove(doomed.path)


def _remove(path: Path) -> None:
    """Renamed first, so that a crash in mid-removal leaves no folder that looks like a checkpoint."""
    doomed = path.with_name(f"{PARTIAL_PREFIX}old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# --- details


def _read(path: Path) -> Checkpoint:
    manifest = _read_manifest(path)
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    return Checkpoint(path, manifest["step"], sum(sizes), manifest.get("facts", {}))


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or "step" not in manifest:
        raise ValueError("it is no manifest")
    for name, entry in manifest["files"].items():
        sound = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not sound or not isinstance(manifest["step"], int):
            raise ValueError(f"it says nothing of {name}")
        try:
            inside(path, name)
        except UserError as error:
            raise ValueError(error.what) from None
    return manifest


def _shallow_damage(path: Path) -> str | None:
    try:
        files = _read_manifest(path)["files"]
    except OSError:
        return "it has no manifest, so it was not finished"
    except ValueError:
        return "its manifest can't be read"
    for name, entry in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size} of {entry['bytes']} bytes"
    return None


def _hash_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files; hashing releases the interpreter lock, so threads help.

    Pieces are large because training takes steps meanwhile: at each end of one the lock changes hands, and those of
    ``hashlib.file_digest``, of 256 KiB, end some 10,000 times a second.
    """

    def one(name: str) -> dict[str, Any]:
        with open(folder / name, "rb", buffering=0) as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()
            piece = memoryview(bytearray(max(min(size, _PIECE), 1)))
            while count := file.readinto(piece):
                digest.update(piece[:count])
            return {"bytes": size, "sha256": digest.hexdigest()}

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
