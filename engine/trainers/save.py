"""Weights to disk, the way ``from_pretrained`` reads them; needs neither TRL nor a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..models.initial import as_on_disk
from ..models.load import stored_dtype
from ..modes import give_usual_modes
from ..output import set_generation, write_output


def save_result(target: Path, model: Any, tokenizer: Any, base: Path) -> None:
    """Write a run's result: an adapter as it is; a full model in the format that its base was stored in.

    Args:
        target: the folder, which is there whole or not at all.
        base: where the base model lies.
    """
    set_generation(model, tokenizer)
    dtype = stored_dtype(base)
    write_output(target, lambda partial: save_weights(model, tokenizer, partial, dtype=dtype), model)


def save_weights(model: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write an adapter or a full model, and its tokenizer, the way ``from_pretrained`` reads them.

    Args:
        dtype: format to store floating-point weights of a full model in; None keeps what they are trained in.
    """
    if hasattr(model, "peft_config"):
        # Embeddings are not trained, and "auto" would ask the Hub whether their size has changed.
        with as_on_disk(model) as state:
            model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        mixer = {name: t.detach().contiguous() for name, t in model.named_parameters() if "xlora_classifier" in name}
        if mixer:  # PEFT 0.21 takes the number of its first layer for the name of an adapter, and leaves it out
            save_file(mixer, folder / "adapter_model.safetensors", metadata={"format": "pt"})
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
    give_usual_modes(folder)  # safetensors writes through a private temporary file, which nobody else could serve
