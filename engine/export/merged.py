"""One model that stands alone: the base with the adapter added to its weights, W + (alpha / r) B A.

The base is read again in the format that it is stored in, not in NF4: a QLoRA adapter was trained against the NF4
values, so that the merged model differs from the trained one by the quantisation error of the base; merging into NF4
would add a second rounding, and few programs could load the result. The product is made in fp32 and rounded once.

A plain LoRA is added tensor by tensor (:mod:`.source`), which takes the memory of one file of the result; what PEFT
alone can add takes the whole model in fp32.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...planner.errors import RunError
from ...planner.options import VIRTUAL_TOKENS
from ..chat import result_folder
from ..models.adapt import grow_vocabulary
from ..models.load import load_base, load_tokenizer, locate, stored_dtype
from ..models.misfit import with_adapter
from ..models.remote_code import trusted
from ..modes import give_usual_modes
from ..output import set_generation, written_whole
from ..run import Run
from ..trainers.save import save_weights
from .adapter import copy_model_files
from .exported import Exported, Tell, require_room, say_nothing
from .source import Source, merging
from .talk import check_folder

#: Bytes of one file of the result, and so of what is in memory at a time.
SHARD = 4 * 2**30


def export_merged(run: Run, destination: Path, tell: Tell = say_nothing) -> Exported:
    """Write the merged model and its tokenizer to ``destination``; a full fine-tune is copied as it is.

    Raises:
        RunError: the run has no model yet, or what it learned can't be merged.
        UserError: its base model is not to be had.
    """
    folder = result_folder(run)
    refuse_unmergeable(run)
    require_room(destination, standing_size(run, folder))
    with written_whole(destination) as partial:
        write_merged(run, folder, partial, tell)
        checked = check_folder(run, folder, partial)
    return Exported(destination, checked, use=(f"AutoModelForCausalLM.from_pretrained({str(destination)!r})",))


def refuse_unmergeable(run: Run) -> None:
    """Refuse tunings that no weights can hold.

    Raises:
        RunError: this run's is one.
    """
    tuning = run.plan.resolved.tuning
    if tuning in VIRTUAL_TOKENS or tuning == "xlora":
        what = f"{tuning} tuning learned virtual tokens, which are no part of any weight"
        if tuning == "xlora":
            what = "xlora mixes its adapters anew for each token, so that no one weight holds them"
        raise RunError(what, where=run.name, do=f"Use: finetui export {run.name} --to adapter")


def is_adapter(folder: Path) -> bool:
    """Whether a result is an adapter rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def standing_size(run: Run, folder: Path) -> int:
    """Bytes of the weights of the model that stands alone, as far as the sizes of files tell."""
    base = locate(run.recipe.model) if is_adapter(folder) else folder
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


def write_merged(run: Run, folder: Path, target: Path, tell: Tell) -> None:
    """Fill ``target`` with the model that stands alone."""
    if not is_adapter(folder):
        copy_model_files(folder, target)
        if run.plan.resolved.method != "reward":  # a checkpoint still has that of the base
            _generating(folder, load_tokenizer(folder)[0]).generation_config.save_pretrained(str(target))
        return
    base = locate(run.recipe.model)
    source = streamed(run, base, folder)
    tokenizer, _ = load_tokenizer(folder)
    if source is None:
        tell("merging through PEFT", 0, 1)
        model, dtype = merge(run, folder)
        set_generation(model, tokenizer)
        save_weights(model, tokenizer, target, dtype=dtype)
        if model.can_generate():
            model.generation_config.save_pretrained(str(target))
    else:
        write_shards(source, target, tell)
        _write_configs(base, tokenizer, target)
        tokenizer.save_pretrained(str(target))
    give_usual_modes(target)


def streamed(run: Run, base: Path, folder: Path) -> Source | None:
    """The merged tensors one by one; None where the model can only be merged whole."""
    resolved = run.plan.resolved
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if resolved.method == "reward" or resolved.options.new_tokens or "auto_map" in config:
        return None
    source = merging(base, folder)
    alike = source is not None and {told.dtype for told in source.stored.values()} == {stored_dtype(base)}
    return source if alike else None


def write_shards(source: Source, target: Path, tell: Tell) -> None:
    """Write tensors as safetensors files of at most :data:`SHARD` bytes, and their index where there are several."""
    shards: list[list[str]] = [[]]
    room = SHARD
    sizes = {name: told.dtype.itemsize * _count(told.shape) for name, told in source.stored.items()}
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    places: dict[str, str] = {}
    done = 0
    for number, names in enumerate(shards, 1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = several if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = source.read(name)
            places[name] = file
            done += 1
            tell("merging", done, len(sizes))
        save_file(tensors, target / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _write_configs(base: Path, tokenizer: Any, target: Path) -> None:
    """The config and generation config that saving the merged model whole would write."""
    model = _generating(base, tokenizer)
    model.config.dtype = stored_dtype(base)
    model.config.architectures = [type(model).__name__]
    model.config.use_cache = True
    model.config.save_pretrained(str(target))
    model.generation_config.save_pretrained(str(target))


def _generating(folder: Path, tokenizer: Any) -> Any:
    """A model without weights whose generation config stops where training did."""
    model = empty_model(folder)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    set_generation(model, tokenizer)
    return model


def empty_model(folder: Path) -> Any:
    """A causal model of a folder's config, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = trusted(folder)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def merge(run: Run, folder: Path) -> tuple[Any, torch.dtype]:
    """The merged model in fp32 on the CPU, and the format to store it in (that of the base)."""
    base = locate(run.recipe.model)
    words = len(run.plan.resolved.options.new_tokens)
    resolved = dataclasses.replace(run.plan.resolved, quantization="none", device="cpu", precision="fp32")
    model = load_base(base, resolved, torch.device("cpu"), lambda _: None, dtype=torch.float32)
    if words:
        grow_vocabulary(model, load_tokenizer(folder)[0], words)
    merged = with_adapter(model, folder, run.recipe.model).merge_and_unload(safe_merge=True)
    return merged, stored_dtype(base)
