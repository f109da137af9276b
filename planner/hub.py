"""Where a model's config.json comes from: a folder, the shipped presets, or the Hub.

Weights are never fetched here. From the Hub comes config.json alone, through huggingface_hub, which caches it and
honours ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from .errors import HubError, ModelError
from .family import ALIASES, MOST
from .hardware import PRESETS
from .inside import local_path

Origin = Literal["folder", "file", "preset", "hub"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Seconds to wait for the Hub before saying that it can't be reached.
TIMEOUT_S = 10.0
_CONNECT_S = 3.0
#: Bytes of the longest config.json that is believed; those of models with many labels have some 100 kB.
_LONGEST = 8 << 20
_AGAIN = "Fetch the model again, or give another folder."


def find_config(model: str) -> tuple[str, dict[str, Any], Origin]:
    """The name, the config.json and its origin for what a recipe's ``model`` says.

    Args:
        model: a folder with a config.json, a bare config.json, or a hub id. An id that ``presets/models`` knows needs
            no network; case does not matter there.

    Raises:
        ModelError: there is no such folder or id, or its config.json can't be read.
        HubError: the Hub is unreachable, or does not give the file.
    """
    path = local_path(model, error=ModelError, where="model")
    if path.is_dir():
        if not (path / "config.json").is_file():
            do = "Give a checkpoint folder in Hugging Face format, or a hub id."
            raise ModelError("the folder has no config.json", where=str(path), do=do)
        return path.resolve().name, read_config(path / "config.json"), "folder"
    if path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return name.replace("--", "/", 1), read_config(path), "file"
    found = _preset(model)
    if found:
        return found[0], read_config(found[1]), "preset"
    if not is_hub_id(model):
        raise ModelError(f"there is no folder or model {model!r}", where="model", do=_suggest(model))
    try:
        return model, read_config(Path(_fetch(model, "config.json"))), "hub"
    except HubError as error:
        near = difflib.get_close_matches(model.lower(), known_models(), n=2, cutoff=0.85)
        if not near:
            raise
        names = " or ".join(known_models()[name][0] for name in near)
        raise HubError(error.what, where=error.where, do=f"Did you mean {names}? {error.do}".rstrip()) from None


@cache
def known_models() -> dict[str, tuple[str, Path]]:
    """The hub ids of ``presets/models``, in lower case, with their spelling and their config.json."""
    names = {}
    for folder in sorted((PRESETS / "models").iterdir()) if (PRESETS / "models").is_dir() else ():
        if (folder / "config.json").is_file():
            name = folder.name.replace("--", "/", 1)
            names[name.lower()] = (name, folder / "config.json")
    return names


#: Words in a model's name that say what it was tuned for, not how it is built.
_VARIANTS = {"instruct", "it", "pt", "chat", "base", "hf"}


def _preset(model: str) -> tuple[str, Path] | None:
    """The preset for a hub id: its own, or that of a sibling that differs in its tuning alone (-Instruct, -Base)."""
    known = known_models()
    if model.lower() in known:
        return known[model.lower()]
    sibling = {_shape_name(name): path for name, path in known.values()}.get(_shape_name(model))
    return (model, sibling) if sibling and _HUB_ID.fullmatch(model) else None


def _shape_name(model: str) -> str:
    return "-".join(word for word in model.lower().split("-") if word not in _VARIANTS)


def is_hub_id(model: str) -> bool:
    """Whether this could be the name of a model on the Hub."""
    return bool(_HUB_ID.fullmatch(model)) and not model.startswith((".", "/", "~"))


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or another file of a model that holds one JSON object.

    Raises:
        ModelError: it can't be read, is no JSON object, or names a size that no model has.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_LONGEST + 1)
        if len(raw) > _LONGEST:
            what = f"this is longer than {_LONGEST >> 20} MiB, which no {path.name} is"
            raise ModelError(what, where=str(path), do="Give the folder or config.json of a model.")
        config = json.loads(raw.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} can't be read ({error})", where=str(path), do=_AGAIN) from None
    except json.JSONDecodeError as error:
        raise ModelError(f"this is not valid JSON ({error.msg})", where=f"{path}:{error.lineno}", do=_AGAIN) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and thousands of brackets
        what = f"this is not valid JSON ({str(error).partition(';')[0]})"
        raise ModelError(what, where=str(path), do=_AGAIN) from None
    if not isinstance(config, dict):
        raise ModelError(f"{path.name} must be a JSON object", where=str(path), do=_AGAIN)
    _require_believable(config, path)
    return config


def _require_believable(config: Mapping[str, Any], path: Path) -> None:
    """Libraries that know models count layers one by one, and take memory for each."""
    for level in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key, most in MOST.items():
            for alias in ALIASES.get(key, (key,)):
                value = level.get(alias)
                if isinstance(value, int | float) and not abs(value) <= most and value == value:
                    what = f"{alias} is {str(value)[:20]}, larger than that of any model"
                    raise ModelError(what, where=str(path), do="Fetch the file again from its source.")


def _suggest(model: str) -> str:
    tails = {name.split("/")[-1]: name for name in known_models()}
    wanted = model.lower()
    near = difflib.get_close_matches(wanted, known_models(), n=3, cutoff=0.6)
    near += [tails[tail] for tail in difflib.get_close_matches(wanted.split("/")[-1], tails, n=3, cutoff=0.6)]
    names = [known_models()[name][0] for name in dict.fromkeys(near)][:3]
    if names:
        return f"Did you mean {' or '.join(names)}?"
    return "Give a checkpoint folder, a config.json, or a hub id such as Qwen/Qwen3-8B."


def remote_config(model: str) -> dict[str, Any]:
    """The config.json that the Hub has for a model, whatever shape is shipped under its name.

    Raises:
        HubError: the Hub is unreachable, or does not give the file.
        ModelError: it can't be read.
    """
    return read_config(Path(_fetch(model, "config.json")))


def _fetch(model: str, filename: str) -> str:
    """The path of one small file of a hub model in huggingface_hub's cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not offline_set() and not reachable():  # huggingface_hub would retry for half a minute
        cached = try_to_load_from_cache(model, filename)
        if isinstance(cached, str):
            return cached
        raise unreachable()
    try:
        return hf_hub_download(model, filename, etag_timeout=TIMEOUT_S)
    except Exception as error:
        raise explained(error, model) from None


def fetched(model: str, filename: str) -> str:
    """The path of one small file of a hub model, downloaded if it is not in huggingface_hub's cache.

    Raises:
        HubError, ModelError: it can't be had.
    """
    return _fetch(model, filename)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def offline_set() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def reachable() -> bool:
    """Whether something listens at the endpoint; behind a proxy only the request itself can tell."""
    parts = urlsplit(_endpoint())
    proxies = (f"{parts.scheme}_proxy", "all_proxy")
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in proxies):
        return True
    import socket

    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def unreachable() -> HubError:
    do = "Check the network and HF_ENDPOINT, or give a checkpoint folder or a config.json."
    return HubError(f"{_endpoint()} can't be reached", where="model", do=do)


def offline(model: str) -> HubError:
    do = f"Unset HF_HUB_OFFLINE, or give a folder. {_suggest(model)}"
    return HubError(f"{model} is not in the cache, and HF_HUB_OFFLINE is set", where="model", do=do)


def explained(error: Exception, model: str) -> HubError | ModelError:
    """What went wrong on the way to the Hub, in plain words."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__
    endpoint = _endpoint()
    page = f"{endpoint}/{model}"
    if isinstance(error, errors.GatedRepoError):
        do = f"Accept its terms at {page}, then set HF_TOKEN to a token of that account."
        return HubError(f"{model} is gated: its owner must grant you access", where="model", do=do)
    if isinstance(error, errors.RepositoryNotFoundError):
        do = f"{_suggest(model)} A private model needs HF_TOKEN."
        return HubError(f"{endpoint} has no model {model}, or it is private", where="model", do=do)
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        do = "Only models in Hugging Face format can be trained: not GGUF files, not adapters alone."
        return HubError(f"{model} has no config.json", where="model", do=do)
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            do = "Set HF_TOKEN to a valid token (huggingface.co/settings/tokens)."
            return HubError(f"{endpoint} refused access to {model} ({status})", where="model", do=do)
        return HubError(f"{endpoint} answered with error {status}", where="model", do="Try again later.")
    if isinstance(error, errors.OfflineModeIsEnabled) or offline_set():
        return offline(model)
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{model!r} is not a hub id", where="model", do=_suggest(model))
    if isinstance(error, errors.LocalEntryNotFoundError | OSError) or type(error).__module__.startswith("httpx"):
        return unreachable()
    raise error
