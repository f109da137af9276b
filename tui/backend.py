"""Backend: all that the app asks of the rest of finetui, as one set of functions that a test can replace.

Each function imports what it needs when it is called, from a worker thread: the first picture needs none of it.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..planner.errors import RecipeError, RunError, UserError

if TYPE_CHECKING:
    from ..engine.check import Check
    from ..engine.cluster.clouds import System
    from ..engine.run import Run
    from ..planner.importers import Imported
    from ..planner.plan import Plan
    from ..planner.recipe import Recipe
    from ..planner.terms import Term
    from .data_look import DataLook
    from .model_list import ModelList
    from .offers import OfferRow

#: Models remembered per user.
_RECENT = 12
#: Examples that the Data screen goes through.
_EXAMPLES = 20


def _plan(recipe: Recipe) -> Plan:
    from ..engine.planning import plan_for

    return plan_for(recipe)


def _explain(recipe: Recipe) -> Mapping[str, Term]:
    from ..engine.planning import explain

    return explain(recipe)[1]


def _check(recipe: Recipe, plan: Plan, root: Path) -> Iterable[Check]:
    from ..engine.preflight import checks

    return checks(recipe, plan, root)


def _start(recipe: Recipe, plan: Plan, root: Path, name: str | None) -> Run:
    from ..engine.launcher import start
    from ..engine.run import Run

    run = Run.create(recipe, plan, root=root, name=name)
    start(run)
    _remember_model(recipe.model)
    return run


def _stop(run: Run) -> None:
    from ..engine.launcher import stop

    stop(run)


def _checkpoint(run: Run) -> None:
    from ..engine.launcher import checkpoint_now

    checkpoint_now(run)


def _kill(run: Run) -> None:
    from ..engine.launcher import kill

    kill(run)


def _resume(run: Run) -> None:
    from ..engine.launcher import resume

    resume(run)


def _delete(run: Run) -> None:
    if run.live:
        raise RunError("the run is at work", where=run.name, do="Stop it first.")
    try:
        shutil.rmtree(run.path)
    except OSError as error:
        what, do = f"the run can't be deleted ({error.strerror})", "Remove its folder by hand."
        raise RunError(what, where=str(run.path), do=do) from error


def _gpus() -> list[str]:
    from ..planner.hardware import load_catalog

    return list(load_catalog())


def _models() -> list[str]:
    from ..planner.hub_search import cached, shipped

    return list(dict.fromkeys([*_recent_models(), *cached(), *sorted(shipped(), key=str.lower)]))


def _search_hub(text: str) -> Sequence[str]:
    from ..planner.hub_search import search

    return search(text)


def _recent_models() -> list[str]:
    from ..engine.run import state_dir

    try:
        return (state_dir() / "models").read_text(encoding="utf-8").splitlines()[:_RECENT]
    except OSError:
        return []


def _remember_model(model: str) -> None:
    from ..engine.run import state_dir

    models = list(dict.fromkeys([model, *_recent_models()]))[:_RECENT]
    try:
        state_dir().mkdir(parents=True, exist_ok=True)
        (state_dir() / "models").write_text("\n".join(models) + "\n", encoding="utf-8")
    except OSError:
        return  # a home that can't be written costs a suggestion, not a run


def _models_on(recipe: Recipe, length: int) -> ModelList:
    from ..planner.hardware import node_for
    from .model_list import models_on

    return models_on(node_for(recipe.hardware).gpu, length)


def _offers(recipe: Recipe, spot: bool) -> list[OfferRow]:
    from ..engine.planning import plan_for, workload_of
    from ..planner.architecture import Architecture
    from ..planner.hardware import this_machine
    from ..planner.hub import find_config
    from ..planner.limits import HardwareRequest
    from ..planner.ranking import rank_offers
    from .offers import OfferRow, with_frontier

    hardware = recipe.hardware.model_dump(exclude={"gpu", "gpus", "device", "strategy", "usd_per_h"})
    anywhere = recipe.model_copy(update={"hardware": HardwareRequest(**hardware)})
    name, config, _ = find_config(recipe.model)
    ranked = rank_offers(
        anywhere, Architecture.from_config(config, name), workload_of(recipe), spot=spot, everything=True
    )
    rows = [
        OfferRow(
            entry.offer.provider,
            entry.offer.gpu,
            entry.offer.count,
            entry.plan,
            (entry.offer.usd_per_h_spot if spot else entry.offer.usd_per_h) or 0.0,
            entry.usd,
            entry.offer.as_of,
            entry.stale,
            entry.offer.source,
            over=entry.over,
            quota=str(entry.quota or ""),
        )
        for entry in ranked
    ]
    if this_machine().gpu.kind == "cuda":
        with contextlib.suppress(UserError):  # what can't be done here can be done elsewhere
            here = plan_for(anywhere)
            rows.insert(0, OfferRow("this machine", here.hardware.gpu, here.hardware.count, here, 0.0, 0.0))
    return with_frontier(rows)


def _machine() -> str:
    from ..planner.hardware import this_machine

    node = this_machine()
    if node.gpu.kind == "cpu":
        return "CPU only"
    return f"{node.count} × {node.gpu.name}"


def _data(recipe: Recipe) -> list[str]:
    from ..engine.data.preview import survey

    found = []
    for source in survey(recipe).sources:
        if source.split == "eval":
            continue
        about = "" if source.rows_exact else "about "
        rows = f", {about}{source.rows:,} rows" if source.rows is not None else ", not downloaded yet"
        found.append(f"{source.format or 'hub dataset'}{rows}")
    return found


def _look(recipe: Recipe) -> DataLook:
    from .data_look import look_at

    return look_at(recipe, _EXAMPLES)


def _tool_of(path: Path) -> str:
    from ..planner.importers import title_of
    from ..planner.importers.source import read

    try:
        return title_of(read(path)[0]) or ""
    except RecipeError:  # which opening it tells
        return ""


def _import_file(path: Path, kind: str | None, gpus: int, method: str | None) -> Imported:
    from ..planner.importers import import_file

    return import_file(path, kind=kind, gpus=gpus, method=method)


def _systems(provider: str) -> Sequence[tuple[System, str]]:
    from ..engine.cluster.written import SUFFIXES
    from .job_file import systems_at

    return [(system, SUFFIXES[system]) for system in systems_at(provider)]


def _job(recipe: Recipe, provider: str, spot: bool, target: Path) -> Sequence[str]:
    from ..engine.cluster.job import Ask
    from .job_file import job_file, save, system_of

    system = system_of(target.name)
    if system is None:
        endings = ".sky.yaml for SkyPilot, .modal.py for Modal, .sbatch for Slurm"
        raise UserError("the name does not say what the job is for", where=str(target), do=f"Let it end in {endings}.")
    rented = system == "skypilot"
    made = job_file(recipe, Ask(system, provider=provider if rented else None, spot=spot and rented), target)
    save(target, made.written.text)
    return made.talk()


def _runs() -> list[Run]:
    from ..engine.run import list_runs

    return list_runs()


def _open(run: Run) -> Run:
    return run


def _root() -> Path:
    from ..engine.run import default_root

    return default_root()


@dataclass(frozen=True)
class Backend:
    """The functions; every one may raise a :class:`FinetuiError`, and all but ``now`` and ``root`` may take a while."""

    plan: Callable[[Recipe], Plan] = _plan
    explain: Callable[[Recipe], Mapping[str, Term]] = _explain
    """Each figure of a recipe's plan with its formula, by its name."""
    check: Callable[[Recipe, Plan, Path], Iterable[Check]] = _check
    start: Callable[[Recipe, Plan, Path, str | None], Run] = _start
    stop: Callable[[Run], None] = _stop
    checkpoint: Callable[[Run], None] = _checkpoint
    kill: Callable[[Run], None] = _kill
    resume: Callable[[Run], None] = _resume
    delete: Callable[[Run], None] = _delete
    runs: Callable[[], list[Run]] = _runs
    open: Callable[[Run], Run] = _open
    """Makes a run ready to be read closely: nothing for one of this machine."""
    models: Callable[[], list[str]] = _models
    """Models that need no network: used lately, in the Hub's cache, and shipped shapes."""
    search_hub: Callable[[str], Sequence[str]] = _search_hub
    """Models of the Hub by part of their name."""
    models_on: Callable[[Recipe, int], ModelList] = _models_on
    """Every shipped model on the GPU that a recipe asks for, with rows of so many tokens."""
    gpus: Callable[[], list[str]] = _gpus
    offers: Callable[[Recipe, bool], list[OfferRow]] = _offers
    """Every offer for a recipe, at spot prices if the second argument says so, and this machine's GPUs first."""
    machine: Callable[[], str] = _machine
    data: Callable[[Recipe], list[str]] = _data
    """One line per source that is trained on: its format and how many rows it has."""
    look: Callable[[Recipe], DataLook] = _look
    tool_of: Callable[[Path], str] = _tool_of
    """The tool whose training file this is; empty for any other file."""
    import_file: Callable[[Path, str | None, int, str | None], Imported] = _import_file
    """The recipe of a tool's file (None: told by its keys), started on so many GPUs, for a command of TRL's."""
    systems: Callable[[str], Sequence[tuple[System, str]]] = _systems
    """Systems that run jobs on a provider's machines, the one to propose first, with what their files end with."""
    job: Callable[[Recipe, str, bool, Path], Sequence[str]] = _job
    """Writes a recipe's job at a provider, at spot prices or not, for the system that the file's name says. Gives back
    what there is to say about it."""
    root: Callable[[], Path] = _root
    now: Callable[[], float] = time.time
