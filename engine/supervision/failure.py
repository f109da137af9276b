"""From an exception of a rank to the cause that a run ends with, and what can be done about it."""

from __future__ import annotations

import errno
import re
import traceback
from pathlib import Path

from ...planner.errors import DataError, FinetuiError, TrainingError
from ...planner.plan import Resolved
from ..durable import is_disk_error
from ..events import Failure
from ..status import Cause

#: A folder that was writable when the run began, and no longer is.
_NO_ACCESS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE})


def classify(error: BaseException, rank: int, resolved: Resolved | None) -> Failure:
    """The failure event of a rank.

    Args:
        resolved: the settings of the run, from which the levers against a lack of memory are named.
    """
    if isinstance(error, TrainingError):
        return Failure(rank, error.cause, error.what, error.where, error.do)
    if isinstance(error, FinetuiError):
        return Failure(rank, "data" if isinstance(error, DataError) else "crash", error.what, error.where, error.do)
    if is_out_of_memory(error):
        needed = _needed_gib(str(error))
        return Failure(rank, "oom", _memory_message(error), _origin(error), memory_levers(resolved), needed)
    if is_disk_error(error):
        do = "Free some space, then resume the run: its checkpoints are intact."
        return Failure(rank, "disk", "no space is left on the disk", _origin(error), do)
    if isinstance(error, OSError) and error.errno in _NO_ACCESS and error.filename:
        do = "Give it back its rights, or mount it again, then resume the run: its checkpoints are intact."
        return Failure(rank, "disk", f"{error.filename} can't be used ({error.strerror})", _origin(error), do)
    first = (str(error).strip().splitlines() or [""])[0]
    cause: Cause = "crash"
    message = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return Failure(rank, cause, message[:500], _origin(error), f"The whole traceback is in log/rank{rank}.log.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the machine had no memory left; names are compared so that torch need not be imported."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OutOfMemoryError", "MemoryError"}:
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "cublas_status_alloc_failed" in text


def memory_levers(resolved: Resolved | None) -> str:
    """What uses less memory, the cheapest in speed first, as settings of the recipe."""
    if resolved is None:
        return "Use a GPU with more memory."
    levers: list[str] = []
    if resolved.micro_batch > 1:
        levers.append(f"micro_batch: {max(1, resolved.micro_batch // 2)} (same batch, more accumulation)")
    if resolved.checkpointing == "none":
        levers.append("hardware.checkpointing: full")
    if resolved.optimizer == "adamw":
        levers.append("optimizer.name: adamw-8bit")
    if resolved.tuning == "full":
        levers.append("tuning: lora")
    elif resolved.tuning == "lora":
        levers.append("tuning: qlora")
    if resolved.sequence_length > 512:
        levers.append(f"sequence_length: {resolved.sequence_length // 2}")
    return f"Try, in this order: {'; '.join(levers)}." if levers else "Use a GPU with more memory."


def _memory_message(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"out of memory ({first[:300]})" if first else "out of memory"


def _needed_gib(text: str) -> float | None:
    """What PyTorch says that its tensors hold on a GPU, and what it was asked for beside; in GiB."""
    asked = re.search(r"Tried to allocate ([\d.]+) (GiB|MiB|KiB)", text)
    held = re.search(r"memory ([\d.]+) (GiB|MiB|KiB) is allocated by PyTorch", text)
    if asked is None or held is None:
        return None
    unit = {"GiB": 1.0, "MiB": 2.0**-10, "KiB": 2.0**-20}
    return round(sum(float(found[1]) * unit[found[2]] for found in (asked, held)), 4)


def _origin(error: BaseException) -> str:
    """File and line of the innermost frame, as a programmer would look for it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
