"""Layer: the modules of one kind of decoder layer, and how many parameters they have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Linear:
    """One linear module: a weight of ``d_out`` x ``d_in``, and a bias of ``d_out`` if it has one."""

    name: str
    d_in: int
    d_out: int
    bias: bool = False

    @property
    def weight(self) -> int:
        return self.d_in * self.d_out

    @property
    def parameters(self) -> int:
        return self.weight + (self.d_out if self.bias else 0)

    def lora(self, rank: int) -> int:
        """Parameters of a LoRA pair on this module, rank x (d_in + d_out) (arXiv:2106.09685)."""
        return rank * (self.d_in + self.d_out)


@dataclass(frozen=True)
class Layer:
    """One kind of decoder layer, ``count`` of them in the model.

    ``norms`` are the parameters of norms and sinks, ``norm_width`` the features that all norms see together.
    ``expert_weights`` are the parameters of all routed experts of one layer, ``active_weights`` of those that one
    token is routed to; of ``everywhere`` every token runs through all of them. ``inner`` is the MLP width that one
    token sees.
    """

    count: int
    attention: tuple[Linear, ...]
    mlp: tuple[Linear, ...]
    norms: int
    norm_width: int
    inner: int
    router: int = 0
    experts: int = 0
    expert_width: int = 0
    expert_weights: int = 0
    active_weights: int = 0
    everywhere: bool = False

    @property
    def run_weights(self) -> int:
        """Parameters of the routed experts that one token is multiplied with."""
        return self.expert_weights if self.everywhere else self.active_weights

    @cached_property
    def experts_per_token(self) -> float:
        """Routed experts that one token runs through."""
        return self.experts * self.run_weights / self.expert_weights if self.expert_weights else 0.0

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        return self.attention + self.mlp

    @cached_property
    def linear_weights(self) -> int:
        return sum(module.weight for module in self.linears)

    @cached_property
    def every_other(self) -> tuple[Linear, ...]:
        """Every second product of a forward pass, from the first on: those that torchtitan's selective checkpointing
        of operations keeps the outputs of (``_apply_ac_to_transformer_block``)."""
        return self.linears[::2]

    @cached_property
    def parameters(self) -> int:
        """Parameters of one such layer."""
        linear = sum(module.parameters for module in self.linears)
        return linear + self.norms + self.router + self.expert_weights
