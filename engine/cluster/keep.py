"""Keep: a copy of a run where it outlives the machine, such as a bucket or a volume, and the way back from it.

What is mounted there may know neither locks nor renames nor appending, as file systems over buckets don't. So the run
works on the machine's own disk, and whole files are copied; of a checkpoint the manifest last, as a checkpoint without
one is none.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..checkpoints.store import MANIFEST, PARTIAL_PREFIX, find
from ..run import Run
from ..status import LIVE_STATES

#: Folders of a run that are of no use on another machine, or are copied in a way of their own.
_APART = frozenset({"control", "checkpoints"})


class Keep:
    """The copy of one run, and of its stages, which lie beside it.

    Args:
        runs: the folder that holds the run.
        name: the run's name.
        folder: where the copy is kept.
    """

    def __init__(self, runs: Path, name: str, folder: Path) -> None:
        self._runs, self._name, self._folder = runs, name, folder
        self._seen: dict[Path, tuple[int, int]] = {}

    def copy(self) -> None:
        """Bring the copy up to date; files that have not changed since the last time are left alone.

        Raises:
            OSError: the place can't be written.
        """
        for run in _with_stages(self._runs, self._name):
            target = self._folder / run.name
            self._checkpoints(run / "checkpoints", target / "checkpoints")
            for file in _files(run):
                self._file(file, target / file.relative_to(run))

    def restore(self) -> bool:
        """Bring a run back that is not here; whether there was one. What is not whole stays behind."""
        if (self._runs / self._name / "run.json").is_file():
            return False
        for kept in _with_stages(self._folder, self._name):
            target = self._runs / kept.name
            for checkpoint in find(kept / "checkpoints"):
                shutil.copytree(
                    checkpoint.path, target / "checkpoints" / checkpoint.path.name,
                    copy_function=shutil.copyfile, dirs_exist_ok=True,
                )  # fmt: skip
            for file in _files(kept):
                (target / file.relative_to(kept)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / file.relative_to(kept))
            for folder in ("log", "control", "checkpoints"):
                (target / folder).mkdir(exist_ok=True)
            _end(Run(target))
        return (self._runs / self._name / "run.json").is_file()

    def _checkpoints(self, source: Path, target: Path) -> None:
        there = {checkpoint.path.name for checkpoint in find(target)}
        here = [checkpoint.path for checkpoint in find(source)]
        for path in here:
            if path.name in there:
                continue
            try:
                self._checkpoint(path, target / path.name)
            except FileNotFoundError:  # the run has just removed it for newer ones
                (target / path.name / MANIFEST).unlink(missing_ok=True)
        kept = {path.name for path in here}
        for name in there - kept if here else ():
            (target / name / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(target / name, ignore_errors=True)

    def _checkpoint(self, source: Path, target: Path) -> None:
        (target / MANIFEST).unlink(missing_ok=True)
        for file in source.rglob("*"):
            if file.is_file() and file.name != MANIFEST:
                (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / file.relative_to(source))
        shutil.copyfile(source / MANIFEST, target / MANIFEST)

    def _file(self, source: Path, target: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # replaced or removed since it was listed: next time
            about = source.stat()
            mark = (about.st_size, about.st_mtime_ns)
            if self._seen.get(source) == mark:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            self._seen[source] = mark


def _with_stages(folder: Path, name: str) -> list[Path]:
    """A run and its stages, as far as they are there."""
    paths = [folder / name, *sorted(folder.glob(f"{name}.*"))]
    return [path for path in paths if (path / "run.json").is_file()]


def _files(run: Path) -> Iterator[Path]:
    """Files of a run that are copied as they are, ``run.json`` last: a copy that has it has the others."""
    for path in sorted(run.rglob("*"), key=lambda path: path == run / "run.json"):
        parts = path.relative_to(run).parts
        partial = any(part.startswith((PARTIAL_PREFIX, ".")) for part in parts) or path.suffix == ".lock"
        if parts[0] not in _APART and not partial and path.is_file():
            yield path


def _end(run: Run) -> None:
    """Note down that whoever was at work on a run that came back from its copy is not any more."""
    if run.recorded.state in LIVE_STATES:
        what = "its machine was taken away"
        run.update(state="stopped", cause=None, message=what, do="", ended=run.recorded.started)
