"""Depth: which tensors of a checkpoint are layers, where each stands, and the config of a model with other layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...planner.errors import ModelError

#: What the number of layers is called in config.json.
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: Keys that say something of single layers by their numbers, and the values that say nothing.
_BY_NUMBER: dict[str, tuple[Any, ...]] = {
    "attn_layer_period": (1,), "cross_attention_layers": ([],), "decoder_sparse_step": (1,),
    "expert_layer_period": (1,), "first_k_dense_replace": (0,), "full_attention_interval": (1,),
    "global_attn_every_n_layers": (1,), "interleave_moe_layer_step": (1,), "mlp_only_layers": ([],),
    "num_kv_shared_layers": (0,), "num_nextn_predict_layers": (0,), "sliding_window_pattern": (1,),
}  # fmt: skip
_LAYER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)+?)(\d+)\.(.+)$")
#: Parts of models that see or hear have layers of their own.
_OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|audio|speech|image|video|codec|vae|encoder)")
_BEFORE = re.compile(r"(embed(?!_out)|\bwte\b|\bwpe\b)")


@dataclass(frozen=True)
class Stack:
    """The decoder layers of a checkpoint: tensors named ``<prefix><number>.<ending>``."""

    prefix: str
    count: int

    def endings(self, names: Sequence[str], layer: int) -> list[str]:
        """What the tensors of one layer are called behind its number."""
        start = f"{self.prefix}{layer}."
        return [name.removeprefix(start) for name in names if name.startswith(start)]


def layers_of(names: Sequence[str], config: dict[str, Any]) -> Stack | None:
    """The decoder layers: the one row of numbered modules that has as many of them as the config says.

    Returns:
        None where there is no such row, or more than one.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    counts = [level[key] for level in (text or {}, config) for key in COUNTS if isinstance(level.get(key), int)]
    if not counts:
        return None
    found: dict[str, set[int]] = {}
    for name in names:
        told = _LAYER.match(name)
        if told:
            found.setdefault(told[1], set()).add(int(told[2]))
    fit = [prefix for prefix, numbers in found.items() if set(range(counts[0])) <= numbers]
    fit = [prefix for prefix in fit if not _OTHER_SENSES.search(prefix)] or fit
    return Stack(fit[0], counts[0]) if len(fit) == 1 else None


def number_of(name: str, stack: Stack) -> int | None:
    """The layer that a tensor belongs to; None outside of the layers."""
    told = _LAYER.match(name)
    return int(told[2]) if told and told[1] == stack.prefix and int(told[2]) < stack.count else None


def position(name: str, stack: Stack | None) -> float:
    """Where a tensor stands: from 0 for the first layer to 1 for the last; 0 outside of the layers."""
    layer = number_of(name, stack) if stack is not None else None
    return 0.0 if stack is None or layer is None else layer / max(1, stack.count - 1)


def comes_before(name: str) -> bool:
    """Whether a tensor outside of the layers is used before them, as an embedding is."""
    return _BEFORE.search(name) is not None


def stack(config: dict[str, Any], layers: Sequence[tuple[dict[str, Any], int]], name: str) -> None:
    """Make a config that of a model whose layers are these, in place.

    Lists with an item for each layer, such as ``layer_types``, are put together from those of the configs.

    Args:
        layers: of each layer of the result the config that it comes from and its number there.

    Raises:
        ModelError: the config says something of single layers by their numbers, and they have other numbers now.
    """
    inner = config.get("text_config")
    for level, key in [(config, None), *([(inner, "text_config")] if isinstance(inner, dict) else [])]:
        count = next((level[one] for one in COUNTS if isinstance(level.get(one), int)), None)
        if count is None:
            continue
        moved = [number for _, number in layers] != list(range(count))
        for entry, value in list(level.items()):
            if moved and entry in _BY_NUMBER and value is not None and value not in _BY_NUMBER[entry]:
                what = f"{entry}: {value} is about layers by their numbers, which change here"
                raise ModelError(what, where=name, do="Layers of this architecture can't be stacked.")
            if isinstance(value, list) and len(value) == count:
                lists = [(source.get(key) or {} if key else source).get(entry) for source, _ in layers]
                if all(isinstance(one, list) for one in lists):
                    level[entry] = [one[number] for one, (_, number) in zip(lists, layers, strict=True) if one]
        for one in COUNTS:
            if one in level:
                level[one] = len(layers)
