"""The tensors of a model that stands alone, one at a time: those of a checkpoint, with an adapter added on the way.

A merge through PEFT holds the whole model in fp32, four bytes per weight. What a plain LoRA adapter changes is known
tensor by tensor, W + (alpha / r) B A (Hu et al. 2021, arXiv:2106.09685), so that one matrix in fp32 is enough. Only an
adapter that is that and nothing more is added so; :func:`merging` says no to every other, for which PEFT is asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...planner.errors import ModelError
from ..models.weights import Stored, stored_tensors

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: Keys of an adapter's config that make it more than W + s B A, with the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "init_lora_weights": (True, False, "gaussian"),
}


@dataclass(frozen=True)
class Pair:
    """One module's share of an adapter: W + scale * up @ down."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Source:
    """Tensors by their names in a checkpoint; nothing is read until asked for.

    Args:
        stored: where each lies.
        pairs: what is added to which.
    """

    stored: Mapping[str, Stored]
    pairs: Mapping[str, Pair] = field(default_factory=dict, repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: told.shape for name, told in self.stored.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the format that it is stored in.

        Raises:
            ModelError: what is to be added is not finite.
        """
        told = self.stored[name]
        count = told.dtype.itemsize
        for size in told.shape:
            count *= size
        with open(told.file, "rb") as file:
            file.seek(told.begin)
            raw = bytearray(file.read(count))
        tensor = torch.frombuffer(raw, dtype=told.dtype) if raw else torch.empty(0, dtype=told.dtype)
        tensor = tensor.reshape(told.shape)
        pair = self.pairs.get(name)
        if pair is None:
            return tensor
        # In fp32 and rounded once, product before scale: bit by bit what PEFT does on a model in fp32.
        change = pair.up.float() @ pair.down.float() * pair.scale
        if not torch.isfinite(change).all():
            do = "Export an earlier checkpoint: training has diverged."
            raise ModelError("the adapter's weights are not all finite", where=name, do=do)
        return (tensor.float() + change).to(told.dtype)


def of_folder(folder: Path) -> Source:
    """The tensors of a checkpoint folder.

    Raises:
        ModelError: it holds none that can be read here.
    """
    try:
        stored = stored_tensors(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the weights can't be read ({error})", where=str(folder), do="Fetch them again.") from error
    if not stored:
        what = "the weights are not plain numbers in safetensors files"
        raise ModelError(what, where=str(folder), do="Export with --to merged first.")
    return Source(stored)


def merging(base: Path, adapter: Path) -> Source | None:
    """The tensors of ``base`` with an adapter added; None if only PEFT can add it.

    Args:
        base: a checkpoint folder.
        adapter: a folder in PEFT's format.
    """
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    told = json.loads((base / "config.json").read_text(encoding="utf-8"))
    plain = all(config.get(key) in values for key, values in _PLAIN.items() if key in config)
    if not plain or "quantization_config" in told or not (adapter / _WEIGHTS).is_file():
        return None
    try:
        stored = stored_tensors(base)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading it whole will say what is wrong with it
    halves = load_file(adapter / _WEIGHTS)
    pairs: dict[str, Pair] = {}
    for name in {key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for key in halves}:
        module = name.removeprefix(_PREFIX)
        down, up = halves.get(f"{name}.lora_A.weight"), halves.get(f"{name}.lora_B.weight")
        found = stored.get(f"{module}.weight")
        if down is None or up is None or found is None or found.shape != (up.shape[0], down.shape[1]):
            return None
        ranks: dict[str, int] = config.get("rank_pattern") or {}
        alphas: dict[str, float] = config.get("alpha_pattern") or {}
        rank = int(ranks.get(get_pattern_key(list(ranks), module), config["r"]))
        alpha = float(alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"]))
        pairs[f"{module}.weight"] = Pair(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return Source(stored, pairs)
