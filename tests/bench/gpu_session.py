"""All that has to be measured on a GPU, as one command that knows how much time it has.

    python -P -m finetui.tests.bench.gpu_session OUT [--parts tests engine …] [--seconds 540] [--models DIR]
        [--only WORD …] [--skip WORD …] [--peers FILE] [--dry-run]

Parts: ``tests`` (pytest -m cuda), ``engine`` (training runs beside other programs, in turns), ``sweep`` (the planner
against dozens of runs), ``kernels`` (each beside its ceiling, and what could be set otherwise), ``start`` (from the
command to the end of the first step). A part is a list of jobs, each a process of its own: one that dies or takes too
long costs its own time and nothing else, and none is begun that the time left cannot hold. What is known is in OUT at
any moment: ``session.jsonl`` (a line per job), ``session.log`` (what they printed), ``engine.jsonl``, ``sweep.jsonl``,
``kernels.json``, ``tune.json`` and ``profile.txt``. Checkpoints with random weights are written below --models, best a
folder in memory, and are found there by later calls.

``--dry-run`` goes through every job on a machine without a GPU: the same commands with a tiny model, few steps and
nothing timed, so that no rented minute is lost to a slip of the pen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetui.engine.launcher import import_environment

PARTS = ("tests", "engine", "sweep", "kernels", "start")
_ROOT = Path(__file__).resolve().parents[2]
_PYTHON = [sys.executable, "-P"]


@dataclass(frozen=True)
class Job:
    """One process.

    Args:
        seconds: that it may take at most; it is not begun with less than ``least`` left.
    """

    name: str
    command: list[str]
    seconds: float
    least: float = 30.0


@dataclass(frozen=True)
class Session:
    """Where things are.

    Args:
        dry: a machine without a GPU, and tiny models.
        peers: a script that trains with another program; see ``sweep.py``.
    """

    out: Path
    models: Path
    dry: bool
    peers: Path | None = None

    def jobs(self, part: str) -> Iterator[Job]:
        """Those of one part, the most wanted first."""
        yield from {
            "tests": self._tests, "engine": self._engine, "sweep": self._sweep, "kernels": self._kernels,
            "start": self._start,
        }[part]()  # fmt: skip

    def _tests(self) -> Iterator[Job]:
        tests = [str(_ROOT / "tests" / folder) for folder in ("kernels", "engine")]
        pytest = [*_PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "--rootdir", str(_ROOT)]
        more = ["--collect-only"] if self.dry else ["-x", "--maxfail=10", "--durations=10"]
        for folder in tests:
            yield Job(f"tests {Path(folder).name}", [*pytest, *more, folder], 240)

    def _engine(self) -> Iterator[Job]:
        # The arms of a job have to fit on the GPU together.
        ends = ["none", "offload", "full"]  # for each program, the most and the least memory
        beside = [
            ("8b lora", "llama-8b", "lora", ends, ["--skip", "finetui:full"]),
            ("8b qlora", "llama-8b", "qlora", ends, ["--skip", "finetui:full"]),
            ("4b full", "qwen3-4b", "full", ["full", "none"], ["--skip", "unsloth:none"]),
            ("8b lora-fp8", "llama-8b", "lora-fp8", ["none", "full"], ["--skip", "unsloth:none", "finetui:full"]),
            ("8b lora, one row of 8192", "llama-8b", "lora", ends,
             ["--skip", "finetui:full", "--sequence-length", "8192", "--micro-batch", "1"]),
            ("1b lora", "llama-1b", "lora", ["none", "none+graphs", "full"], []),
            ("8b lora, graphs", "llama-8b", "lora", ["none", "none+graphs", "full"], ["--skip", "unsloth:full"]),
        ]  # fmt: skip
        for name, shape, tuning, modes, more in beside:
            if self.dry and tuning in ("lora-fp8", "qlora"):
                continue  # products of these need a GPU, or minutes
            modes = [mode for mode in modes if not (self.dry and (mode == "offload" or "+" in mode))]
            yield Job(f"engine {name}", self._beside(name, shape, tuning, modes, more), 240, least=90)
        profile = ["--profile", str(self.out / "profile.txt"), "--arms", "finetui"]
        modes = ["none"] if self.dry else ["none", "none+graphs"]
        command = self._beside("profile", "llama-1b", "lora", modes, profile)
        yield Job("engine profile of 1b", command, 120, least=45)

    def _beside(self, name: str, shape: str, tuning: str, modes: list[str], more: list[str]) -> list[str]:
        """Ours and Unsloth's, loaded side by side and timed in turns, three rounds of four steps."""
        folder = self.out.parent / f"{self.out.name}-arms" / name.replace(" ", "-").replace(",", "")
        command = [*_PYTHON, "-m", "finetui.tests.bench.engine", *self._model(shape), "--tuning", tuning]
        command += ["--checkpointing", *modes, "--append", str(self.out / "engine.jsonl"), "--folder", str(folder)]
        if "--arms" not in more:
            command += ["--arms", "finetui", *([] if self.dry else ["unsloth"])]
        small = ["--sequence-length", "32", "--micro-batch", "1", "--rounds", "1", "--turn", "1", "--timeout", "120"]
        return [*command, *more, *(small if self.dry else ["--rounds", "3", "--turn", "4", "--timeout", "110"])]

    def _model(self, shape: str) -> list[str]:
        shape = "tiny" if self.dry else shape
        return [str(self.models / shape), "--make", shape]

    def _sweep(self) -> Iterator[Job]:
        command = [*_PYTHON, "-m", "finetui.tests.bench.sweep"]
        if self.dry:
            yield Job("sweep", [*command, "list"], 60)
            return
        peers = ["--peers", str(self.peers)] if self.peers else []
        out, seconds = str(self.out / "sweep.jsonl"), 480
        yield Job("sweep", [*command, "run", out, "--models", str(self.models), "--seconds", str(seconds), *peers], 540)

    def _kernels(self) -> Iterator[Job]:
        script = [*_PYTHON, str(Path(__file__).with_name("kernels.py"))]
        more = ["--help"] if self.dry else ["--json", str(self.out / "kernels.json")]
        yield Job("kernels", [*script, *more], 240)
        tune = [*_PYTHON, "-m", "finetui.tests.bench.tune", "--json", str(self.out / "tune.json")]
        below = [
            "--only",
            "rms_norm",
            "rows of the loss",
            "adamw",
            "gated",
            "narrow",
            "--warm",
            "8",
            "--seconds",
            "210",
        ]
        yield Job("tune", [*tune, *(["--check", "--only", "nf4"] if self.dry else below)], 240)

    def _start(self) -> Iterator[Job]:
        """Twice: the first call fills what is kept between runs (compiled modules, kernels, verdicts)."""
        for name in ("cold", "warm"):
            more = ["--apart", "--arms", "finetui", *([] if self.dry else ["unsloth"]), "--rounds", "1", "--turn", "1"]
            shape = "llama-8b"
            command = self._beside(f"start {name}", shape, "lora", ["none"], more)
            yield Job(f"start {name}", command, 150, least=60)


def run(job: Job, session: Session, left: float) -> dict[str, object]:
    """Let a job run, and everything it started end with it."""
    began, limit = time.monotonic(), min(job.seconds, left)
    environment = {**os.environ, **import_environment(), "PYTHONUNBUFFERED": "1"}
    if session.dry:
        environment["TRITON_INTERPRET"] = "1"
    with open(session.out / "session.log", "ab") as log:
        log.write(f"\n=== {job.name}: {' '.join(job.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tempfile.gettempdir(),
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = "time was up"
        except KeyboardInterrupt:
            _end(process)
            raise
        _end(process)
    return {"job": job.name, "ended": code, "seconds": round(time.monotonic() - began, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and its children, which are in a session of their own."""
    for kind, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def salvage(session: Session) -> None:
    """What arms measured that nobody was left to write down, as lines of ``engine.jsonl``."""
    path = session.out / "engine.jsonl"
    known = [json.loads(line) for line in _lines(path)]
    told, names = [row.get("step_s") for row in known], [row.get("salvaged") for row in known]
    for log in sorted((session.out.parent / f"{session.out.name}-arms").glob("*/*/log")):
        lines = [line for line in _lines(log) if line.startswith(("SO FAR {", "RESULT {")) and line.endswith("}")]
        if not lines:
            continue
        name, result = f"{log.parent.parent.name}/{log.parent.name}", json.loads(lines[-1][lines[-1].index("{") :])
        if name not in names and result["step_s"] not in told:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"salvaged": name, **result}) + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def main() -> int:
    """Run the parts in turn; the exit code is 1 if a job failed or was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="jobs whose name has one of these")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    a = parser.parse_args()
    memory = Path("/dev/shm")
    models = a.models or (memory if memory.is_dir() else Path(tempfile.gettempdir())) / "finetui-models"
    a.out.mkdir(parents=True, exist_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    session = Session(a.out.resolve(), models.resolve(), a.dry_run, a.peers.resolve() if a.peers else None)
    if not a.dry_run and importlib.util.find_spec("unsloth") is None:
        print("unsloth is not installed here: ours runs alone", file=sys.stderr)
    until, bad = time.monotonic() + a.seconds, 0
    for job in (job for part in a.parts for job in session.jobs(part)):
        if not any(word in job.name for word in a.only) or any(word in job.name for word in a.skip):
            continue
        left = until - time.monotonic()
        if left < job.least:
            row: dict[str, object] = {"job": job.name, "left_out": f"{left:.0f} s are left, it needs {job.least:.0f}"}
        else:
            row = run(job, session, left)
        if job.name.startswith(("engine", "start")):
            salvage(session)
        bad += row.get("ended") != 0
        print(json.dumps(row), flush=True)
        with open(session.out / "session.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
