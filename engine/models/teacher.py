"""The teacher of a student: whether it can be had, whether both have the same words, and how it is loaded.

A student can only be told how likely each next word is by a model that has the same words under the same numbers.
Tokenizers say so, and are read before any weights. Models of one family pad their vocabularies differently (Qwen2.5 has
151,936 words up to 3B and 152,064 from 7B, of which its tokenizer knows 151,665): both are compared over those that
they share, and no token is among the others.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...planner import hub
from ...planner.errors import HubError, ModelError, RecipeError
from ...planner.plan import Resolved
from ...planner.recipe import Recipe
from ...planner.teacher import Found, architecture_of, find_teacher
from ..check import Check
from .at_hand import check_model, folder_of

_FILE = "tokenizer.json"


def check_teacher(recipe: Recipe) -> list[Check]:
    """Whether a recipe's teacher is at hand or can be had, and shares its student's words as far as files here tell.

    Raises:
        ModelError, HubError: it is not to be had, or damaged.
        RecipeError: it has other words.
    """
    from . import remote_code
    from .adapter_start import find_adapter

    found = find_teacher(recipe.distillation.teacher)
    if found.adapter is not None:
        find_adapter(str(found.adapter))
    folder = folder_of(found.base)
    trust = recipe.trust_remote_code and (folder is None or remote_code.needed(folder))
    checks = [dataclasses.replace(check, name="teacher") for check in check_model(found.base, trust)]
    if find_spec("tokenizers") is not None and all(check.status != "fail" for check in checks):
        both = _tokenizer_of(recipe.model), _tokenizer_of(found.base)
        if both[0] is not None and both[1] is not None:
            require_same_words(both[0], both[1], recipe.distillation.teacher)
    return checks


def download_bytes(recipe: Recipe) -> int:
    """What of the teacher is not here yet."""
    base = find_teacher(recipe.distillation.teacher).base if recipe.method == "distill" else ""
    return 2 * architecture_of(base).parameters if base and folder_of(base) is None else 0


def _tokenizer_of(model: str) -> Path | None:
    """A folder with the model's tokenizer, fetched alone if it is on the Hub; None where it can't be had so."""
    folder = folder_of(model)
    if folder is None and hub.is_hub_id(model) and not hub.offline_set() and hub.reachable():
        try:
            folder = Path(hub.fetched(model, _FILE)).parent
        except (HubError, ModelError):  # a tokenizer in another form; it is looked at once it is here
            return None
    return folder if folder is not None and (folder / _FILE).is_file() else None


def words_of(folder: Path) -> dict[str, int]:
    """Every token of a model's tokenizer with its number.

    Raises:
        ModelError: there is no tokenizer that can be read.
    """
    try:
        if (folder / _FILE).is_file():
            from tokenizers import Tokenizer

            words: dict[str, int] = Tokenizer.from_file(str(folder / _FILE)).get_vocab(with_added_tokens=True)
            return words
        from transformers import AutoTokenizer

        return dict(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).get_vocab())
    except Exception as error:  # both libraries raise nothing more special
        what = (
            f"the tokenizer can't be read ({str(error).splitlines()[0][:160] if str(error) else type(error).__name__})"
        )
        raise ModelError(what, where=str(folder), do="It needs tokenizer.json, or what its class reads.") from error


def require_same_words(student: Path, teacher: Path, name: str) -> None:
    """Refuse a teacher whose tokens mean something else to its student.

    Args:
        student, teacher: folders with their tokenizers, and a config.json if they are all there.
        name: what the recipe calls the teacher.

    Raises:
        RecipeError: it has other tokens, or other numbers for them, or no room for some.
    """
    ours, theirs = words_of(student), words_of(teacher)
    differing = sorted((token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)), key=str)
    do = "Distil from a larger model of the student's own family, or train by sft on answers that this one wrote."
    if differing:
        first = differing[0]
        here, there = (str(words.get(first, "none")) for words in (ours, theirs))
        many = "1 token differs" if len(differing) == 1 else f"{len(differing):,} tokens differ"
        what = f"the teacher {name} does not share the student's vocabulary: {many}"
        what += f", such as {first!r}, number {here} of the student's and {there} of the teacher's"
        raise RecipeError(what, where="distillation.teacher", do=do)
    size = _size(teacher)
    if size is not None and ours and max(ours.values()) >= size:
        what = f"the teacher {name} has {size:,} words, and its tokenizer more"
        raise RecipeError(what, where="distillation.teacher", do=do)


def _size(folder: Path) -> int | None:
    """How many words a model has embeddings for, as its config says."""
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = (told.get("text_config") or told).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def load_teacher(found: Found, folder: Path, recipe: Recipe, resolved: Resolved, device: Any, emit: Any) -> Any:
    """The frozen teacher, in the format that arithmetic has or in 4 bits, with its adapter if it has one.

    Args:
        folder: where its base lies.
        resolved: the student's plan.

    Raises:
        ModelError: it can't be read.
    """
    from .load import Numerics, load_base
    from .misfit import with_adapter

    numerics = Numerics.of(resolved)
    stored = dataclasses.replace(resolved, method="sft", quantization=recipe.distillation.quantization)
    model = load_base(folder, stored, device, emit, dtype=numerics.autocast or numerics.weights)
    if found.adapter is not None:
        model = with_adapter(model, found.adapter, found.base)
    model.requires_grad_(False).eval()
    return model.get_base_model() if found.adapter is not None else model
