"""What finetui's own kernels change: whole decoder layers as one function, which keeps what its policy says.

Bytes per token and layer for 16-bit values, with H hidden, I MLP width, Q and K the widths of queries and of keys
(``kernels/decoder_layer.py`` has the same table)::

    checkpointing: full   2 H                          all is computed again but the down projection
    checkpointing: none   4 H + 4 Q + 4 K + 4 I        norms, rotary embedding and activation are computed again

and 2 per rank for each of the seven modules with an adapter, and 4 per head. Layers at work in backward hold their
whole content and the gradients of the gated MLP. On hosts with memory to spare and a fast bus, what ``full`` keeps is
parked there; that is not counted on.
"""

from __future__ import annotations

from .architecture import Architecture
from .hardware import Gpu
from .stacks import Stack

#: Families whose layers the kernels recognise (``kernels/layers.py``).
_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def runs_whole_layers(architecture: Architecture, stack: Stack, gpu: Gpu, *, tuning: str, dropout: bool) -> bool:
    """Whether each decoder layer is one function: frozen weights, a known layer, no dropout, a GPU with bf16."""
    return (
        stack.whole_layers
        and gpu.kind == "cuda"
        and gpu.bf16
        and tuning != "full"
        and not dropout
        and architecture.model_type in _FAMILIES
        and all(not layer.experts for layer in architecture.layers)
    )


def layer_bytes(architecture: Architecture, rank: int, adapters: int, checkpointing: str) -> tuple[float, float]:
    """Bytes per token that one layer keeps, and the further bytes of its backward."""
    hidden, q, kv = architecture.hidden, architecture.query_width, architecture.kv_width
    inner = max(layer.inner for layer in architecture.layers)
    everything = 4 * hidden + 4 * q + 4 * kv + 4 * inner + 2 * rank * adapters + 4 * architecture.heads
    gradients = 4.0 * hidden + 4 * inner
    if checkpointing == "none":
        return float(everything), gradients
    return 2.0 * hidden, everything - 2 * hidden + gradients
