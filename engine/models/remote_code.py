"""Models that bring Python files of their own: nothing of them runs before the user has seen and allowed it.

A recipe says that its model may (``trust_remote_code: true``), and the user says once on this machine that these very
files may (``finetui trust MODEL``). What is remembered is the SHA-256 of each file, so another revision, or one changed
byte, asks anew; a recipe from somebody else can't bring the permission with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...planner.errors import ModelError
from ...planner.inside import inside
from ...planner.state import state_dir

#: Files of a model that may name classes of its own, and the key that does so.
_CONFIGS, _KEY = ("config.json", "tokenizer_config.json", "processor_config.json"), "auto_map"


@dataclass(frozen=True)
class CodeFile:
    """One Python file of a model; ``name`` is relative to its folder."""

    name: str
    bytes: int
    sha256: str


def code_of(folder: Path) -> list[CodeFile]:
    """The Python files that a model's configs ask for, and all that lie beside them: each may import the others.

    Raises:
        ModelError: the code is that of another repository, or a link to somewhere else.
    """
    if not _named(folder):
        return []
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    found = []
    for name in files:
        raw = inside(folder, name, error=ModelError).read_bytes()
        found.append(CodeFile(name, len(raw), hashlib.sha256(raw).hexdigest()))
    return found


def needed(folder: Path) -> bool:
    """Whether a model can't be loaded without its own code: transformers has no class for it, or for its tokenizer."""
    if not _named(folder):
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    model, tokenizer = (_config(folder, name) for name in _CONFIGS[:2])
    if model.get(_KEY) and model.get("model_type") not in CONFIG_MAPPING_NAMES:
        return True
    return bool(tokenizer.get(_KEY)) and tokenizer_class_from_name(str(tokenizer.get("tokenizer_class"))) is None


def trusted(folder: Path) -> bool:
    """Whether a model's own code is to run: there is no other way to load it, and the user has allowed every file."""
    if not needed(folder):
        return False
    files, known = code_of(folder), _allowed()
    return bool(files) and all(file.sha256 in known for file in files)


def refusal(folder: Path, model: str = "") -> ModelError:
    """The error of a model that can't be loaded without code that is not allowed."""
    name = model or str(folder)
    files = ", ".join(file.name for file in code_of(folder)[:4]) or "none are there"
    what = f"the model is made by Python files that come with it ({files}), and they are not allowed to run"
    do = f"Read them, allow them with: finetui trust {name}, and set trust_remote_code: true in the recipe."
    return ModelError(what, where=name, do=do)


def check(folder: Path, *, wanted: bool, model: str) -> None:
    """Refuse a model whose code would have to run, unless recipe and user both say that it may.

    Args:
        wanted: the recipe's ``trust_remote_code``.

    Raises:
        ModelError: one of them does not.
    """
    if needed(folder) and not (wanted and trusted(folder)):
        raise refusal(folder, model)


def allow(files: list[CodeFile], model: str) -> None:
    """Remember that the user has allowed these files; written whole or not at all, for this user alone."""
    place = _place()
    place.parent.mkdir(parents=True, exist_ok=True)
    known = _allowed() | {file.sha256: {"model": model, "file": file.name, "time": time.time()} for file in files}
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=".")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(known, file, indent=1)
    os.replace(name, place)


def _place() -> Path:
    return state_dir() / "allowed-code.json"


def _allowed() -> dict[str, Any]:
    try:
        found = json.loads(_place().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: then nothing is allowed
        return {}
    return found if isinstance(found, dict) else {}


def _named(folder: Path) -> bool:
    """Whether a config names classes of the model's own."""
    named = False
    for name in _CONFIGS:
        classes = _config(folder, name).get(_KEY)
        if classes and "--" in json.dumps(classes):
            do = "Download that repository's files into the model's folder and drop the prefix, or use another model."
            raise ModelError("the model is made by code of another repository", where=f"{folder}/{name}", do=do)
        named = named or bool(classes)
    return named


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # whoever loads it says what is wrong with it
        return {}
    return config if isinstance(config, dict) else {}
