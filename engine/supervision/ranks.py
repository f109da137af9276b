"""The ranks of a run as processes: one as a plain child, several through ``torch.distributed.elastic``.

Elastic needs PyTorch, which takes seconds to import here while no rank has begun to import it for itself. A single
rank has nobody to meet, so it is spared that, and a process group of one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from ...planner.errors import FinetuiError
from ...planner.plan import Plan
from .. import bytecode
from ..children import import_environment, rank_environment
from ..run import Run
from ..standby import WaitingRank

#: Seconds between SIGTERM and SIGKILL for ranks that are ended without a checkpoint.
QUIT_S = 3.0
#: The variable that tells ranks of one machine the file in which they meet.
MEETING = "FINETUI_MEETING"

Launch = Callable[[], dict[int, int]]
"""Runs all ranks to their end and gives the exit codes of those that failed; a negative code is a signal."""


def launcher(run: Run, world_size: int, worker: Sequence[str], waiting: WaitingRank | None = None) -> Launch:
    """What starts the ranks of a run, each a session of its own so that it can be ended with all that it started.

    Args:
        worker: what each rank runs, as arguments of Python before the run directory.
        waiting: a rank that is there already, to be the only one.

    Raises:
        FinetuiError: PyTorch is not installed, or can't be imported.
    """
    if importlib.util.find_spec("torch") is None:
        raise FinetuiError("PyTorch is not installed", do="Install it with: pip install 'finetui[train]'")
    command = [*worker, str(run.path)]
    return _several(run.name, world_size, command) if world_size > 1 else lambda: _single(command, waiting)


def environment(plan: Plan, present: Mapping[str, str]) -> dict[str, str]:
    """What the ranks need in their environment; what the user has set by hand stays."""
    resolved = plan.resolved
    added = rank_environment(present, world=resolved.world_size, cuda=resolved.device == "cuda")
    visible = ",".join(map(str, resolved.gpus)) if resolved.device == "cuda" else ""
    devices = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
    return added | devices | import_environment() | bytecode.environment(present)


def _single(command: Sequence[str], waiting: WaitingRank | None) -> dict[int, int]:
    # Without LOCAL_RANK: libraries take that for a process group to join.
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    code = None if waiting is None else waiting.train(Path(command[-1]), environment)
    if code is None:
        code = subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True).wait()
    return {0: code} if code else {}


def _several(name: str, world_size: int, command: Sequence[str]) -> Launch:
    try:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    except ImportError as error:
        raise FinetuiError(
            f"PyTorch can't be imported ({error})", do="Install it with: pip install 'finetui[train]'"
        ) from error
    # Torch's TCP store listens on every address of the machine, obeys whoever connects, and unpickles what they store.
    # Ranks of one machine meet in files instead, in a folder of this user alone.
    meeting = Path(tempfile.mkdtemp(prefix="finetui-ranks-"))
    # It warns that signals are not handled in its thread; they are, in the supervisor's main one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=str(meeting / "agent"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",  # a container's own host name need not resolve
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # ranks write their own logs
    )

    def launch() -> dict[int, int]:
        os.environ[MEETING] = str(meeting / "ranks")
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or elastic opens a store for the ranks after all
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            return {rank: failure.exitcode for rank, failure in error.failures.items()}
        finally:
            shutil.rmtree(meeting, ignore_errors=True)
        return {}

    return launch


# --- their end


def end_ranks(*, politely: bool) -> None:
    """End all children with what they have started; each is a session of its own.

    Their exit status is left for those to collect who started them, so nothing here waits for them in the way a parent
    does.

    Args:
        politely: with SIGTERM first, and SIGKILL :data:`QUIT_S` seconds later.
    """
    ranks = _working_children()
    if politely:
        for rank in ranks:
            _signal_group(rank, signal.SIGTERM)
        deadline = time.monotonic() + QUIT_S
        while (ranks := _working_children()) and time.monotonic() < deadline:
            time.sleep(0.05)
    for rank in ranks:
        _signal_group(rank, signal.SIGKILL)


def _working_children() -> list[int]:
    working = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                working.append(child.pid)
    return working


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
