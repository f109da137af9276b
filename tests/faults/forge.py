"""A process that has imported everything and forks supervisors and ranks from itself, on request.

    python -P tests/faults/forge.py < requests > answers

Importing torch, transformers and trl takes some eight seconds of a core, so that two hundred kills would take an hour
of imports alone. What is forked here runs the very code of a real supervisor and of real ranks, as processes of their
own with the same relations: a rank is the supervisor's child and dies with it. Only the way they begin differs.

A request is a line of JSON, ``{"run": path, "clock": seconds}``; the answer is the pid of the supervisor. ``clock``
is how far the wall clock is set back once the first step has been told. ``{"ground": folder}`` asks for a tiny model
and its rows; the answer is the pid of the process that writes them.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}

from finetui.engine import supervisor, worker
from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.supervision.ranks import MEETING


def import_all() -> None:
    """Whatever a rank imports on its way."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.compute  # noqa: F401
    import torch
    import transformers
    import trl  # noqa: F401

    from finetui.engine import baseline, evaluate, samples  # noqa: F401
    from finetui.engine.data import prepare  # noqa: F401
    from finetui.engine.models import adapt, load  # noqa: F401
    from finetui.engine.trainers import build, callbacks, job, optimizers, settings, sft  # noqa: F401

    assert transformers.AutoModelForCausalLM
    assert transformers.LlamaForCausalLM
    torch.set_num_threads(1)


def launcher(run: Run, world: int, _worker: Sequence[str], _waiting: object = None) -> Callable[[], dict[int, int]]:
    """As :func:`finetui.engine.supervision.ranks.launcher`, by forks."""

    def launch() -> dict[int, int]:
        meeting = f"/tmp/finetui-forge-{os.getpid()}-{time.monotonic_ns()}"
        left = {}
        for rank in range(world):
            place = {"RANK": str(rank), "WORLD_SIZE": str(world)}
            if world > 1:
                place |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), MEETING: meeting}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, and not used
            if not (pid := os.fork()):
                be_rank(run, place)
            left[pid] = rank
        failed: dict[int, int] = {}
        deadline = None
        while left:
            for pid in list(left):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended and (code := os.waitstatus_to_exitcode(status)):
                    failed[left[pid]] = code
                if ended:
                    del left[pid]
            if failed and deadline is None:
                deadline = time.monotonic() + 2  # peers hang in a collective
            if deadline is not None and time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        Path(meeting).unlink(missing_ok=True)
        return failed

    return launch


def be_rank(run: Run, place: dict[str, str]) -> NoReturn:
    """Be a rank of a run, as ``python -m finetui.engine.worker`` is."""
    code = 1
    try:
        os.setsid()
        os.closerange(3, 4096)  # as exec does with all that a supervisor has open
        for number in (signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        os.environ |= place
        if (fault := run.path / "fault").is_file():
            runpy.run_path(str(Path(__file__).with_name("ruin.py")))["ruin"](run, fault.read_text())
        code = worker.main([str(run.path)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def be_supervisor(path: str, clock: float) -> NoReturn:
    """Supervise a run, as ``python -m finetui.engine.supervisor`` does."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: unlike a real one, it ends with the tests
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(Path(path) / "log" / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 4096)
        if clock:
            set_back(Run(path), clock)
        supervisor.launcher = launcher  # type: ignore[attr-defined]
        code = supervisor.main([path])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def lay_ground(folder: Path) -> NoReturn:
    """Write a tiny model and its rows."""
    try:
        os.dup2(2, 1)  # stdout has answers on it
        runpy.run_path(str(Path(__file__).with_name("ground.py")))["main"](folder)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def set_back(run: Run, seconds: float) -> None:
    """From the first step on, this process and its children live ``seconds`` in the past."""
    now, back = time.time, [0.0]

    def told() -> float:
        if not back[0] and any(event.type == "step" for event in read_events(run.events_path)):
            back[0] = seconds
        return now() - back[0]

    time.time = told


def main() -> None:
    """Answer requests until there are none."""
    import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if not (pid := os.fork()):
            if "ground" in asked:
                lay_ground(Path(asked["ground"]))
            be_supervisor(asked["run"], asked.get("clock", 0.0))
        print(pid, flush=True)


if __name__ == "__main__":
    main()
