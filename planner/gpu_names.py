"""What to answer to the name of a GPU that is not in the catalog: what was meant, and what can be planned instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hardware import Gpu

_RENTED = "`finetui gpus MODEL` ranks the ones that can be rented"
_CPU = "hardware.device: cpu (--set hardware.device=cpu) plans for this machine's processor"
#: Makers whose devices the engine does not train on, by words of their devices' names.
_OTHERS = {
    "Apple": r"apple|mac(book)?|mps|^m[1-9]",
    "AMD": r"amd|radeon|rx|vega|instinct|gfx\w+|mi\d+\w*",
    "Intel": r"intel|arc|gaudi\w*|xpu|iris",
    "Google": r"google|tpu|v[2-6][ep]?-\d+",
}
_SLICE = re.compile(r"\bmig\b|\b\d+g\.\d+gb\b", re.IGNORECASE)
_SIZE = re.compile(r"\s*(\d+)\s*(?:g|gb|gib)?\s*(?:gpu|card|vram)?\s*", re.IGNORECASE)
#: So many names are told at most.
_MOST = 6


def unknown_gpu(name: str, catalog: Iterable[Gpu], names: Mapping[str, str], plain: str) -> tuple[str, str]:
    """What is wrong with a name, and what to do about it.

    Args:
        names: the catalog's names and aliases without case and punctuation, to the name of the GPU.
        plain: ``name`` in that form.
    """
    missing = f"there is no GPU named {name!r} in the catalog"
    if plain in ("cpu", "processor", "none"):
        return f"{name!r} is no GPU", f"Leave it out: {_CPU}."
    near = [names[one] for one in difflib.get_close_matches(plain, list(names), n=3, cutoff=0.5)]
    if _SLICE.search(name):
        whole = next((names[one] for one in sorted(names, key=len, reverse=True) if plain.startswith(one)), "")
        plan = f"Plan for the whole {whole}" if whole else "Plan for a whole GPU"
        return f"runs on slices of a GPU (MIG) are not supported, as {name!r} is one", f"{plan}, or {_RENTED}."
    catalog = list(catalog)
    sized = _SIZE.fullmatch(name)
    if sized and not name.strip().isdigit():
        return missing, _of_size(int(sized[1]), catalog)
    maker = next((one for one, words in _OTHERS.items() if re.search(rf"\b({words})\b", name, re.IGNORECASE)), "")
    if maker == "AMD":
        theirs = [gpu.name for gpu in catalog if gpu.compute_capability.startswith("gfx")]
        return missing, f"Of AMD's it has {', '.join(theirs)}; {_RENTED}; {_CPU}."
    if maker:
        return f"{missing}: finetui does not train on {maker}'s", f"{_RENTED}; {_CPU}."
    shown = list(dict.fromkeys(near))
    return missing, f"Did you mean {' or '.join(shown)}?" if shown else "`finetui gpus` lists those it has."


def _of_size(gb: int, catalog: Iterable[Gpu]) -> str:
    """The cards of so many GB, the newest that people have at home first: those are what they name by their memory."""
    cards = [gpu for gpu in catalog if abs(gpu.memory_gib - 0.96 * gb) < 0.06 * gb]
    if not cards:
        return "`finetui gpus` lists those it has, with their memory."
    alike = [gpu.name for gpu in sorted(cards, key=_at_home, reverse=True)]
    more = f" and {len(alike) - _MOST} others (`finetui gpus`)" if len(alike) > _MOST else ""
    return f"Name the card; with {gb} GB there are {', '.join(alike[:_MOST])}{more}."


def _at_home(gpu: Gpu) -> tuple[bool, bool, float]:
    """Cards for people are larger than those for servers, whole ones than a laptop's, and newer than older ones."""
    newness = float(gpu.compute_capability) if gpu.compute_capability[:1].isdigit() else 0.0  # AMD's are no numbers
    return gpu.name.startswith("RTX-"), not gpu.name.endswith("-Laptop"), newness
