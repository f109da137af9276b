"""mergekit's YAML files, read as merges of finetui.

What their keys mean is told in mergekit's README ("Merge Configuration") and its docs/merge_methods.md; how its 0.1.5
treats what these leave open was seen from what it makes of small models: a gradient runs over the layers of each slice,
and what is outside of the layers has its first value; a model that is the base has no
task vector; nuslerp with ``nuslerp_flatten: false`` interpolates the rows of a matrix one by one, and with
``nuslerp_row_wise`` its columns.
"""

from __future__ import annotations

from typing import Any

from ...planner.errors import RecipeError
from .methods import METHODS, REQUIRED

_KEYS = {
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", "out_path",
}  # fmt: skip
#: Parameters under other names here.
_RENAMED = {"lambda": "scale", "scale": "weight"}
_SAME = {"weight", "density", "epsilon", "gamma", "t", "normalize", "rescale"}
_ANGLES = {"filter_wise", "nuslerp_flatten", "nuslerp_row_wise"}
#: Parameters of mergekit that save memory and change no result.
_WITHOUT_EFFECT = {"int8_mask": "it saves memory in mergekit and changes no result"}


def is_mergekit(tree: dict[str, Any]) -> bool:
    """Whether a file is one of mergekit's."""
    return "merge_method" in tree or ("base_model" in tree and "method" not in tree)


def translated(tree: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The tree of a :class:`.recipe.MergeRecipe`, and what of the file has no part in it, in words.

    Raises:
        RecipeError: the file asks for something that finetui's merges can't do.
    """
    strange = sorted(set(tree) - _KEYS)
    if strange:
        raise RecipeError(f"{strange[0]!r} is no key of mergekit that is known here", where=source, do="Remove it.")
    method = str(tree.get("merge_method", "")).replace("-", "_")
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise RecipeError(f"merge_method {method!r} is not known here", where=source, do=f"Known are {known}.")
    notes: list[str] = []
    base = None if tree.get("base_model") is None else _name(tree["base_model"], source)
    result: dict[str, Any] = {"method": method} | _parameters(tree.get("parameters"), method, source, notes)
    for key, inner in (("models", None), ("slices", "sources")):
        if tree.get(key) is None:
            continue
        if not isinstance(tree[key], list) or not all(isinstance(one, dict) for one in tree[key]):
            raise RecipeError(f"{key} is a list of mappings", where=source, do="Write: - model: …")
        if inner is None:
            result[key] = _ordered([_model(one, method, source, notes) for one in tree[key]], method, base, source)
            continue
        parts = []
        for part in tree[key]:
            sources = [_model(one, method, source, notes) for one in part.get("sources") or []]
            parts.append(
                {"sources": _ordered(sources, method, base, source)}
                | _parameters(part.get("parameters"), method, source, notes)
            )
        result[key] = parts
    if base is not None and METHODS[method].base != "none":
        result["base"] = base
    if METHODS[method].each.get("density") is REQUIRED:
        result.setdefault("density", 1.0)
    _formats(tree, result, base, source, notes)
    return result, list(dict.fromkeys(notes))


def _ordered(models: list[dict[str, Any]], method: str, base: str | None, source: str) -> list[dict[str, Any]]:
    """The models as the methods here take them: the base apart, or first where it is one of those that are merged."""
    if base is None:
        return models
    ours = [one for one in models if one["model"] == base]
    others = [one for one in models if one["model"] != base]
    if METHODS[method].base != "none":
        ranges = {tuple(one.get("layers", ())) for one in models}
        if ours and len(ranges) > 1:
            do = "Give the base the same layers as the others."
            raise RecipeError("the base has other layers in a slice than the models", where=source, do=do)
        return others
    if method == "slerp" and not ours:
        return [{"model": base, **{k: v for k, v in one.items() if k == "layers"}} for one in others[:1]] + others
    if not ours and method != "passthrough":
        do = "Name one of the models as base_model: config and tokenizer come from it."
        raise RecipeError(f"base_model is none of the models of this {method} merge", where=source, do=do)
    return ours + others if method != "passthrough" else models


def _model(one: Any, method: str, source: str, notes: list[str]) -> dict[str, Any]:
    if not isinstance(one, dict) or "model" not in one or set(one) - {"model", "layer_range", "parameters"}:
        do = "Its keys are model, layer_range and parameters."
        raise RecipeError(f"this is no model of a merge: {str(one)[:80]}", where=source, do=do)
    made = {"model": _name(one["model"], source)}
    if "layer_range" in one:
        made["layers"] = one["layer_range"]
    return made | _parameters(one.get("parameters"), method, source, notes)


def _name(model: Any, source: str) -> str:
    if isinstance(model, str):
        return model
    do = "Write it as a hub id or a folder; with an adapter as MODEL+ADAPTER."
    raise RecipeError(f"a model is named by text, not by {str(model)[:80]}", where=source, do=do)


def _parameters(given: Any, method: str, source: str, notes: list[str]) -> dict[str, Any]:
    """The parameters of one level under the names that they have here."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RecipeError("parameters is a mapping of names to values", where=source, do="Write: weight: 0.5")
    made: dict[str, Any] = {}
    for name, value in given.items():
        if name in _WITHOUT_EFFECT:
            notes.append(f"{name}: {_WITHOUT_EFFECT[name]}")
        elif name in _RENAMED and (name != "scale" or method == "passthrough"):
            made[_RENAMED[name]] = _setting(value, source)
        elif name in _SAME:
            made[name] = _setting(value, source)
        elif name not in _ANGLES:
            raise RecipeError(f"parameter {name!r} of mergekit is not known here", where=source, do="Remove it.")
    if given.get("filter_wise"):
        made["per"] = "row"
    if given.get("nuslerp_flatten") is False:
        made["per"] = "column" if given.get("nuslerp_row_wise") else "row"
    return made


def _setting(value: Any, source: str) -> Any:
    """A value with its conditions: ``filter: "*"`` is mergekit's for every tensor."""
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        return value
    made = []
    for item in value:
        if not isinstance(item, dict) or "value" not in item or set(item) - {"filter", "value"}:
            do = "A condition is {filter: mlp, value: 0.5}, or {value: 0.5} for all other tensors."
            raise RecipeError(f"this is no condition: {str(item)[:80]}", where=source, do=do)
        made.append({"filter": "" if item.get("filter") in (None, "*") else item["filter"], "value": item["value"]})
    return made


def _formats(tree: dict[str, Any], result: dict[str, Any], base: str | None, source: str, notes: list[str]) -> None:
    """Number format and tokenizer."""
    dtype = tree.get("out_dtype") or tree.get("dtype")
    if dtype is not None:
        result["dtype"] = dtype
    told = tree.get("tokenizer")
    if isinstance(told, dict) and (extra := sorted(set(told) - {"source"})):
        do = "Remove it, and keep source: base or union."
        raise RecipeError(f"tokenizer.{extra[0]} of mergekit is not known here", where=source, do=do)
    wanted = told.get("source", "union") if isinstance(told, dict) else tree.get("tokenizer_source")
    named = [*([base] if base else []), *(one["model"] for one in result.get("models", ()))]
    if wanted in ("base", "union"):
        result["tokenizer"] = wanted
    elif wanted is not None and wanted == next(iter(named), None):
        result["tokenizer"] = "base"
    elif wanted is not None:
        do = "Use base or union; the tokenizer comes from base_model, else from the first model."
        raise RecipeError(f"a tokenizer from {wanted!r} is not possible here", where=source, do=do)
    if tree.get("chat_template") is not None:
        notes.append("chat_template: the template of the base or first model is kept")
    notes += [f"{key}: the folder is named on the command line" for key in ("out_path",) if tree.get(key)]
