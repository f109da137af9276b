"""Which models there are, by name: shipped shapes, folders, the Hub's cache on this machine, and the Hub itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import HubError
from .hub import explained, known_models, offline_set, reachable, unreachable

#: Models that the Hub is asked for at once.
MOST = 25


def shipped() -> list[str]:
    """The models that ``presets/`` knows."""
    return [name for name, _ in known_models().values()]


def cached() -> list[str]:
    """The models of the Hub whose ``config.json`` is in huggingface_hub's cache on this machine."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    try:
        models = sorted(folder.glob("models--*"))
        return [
            model.name.removeprefix("models--").replace("--", "/")
            for model in models
            if any(model.glob("snapshots/*/config.json"))
        ]
    except OSError:
        return []


def folders(text: str) -> list[str]:
    """Folders that begin with what was typed, those that hold a model first; nothing unless it looks like a path."""
    if not text.startswith(("/", "./", "../", "~")):
        return []
    typed = Path(text).expanduser()
    parent, prefix = (typed, "") if text.endswith("/") else (typed.parent, typed.name)
    try:
        found = [entry for entry in parent.iterdir() if entry.is_dir() and entry.name.startswith(prefix)]
        found = [entry for entry in found if prefix.startswith(".") or not entry.name.startswith(".")]
        return sorted((str(entry) if (entry / "config.json").is_file() else f"{entry}/" for entry in found),
                      key=lambda path: (path.endswith("/"), path.lower()))  # fmt: skip
    except OSError:
        return []


def matching(names: Iterable[str], text: str) -> list[str]:
    """The names that hold every word that was typed, those that begin with the first one first."""
    words = text.lower().split()
    found = [name for name in dict.fromkeys(names) if all(word in name.lower() for word in words)]
    first = words[0] if words else ""
    return sorted(found, key=lambda name: not name.split("/")[-1].lower().startswith(first)) if first else found


def search(text: str) -> Sequence[str]:
    """Text models of the Hub whose names hold what was typed, the most downloaded first. One request, no retries.

    Raises:
        HubError: it can't be reached, is not to be asked (``HF_HUB_OFFLINE``), or gives no answer.
    """
    if offline_set():
        raise HubError("the Hub is not asked: HF_HUB_OFFLINE is set", do="Unset it to search there.")
    if not reachable():
        raise unreachable()
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_models(search=text, pipeline_tag="text-generation", sort="downloads", limit=MOST)
        return [model.id for model in found]
    except Exception as error:
        raise explained(error, text) from None
