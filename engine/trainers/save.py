"""Weights to disk, the way ``from_pretrained`` reads them; needs neither TRL nor a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_weights(model: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write an adapter or a full model, and its tokenizer, the way ``from_pretrained`` reads them.

    Args:
        dtype: format to store floating-point weights of a full model in; None keeps what they are trained in.
    """
    if hasattr(model, "peft_config"):
        # Embeddings are not trained, and "auto" would ask the Hub whether their size has changed.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        options: dict[str, Any] = {}
        before = model.config.dtype
        if dtype is not None:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
            options["state_dict"] = state
            model.config.dtype = dtype
        cache, model.config.use_cache = model.config.use_cache, True
        try:
            model.save_pretrained(str(folder), **options)
        finally:
            model.config.dtype, model.config.use_cache = before, cache
    tokenizer.save_pretrained(str(folder))
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes through a private temporary file, which nobody else could serve
