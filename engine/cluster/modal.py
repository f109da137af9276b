"""A job as a program for Modal: one function on a GPU, and a volume that outlives it.

Written against https://modal.com/docs/reference, tried with modal 1.6. Functions may be interrupted and are then called
again, and last a day at most (https://modal.com/docs/guide/preemption, …/timeouts); either way the run goes on from the
copy on the volume. Secrets are taken from the environment of whoever types ``modal run``.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from .files import FOLDER
from .job import Job
from .written import ATTEMPT, Written, head, near

#: Seconds that a function may take, and how often it may be called again after that.
_DAY_S, _MOST_RETRIES = 86400, 10
#: The volume that runs are kept on and where it is mounted; the folder that the recipe's files are mounted in, and the
#: one of the machine's own disk that the run is at work in.
VOLUME, _KEEP, _MOUNTS, _WORK = "finetui-runs", "/keep", "/root", "/tmp/finetui"
#: Cores for each rank: it computes with one and reads data with others. Assumed.
_CORES = 4
#: GiB of disk that every function has (https://modal.com/docs/guide/resources).
_DISK_GIB = 512


def write(job: Job, base: Path, file: str) -> Written:
    """The program.

    Args:
        base: folder of the job file.
        file: what it is called in the commands to type next.
    """
    commands = [
        ("start it, and watch it (--detach: it goes on when you leave)", ["modal", "run", "--detach", file]),
        *(("fetch the run", ["modal", "volume", "get", VOLUME, run, "runs/"]) for run in _runs(job)),
    ]
    notes = ["cores and memory cost extra on Modal: the price is that of the GPU"]
    return Written(_program(job, base), commands, notes)


def _runs(job: Job) -> list[str]:
    """The run, and those of its stages that train, which lie beside it."""
    from ...planner.stages import expand

    steps = enumerate(expand(job.recipe) if job.recipe.stages else (), 1)
    return [job.name, *(f"{job.name}.{number}-{step.name}" for number, step in steps if step.recipe is not None)]


def _program(job: Job, base: Path) -> str:
    about = "\n".join(head(job, base))
    return f"""{_docstring(about)}

import pathlib
import signal
import subprocess
import sys

import modal

NAME = {job.name!r}
RECIPE = (
{_lines(job.recipe_text())})
HERE = pathlib.Path(__file__).parent

app = modal.App("finetui")
keep = modal.Volume.from_name({VOLUME!r}, create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("build-essential")  # Triton compiles
    .uv_pip_install({", ".join(map(repr, job.packages))})
{_files(job, base)})


@app.function(
    image=image,
{_resources(job)}    volumes={{{_KEEP!r}: keep}},
)
def train() -> int:
    work = pathlib.Path({_WORK!r})
    work.mkdir(exist_ok=True)
    (work / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    if not (work / {FOLDER!r}).is_symlink():
        (work / {FOLDER!r}).symlink_to({f"{_MOUNTS}/{FOLDER}"!r})
    keep.reload()
    command = [sys.executable, "-P", "-m", {ATTEMPT!r}, "recipe.yaml"]
    attempt = subprocess.Popen([*command, "--name", NAME, "--runs", "runs", "--keep", {_KEEP!r}], cwd=work)
    try:
        return attempt.wait()
    except BaseException:  # the container is taken away, in half a minute
        attempt.send_signal(signal.SIGTERM)
        attempt.wait(25)
        raise
    finally:
        keep.commit()


@app.local_entrypoint()
def main() -> None:
    sys.exit(train.remote())
"""


def _docstring(text: str) -> str:
    """Text as a docstring: whatever it holds, it ends where it should."""
    return '"""' + text.replace("\\", "\\\\").replace('"', '\\"') + '\n"""'


def _lines(text: str) -> str:
    """Text as string literals, a line each."""
    return "".join(f"    {line!r}\n" for line in text.splitlines(keepends=True))


def _files(job: Job, base: Path) -> str:
    text = ""
    for mount in job.mounts:
        local = near(mount.local, base)
        where = f"HERE / {local[2:]!r}" if local.startswith(f".{os.sep}") else repr(local)
        add = "add_local_dir" if mount.is_folder else "add_local_file"
        text += f"    .{add}({where}, {f'{_MOUNTS}/{mount.remote}'!r})\n"
    return text


def _resources(job: Job) -> str:
    machine = job.machine
    options: dict[str, str] = {}
    if machine.gpu_name:
        options["gpu"] = repr(f"{machine.gpu_name}:{machine.count}")
    options["cpu"] = repr(float(_CORES * machine.count))
    options["memory"] = str(1024 * job.memory_gib)
    if job.disk_gib > _DISK_GIB:
        options["ephemeral_disk"] = str(1024 * job.disk_gib)
    limit_s = math.ceil(job.limit_s) if job.limit_s is not None else _DAY_S
    options["timeout"] = str(min(limit_s, _DAY_S))
    if limit_s > _DAY_S:
        again = min(math.ceil(limit_s / _DAY_S), _MOST_RETRIES)
        options["retries"] = f"modal.Retries(max_retries={again}, initial_delay=0.0)"
    if job.secrets:
        options["secrets"] = f"[modal.Secret.from_local_environ({job.secrets!r})]"
    return "".join(f"    {key}={value},\n" for key, value in options.items())
