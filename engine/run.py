"""Run: a plan carried out. A directory of plain files, and a process that outlives the terminal.

    runs/<name>/
      recipe.yaml plan.json      what was asked, what was decided and predicted
      run.json                   state, process, attempt, why it ended; replaced atomically
      events.jsonl               see events.py
      log/rank0.log …            what each rank printed
      control/                   requests as files: stop, checkpoint
      checkpoints/step-000200/   see checkpoints/
      output/                    the adapter or the model
      evaluations/               what finetui eval measured, see evaluation/records.py

The directory is the only contract between a run and whoever watches it: there is no server and no socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import psutil

from ..planner import preferences
from ..planner.errors import RunError
from ..planner.kinds import strange_field
from ..planner.plan import Plan
from ..planner.recipe import Recipe
from ..planner.secrets import redact
from ..planner.state import state_dir
from ..planner.version import VERSION
from .durable import write_atomically
from .events import EventLog, Payload, State
from .filelock import FileLock
from .modes import FILE, FOLDER
from .named import STAGE, named
from .process import has_open
from .status import LIVE_STATES, Status

T = TypeVar("T")
Request = Literal["stop", "checkpoint"]

#: Room on the disk that is kept so that a full disk can still be reported.
RESERVE_BYTES = 256 * 1024
#: A live run samples its machine every few seconds; one that is silent for so long is gone.
SILENCE_S = 120.0
_WORDLESS = "killed, or the machine went down"

#: A process that was killed may hold its files until the last of its threads is gone.
_DYING_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Run:
    """One run directory. Cheap to make; nothing is read until asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(cls, recipe: Recipe, plan: Plan, *, root: Path | None = None, name: str | None = None) -> Self:
        """Make a new run directory, whole or not at all.

        Raises:
            RunError: the name is taken or not a plain name, or the directory can't be written.
        """
        root = (root or default_root()).resolve()
        check_name(name)
        try:
            os.fsencode(root).decode()
        except UnicodeDecodeError:  # Arrow, for one, opens no such file
            do = "Name another: FINETUI_RUNS=FOLDER."
            raise RunError("the name of the folder of runs is not UTF-8", where=ascii(str(root)), do=do) from None
        if name is not None and (root / name).exists():
            raise RunError(f"a run named {name!r} exists already", where=str(root / name), do="Choose another --name.")
        try:
            root.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
            partial.chmod(FOLDER)
            try:
                for folder in ("log", "control", "checkpoints"):
                    (partial / folder).mkdir(mode=FOLDER)
                recipe.save(partial / "recipe.yaml")
                plan.save(partial / "plan.json")
                status = Status(created=time.time(), host=socket.gethostname(), version=VERSION)
                write_atomically(partial / "run.json", json.dumps(dataclasses.asdict(status), indent=2))
                (partial / "events.jsonl").touch()
                for file in ("recipe.yaml", "plan.json", "events.jsonl"):
                    (partial / file).chmod(FILE)
                target = _claim(partial, root, name or suggest_name(recipe, plan), exact=name is not None)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        except OSError as error:
            what, do = f"the run directory can't be made ({error.strerror})", "Name another: FINETUI_RUNS=FOLDER."
            raise RunError(what, where=str(root), do=do) from error
        run = cls(target)
        _remember(run.path)
        return run

    @classmethod
    def open(cls, name_or_path: str | Path, *, root: Path | None = None) -> Self:
        """Find a run by its directory, by its name, or by as much of it as no other run's name begins with.

        Raises:
            RunError: there is no such run, or more than one; the message names the ones there are.
        """
        direct = Path(name_or_path)
        if (direct / "run.json").is_file():
            return cls(direct.resolve())
        runs = list_runs(root)
        whole = cls((root or default_root()) / name_or_path)
        if (whole.path / "run.json").is_file() and all(run.name != whole.name for run in runs):
            whole.recorded  # noqa: B018 - raises what is wrong with it, before a run whose name goes on is taken for it
        if found := named(runs, str(name_or_path)):
            return cls(found.path)
        known = ", ".join(run.name for run in runs[:5])
        raise RunError(
            f"there is no run {str(name_or_path)!r}",
            do=f"The latest runs are: {known}." if known else "Start one with: finetui quickstart",
        )

    # --- what was asked and decided

    @property
    def recipe(self) -> Recipe:
        """What was asked."""
        return Recipe.load(self.path / "recipe.yaml")

    @property
    def plan(self) -> Plan:
        """What was decided and predicted.

        Raises:
            RunError: the file is missing or damaged.
        """
        try:
            return Plan.load(self.path / "plan.json")
        except (OSError, ValueError, KeyError, TypeError) as error:
            what, do = f"the plan can't be read ({error})", "Start a new run with the recipe.yaml beside it."
            raise RunError(what, where=str(self.path / "plan.json"), do=do) from None

    @property
    def events_path(self) -> Path:
        """The event file."""
        return self.path / "events.jsonl"

    @property
    def output_path(self) -> Path:
        """Where the finished adapter or model lies."""
        return self.path / "output"

    @property
    def best_path(self) -> Path:
        """Folder of the weights that did best on held-out rows, where the recipe keeps them."""
        return self.path / "best"

    def log_path(self, rank: int = 0) -> Path:
        """What one rank printed."""
        return self.path / "log" / f"rank{rank}.log"

    # --- state

    @property
    def recorded(self) -> Status:
        """``run.json`` as it was last written, whether or not its process still lives.

        Raises:
            RunError: the file is missing or damaged.
        """
        try:
            tree = self._tree()
            if (strange := strange_field(Status, tree)) is not None:
                raise ValueError(f"{strange} is of another kind than it should be")
            known = {f.name for f in dataclasses.fields(Status)}
            return Status(**{key: value for key, value in tree.items() if key in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            what, do = f"this is not a run ({error})", "The runs there are: finetui runs."
            if not self.path.exists():
                what = "the run's directory is gone: deleted or moved"
            raise RunError(what, where=str(self.path / "run.json"), do=do) from None

    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        return tree

    @property
    def status(self) -> Status:
        """``run.json``, with ``lost`` for a live state whose process is gone.

        The process of a run on another machine can't be seen; that run is lost when its events fall silent.
        """
        status = self.recorded
        if status.state not in LIVE_STATES:
            return status
        heard = self._last_heard()
        if status.host == socket.gethostname():
            lives = self._process_lives(status)
        else:
            lives = time.time() - max(heard, status.started, status.created) < SILENCE_S
        if lives:
            return status
        try:
            full = shutil.disk_usage(self.path).free < RESERVE_BYTES
        except OSError:
            full = False
        return dataclasses.replace(
            status,
            state="lost",
            message=f"the process ended without a word: {'its disk is full' if full else _WORDLESS}",
            do=f"{'Free some space, then continue' if full else 'Continue'} from the last checkpoint with: "
            f"finetui resume {self.name}",
            ended=max(heard, status.started),
        )

    def _last_heard(self) -> float:
        try:
            return self.events_path.stat().st_mtime
        except OSError:
            return 0.0

    @property
    def live(self) -> bool:
        """Whether a process is at work on this run."""
        return self.status.state in LIVE_STATES

    def _process_lives(self, status: Status) -> bool:
        if status.pid == 0:  # not started yet: young enough to be on its way?
            return time.time() - max(status.created, status.started) < 60
        try:
            process = psutil.Process(status.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            here = has_open(status.pid, self.path / "control" / "supervisor.lock")
            if here is not None:
                return here
            if abs(process.create_time() - status.pid_started) < 2:
                return True
            # Linux knows start times since boot only, so a clock that was set since then moves them all.
            return str(self.path) in process.cmdline()
        except psutil.Error:
            return False

    def update(self, **changes: Any) -> Status:
        """Change fields of ``run.json`` atomically; a change of state is an event too."""
        with self._locked("run.json.lock"):
            before = self.recorded
            told = {key: redact(value) if isinstance(value, str) else value for key, value in changes.items()}
            after = dataclasses.replace(before, **told)
            # What a later release of finetui has written there stays.
            text = json.dumps({**self._tree(), **dataclasses.asdict(after)}, indent=2)
            self._despite_full_disk(lambda: write_atomically(self.path / "run.json", text))
        if (before.state, before.attempt) != (after.state, after.attempt):
            self.append(State(after.state, after.cause, after.message, after.do, after.attempt))
        return after

    def append(self, payload: Payload) -> None:
        """Append one event that must not get lost: on a full disk the reserve is given up for it."""
        with EventLog(self.events_path) as log:
            self._despite_full_disk(lambda: log.append(payload))

    def hold_reserve(self) -> None:
        """Keep a little of the disk, so that a run that fills it can still say so."""
        with contextlib.suppress(OSError):  # a disk that is full from the start is reported by whoever writes next
            # Random bytes, because a file system that compresses keeps no room for zeros.
            self._reserve_path.write_bytes(os.urandom(RESERVE_BYTES))

    def free_reserve(self) -> bool:
        """Give that room up; False if it was given up before."""
        try:
            self._reserve_path.unlink()
        except OSError:
            return False
        return True

    @property
    def _reserve_path(self) -> Path:
        return self.path / "control" / "reserve"

    def _despite_full_disk(self, write: Callable[[], T]) -> T:
        try:
            return write()
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT} or not self.free_reserve():
                raise
            return write()

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE)
        lock = FileLock(fd, self.path / name)
        try:
            lock.acquire()
            yield
        finally:
            lock.close()
            os.close(fd)

    def claim(self) -> int:
        """Become the one supervisor of this run; the lock is held until the process ends or closes the descriptor.

        Raises:
            RunError: another process is at work on it, or this is no run.
        """
        self.recorded  # noqa: B018 - raises where there is no run
        (self.path / "control").mkdir(exist_ok=True)
        fd = os.open(self.path / "control" / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE)
        lock = FileLock(fd, self.path / "control" / "supervisor.lock")
        until = time.monotonic() + _DYING_S
        while True:
            try:
                lock.acquire(wait=False)
                break
            except BlockingIOError:
                if time.monotonic() > until or self._process_lives(self.recorded):
                    lock.close()
                    os.close(fd)
                    raise RunError(
                        "another process is at work on this run",
                        where=self.name,
                        do=f"Watch it with: finetui attach {self.name}",
                    ) from None
            time.sleep(0.02)
        if lock.fd != fd:
            os.close(fd)
        return lock.fd

    # --- requests

    def request(self, what: Request) -> None:
        """Ask the run to stop (with a checkpoint) or to write a checkpoint now."""
        folder = self.path / "control"
        folder.mkdir(mode=FOLDER, exist_ok=True)
        (folder / what).touch(mode=FILE)

    def requested(self, what: Request) -> bool:
        """Whether a request is waiting."""
        return (self.path / "control" / what).exists()

    def withdraw(self, what: Request) -> None:
        """Take a request back, or mark it as done."""
        (self.path / "control" / what).unlink(missing_ok=True)


def check_name(name: str | None) -> None:
    """Nothing, if a run may be called so, or is to get a name by itself.

    Raises:
        RunError: it may not.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise RunError(f"{name!r} is not a run name", do="Use letters, digits, '.', '_' and '-' only.")


def trained(run: Run) -> Run:
    """The run that holds what was learned: itself, or of a run with stages the last of those that have trained."""
    stages = [path for path in run.path.parent.glob(f"{run.name}.*") if (path / "run.json").is_file()]
    numbered = [(int(found[1]), Run(path)) for path in stages if (found := STAGE.fullmatch(path.name[len(run.name) :]))]
    finished = [(number, stage) for number, stage in numbered if stage.recorded.state == "finished"]
    return max(finished, key=lambda one: one[0])[1] if finished else run


def default_root() -> Path:
    """Where new runs go: ``$FINETUI_RUNS``, else the user's ``runs`` setting, else ``runs`` in the current folder."""
    return Path(os.environ.get("FINETUI_RUNS") or preferences.load().runs or "runs").expanduser().resolve()


def list_runs(root: Path | None = None) -> list[Run]:
    """All runs under ``root`` and all others this user has started anywhere, newest first."""
    found: dict[Path, float] = {}
    root = (root or default_root()).resolve()
    candidates = list(root.iterdir()) if root.is_dir() else []
    with contextlib.suppress(OSError, RuntimeError):  # no index yet, or no home folder that can be read
        lines = (state_dir() / "runs").read_text(encoding="utf-8", errors="replace").splitlines()
        candidates += [path for line in lines if (path := _remembered(line)) is not None]
    for path in candidates:
        if path.name.startswith(".") or path in found:
            continue
        with contextlib.suppress(RunError):
            found[path] = Run(path).recorded.created
    return [Run(path) for path in sorted(found, key=lambda path: -found[path])]


def suggest_name(recipe: Recipe, plan: Plan) -> str:
    """A name that tells runs apart at a glance: model, tuning and date."""
    model = re.sub(r"[^a-z0-9.]+", "-", Path(recipe.model).name.lower()).strip("-.") or "model"
    return f"{model[:40]}-{plan.resolved.tuning}-{time.strftime('%m%d-%H%M')}"


def _claim(partial: Path, root: Path, name: str, *, exact: bool) -> Path:
    """Give the finished directory its name; a suggested name that is taken gets a number."""
    for number in range(1, 1000):
        target = root / (name if number == 1 else f"{name}-{number}")
        if not target.exists():
            try:
                os.rename(partial, target)
            except OSError:
                if exact or not target.exists():
                    raise
                continue
            return target
        if exact:
            break
    raise RunError(f"a run named {name!r} exists already", where=str(root / name), do="Choose another --name.")


def _remember(path: Path) -> None:
    """Add a run to this user's index, so that it is found from any folder."""
    with contextlib.suppress(OSError, RuntimeError):  # a home that is read-only or missing must not stop a run
        state_dir().mkdir(parents=True, exist_ok=True)
        with open(state_dir() / "runs", "a", encoding="utf-8") as file:
            plain = str(path).isprintable()  # neither of several lines nor of bytes that are no text
            file.write(f"{path if plain else json.dumps(str(path))}\n")


def _remembered(line: str) -> Path | None:
    """The path that :func:`_remember` wrote as a line; None if a full disk, say, has left a part of it."""
    try:
        told = json.loads(line) if line.startswith('"') else line
    except ValueError:
        return None
    return Path(told) if told else None
