"""Whether the model of a recipe is at hand, or can be had from the Hub; nothing of it is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import cast

from ...planner import hub
from ...planner.errors import UserError, first_line
from ...planner.packed import check_packed, packed_weights
from ...planner.recipe import Recipe
from ..check import Check
from ..pickles import refuse
from . import remote_code
from .files import require_sound


def check_model(model: str, trust: bool = False) -> list[Check]:
    """Whether a model can be used: one that is here needs all its files, one of the Hub an answer about it.

    Args:
        trust: code that the model brings may run.

    Raises:
        ModelError: its weights are pickles, damaged or not all there, or code of its own is not allowed.
    """
    folder = folder_of(model)
    if folder is not None:
        remote_code.check(folder, wanted=trust, model=model)
        if trust and not remote_code.needed(folder):
            what = "the model needs no code of its own, so trust_remote_code has no effect"
            return [Check("model", "fail", what, "Remove trust_remote_code.")]
        if folder == Path(model).expanduser():
            return [_complete(folder)]
        return [Check("model", "ok", f"{model} is in the local cache")]
    return [_on_the_hub(model)]


def check_stored(recipe: Recipe) -> list[Check]:
    """Whether the checkpoint of a model that is planned from a shipped shape can be trained on as it is stored.

    The shapes do not say how weights are packed, and several releases of one shape may differ in that.

    Raises:
        ModelError: it is packed in a way that this recipe can't be carried out on.
    """
    try:
        if hub.find_config(recipe.model)[2] != "preset":
            return []  # its own config was read for the plan
        folder = folder_of(recipe.model)
        config = hub.find_config(str(folder))[1] if folder is not None else hub.remote_config(recipe.model)
    except UserError:
        return []  # whether the model can be had at all is a check of its own
    check_packed(recipe, packed_weights(config), recipe.model)
    return []


def folder_of(model: str) -> Path | None:
    """Where a model lies that is here: the folder that was named, or the Hub's copy in its cache."""
    given = Path(model).expanduser()
    return given if given.is_dir() else _cached(model)


def _complete(folder: Path) -> Check:
    from .tiny import is_tiny

    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        missing.append("a tokenizer (tokenizer.json)")
    refuse(folder, [path.name for path in folder.iterdir()])
    if not is_tiny(folder) and not any(folder.glob("*.safetensors")):
        missing.append("weights (*.safetensors)")
    if missing:
        do = "Give a checkpoint in Hugging Face format, as save_pretrained writes it."
        return Check("model", "fail", f"{folder} lacks {', '.join(missing)}", do)
    if find_spec("safetensors") is not None:  # else a check of its own says so
        require_sound(folder)
    return Check("model", "ok", str(folder))


def _on_the_hub(model: str) -> Check:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    # The base of all errors of its HTTP client, which is httpx or httpx2 by its release.
    http_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])

    if constants.HF_HUB_OFFLINE:
        do = "Unset HF_HUB_OFFLINE, or give the folder of a checkpoint."
        return Check("model", "fail", f"{model} is not here, and the Hub is switched off", do)
    page = f"{constants.ENDPOINT}/{model}"
    try:
        HfApi().model_info(model, timeout=5)
        HfApi().auth_check(model)
    except GatedRepoError:
        do = f"Accept its licence at {page}, then set HF_TOKEN or run: hf auth login"
        return Check("model", "fail", f"{model} is gated, and this token may not read it", do)
    except (RepositoryNotFoundError, HFValidationError):
        do = "See how its name is written; a private one needs HF_TOKEN."
        return Check("model", "fail", f"there is no folder {model}, and no such model on the Hub", do)
    except (http_error, OSError) as error:
        do = "Look at the network or HF_ENDPOINT, or give the folder of a checkpoint."
        return Check("model", "fail", f"{model} is not here, and the Hub does not answer ({first_line(error)})", do)
    return Check("model", "ok", f"{model} can be downloaded")


def _cached(model: str) -> Path | None:
    """The local copy of a hub model, if it has weights; their folder is the snapshot of the latest download."""
    if model.count("/") != 1:
        return None
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots"
    for snapshot in sorted(snapshots.glob("*")):
        if (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors")):
            return snapshot
    return None
