"""What can go wrong inside a rank, done to a real one: see :data:`FAULTS`. The forge calls it before a rank begins."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from finetui.engine.run import Run

#: Called with the trainer, the step (from 1), the attempt and the loss of a micro-batch; returns the loss.
Fault = Callable[[Any, int, int, Any], Any]


def ruin(run: Run, name: str) -> None:
    """Have a fault in this process, in its micro-batches."""
    from finetui.engine.trainers.sft import TokenMeanTrainer

    attempt, fault = run.recorded.attempt, FAULTS[name]
    compute = TokenMeanTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **more: Any) -> Any:
        loss = compute(self, *args, **more)
        if not self.model.training:
            return loss
        return fault(self, self.state.global_step + 1, attempt, loss)

    TokenMeanTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def out_of_memory(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """Step 7 does not fit with the micro batch that was planned."""
    import torch

    if step == 7 and trainer.args.per_device_train_batch_size >= 4:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB "
            "is free. Including non-PyTorch memory, this process has 78.10 GiB memory in use. Of the allocated memory "
            "70.00 GiB is allocated by PyTorch, and 7.00 GiB is reserved by PyTorch but unallocated."
        )
    return loss


def real_out_of_memory(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """The same, by asking the GPU for a pebibyte."""
    import torch

    if step == 7 and trainer.args.per_device_train_batch_size >= 4:
        torch.empty(1 << 50, dtype=torch.uint8, device=loss.device)
    return loss


def nan(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """From step 9 on, nothing is finite."""
    return loss * float("nan") if step >= 9 else loss


def nan_once(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """The second micro-batch of step 9 has no finite loss; the first one has."""
    seen = trainer.__dict__.setdefault("_seen", [])
    seen.append(step)
    return loss * float("nan") if step == 9 and seen.count(9) == 2 else loss


def explosion(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """From step 10 on, the loss is far above all before."""
    return loss * 40 if step >= 10 else loss


def hang(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """The last rank never comes back from a micro-batch of step 5; then all is well."""
    if step == 5 and attempt == 1 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        wait_for_ever()
    return loss


def wait_for_ever() -> None:
    """A name to look for in a stack."""
    time.sleep(1000)


def device_lost(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """A GPU fails at step 5, once."""
    if step == 5 and attempt == 1:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    return loss


def stopped(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """Something sends SIGSTOP at step 5."""
    if step == 5 and not trainer.__dict__.setdefault("_stopped", False):
        trainer._stopped = True
        os.kill(os.getpid(), signal.SIGSTOP)
    return loss


def slow(trainer: Any, step: int, attempt: int, loss: Any) -> Any:
    """Micro-batches that take a while."""
    time.sleep(0.3)
    return loss


FAULTS: dict[str, Fault] = {
    "oom": out_of_memory, "oom-real": real_out_of_memory, "nan": nan, "nan-once": nan_once, "explosion": explosion,
    "hang": hang, "device-lost": device_lost, "stopped": stopped, "slow": slow,
}  # fmt: skip
