"""Every check that can spare a run its failure, made before anything is downloaded or started.

Torch-free and, but for a model or dataset on the Hub that is not here yet, without network: in all well under a second.
Each check is one small function from recipe and plan to what it found.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil

from ..planner.cgroup import memory_limit
from ..planner.errors import UserError
from ..planner.plan import Plan
from ..planner.recipe import Recipe
from ..planner.rollout import ROLLOUT_METHODS
from .check import PACKAGES, Check, logout, nearest_folder
from .models.at_hand import check_model, check_stored, folder_of
from .run import default_root
from .supervision.at_end import cannot as cannot_shut_down
from .supervision.gpulock import holders

GIB = 2**30

#: Events, logs and TensorBoard files of a long run, in bytes.
_LOGS = 64 * 2**20
#: Shared memory that NCCL and data loaders of several ranks need; Docker gives 64 MiB unless told otherwise.
_SHARED_MEMORY = 512 * 2**20


def preflight(recipe: Recipe, plan: Plan, root: Path | None = None) -> list[Check]:
    """All checks; the run may start if none has status ``fail``.

    Args:
        root: the folder that will hold the run directory.
    """
    return list(checks(recipe, plan, root))


def checks(recipe: Recipe, plan: Plan, root: Path | None = None) -> Iterator[Check]:
    """The checks one by one, the quickest and most likely to fail first."""
    folder = (root or default_root()).resolve()
    every: list[tuple[str, Callable[[], list[Check]]]] = [
        ("plan", lambda: _fits(plan)),
        ("packages", lambda: _packages(recipe, plan)),
        ("gpu", lambda: _gpus(plan) if plan.resolved.device == "cuda" else []),
        ("gpu", lambda: _locked(recipe, plan)),
        ("memory", lambda: _host_memory(plan) if plan.resolved.device == "cpu" else []),
        ("memory", lambda: _put_together(plan) if plan.resolved.strategy == "fsdp" else []),
        ("shared memory", lambda: _shared_memory(plan)),
        ("run folder", lambda: _writable(folder)),
        ("data", lambda: _data(recipe, plan)),
        ("rewards", lambda: _rewards(recipe)),
        ("model", lambda: check_model(recipe.model, recipe.trust_remote_code)),
        ("model", lambda: check_stored(recipe)),
        ("teacher", lambda: _teacher(recipe)),
        ("adapter", lambda: _adapters(recipe)),
        ("disk", lambda: _disk(recipe, plan, folder)),
        ("logout", logout),
        ("at end", lambda: at_end(recipe)),
    ]
    for name, check in every:
        try:
            yield from check()
        except UserError as error:
            yield Check(name, "fail", f"{error.where}: {error.what}" if error.where else error.what, error.do)
        except OSError as error:
            yield Check(name, "warn", f"this could not be checked ({error})")


def _fits(plan: Plan) -> list[Check]:
    need, have, what = plan.memory.device_gib, plan.hardware.memory_gib, plan.hardware.gpu
    told = f"{need:.1f} of {have:.1f} GiB on {what}"
    if not plan.fits:
        return [Check("plan", "fail", f"the plan does not fit: {told}", " ".join(plan.warnings[:1]))]
    if not plan.hardware.local:
        do = "Run it on such a machine, or leave out hardware.gpu to plan for this one."
        return [Check("plan", "fail", f"the plan is for {what}, not for this machine", do)]
    if plan.memory.high_gib > have:
        do = f"If it runs out of memory: {plan.memory.lever}" if plan.memory.lever else "Watch its first steps."
        return [Check("plan", "warn", f"tight: {told}, at most {plan.memory.high_gib:.1f}", do)]
    return [Check("plan", "ok", f"fits: {told}")]


def _packages(recipe: Recipe, plan: Plan) -> list[Check]:
    from packaging.version import Version

    resolved = plan.resolved
    unneeded = set()
    if resolved.quantization == "none" and "8bit" not in resolved.optimizer:
        unneeded.add("bitsandbytes")
    if resolved.device == "cpu" or resolved.kernels == "off":
        unneeded.add("triton")
    if "tensorboard" not in recipe.track:
        unneeded.add("tensorboard")
    missing, wrong, found = [], [], {}
    for name, (first, beyond) in PACKAGES.items():
        if name in unneeded:
            continue
        try:
            found[name] = version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if Version(version) < Version(first) or (beyond and Version(version) >= Version(beyond)):
            wrong.append(f"{name} {version} (needed: {first} or later{f', before {beyond}' if beyond else ''})")
    do = "pip install 'finetui[train]'"
    if missing:
        return [Check("packages", "fail", f"not installed: {', '.join(missing)}", do)]
    if wrong:
        return [Check("packages", "fail", f"outside the range that works: {', '.join(wrong)}", do)]
    if resolved.device == "cuda" and found["torch"].endswith("+cpu"):
        do = "Install a CUDA build, see https://pytorch.org/get-started/locally."
        return [Check("packages", "fail", f"PyTorch {found['torch']} is a build for the CPU alone", do)]
    return [Check("packages", "ok", f"torch {found['torch']}, transformers {found['transformers']}")]


def _locked(recipe: Recipe, plan: Plan) -> list[Check]:
    """Other runs of finetui at work on these GPUs, of any user of this machine."""
    shared = recipe.hardware.shared
    gpus = plan.resolved.gpus if plan.resolved.device == "cuda" else []
    do = "Wait for it, choose others with hardware.gpus, or set hardware.shared: true."
    status: Literal["warn", "fail"] = "warn" if shared else "fail"
    return [
        Check(f"gpu {held.gpu}", status, str(held), "Both will be slower." if shared else do) for held in holders(gpus)
    ]


def _gpus(plan: Plan, load: Callable[[], Any] = lambda: importlib.import_module("pynvml")) -> list[Check]:
    wanted = plan.resolved.gpus
    nvml = load()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        do = "Install the driver, or start the container with its GPUs (docker run --gpus all)."
        return [Check("gpu", "fail", f"the NVIDIA driver does not answer ({error})", do)]
    try:
        count = nvml.nvmlDeviceGetCount()
        absent = [index for index in wanted if index >= count]
        if absent:
            do = f"Choose among 0 to {count - 1} with hardware.gpus." if count else "This machine has no GPU."
            return [Check("gpu", "fail", f"there is no GPU {', '.join(map(str, absent))}", do)]
        found = [_gpu(nvml, index, plan.memory.device_gib) for index in wanted]
    except nvml.NVMLError as error:
        return [Check("gpu", "fail", f"the driver does not answer about its GPUs ({error})", "Look at nvidia-smi.")]
    finally:
        nvml.nvmlShutdown()
    return [*found, *_visible(wanted)]


def _gpu(nvml: Any, index: int, need_gib: float) -> Check:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    try:
        others = [str(process.pid) for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except nvml.NVMLError:
        others = []  # not told inside some containers
    free = memory.free / GIB
    whom = f"GPU {index} ({name if isinstance(name, str) else name.decode()})"
    by = f", used by process {', '.join(others)}" if others else ""
    if free < need_gib:
        do = "End what runs there, or choose another GPU with hardware.gpus."
        return Check(f"gpu {index}", "fail", f"{whom}: {free:.1f} GiB free of the {need_gib:.1f} needed{by}", do)
    if others:
        return Check(f"gpu {index}", "warn", f"{whom} is not idle: {free:.1f} GiB free{by}", "Both will be slower.")
    return Check(f"gpu {index}", "ok", f"{whom}: {free:.1f} GiB free, {need_gib:.1f} needed")


def _visible(wanted: list[int]) -> list[Check]:
    """A scheduler's choice of GPUs that the plan does not keep to would take somebody else's."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not given or not all(part.strip().isdigit() for part in given.split(",")):
        return []
    outside = [index for index in wanted if index not in {int(part) for part in given.split(",")}]
    if not outside:
        return []
    what = f"CUDA_VISIBLE_DEVICES={given} leaves out GPU {', '.join(map(str, outside))} of the plan"
    return [Check("gpu", "fail", what, f"Set hardware.gpus: [{given}], or unset CUDA_VISIBLE_DEVICES.")]


def _host_memory(plan: Plan) -> list[Check]:
    free, limit = psutil.virtual_memory().available, memory_limit()
    if limit is not None:
        free = min(free, limit.limit - limit.used)
    need = plan.memory.device_gib * plan.resolved.world_size
    told = f"{free / GIB:.1f} GiB free, about {need:.1f} needed"
    if free / GIB < need:
        return [Check("memory", "warn", told, "Close other programs, or use a smaller batch or sequence_length.")]
    return [Check("memory", "ok", told)]


def _put_together(plan: Plan) -> list[Check]:
    """A model that is split passes whole through rank 0's host memory: as it is read, packed if it is to be, and with
    its optimiser's states (two numbers for each weight, as the weight is stored) as it is saved."""
    resolved = plan.resolved
    width = 4 if resolved.precision in ("fp32", "bf16-mixed") else 2
    need = plan.model.parameters * width * (3 if resolved.trains_base else 1)
    if resolved.quantization == "nf4":
        need = round(plan.memory.terms["weights"] * GIB * resolved.world_size)
    have, limit = psutil.virtual_memory().total, memory_limit()
    have = have if limit is None else min(have, limit.limit)
    told = f"{have / GIB:.0f} GiB on the host, about {need / GIB:.0f} to read and save the whole model"
    if need > have:
        return [Check("memory", "fail", told, "Use a machine with more host memory, or tuning: lora.")]
    return [Check("memory", "ok", told)]


def _shared_memory(plan: Plan) -> list[Check]:
    if plan.resolved.world_size == 1:
        return []
    free = shutil.disk_usage("/dev/shm").free
    told = f"/dev/shm has {free / 2**20:.0f} MiB free"
    if free < _SHARED_MEMORY:
        do = "Start the container with --shm-size=8g or --ipc=host: several ranks talk through it."
        return [Check("shared memory", "warn", told, do)]
    return [Check("shared memory", "ok", told)]


def _writable(folder: Path) -> list[Check]:
    there = nearest_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        what = f"{there} can't be written ({error.strerror})"
        return [Check("run folder", "fail", what, "Choose another folder with FINETUI_RUNS=FOLDER.")]
    return [Check("run folder", "ok", str(folder))]


def _data(recipe: Recipe, plan: Plan) -> list[Check]:
    if not recipe.data:
        return [Check("data", "fail", "the recipe names no dataset", "Add a line 'data: rows.jsonl'.")]
    from .data.preview import read_through, survey, trainable

    found = survey(recipe)
    formats = ", ".join(dict.fromkeys(source.format or "format not known yet" for source in found.sources))
    if found.train_rows is None or found.tokens is None:
        return [Check("data", "ok", f"{formats}; counted when it is downloaded")]
    if found.train_rows == 0:
        return [Check("data", "fail", "there is no row to train on", "Add rows, or a source with split: train.")]
    read, whole = read_through(recipe)
    tokenizer, length = _tokenizer_file(recipe.model), plan.resolved.sequence_length
    if tokenizer is not None and not trainable(recipe, tokenizer, length):
        what = f"no token would be trained: no row has an answer with loss that begins within {length} tokens"
        return [Check("data", "fail", what, "Raise sequence_length, shorten the prompts, or look at finetui data.")]
    told = f"{found.train_rows:,} rows to train on, about {found.tokens:,} tokens; {formats}"
    return [Check("data", "ok", told if whole else f"{told}; the first {read:,} rows were read and are sound")]


def _tokenizer_file(model: str) -> Path | None:
    """The tokenizer of a model that is here already, if it can be read without transformers."""
    folder = folder_of(model)
    file = folder / "tokenizer.json" if folder is not None else None
    return file if file is not None and file.is_file() and find_spec("tokenizers") is not None else None


def _rewards(recipe: Recipe) -> list[Check]:
    if recipe.method not in ROLLOUT_METHODS:
        return []
    from .rewards.judges import check_rewards

    check_rewards(recipe)
    return [Check("rewards", "ok", ", ".join(reward.name for reward in recipe.rewards))]


def _teacher(recipe: Recipe) -> list[Check]:
    if recipe.method != "distill":
        return []
    from .models.teacher import check_teacher

    return check_teacher(recipe)


def _adapters(recipe: Recipe) -> list[Check]:
    """Adapters made before that the tuning builds on."""
    from ..planner.stages import PREVIOUS
    from .models.adapter_start import find_adapter

    named = [*recipe.tuning.experts, recipe.tuning.start_from]
    return [Check("adapter", "ok", str(find_adapter(folder))) for folder in named if folder not in ("", PREVIOUS)]


def _disk(recipe: Recipe, plan: Plan, folder: Path) -> list[Check]:
    # A new checkpoint is complete before the oldest one goes.
    need = int((plan.disk.checkpoints_gib + plan.disk.output_gib) * GIB) + _LOGS
    places = {nearest_folder(folder): need}
    from .models.teacher import download_bytes

    missing = download_bytes(recipe) + (2 * plan.model.parameters if folder_of(recipe.model) is None else 0)
    if missing:
        from huggingface_hub import constants

        cache = nearest_folder(Path(constants.HF_HUB_CACHE))
        places[cache] = places.get(cache, 0) + missing
    found = []
    for device in {place.stat().st_dev: place for place in places}.values():
        needed = sum(size for place, size in places.items() if place.stat().st_dev == device.stat().st_dev)
        free = shutil.disk_usage(device).free
        each = f"{recipe.checkpoint.keep + 1} checkpoints of {plan.disk.checkpoint_gib:.1f} GiB"
        told = f"{free / GIB:.1f} GiB free at {device}, up to {needed / GIB:.1f} needed ({each}, and the result)"
        if free < needed:
            found.append(Check("disk", "fail", told, "Free some, choose another folder, or keep fewer checkpoints."))
        else:
            found.append(Check("disk", "ok", told))
    return found


def at_end(recipe: Recipe) -> list[Check]:
    """What will happen after the run is shown before it, and refused where it can't happen."""
    wish = recipe.limits.at_end
    if wish.do == "command":
        return [Check("at end", "ok", f"runs: {wish.command}")]
    if wish.do == "nothing":
        return []
    if why := cannot_shut_down():
        do = "Let limits.at_end run the command by which your provider ends the machine, or set it to nothing."
        return [Check("at end", "fail", f"this machine can't be shut down: {why}", do)]
    return [Check("at end", "ok", "the machine is shut down a minute after the run has ended by itself")]
