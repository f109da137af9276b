"""One attempt at a run inside a job of a cluster: starts it or goes on with it, follows it, and has it saved in time.

    python -P -m finetui.engine.cluster.attempt RECIPE --name NAME --runs FOLDER [--keep FOLDER] [--requeue]

It stays in the foreground, as jobs must, and does what a person would: ``finetui run`` or, where the run is there
already, ``finetui resume``, then ``finetui attach``. Signals:

    SIGUSR1          the job will be ended in ``--notice-s`` seconds: a checkpoint, then the end
    SIGTERM, SIGINT  the same within the recipe's limits.grace_s

Exit codes: 0 the run has finished; 75 it was saved and is to be continued; 2 the user's to put right; 1 all else.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from ..checkpoints.store import find
from ..children import import_environment
from ..run import SILENCE_S, Run
from ..status import LIVE_STATES
from ..supervision.preemption import FILE
from .keep import Keep

_PACKAGE = (__package__ or "finetui.engine.cluster").partition(".")[0]

#: What BSD's sysexits.h calls a failure that another attempt may get over (EX_TEMPFAIL).
TO_BE_CONTINUED = 75
#: Seconds between two looks at the run, and between two copies of it.
POLL_S, COPY_S = 0.5, 60.0
#: Seconds that the viewer gets to print what it has not printed yet.
_LAST_WORDS_S = 20.0


class Notice:
    """What signals have said: in how many seconds the job ends, and whether its own clock said so.

    A run that is at work is told by the signal handler itself: whatever else goes on here, such as a long copy, no
    second of what is left is lost.
    """

    def __init__(self, notice_s: float) -> None:
        self.left_s: float | None = None
        self.by_clock = False
        self._notice_s = notice_s
        self._run: Run | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.left_s, self.by_clock = self._notice_s, True
        elif self.left_s is None:
            self.left_s = -1.0
        self._pass_on()

    def to(self, run: Run) -> None:
        """From now on a run is told, at once if there is something to tell."""
        self._run = run
        self._pass_on()

    def _pass_on(self) -> None:
        """Say how many seconds are left; without a number, those of the recipe."""
        if self._run is None or self.left_s is None:
            return
        folder = self._run.path / "control"
        folder.mkdir(exist_ok=True)
        part = folder / f".{FILE}"
        part.write_text(f"{self.left_s:.0f}" if self.left_s > 0 else "", encoding="utf-8")
        part.replace(folder / FILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of a job."""
    parser = argparse.ArgumentParser(prog="finetui.engine.cluster.attempt", description="Carry out one run in a job.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--name", required=True, help="the run's name")
    parser.add_argument("--runs", type=Path, required=True, help="folder that holds the run")
    parser.add_argument("--keep", type=Path, help="folder that outlives the machine: a copy of the run is kept there")
    parser.add_argument("--notice-s", type=float, default=110.0, help="seconds that are left at SIGUSR1")
    parser.add_argument("--requeue", action="store_true", help="after SIGUSR1, put the Slurm job into the queue again")
    options = parser.parse_args(argv)
    runs = options.runs.expanduser().resolve()
    keep = Keep(runs, options.name, options.keep.expanduser()) if options.keep else None
    notice = Notice(options.notice_s)
    if keep is not None and keep.restore():
        print(f"{options.name} is back from {options.keep}", flush=True)
    run = Run(runs / options.name)
    before = _newest(run)
    code = _begin(run, options.recipe, notice)
    if code is None:
        code = _follow(run, notice, keep)
    if options.requeue and notice.by_clock and code == TO_BE_CONTINUED:
        code = _requeue(run, before)
    return code


# --- the run


def _begin(run: Run, recipe: Path, notice: Notice) -> int | None:
    """Start the run or go on with it; an exit code where that is not to be, or can't be done."""
    there = (run.path / "run.json").is_file()
    if there:
        _wait_for_others(run, notice)
        if run.recorded.state == "finished":
            print(f"{run.name} has finished already; its result lies in {run.output_path}", flush=True)
            return 0
    if notice.left_s is not None:
        return TO_BE_CONTINUED
    anew = ("run", str(recipe), "--name", run.name, "--out", str(run.path.parent))
    code = _finetui(*(("resume", str(run.path)) if there else anew), "--detach").wait()
    if code < 0 and notice.left_s is not None:  # the signal went to every process of the job
        return TO_BE_CONTINUED
    return None if code == 0 else 2 if code == 2 else 1


def _wait_for_others(run: Run, notice: Notice) -> None:
    """Wait until a run that is at work, or was so on a machine that is gone, has ended or fallen silent."""
    until = time.monotonic() + 2 * SILENCE_S
    if run.status.state in LIVE_STATES:
        print(f"{run.name} was at work on {run.recorded.host}: waiting until that has ended", flush=True)
    while run.status.state in LIVE_STATES and notice.left_s is None and time.monotonic() < until:
        time.sleep(POLL_S)


def _follow(run: Run, notice: Notice, keep: Keep | None) -> int:
    """Stay with a run until it ends, print what it says, pass notices on, and keep the copy up to date."""
    viewer = _finetui("attach", str(run.path), "--plain")
    notice.to(run)
    copied = time.monotonic()
    while run.status.state in LIVE_STATES:
        time.sleep(POLL_S)
        if keep is not None and time.monotonic() > copied + COPY_S:
            _copy(keep)
            copied = time.monotonic()
    try:
        viewer.wait(_LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        viewer.terminate()
        viewer.wait()
    saved = keep is None or _copy(keep)
    status = run.status
    if status.state == "finished":
        return 0 if saved else 1
    if status.cause == "preempted" or (notice.left_s is not None and status.state in {"stopped", "lost"}):
        return TO_BE_CONTINUED
    return 2 if status.cause == "data" else 1


def _copy(keep: Keep) -> bool:
    """Bring the copy up to date; whether it is. A place that can't be written now may be so again."""
    try:
        keep.copy()
    except OSError as error:
        print(f"! the copy of the run can't be brought up to date ({error})", file=sys.stderr, flush=True)
        return False
    return True


def _newest(run: Run) -> int:
    """Step of the newest checkpoint of a run and its stages, added up; 0 without any."""
    folders = [run.path, *run.path.parent.glob(f"{run.name}.*")]
    return sum(max((c.step for c in find(folder / "checkpoints")), default=0) for folder in folders)


def _requeue(run: Run, before: int) -> int:
    """Ask Slurm to start this job again, unless it would come no further than this time."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if _newest(run) <= before:
        what = f"{run.name} came no further than checkpoint {before} in the time that the job has"
        print(f"{what}: it is not put into the queue again. Give it more --time.", file=sys.stderr, flush=True)
        return 1
    done = subprocess.run(["scontrol", "requeue", job], check=False)
    if done.returncode:
        print(
            f"Slurm does not put job {job} into the queue again: sbatch the script anew.", file=sys.stderr, flush=True
        )
    return TO_BE_CONTINUED


def _finetui(*words: str) -> subprocess.Popen[bytes]:
    """A command of finetui as a child of this one. It ignores Ctrl-C: what that means is decided here."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _PACKAGE, *words],
        stdin=subprocess.DEVNULL, env={**os.environ, **import_environment()}, start_new_session=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
