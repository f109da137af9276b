"""A run that seems to be at work: eight GPUs that say something once a second, none of which is there.

Figures are made up, and different every second, which is the hardest case for whoever draws them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil

from finetui.engine.events import (
    CheckpointSaved,
    Eval,
    EventLog,
    GpuSample,
    HostSample,
    MemoryUse,
    Payload,
    State,
    Step,
)
from finetui.engine.planning import plan_for
from finetui.engine.run import Run
from finetui.engine.status import Status
from finetui.planner.recipe import Recipe

#: Steps the run has done when it is opened, and steps it will do.
DONE, STEPS = 240, 10_000
STEP_S = 1.0


def live_run(root: Path, name: str = "eight", *, gpus: int = 8) -> Run:
    """A run of this very process, :data:`DONE` seconds old."""
    hardware = {"gpu": "H100", "gpus": gpus} if gpus else {"device": "cpu"}
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "qlora", "hardware": hardware})
    run = Run.create(recipe, plan_for(recipe), root=root, name=name)
    begin = time.time() - DONE * STEP_S
    own_it(run, begin)
    with EventLog(run.events_path) as log:
        log.append(State("running", attempt=1))
        for step in range(1, DONE + 1):
            for payload in second(step, gpus if step % 60 == 0 else 0):
                log.append(payload)
    # The log stamps the present time; the run has been at it for a while.
    lines = [json.loads(line) for line in run.events_path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["time"] = round(begin + STEP_S * line.get("step", DONE), 3)
    run.events_path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


def own_it(run: Run, begin: float) -> None:
    """Make this process the run's supervisor in the eyes of its viewers."""
    status = Status("running", attempt=1, pid=os.getpid(), pid_started=psutil.Process().create_time(),
                    host=socket.gethostname(), created=begin, started=begin)  # fmt: skip
    (run.path / "run.json").write_text(json.dumps(dataclasses.asdict(status)), encoding="utf-8")


def second(step: int, gpus: int, *, nan: bool = False, lost: int | None = None) -> list[Payload]:
    """What a run says in one second, its GPUs included; one that is ``lost`` gives no figures any more."""
    loss = math.nan if nan else 1.2 + 1.25 * math.exp(-step / 60) + (step * 7 % 13 - 6) / 80
    norm = math.inf if nan else 0.3 + (step * 3 % 7) / 30
    speed = 41_000.0 + step * 31 % 971
    said: list[Payload] = [Step(step, step / STEPS, loss, 2e-4 * (1 - step / STEPS), norm, step * 16384, speed, STEP_S,
                                STEPS)]  # fmt: skip
    for index in range(gpus):
        load = float((step * 5 + index * 11) % 100)
        sample = GpuSample(index=index, name="NVIDIA H100 80GB HBM3", memory_used_gib=60 + load / 20,
                           memory_total_gib=79.6, sm_percent=load, power_w=600 + load, temperature_c=60 + load / 10,
                           sm_clock_mhz=1700.0 + load, throttle=[])  # fmt: skip
        gone = {
            field.name: None for field in dataclasses.fields(sample) if field.name not in ("index", "name", "throttle")
        }
        said.append(dataclasses.replace(sample, **gone) if index == lost else sample)
        said.append(MemoryUse(index, 58.0 + load / 50, 61.0, 60.0))
    if gpus:
        said.append(HostSample(float(step % 100), 40.0 + step % 9, 310.0 - step % 5, 251.5))
    if step % 100 == 0:
        said += [Eval(step, 1.3 + 1.1 * math.exp(-step / 60)), CheckpointSaved(step, "checkpoints", 187_000_000, 1.4)]
    return said


class Feeder:
    """Writes on in a thread, a second of the run per second, until it is left; ``nan`` and ``lost`` can be switched."""

    def __init__(self, run: Run, gpus: int = 8) -> None:
        self.run, self.gpus, self.step = run, gpus, DONE
        self.nan = False
        self.lost: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def _write(self) -> None:
        with EventLog(self.run.events_path) as log:
            while not self._ended.wait(STEP_S):
                self.step += 1
                for payload in second(self.step, self.gpus, nan=self.nan, lost=self.lost):
                    log.append(payload)

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
