"""Architecture: what a model is, read from its config.json alone: shapes and exact parameter counts.

How a layer of each ``model_type`` is built is the table in :mod:`.families`, :mod:`.config_json` reads a config with
it, and this module counts. Counts are those of transformers' own model class (``sum(p.numel() for p in
model.parameters())``, tied weights once), of the text tower where a config also holds vision or audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from .config_json import read_config
from .errors import ModelError, RecipeError
from .layer import Layer, Linear
from .packed import Packed, packed_weights


@dataclass(frozen=True, eq=False)  # compared by identity: it is the key of caches, and hashing every shape is slow
class Architecture:
    """Shapes of a decoder-only model. ``exact`` is false where the family is not known and shapes had to do."""

    name: str
    model_type: str
    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    vocab: int
    max_positions: int
    tied: bool
    layers: tuple[Layer, ...]
    position_parameters: int = 0
    """Of tables beside the words': of positions, or of each layer's own embeddings."""
    outside: tuple[Linear, ...] = ()
    """Linear modules outside the layers, but for the output head."""
    final_norm: int = 0
    head_bias: int = 0
    window: int = 0
    windowed_layers: int = 0
    gated: bool = True
    layer_norm: bool = False
    adapted_experts: tuple[str, ...] = ()
    exact: bool = True
    note: str = ""
    activation: str = "silu"
    """Of the MLP, as the config names it."""
    packed: Packed | None = None
    """How the weights are stored, where that is not as plain numbers."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "model") -> Self:
        """Read a config.json.

        Args:
            config: the parsed file. A ``text_config`` inside it (vision-language models) is what is read.
            name: what the model is called in messages.

        Raises:
            ModelError: it is no decoder-only language model, or a shape is missing or not a whole number above 0.
        """
        try:
            return cls(**read_config(config, name), packed=packed_weights(config))
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # Some hundred keys of fifty families are read there, and any may hold anything.
            what = f"a value is of another kind than it should be ({str(error)[:120]})"
            raise ModelError(what, where=f"{name}: config.json", do="Fetch it again from its source.") from error

    @cached_property
    def num_layers(self) -> int:
        return sum(layer.count for layer in self.layers)

    @cached_property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden + self.position_parameters

    @cached_property
    def head_parameters(self) -> int:
        """Of the output head; its weight counts as embedding where it is tied."""
        return (0 if self.tied else self.vocab * self.hidden) + self.head_bias

    @cached_property
    def breakdown(self) -> dict[str, int]:
        """Parameters by module; they add up to :attr:`parameters`."""
        parts = {
            "embedding": self.embedding_parameters,
            "attention": 0,
            "mlp": 0,
            "experts": 0,
            "router": 0,
            "norms": 0,
        }
        for layer in self.layers:
            parts["attention"] += layer.count * sum(m.parameters for m in layer.attention)
            parts["mlp"] += layer.count * sum(m.parameters for m in layer.mlp)
            parts["experts"] += layer.count * layer.expert_weights
            parts["router"] += layer.count * layer.router
            parts["norms"] += layer.count * layer.norms
        parts["embedding"] += sum(module.parameters for module in self.outside)
        parts["norms"] += self.final_norm
        parts["lm_head"] = self.head_parameters
        return parts

    @cached_property
    def parameters(self) -> int:
        return sum(self.breakdown.values())

    @cached_property
    def linear_weights(self) -> int:
        """Weights (without biases) of all ``nn.Linear`` inside the layers: what bitsandbytes stores in 4 bits."""
        inside = sum(layer.count * layer.linear_weights for layer in self.layers)
        return inside + sum(module.weight for module in self.outside)

    @cached_property
    def expert_weights(self) -> int:
        return sum(layer.count * layer.expert_weights for layer in self.layers)

    @cached_property
    def largest_linear(self) -> int:
        return max(module.weight for layer in self.layers for module in layer.linears)

    @cached_property
    def layer_matmul_weights(self) -> int:
        """Weights but the head's that one token is multiplied with: of the routed experts, those that run."""
        inside = sum(layer.count * (layer.linear_weights + layer.router + layer.run_weights) for layer in self.layers)
        return inside + sum(module.weight for module in self.outside)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token passes through."""
        return self.parameters - sum(
            layer.count * (layer.expert_weights - layer.active_weights) for layer in self.layers
        )

    @cached_property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @cached_property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def targeted(self, targets: str | Sequence[str] = "all-linear") -> list[tuple[Layer, list[Linear]]]:
        """The linear modules of each kind of layer that get an adapter.

        Raises:
            RecipeError: a name that no module of the layers has.
        """
        if targets == "all-linear":
            return [(layer, list(self._adaptable(layer))) for layer in self.layers]
        leaves = self._leaves(targets)
        return [(layer, [m for m in self._adaptable(layer) if m.name in leaves]) for layer in self.layers]

    def _adaptable(self, layer: Layer) -> tuple[Linear, ...]:
        return tuple(module for module in layer.linears if module.name not in self.adapted_experts)

    def _leaves(self, targets: str | Sequence[str]) -> set[str]:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        known = {module.name for layer in self.layers for module in self._adaptable(layer)} | {*self.adapted_experts}
        known |= {module.name for module in self.outside}
        unknown = [name for name in wanted if name.rsplit(".", 1)[-1] not in known]
        leaves = {name.rsplit(".", 1)[-1] for name in wanted}
        if unknown or not wanted:
            named = ", ".join(map(repr, unknown))
            raise RecipeError(
                f"{self.name} has no linear module named {named}" if unknown else "targets is empty",
                where="tuning.targets",
                do=f"Use all-linear, or some of: {', '.join(sorted(known))}.",
            )
        if self.adapted_experts and len(leaves & {*self.adapted_experts[1:3]}) == 1:
            gate, up = self.adapted_experts[1:3]
            what = f"{gate} and {up} are one fused weight in {self.name}"
            raise RecipeError(what, where="tuning.targets", do="Name both or neither.")
        return leaves

    def expert_lora(self, layer: Layer, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """LoRA parameters on router and fused experts of one layer.

        PEFT gives each expert its own pair, at twice the rank on the fused gate and up projection.
        """
        if not self.adapted_experts or not layer.experts:
            return 0
        router, gate, _, down = self.adapted_experts
        leaves = {*self.adapted_experts} if targets == "all-linear" else self._leaves(targets)
        hidden, width = self.hidden, layer.expert_width
        total = rank * (hidden + layer.experts) if router in leaves else 0
        total += layer.experts * 2 * rank * (hidden + 2 * width) if gate in leaves else 0
        return total + (layer.experts * rank * (hidden + width) if down in leaves else 0)

    def lora_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Trainable parameters of LoRA: rank x (d_in + d_out) for each targeted module.

        Raises:
            RecipeError: a name that no module has.
        """
        leaves = None if targets == "all-linear" else self._leaves(targets)
        outside = sum(module.lora(rank) for module in self.outside if leaves is None or module.name in leaves)
        return outside + sum(
            layer.count * (sum(m.lora(rank) for m in modules) + self.expert_lora(layer, rank, targets))
            for layer, modules in self.targeted(targets)
        )

    def trainable(self, tuning: str, rank: int = 16, targets: str | Sequence[str] = "all-linear") -> int:
        """Trainable parameters under ``full``, ``lora`` or ``qlora``."""
        return self.parameters if tuning == "full" else self.lora_parameters(rank, targets)
