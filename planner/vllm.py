"""What vLLM takes of a GPU that it shares with training: grpo and rloo copy the policy into it to generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .architecture import Architecture
from .hardware import GIB, Gpu

if TYPE_CHECKING:
    from .recipe import Recipe

#: What vLLM needs beyond its copy of the weights, as a factor on them: its own activations, CUDA graphs, and a cache
#: for the shortest batch; and the share of a GPU that is left to neither. Estimates: no run with vLLM was measured.
BESIDE, SPARE = 1.25, 0.05


def set_aside_gib(recipe: Recipe, architecture: Architecture, gpu: Gpu) -> float:
    """GiB that a plan has to leave free; 0 where vLLM is not asked for by name, or generates on other GPUs."""
    asked = recipe.rollout
    if recipe.method not in ("grpo", "rloo") or asked.engine != "vllm" or asked.server or gpu.kind == "cpu":
        return 0.0
    return BESIDE * 2 * architecture.parameters / GIB + SPARE * gpu.memory_gib
