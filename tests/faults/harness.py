"""Runs that things are done to: real supervisors and ranks, who kills them, and what they must come to in the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import finetui
from finetui.engine.checkpoints import store
from finetui.engine.events import Event, read_events
from finetui.engine.planning import plan_for
from finetui.engine.run import Run
from finetui.engine.status import LIVE_STATES
from finetui.planner.recipe import Recipe

HERE = Path(__file__).parent
#: Nothing here takes so long on a machine that works.
PATIENCE_S = 300.0


def environment() -> dict[str, str]:
    """Of a process that can import finetui as this one does, and computes with one thread."""
    package = Path(finetui.__file__).parent
    # The folder of the package itself has names in it that other packages look for.
    paths = [path for path in sys.path if Path(path).resolve() != package.resolve()]
    path = os.pathsep.join([str(package.parent), *paths])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Forge:
    """Starts supervisors within milliseconds, see ``forge.py``."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(HERE / "forge.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment(),
            )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", log.read_text()

    def start(self, run: Run, *, clock: float = 0.0) -> psutil.Process:
        """Begin or resume a run; its supervisor."""
        run.withdraw("stop")
        return self._ask({"run": str(run.path), "clock": clock})

    def ground(self, folder: Path) -> tuple[Path, Path]:
        """A tiny model of Llama's shape with random weights, and 48 rows to train it on."""
        maker = self._ask({"ground": str(folder)})
        wait_until(lambda: gone(maker))
        assert (folder / "rows.jsonl").is_file()
        return folder / "model", folder / "rows.jsonl"

    def _ask(self, request: dict[str, Any]) -> psutil.Process:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return psutil.Process(int(self._process.stdout.readline()))

    def close(self) -> None:
        """End it, with all that it has started."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def watched(root: Path, report: Path) -> Iterator[Callable[[], list[str]]]:
    """A process looks at all checkpoints under a folder while the block runs; gives what it found so far."""
    command = [sys.executable, "-P", str(HERE / "watcher.py"), str(root), str(report)]
    process = subprocess.Popen(command, env=environment())
    try:
        yield lambda: [line for line in report.read_text().splitlines() if not line.startswith("looked")]
    finally:
        process.terminate()
        process.wait(30)


# --- what a run comes to


@dataclass(frozen=True)
class Result:
    """What a run has computed, to the last bit: losses and gradient norms by step, held-out losses, tokens, files."""

    steps: dict[int, tuple[float, float, float, int]]
    evaluations: dict[int, float]
    output: dict[str, str]


def result_of(run: Run) -> Result:
    """What a finished run computed. Steps that were repeated must have come out the same each time."""
    events = read_events(run.events_path)
    steps: dict[int, tuple[float, float, float, int]] = {}
    for event in events:
        if event.type == "step":
            told = event.data
            figures = (told["loss"], told["grad_norm"], told["learning_rate"], told["tokens"])
            assert steps.setdefault(told["step"], figures) == figures, f"step {told['step']} came out in two ways"
    evaluations = {event.data["step"]: event.data["loss"] for event in events if event.type == "eval"}
    output = {
        str(path.relative_to(run.output_path)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.output_path.rglob("*.safetensors"))
    }
    return Result(steps, evaluations, output)


def require_orderly(run: Run) -> None:
    """Whatever happened to it: events are numbered without a gap, and its files can be read."""
    raw = run.events_path.read_bytes()
    assert raw.endswith(b"\n")
    numbers = [json.loads(line)["seq"] for line in raw.splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert run.recorded.state not in LIVE_STATES
    assert not [p.name for p in (run.path / "checkpoints").iterdir() if store.damage(p) is not None]


def told(run: Run, kind: str) -> list[Event]:
    """Events of one type."""
    return [event for event in read_events(run.events_path) if event.type == kind]


# --- who does what


def ranks_of(supervisor: psutil.Process) -> list[psutil.Process]:
    """The ranks that are at work."""
    with contextlib.suppress(psutil.Error):
        return [child for child in supervisor.children() if child.status() != psutil.STATUS_ZOMBIE]
    return []


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def wait_until(what: Callable[[], bool], *, poll_s: float = 0.01) -> None:
    """Wait for something that must happen."""
    until = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(poll_s)


def kill_9(processes: list[psutil.Process]) -> None:
    """All of them, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: all(gone(process) for process in processes))


@dataclass
class Killer:
    """Kills a run at random moments until enough is enough.

    Args:
        forge: starts it again.
        kills: how often.
        seed: of the moments.
        log: gets a line per kill.
    """

    forge: Forge
    kills: int
    seed: int
    log: Callable[[str], None] = lambda line: None
    done: dict[str, int] = field(default_factory=dict)

    def torment(self, make: Callable[[], Run], check: Callable[[Run], None]) -> None:
        """Kill runs until all kills are used up, starting a new one when one finishes; every run has to finish."""
        choose = random.Random(self.seed)
        while sum(self.done.values()) < self.kills:
            run = make()
            while not self._one_life(run, choose):
                pass
            check(run)

    def _one_life(self, run: Run, choose: random.Random) -> bool:
        """From a start to a kill or the end; whether the run has finished."""
        supervisor = self.forge.start(run)
        left = self.kills - sum(self.done.values())
        moment, victim = choose.choice(MOMENTS), choose.choice(("supervisor", "rank", "all"))
        delay = choose.random()
        if left > 0 and self._await(run, supervisor, moment, delay):
            ranks = ranks_of(supervisor)
            doomed = {"supervisor": [supervisor], "rank": ranks[:1], "all": [supervisor, *ranks]}[victim]
            if doomed:
                step = max((event.data["step"] for event in told(run, "step")), default=0)
                kill_9(doomed)
                name = f"{victim} {moment}"
                self.done[name] = self.done.get(name, 0) + 1
                self.log(f"{run.name}: killed {name}, after step {step}")
                if victim == "rank":  # its supervisor begins again by itself
                    return self._end(run, supervisor)
                wait_until(lambda: all(gone(rank) for rank in ranks))  # they die with it
                return run.status.state == "finished"
        return self._end(run, supervisor)

    def _await(self, run: Run, supervisor: psutil.Process, moment: str, delay: float) -> bool:
        """Wait for a moment of a kind; False if the run ended first."""
        begin = len(told(run, "step"))
        folder = run.path / "checkpoints"

        def here() -> bool:
            if gone(supervisor) or moment == "starting":
                return True
            if moment == "training":
                return len(told(run, "step")) > begin
            return any(folder.glob(f"{store.PARTIAL_PREFIX}*"))

        wait_until(here, poll_s=0.0005 if moment == "saving" else 0.01)
        time.sleep(delay * {"starting": 1.0, "training": 1.0, "saving": 0.02}[moment])
        return not gone(supervisor)

    def _end(self, run: Run, supervisor: psutil.Process) -> bool:
        wait_until(lambda: gone(supervisor))
        status = run.status
        assert status.state in {"finished", "failed", "lost"}, status
        assert status.state != "failed" or "SIGKILL" in status.message, status
        return status.state == "finished"


MOMENTS = ("starting", "training", "training", "saving", "saving")


def recipe_for(model: Path, rows: Path, **more: Any) -> dict[str, Any]:
    """A recipe for that: checkpoints often, so that most moments are moments of a checkpoint."""
    return {
        "model": str(model), "tuning": {"type": "lora", "rank": 4, "dropout": 0.1}, "data": str(rows), "epochs": 1000,
        "checkpoint": {"every": 2, "keep": 2}, "evaluation": {"every": 6, "holdout": 0.1}, "track": [],
        "hardware": {"device": "cpu"}, "batch_size": 8, "micro_batch": 4, "packing": False, "sequence_length": 64,
        **more,
    }  # fmt: skip


def build_run(ground: tuple[Path, Path], root: Path, steps: int, ranks: int, **recipe: Any) -> Run:
    """A run over the tiny model, not begun."""
    asked = recipe_for(*ground, max_steps=steps, **recipe)
    asked["hardware"] = {"device": "cpu", "gpus": ranks}
    built = Recipe.build(asked)
    return Run.create(built, plan_for(built), root=root)


def killed_after(forge: Forge, run: Run, step: int) -> None:
    """Begin a run and kill all of it once a checkpoint of that step or a later one is complete."""
    supervisor = forge.start(run)
    wait_until(lambda: gone(supervisor) or any(event.data["step"] >= step for event in told(run, "checkpoint")))
    kill_9([supervisor, *ranks_of(supervisor)])


def finish(forge: Forge, run: Run) -> None:
    """Go on to the end."""
    supervisor = forge.start(run)
    wait_until(lambda: gone(supervisor))
    assert run.recorded.state == "finished", (run.path / "log" / "supervisor.log").read_text()[-1500:]
    require_orderly(run)
