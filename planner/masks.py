"""Masks of attention: where a kernel is handed one, and what stays of it.

Without a mask, attention is flash attention's, which hides later positions by itself. A mask is made where rows are
padded or packed, and for layers with a sliding window that a row fills (``masking_utils.py`` of transformers 5 skips it
for rows shorter than the window alone). FlashAttention-2 and kernels of other programs take windows as numbers.
"""

from __future__ import annotations

from .architecture import Architecture
from .settings import Settings
from .stacks import Stack

#: Families whose attention has no fused path in transformers: a soft cap on its scores, or sinks.
_EAGER = frozenset({"gemma2", "gpt_oss"})


def runs_eager(architecture: Architecture, settings: Settings, stack: Stack) -> bool:
    """Whether attention writes its scores out."""
    if settings.attention == "flash":
        return False
    return settings.attention == "eager" or (stack.stock_model and architecture.model_type in _EAGER)


def masked_share(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """The share of the layers whose attention is handed a mask; 1 where rows are padded or packed."""
    if settings.masked:
        return 1.0
    windows = stack.stock_model and not stack.whole_layers and settings.attention == "sdpa"
    if not windows or not 0 < architecture.window <= settings.sequence_length:
        return 0.0
    return architecture.windowed_layers / max(architecture.num_layers, 1)


def mask_bytes(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """Bytes of an explicit mask: one boolean per pair of positions."""
    given = masked_share(architecture, settings, stack) > 0
    return float(settings.rows * settings.sequence_length**2) if given else 0.0


def mask_copies(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """Bytes of the additive mask that each call of SDPA makes of the boolean one and keeps for its backward."""
    return settings.compute_bytes * mask_bytes(architecture, settings, stack)


def score_bytes(architecture: Architecture, settings: Settings) -> float:
    """Bytes of one layer's scores where no fused kernel takes it: fp32 with keys that several heads share, for which
    torch has the plain product alone (``sdp_utils.cpp``).

    They stay until the layer's backward whatever its policy, and five times as much is there while a layer is at work
    (followed with ``finetui plan --exact``).
    """
    if settings.compute_bytes != 4 or architecture.kv_heads == architecture.heads:
        return 0.0
    return 4.0 * architecture.heads * settings.sequence_length * settings.tokens
