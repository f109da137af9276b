"""Models whose checkpoints are packed already (:mod:`finetui.planner.packed`), loaded as their plan has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...planner.errors import ModelError
from ...planner.packed import OPENED, Packed, packed_weights


def packed_checkpoint(folder: Path) -> Packed | None:
    """How the weights in a folder are stored; None where it is as plain numbers, or no config says anything."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # loading it will say what is wrong with it
    return packed_weights(config) if isinstance(config, dict) else None


def opening(packed: Packed) -> Any:
    """What ``from_pretrained`` takes as ``quantization_config`` to read packed weights into plain ones."""
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    assert packed.method in OPENED, packed.method
    return Mxfp4Config(dequantize=True) if packed.method == "mxfp4" else FineGrainedFP8Config(dequantize=True)


def require(packed: Packed, quantization: str, folder: Path) -> None:
    """Refuse what a plan that knew the config would have refused, where it planned from a shape known by name.

    Raises:
        ModelError: these weights can't be trained on, or not as they would have to be packed.
    """
    if packed.opened and quantization == "none":
        return
    if packed.ours and quantization in ("nf4", "none"):
        return
    do = "Use tuning: lora, on 16 bits." if packed.opened else "Use the model that it was made from."
    what = f"its weights are stored as {packed.title}, which this plan ({quantization}) can't be carried out on"
    raise ModelError(what, where=str(folder), do=do)


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Have packed layers multiply in the format of this run rather than in that which their checkpoint names."""
    for module in model.modules():
        if hasattr(module, "quant_state") and getattr(module, "compute_dtype", dtype) is not dtype:
            module.compute_dtype = dtype


def plain(model: Any, packed: Packed, dtype: torch.dtype) -> Any:
    """The model with plain weights, and with no memory of ever having had others.

    transformers keeps how each tensor was read, and would save them by the way back, which packing has not.

    Returns:
        The same model; of NF4 weights, which merging can't add to, with new ones in ``dtype``.
    """
    if not packed.opened:
        model = model.dequantize().to(dtype)
        for told in (model.config, model):
            if getattr(told, "quantization_config", None) is not None:
                del told.quantization_config
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions
    return model
