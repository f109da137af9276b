"""Training files of other tools as recipes, with what became of each of their keys.

``import_file`` reads one, knows whose it is by its keys, and leaves nothing unsaid: a key is carried over, not needed,
not carried over, or unknown.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..recipe import Recipe
from .job import Job
from .ledger import OUTCOMES, Fate, Ledger, Outcome
from .source import interpolate, read, referenced

__all__ = ["KINDS", "OUTCOMES", "Fate", "Imported", "Outcome", "detect", "import_file", "title_of"]

#: The tools whose files are read, each a module here.
KINDS = ("axolotl", "llamafactory", "torchtune", "trl")


@dataclass(frozen=True)
class Imported:
    """A recipe made of another tool's file: ``title`` names the tool, ``fates`` say what became of each key."""

    kind: str
    title: str
    source: str
    recipe: Recipe
    fates: tuple[Fate, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Keys by what became of them."""
        found = Counter(fate.outcome for fate in self.fates)
        return {outcome: found[outcome] for outcome in OUTCOMES}

    def to_yaml(self) -> str:
        """The recipe as YAML, headed by what it came from and what it does not hold."""
        from ..printable import printable

        left = [fate for fate in self.fates if fate.outcome in ("not carried", "unknown")]
        head = [f"Imported from {Path(self.source).name} ({self.title})." + (" Not carried over:" if left else "")]
        head += [f"- {fate.key}: {fate.value}: {fate.why}. {fate.do}" for fate in left]
        comments = [f"# {printable(' '.join(line.split()))}\n" for line in head]
        return "".join(comments) + self.recipe.to_yaml()


def import_file(path: str | Path, *, kind: str | None = None, gpus: int = 1, method: str | None = None) -> Imported:
    """The recipe that a file of another tool describes.

    Args:
        path: the YAML file.
        kind: whose it is; by its keys if left out.
        gpus: on how many GPUs it was started, which such files do not say.
        method: what TRL's command line says beside the file: sft, dpo, kto, grpo, rloo, reward.

    Raises:
        RecipeError: the file can't be read or told apart, a value of it can't be what it is, or it describes what
            finetui has no method for.
    """
    path = Path(path)
    tree, lines = read(path)
    kind = kind or detect(tree, str(path))
    if method is not None and kind != "trl":
        raise RecipeError(f"--method has no effect on a file of {kind}, which says it itself", do="Leave it out.")
    module = importlib.import_module(f".{kind}", __package__)
    named = referenced(tree) if kind == "torchtune" else set()
    ledger = Ledger(interpolate(tree, str(path), lines) if named else tree, str(path), lines)
    module.carry(Job(ledger, path.resolve().parent, gpus, method))
    ledger.idle(sorted(named), "the keys that name it have its value")
    sources = ledger.recipe.get("data", [])
    if sources and all(source.get("split") == "eval" for source in sources):
        ledger.retract("data", "would be measured on", "Write data: yourself; nothing to train on was found.")
    recipe = _build(ledger, str(path))
    return Imported(kind, module.TITLE, str(path), recipe, ledger.fates(module.TITLE))


#: What a recipe says of an option without effect; other tools take such ones without a word.
_USELESS = re.compile(r"(?:(rollout|preference|optimizer)\.)?(\w+) has no effect")


def _build(ledger: Ledger, source: str) -> Recipe:
    """The recipe of what was carried, without options that have no effect beside the others."""
    while True:
        try:
            return Recipe.build(ledger.recipe, source=source, lines=ledger.places)
        except RecipeError as error:
            found = _USELESS.match(error.what)
            section = found and (found[1] or error.where.rpartition(": ")[2])
            if found is None or not ledger.without(f"{section}.{found[2]}", error.what):
                raise _placed(error, ledger, source) from None


def _placed(error: RecipeError, ledger: Ledger, source: str) -> RecipeError:
    """An error about a whole section, with the line of the key in it that it speaks of."""
    section = error.where.removeprefix(f"{source}: ")
    for word in re.findall(r"\w+", error.what):
        line = ledger.places.get((section, word)) or ledger.places.get((word,))
        if line and error.where in (source, f"{source}: {section}"):
            return RecipeError(error.what, where=f"{source}:{line}: {word}", do=error.do)
    return error


def title_of(tree: dict[str, Any]) -> str | None:
    """The tool whose training file this is; None if it is nobody's."""
    try:
        return str(importlib.import_module(f".{detect(tree, '')}", __package__).TITLE)
    except RecipeError:
        return None


def detect(tree: dict[str, Any], source: str) -> str:
    """Whose file this is, by its keys.

    Raises:
        RecipeError: nobody's, or more than one tool's.
    """
    modules = {kind: importlib.import_module(f".{kind}", __package__) for kind in KINDS}
    if modules["torchtune"].has_components(tree):
        return "torchtune"
    found = {kind: sorted(module.SIGNATURE & tree.keys()) for kind, module in modules.items()}
    able = [kind for kind, module in modules.items() if module.NEEDED & tree.keys() and found[kind]]
    if len(able) > 1:  # what another one knows, too, doesn't tell them apart
        known = {kind: {*modules[kind].IDLE, *modules[kind].LOST} for kind in able}
        alone = [
            kind
            for kind in able
            if any(all(key not in known[one] for one in able if one != kind) for key in found[kind])
        ]
        able = alone or able
    if len(able) == 1:
        return able[0]
    if len(able) > 1:
        named = "; ".join(f"{', '.join(found[kind][:3])} are of {modules[kind].TITLE}" for kind in able)
        what = f"this could be a file of several tools: {named}"
        raise RecipeError(what, where=source, do=f"Say which: --from {able[0]}.")
    if "model" in tree and set(tree) <= set(Recipe.model_fields):
        raise RecipeError("this is a recipe of finetui already", where=source, do=f"Plan it: finetui plan {source}")
    near = [kind for kind in KINDS if found[kind]]
    titles = ", ".join(module.TITLE for module in modules.values())
    do = f"Give a training file of {titles}; or say whose it is: --from {near[0] if near else KINDS[0]}."
    raise RecipeError("no tool's training file has these keys", where=source, do=do)
