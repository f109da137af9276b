"""One model that stands alone: the base with the adapter added to its weights, W + (alpha / r) B A.

The base is read again in the format that it is stored in, not in NF4: a QLoRA adapter was trained against the NF4
values, so that the merged model differs from the trained one by the quantisation error of the base; merging into NF4
would add a second rounding, and few programs could load the result. The product is made in fp32 and rounded once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ...planner.errors import RunError
from ...planner.options import VIRTUAL_TOKENS
from ..chat import result_folder
from ..models.adapt import grow_vocabulary
from ..models.load import load_base, load_tokenizer, locate, stored_dtype
from ..output import set_generation, written_whole
from ..run import Run
from ..trainers.save import save_weights
from .adapter import copy_model_files


def export_merged(run: Run, destination: Path) -> Path:
    """Write the merged model and its tokenizer to ``destination``; a full fine-tune is copied as it is.

    Raises:
        RunError: the run has no model yet, or what it learned can't be merged.
        UserError: its base model is not to be had.
    """
    folder = result_folder(run)
    tuning = run.plan.resolved.tuning
    if tuning in VIRTUAL_TOKENS or tuning == "xlora":
        what = f"{tuning} tuning learned virtual tokens, which are no part of any weight"
        if tuning == "xlora":
            what = "xlora mixes its adapters anew for each token, so that no one weight holds them"
        raise RunError(what, where=run.name, do=f"Use: finetui export {run.name} --to adapter")
    if not (folder / "adapter_config.json").is_file():
        with written_whole(destination) as partial:
            copy_model_files(folder, partial)
        return destination
    model, dtype = merge(run, folder)
    tokenizer, _ = load_tokenizer(folder)
    set_generation(model, tokenizer)
    with written_whole(destination) as partial:
        save_weights(model, tokenizer, partial, dtype=dtype)
    return destination


def merge(run: Run, folder: Path) -> tuple[Any, torch.dtype]:
    """The merged model in fp32 on the CPU, and the format to store it in (that of the base)."""
    from peft import PeftModel

    base = locate(run.recipe.model)
    words = len(run.plan.resolved.options.new_tokens)
    resolved = dataclasses.replace(run.plan.resolved, quantization="none", device="cpu", precision="fp32")
    model = load_base(base, resolved, torch.device("cpu"), lambda _: None, dtype=torch.float32)
    if words:
        grow_vocabulary(model, load_tokenizer(folder)[0], words)
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    return merged, stored_dtype(base)
