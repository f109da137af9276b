"""The files of this machine that a recipe names: which have to come along, and where the recipe finds them there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...planner.errors import RecipeError, UserError
from ...planner.inside import local_path
from ...planner.recipe import Recipe
from ...planner.rollout import SHIPPED_REWARDS
from ...planner.secrets import variables_of
from ...planner.stages import PREVIOUS
from ...planner.teacher import find_teacher
from ..data.places import is_address, package_for
from ..data.sources import is_local
from ..models.adapter_start import find_adapter

#: Where files lie beside the recipe, on the other machine.
FOLDER = "files"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Mount:
    """A file or folder of this machine; ``remote`` is its path there, beside the recipe: plain characters alone."""

    local: Path
    remote: str
    bytes: int

    @property
    def is_folder(self) -> bool:
        return self.local.is_dir()


def bundled(recipe: Recipe) -> tuple[Recipe, list[Mount]]:
    """The recipe with the paths that its files have there, and the files.

    Raises:
        UserError: a file is not there, or its name can't stand in a job file.
    """
    mounts: dict[Path, Mount] = {}
    for teacher in _teachers(recipe):
        found = find_teacher(teacher)
        if found.adapter is not None and _is_folder(found.base):
            what = f"the teacher is an adapter on {found.base}, a folder of this machine that it names itself"
            raise RecipeError(
                what, where="distillation.teacher", do="Merge it (finetui export --to merged), and name that."
            )

    def carried(text: str) -> str:
        path = _found(text)
        if path not in mounts:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-.") or "file"
            mounts[path] = Mount(path, f"{FOLDER}/{len(mounts)}/{name}", size_of(path))
        return f"./{mounts[path].remote}"

    tree = _with_paths(recipe.to_dict(), carried, lambda text: carried(str(find_adapter(text))))
    for stage in tree.get("stages", []):
        stage.pop("path", None)  # an export goes into the run's own directory, which comes back
    return Recipe.build(tree, source="the job"), list(mounts.values())


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with whole paths, for a machine that shares this one's disks; nothing needs to be there yet."""

    def whole(text: str) -> str:
        return os.path.abspath(local_path(text))

    return Recipe.build(_with_paths(recipe.to_dict(), whole, whole), source="the job")


Replace = Callable[[str], str]


def _with_paths(tree: dict[str, Any], replace: Replace, adapter: Replace) -> dict[str, Any]:
    """The tree of a recipe with each path of this machine that it reads put through ``replace``, or ``adapter``."""
    tree = dict(tree)
    if _is_folder(tree["model"]):
        tree["model"] = replace(tree["model"])
    parts = [tree]
    if tree.get("stages"):
        tree["stages"] = [dict(stage) for stage in tree["stages"]]
        parts += tree["stages"]
    for part in parts:
        _replace_in(part, replace, adapter)
    return tree


def _replace_in(tree: dict[str, Any], replace: Replace, adapter: Replace) -> None:
    distillation = tree.get("distillation")
    if isinstance(distillation, dict) and _is_folder(distillation.get("teacher") or "a hub/id"):
        found = find_teacher(distillation["teacher"])
        tree["distillation"] = {**distillation, "teacher": replace(str(found.adapter or found.base))}
    tuning = tree.get("tuning")
    if isinstance(tuning, dict):
        tuning = tree["tuning"] = dict(tuning)
        if tuning.get("start_from") not in (None, "", PREVIOUS):
            tuning["start_from"] = adapter(tuning["start_from"])
        if tuning.get("experts"):
            tuning["experts"] = [adapter(folder) for folder in tuning["experts"]]
    template = tree.get("chat_template")
    if isinstance(template, str) and (Path(template).suffix == ".jinja" or template.startswith(("/", "~", "."))):
        tree["chat_template"] = replace(template)
    data = tree.get("data")
    if isinstance(data, str | dict):  # a stage may say it in short
        data = [data]
    if isinstance(data, list):
        sources = [source if isinstance(source, dict) else {"path": source} for source in data]
        tree["data"] = [{**s, "path": replace(s["path"])} if is_local(s["path"]) else s for s in sources]
    rewards = tree.get("rewards")
    if isinstance(rewards, str | dict):
        rewards = [rewards]
    if isinstance(rewards, list):
        tree["rewards"] = [_reward(reward, replace) for reward in rewards]


def _reward(reward: Any, replace: Replace) -> Any:
    if isinstance(reward, dict):
        return {**reward, "function": _reward(reward["function"], replace)}
    path, _, name = str(reward).rpartition(":")
    return reward if reward in SHIPPED_REWARDS else f"{replace(path)}:{name}"


def secrets_of(recipe: Recipe) -> list[str]:
    """Names of the variables that a recipe needs from the environment: those of its addresses and of its rewards.

    Raises:
        UserError: one can't be the name of a variable.
    """
    rewards = [*recipe.rewards, *(r for stage in recipe.stages for r in stage.changes.get("rewards", []))]
    found = [name for path in _paths(recipe) for name in variables_of(path)]
    for reward in rewards:
        found += reward.get("environment", []) if isinstance(reward, dict) else getattr(reward, "environment", [])
    for name in found:
        check_variable(name)
    return list(dict.fromkeys(found))


def check_variable(name: str) -> None:
    """Nothing, if a variable of the environment may be called so.

    Raises:
        UserError: it may not.
    """
    if not _VARIABLE.fullmatch(name):
        raise UserError(f"{name!r} can't be the name of a variable", do="Write it in letters, digits and _.")


def packages_of(recipe: Recipe) -> list[str]:
    """What the addresses of a recipe need to be opened."""
    return list(dict.fromkeys(filter(None, map(package_for, _paths(recipe)))))


def _paths(recipe: Recipe) -> list[str]:
    """Where the rows of a recipe and of its stages come from."""
    found: list[str] = []
    for data in ([source.path for source in recipe.data], *(stage.changes.get("data", []) for stage in recipe.stages)):
        for source in data if isinstance(data, list) else [data]:
            found.append(source["path"] if isinstance(source, dict) else str(source))
    return found


def on_hub(recipe: Recipe) -> bool:
    """Whether anything of a recipe comes from the Hub: its model, a teacher, or rows."""
    models = [recipe.model, *(find_teacher(teacher).base for teacher in _teachers(recipe))]
    if not all(map(_is_folder, models)):
        return True
    return any(not is_local(path) and not is_address(path) for path in _paths(recipe))


def _teachers(recipe: Recipe) -> list[str]:
    """Whom the students of a recipe and of its stages learn from."""
    told = [stage.changes.get("distillation") for stage in recipe.stages]
    named = [recipe.distillation.teacher, *(part.get("teacher", "") for part in told if isinstance(part, dict))]
    return [teacher for teacher in named if teacher]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _is_folder(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or local_path(model).exists()


def _found(text: str) -> Path:
    path = Path(os.path.abspath(local_path(text)))
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in str(path)):
        what = f"the name {str(path)!r} holds a line break or another control character"
        raise UserError(what, do="Rename it: no job file can name it.")
    if not path.exists():
        do = "A job takes it along from here; write the job on the machine that has it."
        raise RecipeError("there is no such file", where=str(path), do=do)
    return path
