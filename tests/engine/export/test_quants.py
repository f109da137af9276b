"""Number formats: what each keeps, which tensor gets which, and K-quants held against ggml's own where it is here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
import gguf
import torch

from finetui.engine.export import kquants, quants
from finetui.planner.errors import ModelError, RunError

K = {4: "Q4_K", 5: "Q5_K", 6: "Q6_K"}


def weights(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(64, 1024) * 0.02
    if kind == "heavy tails":
        x = x * torch.distributions.StudentT(3.0).sample(x.shape)
    elif kind == "all positive":
        x = x.abs() + 0.01
    elif kind == "zeros":
        x[0], x[1:, 256:600] = 0, 0
    return x


def back(encoded: Any, kind: str) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = gguf.dequantize(encoded, gguf.GGMLQuantizationType[kind])
    return found


def error(found: np.ndarray[Any, Any], x: torch.Tensor) -> float:
    return float(np.linalg.norm(found - x.numpy()) / np.linalg.norm(x.numpy()))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "all positive", "zeros"])
def test_more_bits_are_nearer_and_zeros_stay(kind: str) -> None:
    x = weights(kind)
    errors = [error(back(kquants.quantize(x, bits).numpy(), K[bits]), x) for bits in (4, 5, 6)]
    # half a step of 2**b levels over the range of 16 or 32 numbers, as a share of their size
    assert errors[0] < 0.11
    assert errors[1] < 0.06
    assert errors[2] < 0.03
    assert errors == sorted(errors, reverse=True)
    if kind == "zeros":
        assert not back(kquants.quantize(x, 4).numpy(), "Q4_K")[0].any()


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "all positive", "zeros"])
def test_no_farther_than_ggml(kind: str, bits: int, llama_library: Any) -> None:
    x = weights(kind).contiguous()
    ours = kquants.quantize(x, bits).numpy()
    theirs, raw = np.zeros_like(ours), x.numpy()
    number = int(gguf.GGMLQuantizationType[K[bits]])
    size = llama_library.ggml_quantize_chunk(number, raw.ctypes.data, theirs.ctypes.data, 0, *x.shape, None)
    assert size == ours.nbytes
    assert error(back(ours, K[bits]), x) < 1.01 * error(back(theirs, K[bits]), x)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_0"])
def test_sizes_are_those_of_the_bytes(kind: str) -> None:
    encoded = quants.encode(weights("normal"), kind, "a tensor")
    assert encoded.nbytes == quants.size_of((64, 1024), kind)


def test_bf16_weights_are_kept_exactly() -> None:
    x = weights("normal").bfloat16()
    assert np.array_equal(back(quants.encode(x, "BF16", "a tensor"), "BF16"), x.float().numpy())


def test_which_tensor_gets_which_format() -> None:
    def of(name: str, *shape: int, quant: str = "q4_k_m", tied: bool = False) -> str:
        return quants.format_of(name, shape or (512, 512), quants.MIXTURES[quant], layers=16, tied=tied)

    assert of("blk.0.attn_norm.weight", 512) == of("blk.0.attn_q.bias", 512) == of("rope_freqs.weight", 64) == "F32"
    assert of("blk.3.attn_q.weight") == of("token_embd.weight") == "Q4_K"
    assert of("output.weight") == of("token_embd.weight", tied=True) == "Q6_K"
    assert [i for i in range(16) if of(f"blk.{i}.ffn_down.weight") == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert of("blk.3.attn_qkv.weight") == "Q5_K"
    assert of("blk.3.attn_q.weight", 512, 96) == "Q5_0"
    assert of("output.weight", 512, 96) == "Q8_0"
    assert of("blk.3.attn_q.weight", 512, 50) == "F16"
    assert of("blk.3.attn_q.weight", 512, 50, quant="bf16") == "BF16"


def test_a_format_that_is_none_is_refused() -> None:
    assert quants.mixture("auto", torch.bfloat16)[0] == "bf16"
    assert quants.mixture("Q4_K_M", torch.bfloat16)[0] == "q4_k_m"
    with pytest.raises(RunError, match="'q3' is no format") as caught:
        quants.mixture("q3", torch.bfloat16)
    assert "q4_k_m" in caught.value.do


def test_weights_that_no_format_holds_are_refused() -> None:
    x = weights("normal")
    with pytest.raises(ModelError, match=r"too large for f16") as caught:
        quants.encode(x * 1e8, "F16", "a tensor")
    assert "bf16" in caught.value.do
    x[3, 3] = float("nan")
    with pytest.raises(ModelError, match="not all finite"):
        quants.encode(x, "Q4_K", "a tensor")
