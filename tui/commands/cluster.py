"""``finetui cluster``: the same plan as a job for SkyPilot, Slurm or Modal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engine.cluster.clouds import System
from ...engine.cluster.job import Ask
from ...planner.errors import HardwareError, UserError
from ...planner.recipe import Recipe
from ..job_file import JobFile, job_file, save
from .options import JsonFlag, takes_recipe

ToFlag = Annotated[System | None, typer.Option("--to", help="Which system of jobs.")]
OutputFlag = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write it here instead of to stdout.")
]
NameFlag = Annotated[str | None, typer.Option("--name", help="Name of the run; a telling one is made up otherwise.")]
ProviderFlag = Annotated[
    str | None, typer.Option("--provider", help="Whose machine SkyPilot rents; the cheapest that it knows otherwise.")
]
SpotFlag = Annotated[
    bool, typer.Option("--spot/--on-demand", help="SkyPilot: a machine that may be taken away; the run goes on.")
]
BucketFlag = Annotated[
    str | None,
    typer.Option(
        "--bucket", help="SkyPilot: keep the run in this bucket (s3://NAME), or in none; one is made otherwise."
    ),
]
IdleFlag = Annotated[
    int | None, typer.Option("--idle-minutes", min=1, help="SkyPilot: give an idle machine back after so long.")
]
GpuNameFlag = Annotated[str | None, typer.Option("--gpu-name", help="What the system calls the GPU, if not as usual.")]
PackageFlag = Annotated[
    list[str] | None,
    typer.Option("--package", metavar="SPEC", help="What pip installs there beside this release; may be repeated."),
]
SecretFlag = Annotated[
    list[str] | None,
    typer.Option("--secret", metavar="NAME", help="A variable that goes along, by its name; may be repeated."),
]
ForceFlag = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
NodesFlag = Annotated[int, typer.Option("--nodes", min=1, help="Machines; a run is on one so far.")]


@takes_recipe()
def cluster(
    recipe: Recipe,
    to: ToFlag = None,
    output: OutputFlag = None,
    name: NameFlag = None,
    provider: ProviderFlag = None,
    spot: SpotFlag = False,
    bucket: BucketFlag = None,
    idle_minutes: IdleFlag = None,
    gpu_name: GpuNameFlag = None,
    package: PackageFlag = None,
    secret: SecretFlag = None,
    nodes: NodesFlag = 1,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """The same plan as a SkyPilot, Slurm or Modal job."""
    if to is None:
        raise UserError("which system is the job for?", where="--to", do="Add --to skypilot, --to slurm or --to modal.")
    if nodes > 1:
        do = "Plan for more or larger GPUs of one machine: finetui gpus shows who has eight."
        raise HardwareError("runs over several machines are not supported", where="--nodes", do=do)
    target = output if output is not None and str(output) != "-" else None
    if target is not None and target.exists() and not force:  # the recipe itself may be called so
        raise UserError("there is a file already", where=str(target), do="Add --force, or give another name.")
    ask = Ask(
        to, name, provider, spot, bucket, gpu_name,
        packages=tuple(package or ()), secrets=tuple(secret or ()), idle_minutes=idle_minutes,
    )  # fmt: skip
    made = job_file(recipe, ask, target)
    if target is not None:
        save(target, made.written.text)
    if as_json:
        print(json.dumps(_tree(made), indent=2, ensure_ascii=False))
        return
    if target is None:
        print(made.written.text, end="")
    print("\n".join(made.talk(saved=target is not None)), file=sys.stderr)


def _tree(made: JobFile) -> dict[str, Any]:
    job, written, machine = made.job, made.written, made.job.machine
    return {
        "system": job.system,
        "name": job.name,
        "file": made.name,
        "text": written.text,
        "gpu": machine.plan.hardware.gpu,
        "gpu_name": machine.gpu_name,
        "count": machine.count,
        "provider": machine.cloud.provider if machine.cloud else "",
        "spot": job.spot,
        "usd_per_h": round(machine.usd_per_h, 4),
        "usd": round(machine.usd, 4),
        "as_of": machine.as_of,
        "time_s": round(machine.time_s, 1),
        "limit_s": round(job.limit_s, 1) if job.limit_s is not None else None,
        "memory_gib": job.memory_gib,
        "disk_gib": job.disk_gib,
        "bucket": job.bucket,
        "files": [{"local": str(m.local), "remote": m.remote, "bytes": m.bytes} for m in job.mounts],
        "secrets": job.secrets,
        "commands": [command for _, command in written.commands],
        "notes": [*job.notes, *written.notes],
    }
