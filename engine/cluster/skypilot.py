"""A job as a task of SkyPilot: on a machine of its own, or as a managed job that outlives spot machines.

Fields as https://docs.skypilot.co/en/latest/reference/yaml-spec.html describes them, tried with skypilot 0.14. Secrets
are named with ``null``, which SkyPilot takes to mean that ``--secret NAME`` must bring the value from the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .attempt import TO_BE_CONTINUED
from .job import Job
from .shell import comment, here_document, word, words
from .written import ATTEMPT, Written, head, near

#: Folders on the machine: the recipe with its files and runs, and the bucket.
_HOME, _KEEP = "finetui", "/finetui-keep"
#: Minutes without work after which a machine whose results are in a bucket is given back.
_IDLE_MINUTES = 10


class _Block(str):
    """Text that YAML shows line by line."""


def write(job: Job, base: Path, file: str) -> Written:
    """The task.

    Args:
        base: folder of the job file, which commands are typed in.
        file: what it is called in the commands to type next.
    """
    idle = _idle_minutes(job)
    text = comment("\n".join(head(job, base))) + _dump(_tree(job, base, idle))
    return Written(text, _commands(job, file), _notes(job, idle))


def _tree(job: Job, base: Path, idle: int | None) -> dict[str, Any]:
    machine = job.machine
    resources: dict[str, Any] = {}
    if machine.cloud is not None:
        resources["infra"] = machine.cloud.name
    if machine.gpu_name:
        resources["accelerators"] = f"{machine.gpu_name}:{machine.count}"
    resources |= {"memory": f"{job.memory_gib}+", "disk_size": job.disk_gib}
    if job.spot:
        # Told in time, the run is saved and the job ends before its machine does: that is no failure.
        resources |= {"use_spot": True, "job_recovery": {"recover_on_exit_codes": [TO_BE_CONTINUED]}}
    elif idle is not None:
        resources["autostop"] = {"idle_minutes": idle, "down": True}
    tree: dict[str, Any] = {"name": cluster_name(job), "resources": resources}
    if job.secrets:
        tree["secrets"] = dict.fromkeys(job.secrets)
    mounts: dict[str, Any] = {f"~/{_HOME}/{mount.remote}": near(mount.local, base) for mount in job.mounts}
    if job.bucket:
        where = "source" if "://" in job.bucket else "name"
        mounts[_KEEP] = {where: job.bucket, "mode": "MOUNT"}
    if mounts:
        tree["file_mounts"] = mounts
    tree["setup"] = _Block(_setup(job))
    tree["run"] = _Block(_run(job))
    return tree


def _setup(job: Job) -> str:
    return f"""set -e
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet uv
mkdir -p ~/{_HOME}
[ -x ~/{_HOME}/venv/bin/python ] || uv venv --python 3.12 ~/{_HOME}/venv
uv pip install --python ~/{_HOME}/venv/bin/python {words(*job.packages)}
"""


def _run(job: Job) -> str:
    keep = f" --keep {_KEEP}" if job.bucket else ""
    return f"""set -e
cd ~/{_HOME}
{here_document("recipe.yaml", job.recipe_text())}exec ./venv/bin/python -P -m {ATTEMPT} recipe.yaml \\
    --name {word(job.name)} --runs runs{keep}
"""


def _idle_minutes(job: Job) -> int | None:
    """Minutes after which the machine is given back; None where that is not possible, or would lose the result."""
    if job.machine.cloud is not None and not job.machine.cloud.ends_itself:
        return None
    return job.idle_minutes if job.idle_minutes is not None or not job.bucket else _IDLE_MINUTES


def _commands(job: Job, file: str) -> list[tuple[str, list[str]]]:
    secrets = [part for name in job.secrets for part in ("--secret", name)]
    how = "start it, and watch it (Ctrl-C stops only the watching)"
    fetch = _from_bucket(job)
    if job.spot:
        return [(how, ["sky", "jobs", "launch", "-n", cluster_name(job), *secrets, file]), *fetch]
    machine = cluster_name(job)
    here = ("fetch the run from the machine", ["rsync", "-avP", f"{machine}:{_HOME}/runs/", "runs/"])
    start, down = ["sky", "launch", "-c", machine, *secrets, file], ["sky", "down", machine]
    return [(how, start), *(fetch or [here]), ("give the machine back", down)]


def cluster_name(job: Job) -> str:
    """The run's name as SkyPilot takes one: it begins with a letter and ends with a letter or digit."""
    name = job.name.rstrip("-_.")
    return name if name[:1].isalpha() else f"run-{name}"


def _from_bucket(job: Job) -> list[tuple[str, list[str]]]:
    """How runs come back from a bucket whose kind its address tells."""
    address = job.bucket.rstrip("/")
    if address.startswith("s3://"):
        return [("fetch the run", ["aws", "s3", "cp", "--recursive", address, "runs/"])]
    if address.startswith("gs://"):
        return [("fetch the run", ["gcloud", "storage", "cp", "-r", f"{address}/*", "runs/"])]
    return []


def _notes(job: Job, idle: int | None) -> list[str]:
    notes = []
    if job.bucket:
        made = "" if "://" in job.bucket else ", which SkyPilot makes (sky storage ls)"
        notes.append(f"the run comes to lie in the bucket {job.bucket}{made}, under {words(job.name)}")
    if job.spot:
        notes.append("when its machine is taken away, the run goes on from its last checkpoint on another one")
    elif idle is not None:
        lost = "" if job.bucket else ": fetch the run before, or it is lost"
        notes.append(f"the machine is given back by itself after {idle} idle minutes{lost}")
    elif idle is None:
        price = f" ${job.machine.usd_per_h:.2f} an hour" if job.machine.usd_per_h else ""
        notes.append(f"the machine goes on costing{price} until you give it back: nothing else holds the result")
    return notes


def _dump(tree: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """YAML with blocks for scripts."""

    Dumper.add_representer(
        _Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")
    )
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
