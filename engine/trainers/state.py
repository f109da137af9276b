"""What a checkpoint holds: weights as ``from_pretrained`` reads them, and all else that training goes on from.

A :class:`Snapshot` names the files and the tensors that belong in them. Made from a trainer it refers to the tensors
that training is about to change; :meth:`Snapshot.copied` is one that training can't reach any more, in host memory,
so that a thread has all the time it needs to write it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.initial import as_on_disk, as_trained
from .tree import FURTHER, Tree, put_together, taken_apart, write_tensors

OPTIMIZER, WEIGHTS, ADAPTER = "optimizer.safetensors", "model.safetensors", "adapter_model.safetensors"
#: Bytes of one file of a full model's weights, or of its optimiser: several are read and hashed side by side.
SHARD = 4 * 10**9
#: Files that are written, or read, side by side.
FILES_AT_ONCE = 4


def rank_file(rank: int) -> str:
    """The file with what one rank has to itself: random numbers, completions in use."""
    return f"rank{rank}.safetensors"


@dataclass(frozen=True)
class Part:
    """One safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """Everything that one checkpoint consists of.

    Args:
        files: small files, by name.
        parts: files of tensors, by name.
        weights: a full model's own weights, by their names in the model.
        arrange: from those to what is stored, by file: a model may keep weights in another form than its checkpoint.
        private: training can't reach any of it as it is.
    """

    files: dict[str, bytes]
    parts: dict[str, Part]
    weights: dict[str, Tensor] = field(default_factory=dict)
    arrange: Callable[[dict[str, Tensor]], dict[str, Part | bytes]] = lambda weights: {}
    private: bool = False

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [*self.weights.values(), *(t for part in self.parts.values() for t in part.tensors.values())]

    def copied(self, host: HostMemory) -> Snapshot:
        """The same with tensors of its own, in host memory."""
        if self.private:
            return self
        with host.copying() as copy_one:
            parts = {
                file: Part({name: copy_one(f"{file}/{name}", t) for name, t in part.tensors.items()}, part.metadata)
                for file, part in self.parts.items()
            }
            weights = {name: copy_one(name, tensor) for name, tensor in self.weights.items()}
        return Snapshot(self.files, parts, weights, self.arrange, private=True)

    def write(self, folder: Path) -> dict[str, str]:
        """Write all files; returns the SHA-256 of each, taken from memory.

        Raises:
            OSError: the disk is full.
        """
        parts = {**self.files, **self.parts, **self.arrange(dict(self.weights))}

        def written(name: str) -> str:
            path, part = folder / name, parts[name]
            path.parent.mkdir(exist_ok=True)
            if isinstance(part, bytes):
                path.write_bytes(part)
                return hashlib.sha256(part).hexdigest()
            return write_tensors(path, part.tensors, part.metadata)

        # One file is as fast as its hash, which is slower than a good disk.
        with ThreadPoolExecutor(FILES_AT_ONCE, "file") as beside:
            return dict(zip(parts, beside.map(written, parts), strict=True))


class HostMemory:
    """Where copies go: pinned memory for tensors of a GPU, kept from one checkpoint to the next.

    One copy at a time: whoever takes the next must be done with the one before.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """What is kept."""
        return sum(place.numel() * place.element_size() for place in self._kept.values())

    def copying(self) -> _Copying:
        """In the block, a function that copies a tensor; when it ends, all copies are there."""
        return _Copying(self._kept)


class _Copying:
    def __init__(self, kept: dict[str, Tensor]) -> None:
        self._kept, self._used, self._waits = kept, set[str](), False

    def __enter__(self) -> Callable[[str, Tensor], Tensor]:
        return self._copy

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            return tensor.clone(memory_format=torch.contiguous_format)
        place = self._kept.get(key)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            place = self._kept[key] = _pinned(tensor)
        self._used.add(key)
        self._waits = True
        return place.copy_(tensor, non_blocking=True)

    def __exit__(self, *_: object) -> None:
        if self._waits:
            torch.cuda.current_stream().synchronize()
        for key in set(self._kept) - self._used:
            del self._kept[key]


def _pinned(like: Tensor) -> Tensor:
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    except RuntimeError:  # the machine pins no more: copies are slower then
        return torch.empty(like.shape, dtype=like.dtype)


# --- weights


def weights_of(model: Any) -> tuple[dict[str, Part], dict[str, Tensor], Callable[[dict[str, Tensor]], Any]]:
    """An adapter as a file, or a model's own weights and how they are arranged in files."""
    if hasattr(model, "peft_config"):
        return {ADAPTER: Part(_adapter(model), {"format": "pt"})}, {}, lambda weights: {}
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    return {}, state, lambda weights: _arranged(model, weights)


def _adapter(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    mixer = {name: tensor.detach() for name, tensor in model.named_parameters() if "xlora_classifier" in name}
    if mixer:  # PEFT 0.21 takes the number of its first layer for the name of an adapter, and leaves it out
        return mixer
    with as_on_disk(model) as state:
        # Embeddings are not trained, and "auto" would ask the Hub whether their size has changed.
        stored: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return stored


def read_adapter(model: Any, folder: Path) -> None:
    """Read the adapter of a checkpoint, if it holds one, into a model that has its like."""
    if not (folder / ADAPTER).is_file():
        return
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result: Any = set_peft_model_state_dict(model, as_trained(load_file(folder / ADAPTER), model))
    strange = set(result.unexpected_keys) - {"prompt_embeddings"}  # read by name into the prompt encoder
    assert not strange, f"adapter of another shape: {sorted(strange)[:3]}"


def _arranged(model: Any, weights: dict[str, Tensor]) -> dict[str, Part | bytes]:
    """Weights under the names and in the form that they have in a checkpoint, cut into files."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, weights)
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    files: dict[str, Part | bytes] = {
        file: Part({name: stored[name] for name in names}, {"format": "pt"})
        for file, names in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files["model.safetensors.index.json"] = json.dumps(index, indent=1, sort_keys=True).encode()
    return files


def descriptions(model: Any, tokenizer: Any = None) -> dict[str, bytes]:
    """The small files beside weights: config or adapter's config, and the tokenizer's if it is given."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if hasattr(model, "peft_config"):
            with as_on_disk(model):
                adapter = model.peft_config["default"]
                before, adapter.inference_mode = adapter.inference_mode, True
                try:
                    adapter.save_pretrained(str(folder))
                finally:
                    adapter.inference_mode = before
        else:
            config = copy.deepcopy(model.config)
            config.use_cache, config.architectures = True, [type(model).__name__]
            config.dtype = str(model.dtype).removeprefix("torch.")
            config.save_pretrained(str(folder))
            if model.can_generate():
                model.generation_config.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what training goes on from


def as_part(tree: Tree) -> Part:
    """A tree as a file of tensors, as :func:`.tree.read_tree` reads it."""
    told, tensors = taken_apart(tree)
    return Part(tensors, {"tree": json.dumps(told)})


def as_parts(file: str, tree: Tree) -> dict[str, Part]:
    """A large tree as files of :data:`SHARD`, by name; it is read by the first, which is called ``file``."""
    told, tensors = taken_apart(tree)
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        more = tensor.numel() * tensor.element_size()
        if groups[-1] and size + more > SHARD:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += more
    stem, _, suffix = file.rpartition(".")
    names = [file, *(f"{stem}.{number}.{suffix}" for number in range(2, len(groups) + 1))]
    first = {"tree": json.dumps(told)} | ({FURTHER: json.dumps(names[1:])} if names[1:] else {})
    told_in = [first, *[{"format": "pt"}] * len(names[1:])]
    return {name: Part(group, about) for name, group, about in zip(names, groups, told_in, strict=True)}


def copied_tree(tree: Tree) -> Tree:
    """A tree whose tensors are copies on the CPU."""
    told, tensors = taken_apart(tree)
    return put_together(told, {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()})


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every source of random numbers that this rank draws from."""
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(words).tolist(), position, has_gauss, gauss),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Draw on from where :func:`random_state` was; a device that had no part in it then is left alone."""
    random.setstate(state["python"])
    name, words, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(words, dtype=np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def gathered(tree: Any, here: bool) -> list[Any]:
    """The trees of all ranks, where they are wanted; elsewhere nothing."""
    if not torch.distributed.is_initialized():
        return [tree]
    found: list[Any] | None = [None] * torch.distributed.get_world_size() if here else None
    torch.distributed.gather_object(tree, found, dst=0)
    return found or []


def as_stored(state: Any) -> dict[str, Any]:
    """A trainer's state as it stores it itself."""
    with tempfile.TemporaryDirectory() as folder:
        state.save_to_json(f"{folder}/state.json")
        tree: dict[str, Any] = json.loads(Path(folder, "state.json").read_text(encoding="utf-8"))
        return tree
