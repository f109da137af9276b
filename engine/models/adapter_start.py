"""Training that goes on from an adapter made before."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...planner.errors import ModelError, RecipeError, first_line
from ...planner.hub import read_config
from ..pickles import refuse
from .files import ADAPTER as WEIGHTS
from .files import ADAPTER_CONFIG as CONFIG
from .files import require_sound


def find_adapter(where: str) -> Path:
    """The folder of an adapter: itself, or the output of the run that it is.

    Raises:
        ModelError: neither is there, or its weights are damaged.
    """
    folder = Path(where).expanduser()
    for place in (folder, folder / "output"):
        if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
            if find_spec("safetensors") is not None:
                require_sound(place)
            return place
    for place in (folder, folder / "output"):
        if place.is_dir():
            refuse(place, [path.name for path in place.iterdir()])
    do = f"Give a folder with {CONFIG} and {WEIGHTS}, or a finished run that made one."
    raise ModelError("there is no adapter here", where=where, do=do)


def continue_from(adapted: Any, where: str) -> None:
    """Put the weights of an adapter on disk into the new one of the same shape.

    Raises:
        ModelError: it can't be read.
        RecipeError: it is of another type, rank or size, or sits on other modules.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = find_adapter(where)
    found = read_config(folder / CONFIG)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ModelError(f"the adapter can't be read ({error})", where=str(folder), do="Export it again.") from error
    config = adapted.peft_config["default"]
    kind = getattr(config.peft_type, "value", config.peft_type)
    for key, ours in (("peft_type", kind), ("r", getattr(config, "r", None)), ("use_dora", _flag(config, "use_dora"))):
        theirs = found.get(key)
        if ours is not None and theirs is not None and theirs != ours:
            what = f"the adapter has {key} {theirs}, and the recipe says {ours}"
            raise RecipeError(what, where="tuning.start_from", do="Set the recipe's tuning to what the adapter has.")
    wanted = _names(adapted)
    if wanted != set(weights):
        strange = sorted(wanted ^ set(weights))
        what = f"the adapter sits on other modules than tuning.targets names ({strange[0]} and {len(strange) - 1} more)"
        do = f"Set targets to those of the adapter: {found.get('target_modules')}."
        raise RecipeError(what, where="tuning.start_from", do=do)
    try:
        set_peft_model_state_dict(adapted, weights)
    except RuntimeError as error:
        line = next((x.strip() for x in str(error).splitlines() if "mismatch" in x), first_line(error))
        what, do = f"the adapter is of another size ({line[:160]})", "Give the model that the adapter was trained on."
        raise RecipeError(what, where="tuning.start_from", do=do) from error


def _flag(config: Any, name: str) -> bool | None:
    return bool(getattr(config, name)) if hasattr(config, name) else None


def _names(adapted: Any) -> set[str]:
    from peft import get_peft_model_state_dict

    return set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
