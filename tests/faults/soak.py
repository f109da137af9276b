"""One run of a tiny model for an hour, under faults at random moments, beside one that is left in peace.

    python -m tests.faults.soak --hours 1 --report FOLDER

What happens to it: ``kill -9`` of supervisor, rank or both while starting, training or saving; SIGTERM as before a
preemption; SIGSTOP of the rank for a while; a bit of the newest checkpoint flipped, one of its files gone, its manifest
cut; events.jsonl cut in mid-line; the clock set back by two hours; the disk filled (where mounting is allowed). In the
end the losses of both are compared step by step and bit by bit. FOLDER gets ``soak.log``, a line per fault, and
``soak.json``. Exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from finetui.engine.checkpoints import store
from finetui.engine.events import EventReader
from finetui.engine.run import Run

from .harness import Forge, build_run, gone, kill_9, ranks_of, wait_until, watched

#: Far more steps than an hour has room for.
STEPS = 200_000
#: Faults, and how often each is chosen.
FAULTS = {
    "kill supervisor": 6, "kill rank": 6, "kill all": 6, "kill all while saving": 8, "kill all while starting": 3,
    "sigterm": 3, "sigstop": 2, "flip a bit": 3, "lose a file": 2, "cut the manifest": 2, "cut the events": 3,
    "set the clock back": 2, "fill the disk": 3,
}  # fmt: skip


class Peace:
    """The run that nothing happens to, but that it is paused where it is far ahead, to leave the machine to others."""

    def __init__(self, run: Run, forge: Forge) -> None:
        self.run, self.losses = run, dict[int, tuple[float, float]]()
        self._supervisor = forge.start(run)
        self._reader, self._paused = EventReader(run.events_path), list[psutil.Process]()

    def read(self) -> int:
        """The latest step."""
        for event in self._reader.read():
            if event.type == "step":
                self.losses[event.data["step"]] = (event.data["loss"], event.data["grad_norm"])
        return max(self.losses, default=0)

    def keep_pace(self, step: int) -> None:
        """Pause or go on, so that it is a little ahead of ``step``."""
        ahead = self.read() - step
        if ahead > 300 and not self._paused:
            self._paused = ranks_of(self._supervisor)
            for rank in self._paused:
                rank.suspend()
        elif ahead < 100:
            self.go_on()

    def go_on(self) -> None:
        """End the pause."""
        for rank in self._paused:
            rank.resume()
        self._paused = []

    def reach(self, step: int) -> None:
        """Go on to at least that step, then stop."""
        self.go_on()
        while self.read() < step:
            assert not gone(self._supervisor), self.run.status
            time.sleep(0.5)
        self.run.request("stop")
        wait_until(lambda: gone(self._supervisor))


class Soak:
    """The tormented run and what is known of it."""

    def __init__(self, run: Run, peace: Peace, forge: Forge, disk: Path | None, seed: int, log: Path) -> None:
        self.run, self.peace, self.forge, self.disk, self.log = run, peace, forge, disk, log
        self.choose = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.repeated: list[int] = []
        self.wrong: list[str] = []
        self.losses: dict[int, tuple[float, float]] = {}
        self.checkpoints = 0
        self._reader = EventReader(run.events_path)
        self._last = self._saved = 0

    def say(self, line: str) -> None:
        """One line of the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def read(self) -> None:
        """What the run has told since; a step that is told again must be the same to the last bit."""
        for event in self._reader.read():
            if event.type == "checkpoint":
                self.checkpoints, self._saved = self.checkpoints + 1, event.data["step"]
            if event.type != "step":
                continue
            step, figures = event.data["step"], (event.data["loss"], event.data["grad_norm"])
            if self.losses.setdefault(step, figures) != figures:
                self.wrong.append(f"step {step} came out as {figures}, before as {self.losses[step]}")
            if step <= self._last:
                self.repeated.append(self._last - step + 1)
            self._last = step
        self.peace.keep_pace(self._last)

    def torment(self, hours: float) -> None:
        """Start it, harm it, start it again, until the time is over; then stop it in an orderly way."""
        until = time.monotonic() + hours * 3600
        clock = 0.0
        while time.monotonic() < until:
            supervisor = self.forge.start(self.run, clock=clock)
            clock = 0.0
            fault = self.choose.choices(list(FAULTS), list(FAULTS.values()))[0]
            if fault == "fill the disk" and self.disk is None:
                fault = "kill all"
            before = self._last
            if "starting" not in fault:
                # An attempt has to get somewhere, or nothing is tested but starting.
                wait_until(lambda s=supervisor, b=before: gone(s) or self._stepped(b + 1))
                time.sleep(self.choose.random() * 6)
            else:
                time.sleep(self.choose.random() * 3)
            self.read()
            self.let_the_watcher_look()
            self.say(f"after step {self._last}, checkpoint {self._saved}: {fault}")
            if fault == "set the clock back":
                clock = 7200.0
            self.harm(fault, supervisor)
            self.counts[fault] += 1
            self.read()
            state = self.run.status
            self.say(f"  {state.state} {state.cause or ''} {state.message}")
            if state.state == "failed" and state.cause not in {"disk", "preempted"} and "SIGKILL" not in state.message:
                self.wrong.append(f"failed: {state.message}")
        supervisor = self.forge.start(self.run)
        further = self._last + 1
        wait_until(lambda: gone(supervisor) or self._stepped(further))
        self.run.request("stop")
        wait_until(lambda: gone(supervisor))
        self.read()
        if self.run.status.state != "stopped":
            self.wrong.append(f"it was asked to stop, and {self.run.status}")
        if not store.latest(self.run.path / "checkpoints").checkpoint:
            self.wrong.append("no sound checkpoint is left")

    def _stepped(self, step: int) -> bool:
        self.read()
        return self._last >= step

    def harm(self, fault: str, supervisor: psutil.Process) -> None:
        """Do one of :data:`FAULTS`, and wait until the run has ended of it."""
        ranks = ranks_of(supervisor)
        folder = self.run.path / "checkpoints"
        match fault:
            case "kill supervisor":
                kill_9([supervisor])
            case "kill rank":
                kill_9(ranks[:1])  # its supervisor starts another
                further = self._last + 3
                wait_until(lambda: gone(supervisor) or self._stepped(further))
                kill_9([supervisor])
            case "kill all while saving":
                wait_until(lambda: gone(supervisor) or any(folder.glob(".partial-*")), poll_s=0.0005)
                time.sleep(self.choose.random() * 0.03)
                kill_9([supervisor, *ranks])
            case "sigterm":
                with contextlib.suppress(psutil.Error):
                    supervisor.send_signal(signal.SIGTERM)
            case "sigstop":
                for rank in ranks[:1]:
                    with contextlib.suppress(psutil.Error):
                        rank.suspend()
                        time.sleep(3)
                        rank.resume()
                kill_9([supervisor, *ranks])
            case "fill the disk":
                assert self.disk is not None
                filler = self.disk / "filler"
                with open(filler, "wb", buffering=0) as file:
                    for block in (2**20, 4096):
                        with contextlib.suppress(OSError):
                            while file.write(bytes(block)) == block:
                                pass
                # Older checkpoints make way for a while, so that it may take long until nothing fits any more.
                enough = time.monotonic() + 60
                wait_until(lambda: gone(supervisor) or time.monotonic() > enough)
                filler.unlink()
                kill_9([supervisor, *ranks_of(supervisor)])
            case _:
                kill_9([supervisor, *ranks])
        wait_until(lambda: gone(supervisor) and all(gone(rank) for rank in ranks))
        self.spoil(fault, folder)

    def spoil(self, fault: str, folder: Path) -> None:
        """Damage files of a run that is not at work."""
        found = store.find(folder)
        if fault in {"flip a bit", "lose a file", "cut the manifest"} and len(found) > 1:
            (self.run.path / "harmed").touch()  # the watcher need not be told
            newest = found[-1].path
            victim = newest / self.choose.choice(("adapter_model.safetensors", "optimizer.safetensors"))
            if fault == "flip a bit":
                raw = bytearray(victim.read_bytes())
                raw[self.choose.randrange(len(raw))] ^= 1 << self.choose.randrange(8)
                victim.write_bytes(raw)
            elif fault == "lose a file":
                victim.unlink()
            else:
                os.truncate(newest / store.MANIFEST, 50)
        elif fault == "cut the events":
            raw = self.run.events_path.read_bytes()
            os.truncate(self.run.events_path, raw.rindex(b"\n", 0, -1) + 10)

    def let_the_watcher_look(self) -> None:
        """It looks away while there is a checkpoint that was damaged here; the next that is written removes that."""
        if not any(store.damage(path) for path in (self.run.path / "checkpoints").glob("step-*")):
            (self.run.path / "harmed").unlink(missing_ok=True)


def small_disk(folder: Path) -> Path | None:
    """A file system of 256 MiB, where that is allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    return folder if not os.geteuid() and not subprocess.run(command, capture_output=True).returncode else None


def main() -> int:
    """The whole of it."""
    parser = argparse.ArgumentParser(description="A run under random faults.")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=Path("soak"))
    options = parser.parse_args()
    options.report.mkdir(parents=True, exist_ok=True)
    log = options.report / "soak.log"
    with tempfile.TemporaryDirectory(prefix="finetui-soak-") as name:
        work = Path(name)
        os.environ["XDG_STATE_HOME"] = str(work / "state")
        forge = Forge(work / "forge.log")
        ground = forge.ground(work)
        disk = small_disk(work / "disk")
        more: dict[str, Any] = {
            "epochs": 10**6,
            "checkpoint": {"every": 5, "keep": 3},
            "evaluation": {"every": 500, "holdout": 0.1},
        }
        tormented = build_run(ground, (disk or work) / "runs", STEPS, 1, **more)
        peaceful = build_run(ground, work / "peace", STEPS, 1, limits={"hang_s": None}, **more)
        began = time.monotonic()
        try:
            peace = Peace(peaceful, forge)
            soak = Soak(tormented, peace, forge, disk, options.seed, log)
            with watched(tormented.path.parent, options.report / "watched.txt") as violations:
                soak.torment(options.hours)
                wrong = soak.wrong + violations()
            peace.reach(max(soak.losses))
            differ = [step for step, figures in soak.losses.items() if peace.losses[step] != figures]
            missing = sorted(set(range(1, max(soak.losses) + 1)) - set(soak.losses))
            wrong += [f"step {step} differs from the peaceful run" for step in differ[:5]]
            wrong += [f"step {step} was never told" for step in missing[:5]]
        finally:
            forge.close()
            if disk:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
        report = {
            "hours": round((time.monotonic() - began) / 3600, 3),
            "faults": dict(sorted(soak.counts.items())),
            "faults in all": sum(soak.counts.values()),
            "steps": max(soak.losses),
            "steps compared bit for bit": len(soak.losses),
            "checkpoints written": soak.checkpoints,
            "most steps repeated after a fault": max(soak.repeated, default=0),
            "disk was filled": disk is not None,
            "wrong": wrong,
            "versions": {name: _version(name) for name in ("torch", "transformers", "trl", "peft")},
        }
        (options.report / "soak.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        soak.say(json.dumps(report))
        print(json.dumps(report, indent=2))
        return 1 if wrong else 0


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


if __name__ == "__main__":
    sys.exit(main())
