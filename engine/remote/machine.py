"""Runs of another machine, over plain ssh: nothing is installed there, nothing listens, and what is read is its run
directories.

Each run has a mirror here: a run directory of this process, written from what the other machine sends, so that
whatever shows a run shows this one. It goes when the process does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...planner.errors import RunError
from ..events import EventReader, parse_line
from ..named import named
from ..run import Request, Run
from ..status import LIVE_STATES, Status
from . import scripts as scripts

#: ``user@box``, a name of ssh's configuration, an address; never anything that ssh would take for an option.
_ADDRESS = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9._@:%\[\]-]*")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FILES = ("recipe.yaml", "plan.json", "run.json")
#: Seconds that an answer may take before the machine is given up.
_ANSWER_S = 60.0
#: A past of more bytes than this is sent in part.
LONG_BYTES = 8 << 20


class MirroredRun(Run):
    """A run of another machine, as far as it was read. Its state is what that machine says of its process."""

    def __init__(self, path: Path, host: Host, remote: str) -> None:
        super().__init__(path)
        self.host, self.remote = host, remote
        self.alive: bool | None = None
        self.trouble = ""

    @property
    def status(self) -> Status:
        """See :class:`Run`; while there is no connection the last state stands, and ``message`` says so."""
        status = self.recorded
        if status.state not in LIVE_STATES:
            return status
        if self.alive is False and (status.pid or time.time() - status.created > 60):
            return dataclasses.replace(
                status,
                state="lost",
                message="the process ended without a word: killed, or the machine went down",
                do=f"Continue it there with: ssh {self.host.address} finetui resume {self.name}",
                ended=max(self._last_heard(), status.started),
            )
        return dataclasses.replace(status, message=self.trouble) if self.trouble else status

    def request(self, what: Request) -> None:
        """See :class:`Run`."""
        self.host.ask(self, scripts.REQUEST, WHAT=what)


class Host:
    """Another machine.

    Args:
        address: what ssh is given: ``user@box`` or a name from its configuration.
        ssh: the program and options of one's own.

    Raises:
        RunError: the address is none.
    """

    def __init__(self, address: str, *, ssh: tuple[str, ...] = ("ssh",)) -> None:
        if not _ADDRESS.fullmatch(address):
            raise RunError(f"{address!r} is no address", do="Use --host user@box, or a name that ssh knows.")
        self.address, self._ssh = address, ssh
        self._folder = tempfile.TemporaryDirectory(prefix="finetui-")
        # A file and no pipe: the process that keeps the shared connection would hold a pipe open.
        self._error_file = Path(self._folder.name) / "errors"
        self._errors = self._error_file.open("ab")
        self._known: dict[str, MirroredRun] = {}
        self.links: dict[str, object] = {}
        """Runs that are followed, by their path there: of these, a listing leaves the events alone."""
        self._listing = threading.Lock()
        self._listed = False
        self._ahead_s = 0.0

    def now(self) -> float:
        """The time on that machine, which its events bear."""
        return time.time() + self._ahead_s

    def set_clock(self, seconds: float) -> None:
        """Note what its clock says; a second off is the way of the message."""
        ahead = seconds - time.time()
        self._ahead_s = ahead if abs(ahead) > 2 else 0.0

    def _shared(self) -> list[str]:
        """Options for one connection for all: a password is asked for once, before the app has taken the terminal."""
        socket = f"{self._folder.name}/%C"
        if len(self._folder.name) > 60:  # sockets have short names, and ssh adds 57 characters to this one
            return []
        return ["-o", "ControlMaster=auto", "-o", f"ControlPath={socket}", "-o", "ControlPersist=60"]

    def complaint(self) -> str:
        """The last line that ssh or the other machine has said on standard error."""
        try:
            said = self._error_file.read_text("utf-8", "replace")
        except OSError:  # closed meanwhile
            return ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def start(self, script: str, **variables: object) -> subprocess.Popen[bytes]:
        """Run a shell script there; its output is read by the caller.

        Raises:
            RunError: there is no ssh.
        """
        options = [*self._shared(), "-o", "ServerAliveInterval=15", "-o", "ConnectTimeout=15", "-T"]
        if self._known:
            options += ["-o", "BatchMode=yes"]
        head = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in variables.items())
        try:
            process = subprocess.Popen(
                [*self._ssh, *options, self.address, "exec sh -s"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        except OSError as error:
            raise RunError(f"ssh can't be started ({error.strerror})", do="Install OpenSSH's client.") from error
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already, and its errors say why
            process.stdin.write((head + script).encode())
            process.stdin.close()
        process.stdin = None  # communicate() would flush it again
        return process

    def ask(self, run: MirroredRun, script: str, **variables: object) -> None:
        """Have something done to a run there.

        Raises:
            RunError: it was not done; the message is that machine's.
        """
        process = self.start(script, RUN=run.remote, **variables)
        if _answer(process).split(b"\n")[-2:] != [b"done", b""]:  # after whatever its shell greets with
            do = f"Look there: ssh {self.address} finetui runs"
            raise RunError(self.complaint() or "it was not done", where=f"{self.address}:{run.remote}", do=do)

    def kill(self, run: MirroredRun) -> None:
        """End a run at once, without a checkpoint; see :meth:`ask` for errors."""
        self.ask(run, scripts.KILL)

    def resume(self, run: MirroredRun) -> None:
        """Continue a run from its last checkpoint, with the finetui there; see :meth:`ask` for errors."""
        self.ask(run, scripts.RESUME)

    def runs(self) -> list[Run]:
        """Its runs, newest first, each with its newest events.

        Raises:
            RunError: the machine can't be reached, or does not answer.
        """
        with self._listing:
            process = self.start(scripts.LIST, WHOLE=0 if self._listed else 1)
            out = _answer(process)
            if b"\nS " not in b"\n" + out:
                what = self.complaint() or "it does not answer"
                raise RunError(what, where=self.address, do=f"Try: ssh {self.address}")
            seen = self._take_listing(out)
            self._listed = True
        return sorted(seen, key=lambda run: -run.recorded.created)

    def _take_listing(self, out: bytes) -> list[MirroredRun]:
        seen: dict[str, MirroredRun] = {}
        run: MirroredRun | None = None
        for frame in frames(io.BytesIO(out)):
            if frame.kind == "R":
                run = self.mirror(frame.text)
                seen[run.remote] = run
            elif frame.kind == "S":
                self.set_clock(float(frame.text))
            elif run is not None and frame.kind == "C":
                if run.remote not in self.links:
                    _take_newer(run, frame.content)
            elif run is not None:
                take(run, frame)
        readable = []
        for one in seen.values():
            with contextlib.suppress(RunError):
                one.recorded  # noqa: B018 - raises where the file was cut or is no run's
                readable.append(one)
        return readable

    def mirror(self, remote: str) -> MirroredRun:
        """The mirror of a run by its path there."""
        if remote not in self._known:
            name = Path(remote).name
            folder = hashlib.sha256(remote.encode()).hexdigest()[:12]
            path = Path(self._folder.name) / folder / (name if _PLAIN_NAME.fullmatch(name) else "run")
            (path / "log").mkdir(parents=True)
            (path / "events.jsonl").touch()
            self._known[remote] = MirroredRun(path, self, remote)
        return self._known[remote]

    def open(self, name: str | None) -> MirroredRun:
        """A run by its path there, its name, or the beginning of that; the newest if None.

        Raises:
            RunError: there is none or more than one, or the machine can't be reached.
        """
        runs = self.runs()
        mirrored = [run for run in runs if isinstance(run, MirroredRun)]
        for run in mirrored:
            if name in (None, run.remote):
                return run
        if name is not None and (found := named(mirrored, name, where=self.address)):
            return found
        if name is not None and name.startswith("/"):  # in a folder that nobody lists; whether it is there shows later
            return self.mirror(name.rstrip("/"))
        known = ", ".join(run.name for run in runs[:5])
        what = f"there is no run {name!r}" if name is not None else "there are no runs"
        raise RunError(what, where=self.address, do=f"The latest runs there are: {known}." if known else "")

    def close(self) -> None:
        """End the shared connection and forget the mirrors."""
        if shared := self._shared():
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(
                    [*self._ssh, *shared, "-O", "exit", self.address],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=5,
                )  # fmt: skip
        self._errors.close()
        self._folder.cleanup()


@dataclasses.dataclass(frozen=True)
class Frame:
    """One answer; see :mod:`finetui.engine.remote.scripts`."""

    kind: str
    text: str
    content: bytes = b""


def frames(stream: BinaryIO) -> Iterator[Frame]:
    """The frames of a stream until it ends; one that is cut off is left out."""
    while line := stream.readline():
        kind, _, rest = line.decode("utf-8", "replace").rstrip("\n").partition(" ")
        if kind not in ("F", "C", "E", "L"):
            yield Frame(kind, rest)
            continue
        length, _, text = rest.partition(" ")
        if not length.isdigit():  # a greeting of that machine's shell
            continue
        content = stream.read(int(length))
        if len(content) < int(length):
            return
        stream.readline()
        yield Frame(kind, text, content)


def take(run: MirroredRun, frame: Frame, *, anew: bool = False) -> None:
    """Write a frame into a run's mirror; ``anew`` replaces what is known of its events, else they are added to."""
    if frame.kind == "F" and frame.text in _FILES:
        replacement = run.path / f".{frame.text}"
        replacement.write_bytes(frame.content)
        replacement.replace(run.path / frame.text)
    elif frame.kind == "A":
        run.alive = {"1": True, "0": False}.get(frame.text)
    elif frame.kind in ("C", "E"):
        target = run.path / ".events.jsonl" if anew else run.events_path
        with target.open("wb" if anew else "ab") as file:
            file.write(frame.content + (b"\n" if frame.kind == "C" else b""))
        target.replace(run.events_path)
    elif frame.kind == "L" and _PLAIN_NAME.fullmatch(name := frame.text.removeprefix("log/")):
        with (run.path / "log" / name).open("ab") as file:
            file.write(frame.content)


def _take_newer(run: MirroredRun, content: bytes) -> None:
    """Add the events of a listing that are newer than what the mirror holds: what it held of older ones stays."""
    known = EventReader(run.events_path).read()
    after = known[-1].seq if known else 0
    with run.events_path.open("ab") as file:
        for raw in content.split(b"\n"):
            event = parse_line(raw)
            if event is not None and event.seq > after:
                after = event.seq
                file.write(raw + b"\n")


def _answer(process: subprocess.Popen[bytes]) -> bytes:
    try:
        return process.communicate(timeout=_ANSWER_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]
