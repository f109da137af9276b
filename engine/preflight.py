"""Every check that can spare a run its failure, made before anything is downloaded or started.

Torch-free and, but for a model or dataset on the Hub that is not here yet, without network: in all well under a second.
Each check is one small function from recipe and plan to what it found.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import psutil

from ..planner.cgroup import memory_limit
from ..planner.errors import UserError
from ..planner.plan import Plan
from ..planner.recipe import Recipe
from ..planner.rollout import ROLLOUT_METHODS
from . import remote_code
from .at_end import cannot as cannot_shut_down
from .gpulock import holders
from .pickles import refuse
from .run import default_root

GIB = 2**30

#: The extra ``train`` of pyproject.toml: the first version that is good and, where known, the first that is not.
PACKAGES: dict[str, tuple[str, str | None]] = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "6"),
    "peft": ("0.21", "1"),
    "trl": ("1.15", "2"),
    "bitsandbytes": ("0.48", "1"),
    "accelerate": ("1.10", "2"),
    "triton": ("3.6", "4"),
    "datasets": ("4.8", "6"),
    "safetensors": ("0.6", "1"),
    "tensorboard": ("2.20", "3"),
    "jinja2": ("3.1.6", "4"),
}
#: Events, logs and TensorBoard files of a long run, in bytes.
_LOGS = 64 * 2**20
#: Shared memory that NCCL and data loaders of several ranks need; Docker gives 64 MiB unless told otherwise.
_SHARED_MEMORY = 512 * 2**20


@dataclass(frozen=True)
class Check:
    """What one check found, and what to do about it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    do: str = ""


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
        ("shared memory", lambda: _shared_memory(plan)),
        ("run folder", lambda: _writable(folder)),
        ("data", lambda: _data(recipe, plan)),
        ("rewards", lambda: _rewards(recipe)),
        ("model", lambda: _model(recipe.model, recipe.trust_remote_code)),
        ("adapter", lambda: _adapters(recipe)),
        ("disk", lambda: _disk(recipe, plan, folder)),
        ("logout", _logout),
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
    there = _existing(folder)
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
    folder = Path(model).expanduser() if Path(model).expanduser().is_dir() else _cached(model)
    file = folder / "tokenizer.json" if folder is not None else None
    return file if file is not None and file.is_file() and find_spec("tokenizers") is not None else None


def _rewards(recipe: Recipe) -> list[Check]:
    if recipe.method not in ROLLOUT_METHODS:
        return []
    from .rewards.judges import check_rewards

    check_rewards(recipe)
    return [Check("rewards", "ok", ", ".join(reward.name for reward in recipe.rewards))]


def _adapters(recipe: Recipe) -> list[Check]:
    """Adapters made before that the tuning builds on."""
    from ..planner.stages import PREVIOUS
    from .adapter_start import find_adapter

    named = [*recipe.tuning.experts, recipe.tuning.start_from]
    return [Check("adapter", "ok", str(find_adapter(folder))) for folder in named if folder not in ("", PREVIOUS)]


def _model(model: str, trust: bool = False) -> list[Check]:
    given = Path(model).expanduser()
    folder = given if given.is_dir() else _cached(model)
    if folder is not None:
        remote_code.check(folder, wanted=trust, model=model)
        if trust and not remote_code.needed(folder):
            what = "the model needs no code of its own, so trust_remote_code has no effect"
            return [Check("model", "fail", what, "Remove trust_remote_code.")]
        at_hand = Check("model", "ok", f"{model} is in the local cache")
        return [_model_folder(folder) if folder is given else at_hand]
    return [_hub_model(model)]


def _model_folder(folder: Path) -> Check:
    from .tiny import is_tiny

    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        missing.append("a tokenizer (tokenizer.json)")
    refuse(folder, [path.name for path in folder.iterdir()])
    if not is_tiny(folder) and not any(folder.glob("*.safetensors")):
        missing.append("weights (*.safetensors)")
    if missing:
        do = "Give a checkpoint in Hugging Face format, as save_pretrained writes it."
        return Check("model", "fail", f"{folder} lacks {', '.join(missing)}", do)
    return Check("model", "ok", str(folder))


def _hub_model(model: str) -> Check:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    # The base of all errors of its HTTP client, which is httpx or httpx2 by its release.
    http_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])

    if constants.HF_HUB_OFFLINE:
        do = "Unset HF_HUB_OFFLINE, or give the folder of a checkpoint."
        return Check("model", "fail", f"{model} is not here, and the Hub is switched off", do)
    page = f"{constants.ENDPOINT}/{model}"
    try:
        HfApi().model_info(model, timeout=5)
        HfApi().auth_check(model)
    except GatedRepoError:
        do = f"Accept its licence at {page}, then set HF_TOKEN or run: hf auth login"
        return Check("model", "fail", f"{model} is gated, and this token may not read it", do)
    except (RepositoryNotFoundError, HFValidationError):
        do = "See how its name is written; a private one needs HF_TOKEN."
        return Check("model", "fail", f"there is no folder {model}, and no such model on the Hub", do)
    except (http_error, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        do = "Look at the network or HF_ENDPOINT, or give the folder of a checkpoint."
        return Check("model", "fail", f"{model} is not here, and the Hub does not answer ({said})", do)
    return Check("model", "ok", f"{model} can be downloaded")


def _cached(model: str) -> Path | None:
    """The local copy of a hub model, if it has weights; their folder is the snapshot of the latest download."""
    if model.count("/") != 1:
        return None
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots"
    for snapshot in sorted(snapshots.glob("*")):
        if (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors")):
            return snapshot
    return None


def _disk(recipe: Recipe, plan: Plan, folder: Path) -> list[Check]:
    # A new checkpoint is complete before the oldest one goes.
    need = int((plan.disk.checkpoints_gib + plan.disk.output_gib) * GIB) + _LOGS
    places = {_existing(folder): need}
    if not Path(recipe.model).expanduser().is_dir() and _cached(recipe.model) is None:
        from huggingface_hub import constants

        cache = _existing(Path(constants.HF_HUB_CACHE))
        places[cache] = places.get(cache, 0) + 2 * plan.model.parameters
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


def _logout(settings: Path = Path("/etc/systemd")) -> list[Check]:
    """Whether systemd-logind ends what a user leaves behind, as some distributions set it up."""
    value = "no"
    for path in (settings / "logind.conf", *sorted((settings / "logind.conf.d").glob("*.conf"))):
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                key, _, given = line.partition("=")
                value = given.strip() if key.strip() == "KillUserProcesses" else value
    if value not in {"yes", "true", "1", "on"} or os.geteuid() == 0:
        return []
    do = "Start finetui with: systemd-run --user --scope finetui (and allow that once: loginctl enable-linger)."
    return [Check("logout", "warn", f"{socket.gethostname()} ends all processes of a user who logs out", do)]


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


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)
