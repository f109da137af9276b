"""What is wrong with this machine, and what to do about it: driver, libraries, GPUs, disk, memory, limits, Hub.

Every check is one small function from nothing to what it found, like those of preflight, which looks at one plan. What
needs PyTorch runs in a process of its own (``pytorch.py``): a broken installation may crash or hang, and is to be
told then. Nothing blocks for longer than its timeout.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...planner.errors import FinetuiError, first_line
from ...planner.host import cores, host_memory
from ..check import PACKAGES, Check, logout, nearest_folder
from ..children import import_environment
from ..run import default_root
from ..telemetry import GpuMonitor

GIB = 2**30
#: Seconds that the Hub has to answer, and that PyTorch, bitsandbytes and Triton have for their trials on a cold disk.
HUB_S, TORCH_S = 3.0, 180.0
#: Free space below which a download or a checkpoint is likely to fail: an 8B model takes 16 GB.
_LITTLE_DISK = 20 * GIB
#: Slower than this, loading an 8B model takes more than two minutes.
_SLOW_DISK = 0.12e9
#: Files that one process may open: data loaders, shards and sockets of several ranks need more than the 1024 of old.
_OPEN_FILES = 4096
_SHARED_MEMORY = 512 * 2**20
_HOT = 87.0
_CUDA_WHEELS = "Install a build for an older CUDA, see https://pytorch.org/get-started/locally, or a newer driver."


def examine() -> Iterator[Check]:
    """All checks, one by one, the quickest first."""
    every: list[tuple[str, Callable[[], list[Check]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("memory", _memory),
        ("shared memory", _shared_memory),
        ("limits", _limits),
        ("logout", logout),
        ("driver", _driver),
        ("gpu", _gpus),
        ("disk", _disks),
        ("hub", _hub),
    ]
    for name, check in every:
        yield from guarded(name, check)
    if importlib.util.find_spec("torch") is not None:
        yield from in_child(["-m", f"{__package__}.pytorch"], TORCH_S)


def guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """What a check found, or that it could not be made: one broken part must not hide the others."""
    try:
        return check()
    except FinetuiError as error:
        return [Check(name, "fail", f"{error.where}: {error.what}" if error.where else error.what, error.do)]
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        return [Check(name, "fail", what, "This should not happen: tell us.")]


def in_child(arguments: list[str], timeout_s: float) -> list[Check]:
    """Checks that a process of its own prints, one JSON object a line; how it ended, if not well.

    Args:
        arguments: of Python.
    """
    said, errors, code = _child(arguments, timeout_s)
    found = [Check(**json.loads(line)) for line in said.splitlines() if line.startswith('{"name"')]
    if code is None:
        what = f"it does not come to an end: nothing after {timeout_s:.0f} s"
        found.append(Check("torch", "fail", what, "Look at dmesg and nvidia-smi: a GPU may hang."))
    elif code:
        what = f"its trial ended badly: {_last_line(errors) or f'exit code {code}'}"
        found.append(Check("torch", "fail", what, "Reinstall finetui[train]."))
    return found


def kernels_of(config: dict[str, Any], tuning: str) -> dict[str, Any]:
    """What :mod:`.kernel_report` says of a model, by its config.json.

    Args:
        tuning: ``lora`` or ``full``.

    Raises:
        FinetuiError: the report could not be made.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(config, file)
        file.flush()
        arguments = ["-m", f"{__package__}.kernel_report", file.name, "--tuning", tuning]
        said, errors, code = _child(arguments, TORCH_S)
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    how = f"not done after {TORCH_S:.0f} s" if code is None else _last_line(errors) or f"exit code {code}"
    raise FinetuiError(f"the kernels could not be tried ({how})", do="See what finetui doctor says of this machine.")


def _child(arguments: list[str], timeout_s: float) -> tuple[str, str, int | None]:
    """What a Python process said and complained of, and its exit code; None if it had to be ended."""
    environment = {**os.environ, **import_environment(), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        return raw.decode() if isinstance(raw, bytes) else raw, "", None
    return done.stdout, done.stderr, done.returncode


def _last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")


def _python() -> list[Check]:
    version = sys.version_info
    told = f"Python {version.major}.{version.minor}.{version.micro}"
    if version[:2] not in {(3, 11), (3, 12)}:
        return [Check("python", "warn", f"{told} is untested", "Use Python 3.11 or 3.12.")]
    return [Check("python", "ok", told)]


def _packages() -> list[Check]:
    from packaging.version import Version

    missing, wrong, found = [], [], []
    for name, (first, beyond) in PACKAGES.items():
        if name == "triton" and sys.platform != "linux":
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if Version(version) < Version(first) or (beyond and Version(version) >= Version(beyond)):
            wrong.append(f"{name} {version} (needed: {first} or later{f', before {beyond}' if beyond else ''})")
        else:
            found.append(f"{name} {version}")
    do = "pip install 'finetui[train]'"
    checks = [Check("packages", "ok", ", ".join(found))] if found else []
    if wrong:
        checks.append(Check("packages", "fail", f"outside the range that works: {', '.join(wrong)}", do))
    if missing:
        what = "nothing that training needs is installed: this machine can plan, not train"
        what = what if not found and not wrong else f"not installed: {', '.join(missing)}"
        checks.append(Check("packages", "warn", what, do))
    return checks


def _memory() -> list[Check]:
    total, free = host_memory()
    told = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, {cores()} cores"
    if free < 4 * GIB:
        return [Check("memory", "warn", told, "Close other programs: libraries and data alone take 3 GiB.")]
    return [Check("memory", "ok", told)]


def _shared_memory() -> list[Check]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return []
    usage = shutil.disk_usage(folder)
    told = f"/dev/shm has {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free"
    if usage.free < _SHARED_MEMORY:
        do = "Needed for several GPUs: start the container with --shm-size=8g or --ipc=host."
        return [Check("shared memory", "warn", told, do)]
    return [Check("shared memory", "ok", told)]


def _limits() -> list[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    told = f"{'any number of' if soft == endless else f'{soft:,}'} open files"
    checks = []
    if soft != endless and soft < _OPEN_FILES:
        more = _OPEN_FILES if hard == endless else min(hard, 65536)
        checks.append(Check("limits", "warn", told, f"Raise it: ulimit -n {more}"))
    else:
        checks.append(Check("limits", "ok", told))
    for name, number in (("address space", resource.RLIMIT_AS), ("file size", resource.RLIMIT_FSIZE)):
        limit = resource.getrlimit(number)[0]
        if limit != endless:
            do = f"Lift it: ulimit {'-v' if number == resource.RLIMIT_AS else '-f'} unlimited"
            checks.append(Check("limits", "warn", f"the {name} of a process is limited to {limit / GIB:.1f} GiB", do))
    return checks


def _driver(load: Callable[[], Any] = lambda: importlib.import_module("pynvml")) -> list[Check]:
    nvml = load()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        nodes = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
        if nodes:
            do = "Install the driver that belongs to the kernel module (nvidia-smi tells), or restart after an update."
            return [Check("driver", "fail", f"{', '.join(nodes)} exist, and the driver does not answer ({error})", do)]
        do = "With a GPU: install its driver, or start the container with docker run --gpus all."
        return [Check("driver", "warn", f"no NVIDIA driver ({error}): everything runs on the CPU", do)]
    try:
        version, cuda = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion()
    finally:
        nvml.nvmlShutdown()
    version = version if isinstance(version, str) else version.decode()
    told = f"NVIDIA driver {version}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
    built = _cuda_of_torch()
    if built and cuda // 1000 < int(built.partition(".")[0]):  # minor versions are compatible
        return [Check("driver", "fail", f"{told}; PyTorch is built for CUDA {built}", _CUDA_WHEELS)]
    return [Check("driver", "ok", f"{told}{f'; PyTorch is built for CUDA {built}' if built else ''}")]


def _cuda_of_torch() -> str:
    """The CUDA version that the installed PyTorch was built for, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return ""
    told = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    for line in told.read_text(encoding="utf-8").splitlines() if told.is_file() else []:
        if line.startswith("cuda"):
            return line.partition("=")[2].strip().strip("'\"").replace("None", "")
    return ""


def _gpus(load: Callable[[], Any] = lambda: importlib.import_module("pynvml")) -> list[Check]:
    nvml = load()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []  # told as the driver's
    monitor = GpuMonitor(load=load)
    try:
        checks = []
        for sample in monitor.sample():
            name = f"gpu {sample.index}"
            used, total = sample.memory_used_gib, sample.memory_total_gib
            memory = f"{total - used:.1f} of {total:.1f} GiB free" if used is not None and total else "memory not told"
            told = f"{sample.name}, {memory}, {sample.temperature_c or 0:.0f} °C"
            bad = [word for word in sample.throttle if word not in {"application clocks", "display clocks"}]
            if bad:
                do = "Look at its cooling and power supply: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
                checks.append(Check(name, "warn", f"{told}; its clocks are held down: {', '.join(bad)}", do))
            elif (sample.temperature_c or 0) >= _HOT:
                checks.append(Check(name, "warn", told, "It will slow down soon: look at its cooling."))
            else:
                checks.append(Check(name, "ok", told))
            checks += _errors(nvml, sample.index, name)
        return [*checks, *(Check("gpu", "fail", told.what, told.do) for told in monitor.take_warnings())]
    finally:
        monitor.close()
        nvml.nvmlShutdown()


def _errors(nvml: Any, index: int, name: str) -> list[Check]:
    """Memory errors that ECC could not mend, and rows that wait for a restart to be replaced."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        count = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    except nvml.NVMLError:
        return []  # a card without ECC
    if count:
        do = "Reset the GPU (nvidia-smi --gpu-reset) or restart; if it comes again, have the card replaced."
        return [Check(name, "fail", f"{count} memory errors since the last restart that ECC could not mend", do)]
    try:
        _corrected, _uncorrected, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
    except nvml.NVMLError:
        return []
    if pending or failed:
        do = "Reset the GPU or restart the machine." if pending else "Have the card replaced."
        return [Check(name, "warn", f"a row of its memory {'waits to be' if pending else 'could not be'} replaced", do)]
    return []


def _disks() -> list[Check]:
    from huggingface_hub import constants

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = {
        "models": Path(constants.HF_HUB_CACHE),
        "runs": default_root(),
        "kernels": Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        "cache": cache / "finetui",
    }
    checks = []
    for name, wanted in places.items():
        folder = nearest_folder(wanted)
        free = shutil.disk_usage(folder).free
        told = f"{wanted}: {free / GIB:.0f} GiB free"
        if not os.access(folder, os.W_OK):
            moves = {"models": "Set HF_HOME to a folder that can be written.", "runs": "Set FINETUI_RUNS."}
            what, other = f"{folder} can't be written", "Set HOME or XDG_CACHE_HOME."
            checks.append(Check(f"disk {name}", "fail", what, moves.get(name, other)))
            continue
        if name not in {"models", "runs"}:
            continue  # small
        speed = _write_speed(folder)
        told += f", writes {speed / 1e9:.2f} GB/s"
        if free < _LITTLE_DISK:
            do = "An 8B model takes 16 GB: free some, or use another disk."
            checks.append(Check(f"disk {name}", "warn", told, do))
        elif speed < _SLOW_DISK:
            checks.append(Check(f"disk {name}", "warn", told, "A network disk? Checkpoints will take minutes."))
        else:
            checks.append(Check(f"disk {name}", "ok", told))
    return checks


def _write_speed(folder: Path, size: int = 2**26) -> float:
    """Bytes per second of writing a file for good."""
    data = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(size // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - began)


def _hub() -> list[Check]:
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token is set, as gated models need (hf auth login)"
    if constants.HF_HUB_OFFLINE:
        return [Check("hub", "warn", f"switched off by HF_HUB_OFFLINE; {token}", "Unset it to download models.")]
    answer = _ask(constants.ENDPOINT)
    if answer:
        do = "Without it only models and data on this machine can be used; a mirror is set with HF_ENDPOINT."
        return [Check("hub", "warn", f"{constants.ENDPOINT} does not answer ({answer}); {token}", do)]
    return [Check("hub", "ok", f"{constants.ENDPOINT} answers; {token}")]


def _ask(address: str) -> str:
    """Why a server does not answer within the timeout; empty if it does, whatever it says."""
    import threading
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    told = [f"nothing within {HUB_S:g} s"]

    def work() -> None:
        try:
            with urlopen(Request(address, method="HEAD"), timeout=HUB_S):
                told[0] = ""
        except HTTPError:
            told[0] = ""
        except (OSError, ValueError) as error:
            told[0] = first_line(getattr(error, "reason", None) or error)

    thread = threading.Thread(target=work, daemon=True)  # a resolver that hangs knows no timeout
    thread.start()
    thread.join(HUB_S + 0.5)
    return told[0]
