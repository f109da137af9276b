"""Programs that train beside one another and are timed in turns, so that a machine that slows down does it to all.

Each is a process of its own that stays loaded. First it takes some steps to compile and to settle; then in each round
so many that are timed as one, while the others wait. Their peaks have to fit on the GPU together.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..children import import_environment
from .task import ARMS, COMMON, Task

Tell = Callable[[str], None]


class Arm:
    """One program in a process of its own; it waits before each of its turns."""

    def __init__(self, task: Task, folder: Path) -> None:
        import os

        self.turns = folder / f"{task.arm}-{task.mode}"
        self.turns.mkdir(parents=True)
        self.task, self.log = replace(task, turns=str(self.turns)), self.turns / "log"
        command = [sys.executable, "-P", "-m", f"{__package__}.arms", self.task.to_json()]
        environment = {**os.environ, **import_environment()}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=tempfile.mkdtemp(), env=environment
            )

    def reach(self, turn: int, timeout_s: float) -> None:
        """Wait until it waits for this turn, or has ended; one that takes too long is ended."""
        until = time.monotonic() + timeout_s
        while not (self.turns / f"{turn}.ready").exists() and self.process.poll() is None:
            if time.monotonic() > until:
                self.process.kill()
                self.process.wait()
            time.sleep(0.01)

    def take(self, turn: int, timeout_s: float) -> None:
        """Let it have a turn, and wait until it is done."""
        self.go(turn)
        self.reach(turn + 1, timeout_s)

    def go(self, turn: int) -> None:
        """Let it go on."""
        (self.turns / f"{turn}.go").touch()

    def result(self, tell: Tell) -> dict[str, Any]:
        """What it measured, or how it failed."""
        self.process.wait()
        head = {"arm": self.task.arm, "checkpointing": self.task.mode}
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.startswith(("fallback:", "phases:", "kernels:")):
                tell(f"  {line}")
        told = [line for line in lines if line.startswith("RESULT ")]
        if told:
            return head | json.loads(told[-1].removeprefix("RESULT "))
        tell("\n".join([f"{self.task.arm} {self.task.mode} failed:", *lines[-25:]]))
        return head | {"failed": next((line for line in reversed(lines) if line.strip()), "no output")}


def measure(
    tasks: Sequence[Task], tell: Tell, *, timeout_s: float = 240.0, together: bool = False, profile: Path | None = None,
    folder: Path | None = None, done: Callable[[dict[str, Any]], object] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Let all arms run, turn by turn, and gather what each measured.

    Args:
        timeout_s: for loading and the first step, and for each turn.
        together: arms load and settle side by side, which spares time; their times to the first step then mean
            nothing, and are left out.
        profile: a file that gets each arm's table of what ran on the GPU; ``task.profile`` is set for it.
        folder: for the turns and logs of the arms; a temporary one by default.
        done: is told each result the moment it is known.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="finetui-turns-"))
    arms: list[Arm] = []
    for task in tasks:
        tell(f"loading {task.arm}, checkpointing {task.mode}")
        arms.append(Arm(task, folder))
        if not together:
            arms[-1].reach(0, timeout_s)
    for arm in arms:
        arm.reach(0, timeout_s)
    last = max(task.rounds for task in tasks) + 1
    tell("settling")
    for arm in arms:  # side by side where they loaded so: compilers of several programs, and nothing that is timed
        arm.go(0)
        if not together:
            arm.reach(1, timeout_s)
    for arm in arms:
        arm.reach(1, timeout_s)
    for turn in range(1, last):
        tell(f"round {turn} of {last - 1}")
        for arm in arms:
            arm.take(turn, timeout_s)
    if profile is not None:
        for arm in arms:
            arm.take(last, timeout_s)
    results = []
    for arm in arms:
        arm.go(last)
        arm.go(last + 1)
        result = arm.result(tell)
        if together:
            result.pop("to_first_step_s", None)
            result.pop("first_step_s", None)
        results.append(result)
        done(result)
        told = arm.turns / "profile"
        if profile is not None and told.exists():
            with open(profile, "a", encoding="utf-8") as file:
                head = f"{arm.task.tuning} {arm.task.arm} {arm.task.mode}"
                file.write(f"{head}\n{told.read_text(encoding='utf-8')}\n\n")
    return results


def tasks_of(first: Task, arms: Sequence[str], modes: Sequence[str], tell: Tell) -> list[Task]:
    """One task for each arm and way of checkpointing, without programs that are not installed."""
    here = [arm for arm in arms if importlib.util.find_spec(ARMS[arm])]
    for arm in arms:
        if arm not in here:
            tell(f"{arm} is not installed here")
    return [replace(first, arm=arm, mode=mode) for mode in modes for arm in here if arm == "finetui" or mode in COMMON]


def facts(command: str) -> dict[str, Any]:
    """What a table of measurements has to say beside its figures: command, date, device, versions."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {}
    for name in ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"command": command, "date": time.strftime("%Y-%m-%d"), "gpu": device, "versions": found}
