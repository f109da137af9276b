"""The command that does what the Launch screen is about to do, so that it can be kept, scripted and mailed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..planner.recipe import Recipe

#: Keys of a recipe that have a flag of their own.
_FLAGS = {
    "method": "--method",
    "tuning.type": "--tuning",
    "tuning.rank": "--rank",
    "sequence_length": "--seq-len",
    "micro_batch": "--micro-batch",
    "hardware.checkpointing": "--checkpointing",
    "optimizer.name": "--optimizer",
}


def command_for(recipe: Recipe, *, name: str = "", root: Path | None = None, path: Path | None = None) -> list[str]:
    """The arguments of ``finetui run`` for a recipe; ``path`` is the file that holds exactly this recipe, if any."""
    words = ["finetui", "run", str(path) if path else recipe.model]
    if path is None:
        for key, value in _flat(recipe.to_dict()):
            if key == "data" and all(set(source) == {"path"} for source in value):
                words += [word for source in value for word in ("--data", source["path"])]
            elif key in _FLAGS:
                words += [_FLAGS[key], str(value)]
            elif key != "model":
                words += ["--set", f"{key}={_text(value)}"]
    if name:
        words += ["--name", name]
    if root is not None:
        words += ["--out", str(root)]
    return [*words, "--detach"]


def as_shell(words: list[str], width: int = 100) -> str:
    """Arguments as one shell command, continued with backslashes where it would be wider than ``width``.

    A flag and its value stay on one line.
    """
    groups: list[str] = []
    for word in map(shlex.quote, words):
        if groups and not word.startswith("--") and (len(groups) == 1 or " " not in groups[-1]):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines, line = [], ""
    for group in groups:
        if line and len(line) + len(group) + 3 > width:
            lines.append(f"{line} \\")
            line = f"    {group}"
        else:
            line = f"{line} {group}" if line else group
    return "\n".join([*lines, line])


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys as dotted ones; lists stay whole."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _text(value: Any) -> str:
    """A value as YAML reads it back; JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value)
