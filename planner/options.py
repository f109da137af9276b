"""What of a tuning and of an optimiser goes beyond the few values that every plan has, as values that can be compared,
hashed and written as JSON. The sections of a recipe (:mod:`.tuning`, :mod:`.optimizer`) explain each name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

#: Types that train the model's own weights; all others leave them as they are.
TRAINS_BASE: frozenset[str] = frozenset({"full", "freeze"})
#: Types whose parameters are pairs of LoRA matrices on linear layers.
LORA_TYPES: frozenset[str] = frozenset({"lora", "qlora", "lora-fp8"})
#: Types that learn virtual tokens instead of weights: nothing to merge, and one row can't hold several examples.
VIRTUAL_TOKENS: frozenset[str] = frozenset({"prompt", "prefix"})
#: Types whose layers can't be run a second time in the backward pass.
NOT_RECOMPUTED: frozenset[str] = frozenset({"prefix", "xlora"})
#: Types that PEFT can put on NF4 weights; loha and lokr have no such layer.
ON_NF4: frozenset[str] = frozenset({"qlora", "adalora", "ia3", "vera", "oft", "prompt", "prefix"})
#: Ways to begin that take a part out of the frozen weights, which must be 16 bits or more for that.
CHANGES_BASE: frozenset[str] = frozenset({"pissa", "olora"})

_LINEAR = {"targets", "modules_to_save"}
_LORA = {"rank", "alpha", "dropout", "use_dora", "rank_stabilized", "init", "lora_plus_ratio", "new_tokens"}
_LORA |= {"target_parameters", "start_from"} | _LINEAR
#: The keys that have an effect, by type; ``quantization`` is checked by itself.
TUNING_KEYS: dict[str, set[str]] = {
    "full": {"new_tokens"},
    "freeze": {"trained_layers", "trained_modules"},
    "lora": _LORA,
    "qlora": _LORA,
    "lora-fp8": _LORA - {"target_parameters", "use_dora"},
    "adalora": {"rank", "alpha", "dropout", "initial_rank"} | _LINEAR,
    "ia3": {"start_from"} | _LINEAR,
    "vera": {"rank", "dropout", "start_from"} | _LINEAR,
    "oft": {"block_size", "dropout", "start_from"} | _LINEAR,
    "loha": {"rank", "alpha", "start_from"} | _LINEAR,
    "lokr": {"rank", "alpha", "start_from"} | _LINEAR,
    "xlora": {"experts"},
    "prompt": {"virtual_tokens", "init_text", "start_from"},
    "prefix": {"virtual_tokens", "start_from"},
}

#: Names of their own for a type with a key.
SHORT: dict[str, dict[str, Any]] = {
    "dora": {"type": "lora", "use_dora": True},
    "qdora": {"type": "qlora", "use_dora": True},
    "rslora": {"type": "lora", "rank_stabilized": True},
    "lora+": {"type": "lora", "lora_plus_ratio": 16.0},
    "pissa": {"type": "lora", "init": "pissa"},
    "olora": {"type": "lora", "init": "olora"},
    "eva": {"type": "lora", "init": "eva"},
    "loftq": {"type": "qlora", "init": "loftq"},
    "qoft": {"type": "oft", "quantization": "nf4"},
}

#: Optimisers that keep their states in a space of lower rank; for whole weights, adapters are of low rank already.
LOW_RANK: frozenset[str] = frozenset({"galore", "apollo", "apollo-mini"})
#: Optimisers whose states move to host memory where the GPU's is full.
PAGED: frozenset[str] = frozenset({"paged-adamw", "paged-adamw-8bit", "paged-lion-8bit"})
#: Optimisers whose kernels run on CUDA alone.
CUDA_ONLY: frozenset[str] = frozenset({"adamw-8bit", "lion-8bit"} | PAGED)


@dataclass(frozen=True)
class Options:
    """Base of both: a plan keeps what differs from the defaults."""

    @classmethod
    def read(cls, tree: dict[str, Any]) -> Self:
        """From their JSON form, in which what has its default may be missing."""
        known = {field.name for field in fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in tree.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON has it."""
        plain = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, (v, default) in plain.items() if v != default}


@dataclass(frozen=True)
class TuningOptions(Options):
    """Beyond type, rank, alpha, dropout and targets."""

    use_dora: bool = False
    rank_stabilized: bool = False
    init: str = "default"
    lora_plus_ratio: float = 1.0
    modules_to_save: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    trained_layers: int = 0
    trained_modules: tuple[str, ...] = ()
    initial_rank: int = 0
    block_size: int = 32
    virtual_tokens: int = 20
    init_text: str = ""
    experts: tuple[str, ...] = ()
    start_from: str = ""


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """Beyond name, rate, schedule, decay and clipping. An empty ``betas`` and a 0 stand for the optimiser's own."""

    betas: tuple[float, ...] = ()
    epsilon: float = 1e-8
    momentum: float = 0.0
    projection_rank: int = 0
    projection_every: int = 200
    projection_scale: float = 0.0
    min_rate: float = 0.0
    cycles: int = 2
    decay_ratio: float = 0.2
