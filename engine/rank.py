"""Rank: this process's place among the ranks of a run, how it meets the others, and with whom it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .modes import FILE
from .run import Run
from .supervision.ranks import MEETING


@dataclass(frozen=True)
class Rank:
    """This process's place among the ranks."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Rank:
        """As torch elastic set it; a process started by hand is the only rank."""
        read = os.environ.get
        return cls(int(read("RANK", "0")), int(read("LOCAL_RANK", "0")), int(read("WORLD_SIZE", "1")))


def redirect(run: Run, rank: int) -> None:
    """What this process prints from now on goes to the log of a rank."""
    path = run.log_path(rank)
    path.parent.mkdir(exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def die_with_parent() -> bool:
    """Ask the kernel to kill this process when its parent dies; False if that has happened already."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    return os.getppid() == parent and parent != 1


def join_group(rank: Rank, kind: str, hang_s: float | None) -> Any:
    """Join the process group, if there is one; returns this rank's device.

    Its collectives wait for longer than it takes to find a hang: the supervisor has the stacks written before it ends
    the ranks, while NCCL's own watchdog would just abort them.
    """
    import torch

    device = torch.device("cuda", rank.local_rank) if kind == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank.world > 1:
        nccl: dict[str, Any] = {"backend": "nccl", "device_id": device}
        options: dict[str, Any] = nccl if device.type == "cuda" else {"backend": "gloo"}
        options["timeout"] = timedelta(seconds=1800 if hang_s is None else max(1800.0, 2 * hang_s))
        if meeting := os.environ.get(MEETING):
            store = torch.distributed.FileStore(meeting, rank.world)
            options |= {"store": store, "rank": rank.rank, "world_size": rank.world}
        torch.distributed.init_process_group(**options)
    return device


def leave_group() -> None:
    """Leave the process group, if one was joined."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def in_turn(rank: Rank, make: Any) -> Any:
    """Let rank 0 do it (and fill the cache), then the others find it done."""
    if rank.rank != 0:
        barrier()
    made = make()
    if rank.rank == 0:
        barrier()
    return made
