"""A LoRA adapter over its base as a source: the product of a pair is added to a weight when that is read.

``W + s B A`` with ``s = alpha / r`` (arXiv:2106.09685), or ``alpha / sqrt(r)`` of rsLoRA (arXiv:2312.03732); of DoRA
each row of that is given the length that was learned (arXiv:2402.09353, equation 5). All of it in fp32.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...planner.errors import ModelError
from ...planner.inside import inside
from ..models.files import opened
from ..models.load import locate
from ..pickles import refuse
from .sources import FLOATS, Checkpoint, Stored, read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_COPY = ".base_layer.weight"
#: What a pair and its magnitude are called behind the name of their module.
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True)
class Pair:
    """What an adapter holds for one module: its tensors' names by their part, the rank and the scaling."""

    names: dict[str, str]
    rank: int
    scaling: float


class Adapter:
    """A folder with an adapter in PEFT's format.

    Args:
        name: as the user named it.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: it is no LoRA adapter, is damaged, or holds something that is no pair and no whole weight.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        names = [path.name for path in folder.iterdir()]
        refuse(folder, names)
        self.config = read_json(inside(folder, CONFIG, error=ModelError))
        kind = str(self.config.get("peft_type"))
        do = "Make a model of it first, with: finetui export RUN --to merged"
        if kind != "LORA":
            raise ModelError(f"an adapter of type {kind} is no sum of pairs", where=name, do=do)
        if WEIGHTS not in names:
            raise ModelError(f"{WEIGHTS} is missing", where=str(folder), do="Fetch the adapter again.")
        self._file = opened(inside(folder, WEIGHTS, error=ModelError))
        self.pairs: dict[str, Pair] = {}
        self.saved: dict[str, Stored] = {}
        """Weights that were trained whole (``modules_to_save``, biases), by their name in the base."""
        self.copies: dict[str, str] = {}
        """The base's own weights that PEFT stored beside pairs on embeddings: their name in the base, and here."""
        found: dict[str, dict[str, str]] = {}
        for key in self._file.keys():  # noqa: SIM118 - no dictionary
            module, part = _split(key)
            if part:
                found.setdefault(module, {})[part] = key
            elif module.endswith(_COPY):
                self.copies[module.removesuffix(_COPY) + ".weight"] = key
            elif "lora_" in key or "token_adapter" in key:
                raise ModelError(f"{key} is no part of a pair", where=name, do=do)
            else:
                told = self._file.get_slice(key)
                self.saved[module] = Stored(WEIGHTS, str(told.get_dtype()), tuple(told.get_shape()))
        for module, names_of in found.items():
            self.pairs[module] = self._pair(module, names_of)
        if not self.pairs:
            raise ModelError("this adapter holds no pairs", where=name, do="Check that it was trained.")

    def _pair(self, module: str, names: dict[str, str]) -> Pair:
        if not ({"a", "b"} <= set(names) or {"embedding_a", "embedding_b"} <= set(names)):
            raise ModelError(f"the pair of {module} is not whole", where=self.name, do="Fetch the adapter again.")
        rank = int(self._file.get_slice(names.get("a") or names["embedding_a"]).get_shape()[0])
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return Pair(names, rank, float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a module in fp32: [r, in] and [out, r], of an embedding [r, words] and [width, r]."""
        names = self.pairs[module].names
        a, b = (names[part] for part in (("a", "b") if "a" in names else ("embedding_a", "embedding_b")))
        return self.tensor(a).float(), self.tensor(b).float()

    def product(self, module: str) -> torch.Tensor:
        """What a pair adds to its weight, in the weight's own layout, in fp32."""
        a, b = self.factors(module)
        delta = self.pairs[module].scaling * (b @ a)
        return delta.T if self.transposed or "embedding_a" in self.pairs[module].names else delta

    def tensor(self, key: str) -> torch.Tensor:
        """One of its tensors as it is stored."""
        tensor: torch.Tensor = self._file.get_tensor(key)
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The format of its pairs."""
        return self.tensor(next(iter(next(iter(self.pairs.values())).names.values()))).dtype

    @property
    def transposed(self) -> bool:
        """Whether weights are [in, out], as in GPT-2."""
        return bool(self.config.get("fan_in_fan_out"))


class Adapted(Checkpoint):
    """A base with a LoRA adapter.

    Args:
        name: as the user named it.
        base: folder or hub id.
        folder: of the adapter.

    Raises:
        ModelError: the adapter doesn't sit on weights that the base stores under these names.
    """

    def __init__(self, name: str, base: str, folder: Path) -> None:
        super().__init__(name, locate(base))
        self.base, self.adapter = base, Adapter(name, folder)

    @property
    def folders(self) -> list[Path]:
        """The base's, then the adapter's: a run writes its tokenizer and chat template beside the adapter."""
        return [self.folder, self.adapter.folder]

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """The base's, but for those that were trained whole."""
        stored = dict(super().tensors)
        do = "Make a model of it first, with: finetui export RUN --to merged"
        for module in [*self.adapter.pairs, *(name.removesuffix(".weight") for name in self.adapter.copies)]:
            if f"{module}.weight" not in stored:
                what = f"the adapter sits on {module}, and the base stores no weight under that name"
                raise ModelError(what, where=self.name, do=do)
            if stored[f"{module}.weight"].dtype not in FLOATS:
                raise ModelError(f"{module}.weight is no floating-point tensor", where=self.name, do=do)
        for name, told in self.adapter.saved.items():
            if name not in stored:
                what = f"the adapter holds {name}, which the base does not store"
                raise ModelError(what, where=self.name, do=do)
            stored[name] = Stored(told.file, stored[name].dtype, told.shape)
        return stored

    def weight_files(self) -> list[Path]:
        """The base's, then the adapter's."""
        return [*self.shards(), self.adapter.folder / WEIGHTS]

    def read(self, name: str) -> Any:
        """A tensor: as the base stores it, as the adapter does, or their sum in fp32."""
        if name in self.adapter.saved:
            return self.adapter.tensor(_PREFIX + name)
        copied = self.adapter.copies.get(name)
        weight = super().read(name) if copied is None else self.adapter.tensor(copied)
        module = name.removesuffix(".weight")
        if module == name or module not in self.adapter.pairs:
            return weight
        delta = self.adapter.product(module)
        if delta.shape != weight.shape:
            what = f"{name} is {list(weight.shape)} in the base and {list(delta.shape)} in the adapter"
            raise ModelError(what, where=self.name, do="Give the base that the adapter was trained on.")
        changed = weight.float() + delta
        magnitude = self.adapter.pairs[module].names.get("magnitude")
        if magnitude is None:
            return changed
        along = 0 if self.adapter.transposed else 1  # of what one output reads
        length = torch.linalg.vector_norm(changed, dim=along, keepdim=True)
        return changed * (self.adapter.tensor(magnitude).float().reshape(length.shape) / length)


def _split(key: str) -> tuple[str, str]:
    """A module and which part of its pair this is, or a tensor of the base and nothing."""
    inner = key.removeprefix(_PREFIX)
    for ending, part in _PARTS.items():
        if inner.endswith("." + ending):
            return inner.removesuffix("." + ending), part
    return inner, ""


def _by_pattern(pattern: Any, module: str, usual: Any) -> Any:
    """The value for a module in PEFT's tables from the end of a module's name, a regular expression, to a value."""
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            continue
    return usual
