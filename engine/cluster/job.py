"""Job: all that a job file says, whichever system it is for."""

from __future__ import annotations

import math
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from ...planner.errors import HardwareError, RecipeError, UserError
from ...planner.hardware import GIB
from ...planner.recipe import Recipe
from ...planner.version import VERSION
from ..run import check_name, suggest_name
from .clouds import System
from .files import Mount, absolute, bundled, check_variable, on_hub, packages_of, secrets_of
from .machine import Machine, choose
from .pinned import pinned

#: What the time of a plan is multiplied by, and seconds added, before a job is ended: plans err, machines are slow.
_MARGIN, _SLACK_S = 1.5, 900.0
#: GiB of disk for Python, PyTorch with CUDA's libraries, and what installing them leaves behind: assumed.
_INSTALLED_GIB = 24.0
#: GiB of host memory: of the system, and of each rank with its libraries and its data. Assumed.
_HOST_GIB, _RANK_GIB = 8.0, 8.0
#: What the planner takes a rented host to have, in memory of its GPUs, where layers wait in it (policies.can_park).
_PARKED = 2.0
#: Bytes per second in which the last checkpoint is written, and seconds that it is asked for beforehand, at least.
_SAVE_BYTES_S, _LEAD_S = 0.8e9, 120
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?[^\x00-\x1f\x7f]*")
_BUCKET = re.compile(r"[a-z][a-z0-9]*://[A-Za-z0-9._/-]+")


@dataclass(frozen=True)
class Ask:
    """What the user wants of a job beside the recipe.

    Args:
        bucket: address of the bucket that outlives the machine; ``none`` for no bucket; None is one of its own.
        packages: what pip installs there beside this release, or in its place if one of them is finetui.
        secrets: names of further variables that go along.
        idle_minutes: after which a machine without work is given back; None is as it fits.
    """

    system: System
    name: str | None = None
    provider: str | None = None
    spot: bool = False
    bucket: str | None = None
    gpu_name: str | None = None
    packages: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    idle_minutes: int | None = None


@dataclass(frozen=True)
class Job:
    """All that a job file says.

    Args:
        recipe: without ``auto``, and with the paths that its files have there.
        limit_s: after so many seconds the job is ended; None where the length of the run is not known.
        memory_gib, disk_gib: of the host.
        lead_s: seconds before its end in which a run must be told, so that it can write a checkpoint.
        secrets: names of variables that it gets, from the environment of whoever starts it.
        needed: those of them without which it can't run.
        bucket: where its copy is kept; empty: nowhere.
        notes: what the user should know.
    """

    system: System
    name: str
    recipe: Recipe
    machine: Machine
    limit_s: float | None
    memory_gib: int
    disk_gib: int
    lead_s: int
    mounts: list[Mount]
    secrets: list[str]
    needed: list[str]
    packages: list[str]
    spot: bool
    bucket: str = ""
    idle_minutes: int | None = None
    notes: list[str] = field(default_factory=list)

    def recipe_text(self) -> str:
        """The recipe as YAML."""
        import yaml

        return yaml.safe_dump(self.recipe.to_dict(), sort_keys=False, allow_unicode=True)

    def summary(self) -> list[str]:
        """What the plan says about the job, one thing to a line."""
        m, resolved = self.machine, self.machine.plan.resolved
        where = f"{m.count} × {m.plan.hardware.gpu}" + (f" at {m.cloud.provider}" if m.cloud else "")
        kind = f"spot machine, {where}" if self.spot else where
        lines = [
            f"{m.plan.model.name}: {resolved.method} by {resolved.tuning}, {resolved.steps:,} steps",
            f"{kind}: {m.plan.memory.device_gib:.1f} of {m.plan.hardware.memory_gib:.1f} GiB, "
            f"about {max(math.ceil(m.time_s / 60), 1)} min",
        ]
        if m.usd_per_h:
            dated = {"": "", "unknown": " (a price of unknown age)"}.get(m.as_of, f" (price of {m.as_of})")
            most = self.recipe.limits.cost_usd
            ends = f"; limits.cost_usd ends it at ${most:.2f}" if most is not None else ""
            lines.append(f"about ${m.usd:.2f} at ${m.usd_per_h:.2f} an hour{dated}{ends}")
        elif m.cloud is not None:
            lines.append("what it costs is not known")
        return lines


def make_job(recipe: Recipe, ask: Ask, *, has_token: bool) -> Job:
    """The job that carries out a recipe.

    Args:
        has_token: whether this user has a token for the Hub; its name is put into the job, never its value.

    Raises:
        UserError: the recipe names no data, nothing fits or is rented out, a file is missing, a name can't be one.
    """
    from ..planning import plan_for

    _check(recipe, ask)
    machine = choose(recipe, ask.system, provider=ask.provider, spot=ask.spot, gpu_name=ask.gpu_name)
    plan, notes = machine.plan, []
    if recipe.limits.cost_usd is not None and not machine.usd_per_h:
        do = "Set hardware.usd_per_h, or limits.hours instead."
        raise RecipeError("no price is known by which this could count", where="limits.cost_usd", do=do)
    final = pinned(machine.recipe, plan, plan_for, machine.usd_per_h)
    mounts: list[Mount] = []
    if ask.system == "slurm":  # whose nodes have the disks of the machine that jobs are sent from
        final = absolute(final)
    else:
        final, mounts = bundled(final)
    if final.limits.at_end.do == "shutdown":
        final = final.with_overrides({"limits.at_end": {"do": "nothing"}})
        notes.append("limits.at_end: shutdown is left out, as the machine is not the job's to turn off")
    limit_s = _limit_s(recipe, machine)
    if limit_s is None:
        notes.append("how long it takes is not known before its data is counted: limits.hours ends it in any case")
    elif ask.system == "skypilot" and final.limits.hours is None:  # which has no limit of its own
        final = final.with_overrides({"limits.hours": round(limit_s / 3600, 2)})
    needed = list(dict.fromkeys([*secrets_of(recipe), *ask.secrets]))
    token = "HF_TOKEN" not in needed and on_hub(recipe)
    if token and not has_token and ask.system != "slurm":  # whose jobs have the environment that they are sent from
        notes.append("HF_TOKEN is not set here, so none goes along: gated models can't be fetched")
    return Job(
        system=ask.system,
        name=ask.name or suggest_name(recipe, plan),
        recipe=final,
        machine=machine,
        limit_s=limit_s,
        memory_gib=_memory_gib(machine),
        disk_gib=_disk_gib(recipe, machine, mounts),
        lead_s=_lead_s(plan.disk.checkpoint_gib),
        mounts=mounts,
        secrets=["HF_TOKEN", *needed] if token and has_token else needed,
        needed=needed,
        packages=_packages(recipe, ask),
        spot=ask.spot,
        bucket=_bucket(ask, machine),
        idle_minutes=ask.idle_minutes,
        notes=notes,
    )


def _check(recipe: Recipe, ask: Ask) -> None:
    """Refuse what could only fail on the rented machine."""
    check_name(ask.name)
    for package in ask.packages:
        if not _PACKAGE.fullmatch(package):
            raise UserError(f"{package!r} is nothing that pip installs", where="--package", do="Leave it out.")
    for name in ask.secrets:
        check_variable(name)
    trained = [stage.changes.get("data") for stage in recipe.stages if stage.do == "train"]
    if not recipe.data and not (trained and all(trained)):
        raise RecipeError("the recipe names no dataset", where="data", do="Add --data rows.jsonl, or 'data:' in it.")
    if Path(recipe.model).expanduser().is_file():
        do = "Give the folder with its weights, or its hub id."
        raise RecipeError("a config.json can be planned for, but not trained", where="model", do=do)
    if Path(recipe.model).expanduser().is_dir():
        from ..models.at_hand import check_model

        for check in check_model(recipe.model, recipe.trust_remote_code):
            if check.status == "fail":
                raise RecipeError(check.detail, where="model", do=check.do)
    if recipe.trust_remote_code and ask.system != "slurm":  # whose nodes share the home in which it is noted
        do = "Use a machine of your own, where finetui trust asks you."
        what = "a model's own code is allowed on each machine, and nobody can be asked on a rented one"
        raise RecipeError(what, where="trust_remote_code", do=do)
    if recipe.rollout.engine == "vllm" and not any(package.startswith("vllm") for package in ask.packages):
        raise RecipeError("vLLM has to be installed there", where="rollout.engine", do="Add --package vllm.")
    if ask.system == "slurm" and (ask.bucket or ask.provider or ask.idle_minutes):
        what = "a Slurm job rents nothing: --provider, --bucket and --idle-minutes have no effect"
        raise UserError(what, do="Leave them out: runs lie on the cluster's own disks.")
    if ask.system == "modal" and (ask.bucket or ask.idle_minutes or ask.spot):
        what = "--bucket, --spot and --idle-minutes have no effect on Modal"
        do = "Leave them out: runs are kept on a volume, and functions end and go on by themselves."
        raise UserError(what, do=do)


def _packages(recipe: Recipe, ask: Ask) -> list[str]:
    own = [] if any(re.match(r"finetui\b", package) for package in ask.packages) else [f"finetui[train]=={VERSION}"]
    return [*own, *ask.packages, *packages_of(recipe)]


def _bucket(ask: Ask, machine: Machine) -> str:
    """Where the copy of the run is kept: the bucket asked for, one of its own, or none where none can be mounted."""
    if ask.system != "skypilot":
        return ""
    cloud = machine.cloud
    where = cloud.provider if cloud is not None else "any cloud"
    if ask.idle_minutes is not None and (ask.spot or (cloud is not None and not cloud.ends_itself)):
        what = "managed jobs end by themselves" if ask.spot else f"SkyPilot can't tell idle machines at {where}"
        raise HardwareError(f"{what}: it has no effect", where="--idle-minutes", do="Leave it out.")
    if cloud is None or cloud.mounts:
        if ask.bucket not in (None, "none"):
            if not _BUCKET.fullmatch(str(ask.bucket)):
                do = "Write it as s3://NAME or gs://NAME."
                raise UserError(f"{ask.bucket!r} is no address of a bucket", where="--bucket", do=do)
            return str(ask.bucket)
        if ask.bucket is None and (cloud is not None or ask.spot):
            return f"finetui-{secrets.token_hex(5)}"
    elif ask.bucket not in (None, "none"):
        do = "Leave it out, or rent at aws, gcp, azure or lambda."
        raise HardwareError(f"SkyPilot can't mount a bucket on machines of {where}", where="--bucket", do=do)
    if ask.spot:
        what = f"a spot run goes on elsewhere from its bucket, and there is none at {where}"
        do = "Leave --spot out, or rent at aws, gcp or azure with a bucket."
        raise HardwareError(what, where="--spot", do=do)
    return ""


def _limit_s(recipe: Recipe, machine: Machine) -> float | None:
    if recipe.limits.hours is not None:
        return recipe.limits.hours * 3600 + _SLACK_S
    if machine.plan.workload.basis == "assumed" and recipe.max_steps is None:
        return None
    return _MARGIN * machine.time_s + _SLACK_S


def _memory_gib(machine: Machine) -> int:
    """Host memory, in GiB."""
    plan = machine.plan
    need = _HOST_GIB + _RANK_GIB * machine.count
    if plan.hardware.kind == "cpu":
        need += plan.memory.device_gib * machine.count
    elif plan.resolved.checkpointing == "offload":
        need = max(need, _PARKED * plan.hardware.memory_gib * machine.count)
    return math.ceil(need)


def _disk_gib(recipe: Recipe, machine: Machine, mounts: list[Mount]) -> int:
    plan = machine.plan
    need = _INSTALLED_GIB + plan.disk.checkpoints_gib + plan.disk.output_gib
    need += 2 * plan.model.parameters / GIB  # the model as it is stored, in 16 bits
    need += 3 * sum(mount.bytes for mount in mounts) / GIB  # data, and its tokens
    if recipe.stages:  # a stage begins with the merged model of the one before it
        need += len(recipe.stages) * 2 * plan.model.parameters / GIB
    return 10 * math.ceil(need / 10)


def _lead_s(checkpoint_gib: float) -> int:
    """Seconds in which the step at work ends and a checkpoint is written, twice over; whole minutes."""
    return 60 * math.ceil(max(_LEAD_S, 60 + 2 * checkpoint_gib * GIB / _SAVE_BYTES_S) / 60)
