"""JobFile: a plan as a job for SkyPilot, Slurm or Modal, with what is to be said about it, for the verb and the app"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.cluster.clouds import System, clouds_of
from ..engine.cluster.job import Ask, Job, make_job
from ..engine.cluster.written import SUFFIXES, Written
from ..engine.durable import write_atomically
from ..planner.errors import UserError
from ..planner.recipe import Recipe
from .format import sentence


@dataclass(frozen=True)
class JobFile:
    """A job, what its system's file says, and ``name``, what that file is called."""

    job: Job
    written: Written
    name: str

    def talk(self, *, saved: bool = True) -> list[str]:
        """What the plan says about the job, what the user should know, and what to type next."""
        lines = [*self.job.summary(), *(f"! {sentence(note)}" for note in (*self.job.notes, *self.written.notes))]
        if not saved:
            lines.append(f"saved in this folder as {self.name}:")
        for why, command in self.written.commands:
            lines += [f"{why}:", f"  {shlex.join(command)}"]
        return lines


def job_file(recipe: Recipe, ask: Ask, target: Path | None = None) -> JobFile:
    """The job that carries out a recipe, as a file at ``target``; nothing is written yet.

    Raises:
        UserError: as :func:`~finetui.engine.cluster.job.make_job`.
    """
    job = make_job(recipe, ask, has_token=bool(os.environ.get("HF_TOKEN")))  # nobody needs its value here
    base = target.resolve().parent if target is not None else Path.cwd()
    name = str(target or f"{job.name}{SUFFIXES[ask.system]}")
    return JobFile(job, _writer(ask.system)(job, base, name), name)


def save(target: Path, text: str) -> None:
    """Write a job file whole, over what is there.

    Raises:
        UserError: it can't be written.
    """
    try:
        write_atomically(target, text)
    except OSError as error:
        what = f"the job can't be written ({error.strerror})"
        raise UserError(what, where=str(target), do="Give another path.") from None


def systems_at(provider: str) -> list[System]:
    """The systems that can carry out a job on an offer of a provider, the one to propose first."""
    renting: Sequence[System] = ("skypilot", "modal")
    return [*(one for one in renting if any(provider in cloud.prices for cloud in clouds_of(one))), "slurm"]


def system_of(file: str) -> System | None:
    """The system that a job file is for, by what its name ends with."""
    return next((system for system, suffix in SUFFIXES.items() if file.endswith(suffix)), None)


def _writer(system: System) -> Callable[[Job, Path, str], Written]:
    if system == "slurm":
        from ..engine.cluster.slurm import write
    elif system == "modal":
        from ..engine.cluster.modal import write
    else:
        from ..engine.cluster.skypilot import write
    return write
