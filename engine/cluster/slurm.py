"""A job as a batch script for Slurm.

Directives as https://slurm.schedmd.com/sbatch.html describes them (read 2026-11). ``--signal=B:USR1@S`` sends the
batch shell alone a signal S seconds before the job's time is over; by ``exec`` that is the process that has the run
saved then and puts the job into the queue again. Where a node fails, Slurm itself does that (``--requeue``).
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from ...planner.version import VERSION
from .job import Job
from .shell import comment, here_document, word, words
from .written import ATTEMPT, Written, head

#: Cores for each rank: it computes with one and reads data with others. Assumed.
_CORES = 4


def write(job: Job, base: Path, file: str) -> Written:
    """The batch script.

    Args:
        base: folder of the job file.
        file: what it is called in the commands to type next.
    """
    text = "#!/bin/bash\n" + comment("\n".join(head(job, base))) + _directives(job) + "\n" + _body(job)
    notes = ["paths of the recipe, and runs/ where you submit it from, must be on a disk that nodes share"]
    if name := job.machine.gpu_name:
        notes.append(f"sinfo -o %G shows what your cluster calls its GPUs: if that is not {name}, use --gpu-name")
    commands = [
        ("start it (with --partition and --account, where your cluster wants them)", ["sbatch", file]),
        ("watch it", ["finetui", "attach", f"runs/{job.name}"]),
    ]
    return Written(text, commands, notes)


def _directives(job: Job) -> str:
    machine = job.machine
    gpus = [f"--gres=gpu:{machine.gpu_name}:{machine.count}"] if machine.gpu_name else []
    clock = [f"--time={_clock(job.limit_s)}"] if job.limit_s is not None else []
    options = [
        f"--job-name={job.name}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={_CORES * machine.count}", *gpus,
        f"--mem={job.memory_gib}G", *clock, f"--signal=B:USR1@{job.lead_s}", "--requeue", "--open-mode=append",
        f"--output={job.name}-%j.log",
    ]  # fmt: skip
    return "".join(f"#SBATCH {option}\n" for option in options)


def _clock(seconds: float) -> str:
    """``D-HH:MM:SS``, in whole minutes."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"


def _environment(job: Job) -> str:
    """The folder of the environment for these packages, which all jobs with the same ones share."""
    return f"{VERSION}-{hashlib.sha256(' '.join(job.packages).encode()).hexdigest()[:8]}"


def _body(job: Job) -> str:
    checks = "".join(f': "${{{name}:?the recipe needs it in the environment}}"\n' for name in job.needed)
    return f"""set -euo pipefail
{checks}runs="${{FINETUI_RUNS:-${{SLURM_SUBMIT_DIR:-$PWD}}/runs}}"
mkdir -p "$runs"
recipe="$runs"/{word(f"{job.name}.recipe.yaml")}
{here_document('"$recipe"', job.recipe_text())}
# FINETUI_PYTHON is a Python that has finetui already; otherwise one is made, once, where all nodes find it.
if [ -z "${{FINETUI_PYTHON:-}}" ]; then
    home="${{XDG_CACHE_HOME:-$HOME/.cache}}/finetui/{_environment(job)}"
    FINETUI_PYTHON="$home/bin/python"
    if [ ! -e "$home/ready" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {{
            echo "finetui needs Python 3.11 or later: load one (module load python), or set FINETUI_PYTHON." >&2
            exit 2
        }}
        mkdir -p "$home"
        exec 9> "$home/lock"
        flock 9 # other jobs wait until it is made
        if [ ! -e "$home/ready" ]; then
            python3 -m venv "$home"
            "$FINETUI_PYTHON" -m pip install {words(*job.packages)}
            touch "$home/ready"
        fi
        exec 9>&-
    fi
fi

exec "$FINETUI_PYTHON" -P -m {ATTEMPT} "$recipe" \\
    --name {word(job.name)} --runs "$runs" --notice-s {max(job.lead_s - 10, 30)} --requeue
"""
