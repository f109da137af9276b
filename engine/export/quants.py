"""The number formats of a GGUF file: which there are, which tensor gets which, how large the file becomes.

The mixtures are those of llama.cpp's ``llama-quantize`` (src/llama-quant.cpp): the head, which decides over each token,
and in the ``_m`` mixtures values and the way down of some layers, keep more bits than the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from ...planner.errors import ModelError, RunError
from . import kquants

#: What a row of another length than a multiple of the block is written in: the nearest with blocks of 32.
_SMALLER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Mixture:
    """A choice of ``--quant``.

    Args:
        file_type: its name among llama.cpp's file types.
        most: the format of most matrices.
        head: that of the output head, or of the embedding that is one.
        more: that of values and the way down in the layers that matter more.
        fused: that of q, k and v in one matrix.
    """

    file_type: str
    most: str
    head: str = ""
    more: str = ""
    fused: str = ""


MIXTURES = {
    "f32": Mixture("ALL_F32", "F32"),
    "f16": Mixture("MOSTLY_F16", "F16"),
    "bf16": Mixture("MOSTLY_BF16", "BF16"),
    "q8_0": Mixture("MOSTLY_Q8_0", "Q8_0"),
    "q6_k": Mixture("MOSTLY_Q6_K", "Q6_K"),
    "q5_k_m": Mixture("MOSTLY_Q5_K_M", "Q5_K", head="Q6_K", more="Q6_K", fused="Q6_K"),
    "q4_k_m": Mixture("MOSTLY_Q4_K_M", "Q4_K", head="Q6_K", more="Q6_K", fused="Q5_K"),
    "q4_0": Mixture("MOSTLY_Q4_0", "Q4_0", head="Q6_K"),
}
_STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def mixture(quant: str, stored: torch.dtype) -> tuple[str, Mixture]:
    """A choice by its name, in either case; ``auto`` keeps the format that the weights are stored in.

    Raises:
        RunError: there is none of that name.
    """
    name = _STORED.get(stored, "f16") if quant == "auto" else quant.lower()
    if name not in MIXTURES:
        do = f"Use {', '.join(MIXTURES)}; for others, write bf16 and give it to llama.cpp's llama-quantize."
        raise RunError(f"{quant!r} is no format that a GGUF can be written in here", where="--quant", do=do)
    return name, MIXTURES[name]


def format_of(name: str, shape: Sequence[int], chosen: Mixture, *, layers: int, tied: bool) -> str:
    """The format of one tensor.

    Args:
        name: in the file, such as ``blk.0.attn_v.weight``.
        shape: rows last, as torch has it.
        layers: how many the model has.
        tied: the embedding is the head too.
    """
    if len(shape) < 2 or not name.endswith(".weight") or "norm" in name or name.startswith("rope_"):
        return "F32"
    wanted = chosen.most
    if name == ("token_embd.weight" if tied else "output.weight"):
        wanted = chosen.head or wanted
    elif name.startswith("blk."):
        _, number, kind, _ = name.split(".")
        if kind == "attn_qkv":
            wanted = chosen.fused or wanted
        elif kind in ("attn_v", "ffn_down") and _matters(int(number), layers):
            wanted = chosen.more or wanted
    if shape[-1] % kquants.BLOCK:
        wanted = _SMALLER.get(wanted, wanted)
    return "F16" if wanted.startswith("Q") and shape[-1] % 32 else wanted


def _matters(number: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and each third between."""
    eighth = layers // 8
    return number < eighth or number >= 7 * layers // 8 or (number - eighth) % 3 == 2


def size_of(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return prod(shape) // block * size


def encode(tensor: torch.Tensor, kind: str, where: str) -> np.ndarray[Any, Any]:
    """A tensor as the bytes of the file, (..., bytes per row) in uint8; F32 and F16 as what they are.

    Raises:
        ModelError: a weight is not finite, or is none in F16.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows = tensor.detach().float().contiguous()
    if not torch.isfinite(rows).all():
        what = f"the weights of {where} are not all finite"
        raise ModelError(what, where=where, do="Export an earlier checkpoint: training has diverged.")
    if kind == "F16" and rows.abs().max() > torch.finfo(torch.float16).max:
        raise ModelError(f"weights of {where} are too large for f16", where="--quant", do="Use bf16.")
    if kind in ("Q4_K", "Q5_K", "Q6_K"):
        encoded: np.ndarray[Any, Any] = kquants.quantize(rows, int(kind[1])).numpy()
        return encoded
    return quantize(rows.numpy(), GGMLQuantizationType[kind])
