"""A GGUF file: laid out before anything of it is made, then written one tensor after the other.

The layout says whether llama.cpp can compute what the model does at all, what each tensor is called and quantised to,
and how large the file becomes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.template import stop_token_ids
from . import gguf_model, gguf_tokenizer, quants
from .exported import Tell
from .gguf_model import GgufModel
from .quants import Mixture
from .source import Source

#: What a file holds beside weights and words.
_HEADER = 2**20


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: where it comes from, its shape, its format."""

    stored: str
    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Layout:
    """A whole file, before it is written.

    ``metadata`` has the file's own keys; ``notes`` tell where llama.cpp computes otherwise than training did.
    """

    model: GgufModel
    quant: str
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """The size of the file, about a MiB too much."""
        extra = sum(tensor.numel() * 4 for tensor in self.model.extra.values())
        words = sum(
            len(str(part)) + 24 for value in self.metadata.values() if isinstance(value, list) for part in value
        )
        weights = sum(quants.size_of(tensor.shape, tensor.kind) + 32 for tensor in self.tensors)
        return weights + extra + words + _HEADER


def lay_out(
    config: Any, tokenizer: Any, shapes: Mapping[str, Sequence[int]], quant: str, stored: torch.dtype, name: str
) -> Layout:
    """What the file will hold.

    Args:
        config: of transformers.
        tokenizer: ready for use.
        shapes: of the checkpoint's tensors, by their names in it.
        quant: a choice of :data:`quants.MIXTURES`, or ``auto``.
        stored: the format of the checkpoint.
        name: the model's, for display.

    Raises:
        ModelError: llama.cpp can't compute what this model does, or would make other tokens of the same text.
        RunError: there is no such format.
    """
    quant, chosen = quants.mixture(quant, stored)
    model = gguf_model.describe(config)
    placed = {name: place for name in shapes if (place := model.name(name)) is not None}
    tensors = _tensors(placed, shapes, chosen, int(model.config.num_hidden_layers))
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    words = gguf_tokenizer.describe(tokenizer, rows, stop_token_ids(tokenizer))
    arch = model.family.arch
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": _named(name, words.phi3),
        "general.file_type": _file_type(chosen),
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in model.metadata.items()},
        f"{arch}.vocab_size": rows,
        **{f"tokenizer.{key}": value for key, value in words.metadata.items()},
    }
    return Layout(model, quant, metadata, tensors, (*model.notes, *words.notes))


def _tensors(
    placed: Mapping[str, str], shapes: Mapping[str, Sequence[int]], chosen: Mixture, layers: int
) -> tuple[Tensor, ...]:
    tied = "output.weight" not in placed.values()
    found = []
    for stored, name in placed.items():
        shape = tuple(shapes[stored])
        found.append(Tensor(stored, name, shape, quants.format_of(name, shape, chosen, layers=layers, tied=tied)))
    return tuple(found)


def _named(name: str, phi3: bool) -> str:
    """The model's name, which llama.cpp takes for more than that where it holds these words."""
    plain = re.sub(r"(?i)(phi)-?(3)|(modern)-(bert)", lambda found: " ".join(filter(None, found.groups())), name)
    return f"phi-3 {plain}" if phi3 else plain


def _file_type(chosen: Mixture) -> int:
    from gguf import LlamaFileType

    return int(LlamaFileType[chosen.file_type])


def write(layout: Layout, source: Source, path: Path, tell: Tell) -> None:
    """Write the file, one tensor after the other.

    Raises:
        ModelError: weights that are not finite, or too large for the format.
        OSError: the disk is full.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(path, layout.model.family.arch)
    try:
        for key, value in layout.metadata.items():
            _add(writer, key, value)
        extra = layout.model.extra
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, np.dtype(np.float32), values.numel() * 4)
        for tensor in layout.tensors:
            size = quants.size_of(tensor.shape, tensor.kind)
            if tensor.kind in ("F32", "F16"):
                plain: Any = np.dtype(np.float32 if tensor.kind == "F32" else np.float16)
                writer.add_tensor_info(tensor.name, tensor.shape, plain, size)
            else:
                kind = GGMLQuantizationType[tensor.kind]
                shape = quant_shape_to_byte_shape(tensor.shape, kind)
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in extra.values():
            writer.write_tensor_data(values.numpy())
        for number, tensor in enumerate(layout.tensors):
            tell("writing", number, len(layout.tensors))
            values = layout.model.rows(tensor.name, source.read(tensor.stored))
            writer.write_tensor_data(quants.encode(values, tensor.kind, tensor.stored))
        tell("writing", len(layout.tensors), len(layout.tensors))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    if isinstance(value, list):
        if value:
            writer.add_array(key, value)
        return
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    writer.add_key_value(key, value, GGUFValueType[kinds[type(value)]])
