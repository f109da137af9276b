"""Shapes of models that nobody here knows, from the size in their name: decoders of a size are built much alike."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

from finetui.planner.architecture import Architecture
from finetui.planner.hub import find_config

#: Dense decoders from 135M to 70B parameters, whose proportions others of about their size have.
_USUAL = (
    "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M", "meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-1.7B",
    "meta-llama/Llama-3.2-3B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-13b-hf",
    "Qwen/Qwen2.5-14B", "mistralai/Mistral-Small-24B-Base-2501", "Qwen/Qwen2.5-32B", "meta-llama/Llama-3.1-70B",
)  # fmt: skip
#: Names of what is no decoder that words pass through, or of mixtures, whose two sizes say too little.
_OTHERS = re.compile(r"\bt5|bert|whisper|mamba|jamba|rwkv|diffusion|\bsd[x\d]|flux|clip|moe|\d+x\d|-a\d+(\.\d+)?b")


def usual_of_size(model: str) -> Architecture | None:
    """A decoder as deep as the size in a model's name asks for; None where the name has none."""
    name = model.lower().replace("_", "-")
    sizes = re.findall(r"(?<![a-z\d.])(\d+(?:\.\d+)?)\s?([bm])(?![a-z\d])", name)
    if not sizes or _OTHERS.search(name):
        return None
    number, unit = sizes[-1]
    parameters = float(number) * (1e9 if unit == "b" else 1e6)
    return _with_layers(parameters) if 5e7 < parameters < 2e11 else None


@cache
def _with_layers(parameters: float) -> Architecture:
    config = min((find_config(name)[1] for name in _USUAL), key=lambda config: _distance(config, parameters))
    known = Architecture.from_config(config)
    outside = known.parameters - sum(layer.count * layer.parameters for layer in known.layers)
    each = (known.parameters - outside) / known.num_layers
    layers = max(round((parameters - outside) / each), 1)
    return Architecture.from_config({**config, "num_hidden_layers": layers}, f"a decoder of {parameters / 1e9:g}B")


def _distance(config: dict[str, Any], parameters: float) -> float:
    return abs(math.log(Architecture.from_config(config).parameters / parameters))
