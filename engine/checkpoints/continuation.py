"""Whether a checkpoint belongs to the run that is about to go on from it: what has changed since, and what may not.

Each checkpoint notes down who it belongs to: recipe, plan, marks of the model's weights and of the training rows,
versions of the libraries. Most changes are welcome, as more GPUs or more steps; they are told. Some would go on
without an error and train something else than the run says: other rows at the position that was reached, another
base below the adapter, a learning rate that the restored schedule overrides. Those are refused.

Nothing here imports torch: ``finetui resume`` looks before it starts anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...planner.errors import RunError
from ...planner.plan import Resolved
from ...planner.recipe import Recipe
from ...planner.rollout import ROLLOUT_METHODS
from ...planner.teacher import find_teacher
from ...planner.version import VERSION
from ..run import Run
from .store import find

_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "triton")

_OTHER_WEIGHTS = "the weights in the checkpoint are of another shape or mean something else"
_OTHER_ROWS = "training would go on at the same position of other rows"
_RESTORED = "the checkpoint restores the old value, so the change would have no effect"
#: Settings of a plan that can't change half-way, and why. The others can, and a change of them is told.
_FIXED = {
    **dict.fromkeys(("method", "tuning", "rank", "alpha", "targets", "tuning_options"), _OTHER_WEIGHTS),
    **dict.fromkeys(("quantization", "precision"), _OTHER_WEIGHTS),
    **dict.fromkeys(("sequence_length", "packing", "train_on", "seed", "batch_size"), _OTHER_ROWS),
    **dict.fromkeys(("optimizer", "optimizer_options"), "the optimiser's state is of another kind"),
    **dict.fromkeys(("learning_rate", "weight_decay"), _RESTORED),
    **dict.fromkeys(("schedule", "warmup_steps"), "the learning rate would jump"),
}
#: Settings whose change follows from others that are told.
_DERIVED = frozenset({"accumulation", "strategy", "warmup_steps"})
#: Sections and keys of a recipe that a run reads again when it goes on; all others became the plan once and for all.
_READ_AGAIN = frozenset(
    {"limits", "checkpoint", "evaluation", "track", "rollout", "rewards", "preference", "distillation", "max_steps",
     "data"}
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was when the checkpoint was written.

    Args:
        what: the setting, in the words of recipe or plan.
        why: why it can't change now; empty if it can.
    """

    what: str
    before: Any
    now: Any
    why: str = ""

    def __str__(self) -> str:
        told = f"{self.what}: {_short(self.before)} -> {_short(self.now)}"
        return f"{told} ({self.why})" if self.why else told


def identity(
    recipe: Recipe, resolved: Resolved, *, model: str = "", teacher: str = "", data: str = "", rows: str = "",
    device: str = "",
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint notes down about the run that it belongs to, as JSON values.

    Args:
        model: mark of the base model's weights (:func:`model_mark`); teacher: of those of a student's teacher.
        data: mark of some of the training rows, as they are read.
        rows: mark of all of them, as they were written.
        device: what it runs on.
    """
    return {
        "finetui": VERSION,
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "resolved": _json({**dataclasses.asdict(resolved), "batch_size": resolved.batch_size}),
        "libraries": dict(_versions()),
        "model": model,
        "teacher": teacher,
        "data": data,
        "content": rows,
        "device": device,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two identities; marks that one of them lacks are not compared."""
    found = list(_plan_changes(before.get("resolved", {}), now["resolved"]))
    planned = {change.what for change in found}
    found += [c for c in _recipe_changes(before.get("recipe", {}), now["recipe"]) if c.what not in planned]
    for key, what, why in (
        ("model", "the base model's weights", _OTHER_WEIGHTS),
        ("teacher", "the teacher's weights", ""),
        ("data", "the training rows", _OTHER_ROWS),
        ("content", "the training rows", _OTHER_ROWS),
        ("device", "device", ""),
        ("finetui", "finetui", ""),
    ):
        told = {change.what for change in found}
        if before.get(key) and now.get(key) and before[key] != now[key] and what not in told:
            found.append(Change(what, before[key], now[key], why))
    versions = before.get("libraries", {})
    found += [Change(k, versions[k], v) for k, v in now["libraries"].items() if versions.get(k, v) != v]
    return found


def require_same_run(found: list[Change], run: Run, step: int) -> None:
    """Refuse to go on where a change would corrupt what comes out.

    Raises:
        RunError: naming every such change.
    """
    refused = [change for change in found if change.why]
    if refused:
        lines = "; ".join(map(str, refused))
        raise RunError(
            f"can't go on from step {step}, since this has changed: {lines}",
            where=run.name,
            do="Undo the change, or start a new run with it; a finished adapter goes on with tuning.start_from.",
        )


def before_resuming(run: Run) -> list[Change]:
    """What has changed since the newest checkpoint, as far as recipe and plan tell; empty without a checkpoint.

    Raises:
        RunError: a change would corrupt what comes out, or the checkpoint is of a release that wrote another format.
    """
    newest = find(run.path / "checkpoints")[-1:]
    if not newest:
        return []
    require_readable(newest[0].path, newest[0].facts, run)
    found = changes(newest[0].facts, identity(run.recipe, run.plan.resolved))
    require_same_run(found, run, newest[0].step)
    return found


def require_readable(path: Path, facts: Mapping[str, Any], run: Run) -> None:
    """Raises:
    RunError: the checkpoint is of a release that wrote another format.
    """
    if "resolved" not in facts:
        raise RunError(
            f"{path.name} was written by an earlier release of finetui, which this one can't go on from",
            where=run.name,
            do="Resume it with that release, or remove its folder checkpoints/ to start from the beginning.",
        )


def model_mark(folder: Path) -> str:
    """A mark of a model's weights that changes when they do: sizes of the files, and samples of what is in them.

    Independent of where the folder lies and when it was written. Reads 1 MiB of each file at most.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for sixteenth in range(16):
                file.seek(size * sixteenth // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()[:24]


def teacher_mark(recipe: Recipe, base: Path | None) -> str:
    """Mark of the weights of a student's teacher and of its adapter's, empty without a teacher.

    Args:
        base: where the teacher's own weights lie.
    """
    if base is None:
        return ""
    adapter = find_teacher(recipe.distillation.teacher).adapter
    return model_mark(base) + (model_mark(adapter) if adapter is not None else "")


def rows_mark(rows: Any) -> str:
    """A mark of prepared training rows: how many there are, and 64 of them, evenly spread.

    Args:
        rows: a sequence of dictionaries, in the order in which they are numbered.
    """
    count = len(rows)
    digest = hashlib.sha256(f"{count}\n".encode())
    for place in range(min(count, 64)):
        row = rows[place * count // min(count, 64)]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def _plan_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for key, value in now.items():
        old = before.get(key, value)
        if old == value:
            continue
        if key == "gpus":
            why = ""
            if len(old) != len(value) and now["method"] in ROLLOUT_METHODS:
                why = "completions in use belong to the ranks that made them"
            yield Change("GPUs" if now["device"] == "cuda" else "processes", len(old), len(value), why)
        elif key == "warmup_steps" and before.get("steps") != now.get("steps"):
            continue  # follows from the number of steps, which is told
        elif key not in _DERIVED or key in _FIXED:
            yield Change(key, old, value, _FIXED.get(key, ""))


def _recipe_changes(before: Any, now: Any) -> Iterator[Change]:
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) == new.get(key):
            continue
        section = key.partition(".")[0]
        if section in ("model", "data"):
            continue  # what counts is what they hold, wherever they lie
        why = "" if section in _READ_AGAIN else "the plan of this run was made without it, so it would have no effect"
        yield Change(key, old.get(key), new.get(key), why)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def _versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _json(tree: Any) -> Any:
    return json.loads(json.dumps(tree))


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
