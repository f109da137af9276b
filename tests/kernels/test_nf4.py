"""NF4 dequantisation is bit for bit that of bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import nf4

bnb = pytest.importorskip("bitsandbytes.functional")

#: The interpreter cuts fp32 to bf16 where a GPU rounds, so bf16 is compared on a GPU only.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


class Parameter(torch.Tensor):
    """What bitsandbytes' Params4bit is to us: bytes with a quant_state."""


def quantised(device, shape, dtype, nested=True, blocksize=64, kind="nf4", storage=torch.uint8):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.02).to(device, dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    parameter = packed.as_subclass(Parameter)
    parameter.quant_state = state
    return parameter, bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "blocksize"), [((8, 64), 64), ((33, 66), 64), ((3, 50), 64), ((300, 128), 128)])
def test_bits_are_those_of_bitsandbytes(device, dtype, nested, shape, blocksize):
    parameter, expected = quantised(device, shape, dtype, nested, blocksize)
    got = nf4.dequantise(nf4.nf4_state(parameter))
    assert got.dtype == dtype
    assert torch.equal(got, expected)


def test_other_storage_types_hold_the_same_bytes(device):
    parameter, expected = quantised(device, (16, 64), torch.float16, storage=torch.float32)
    assert torch.equal(nf4.dequantise(nf4.nf4_state(parameter)), expected)


def test_into_a_part_of_a_larger_buffer(device):
    parameter, expected = quantised(device, (10, 128), torch.float16)
    buffer = torch.full((10, 160), 7.0, dtype=torch.float16, device=device)
    nf4.dequantise(nf4.nf4_state(parameter), buffer[:, :128])
    assert torch.equal(buffer[:, :128], expected)
    assert (buffer[:, 128:] == 7).all()


def test_what_cannot_be_read_is_told(device):
    assert "not quantised" in nf4.nf4_state(torch.zeros(3))
    parameter, _ = quantised(device, (8, 64), torch.float16, kind="fp4")
    assert "fp4" in nf4.nf4_state(parameter)
    parameter, _ = quantised(device, (8, 64), torch.float16)
    shard = parameter[:100].as_subclass(Parameter)
    shard.quant_state = parameter.quant_state
    assert "sharded" in nf4.nf4_state(shard)


@pytest.mark.parametrize(
    ("out", "message"),
    [((8, 63), "the weight"), ((64, 8), "the weight")],
)
def test_a_wrong_buffer_is_refused(device, out, message):
    parameter, _ = quantised(device, (8, 64), torch.float16)
    with pytest.raises(ValueError, match=message):
        nf4.dequantise(nf4.nf4_state(parameter), torch.empty(out, dtype=torch.float16, device=device))
    parameter, _ = quantised(device, (8, 50), torch.float16)
    with pytest.raises(ValueError, match="strided"):
        nf4.dequantise(nf4.nf4_state(parameter), torch.empty(8, 64, dtype=torch.float16, device=device)[:, :50])


def test_scratch_is_used_again_and_grows(device):
    nf4.release_scratch()
    first = nf4.scratch((4, 8), torch.float16, device)
    assert nf4.scratch((2, 8), torch.float16, device).data_ptr() == first.data_ptr()
    assert nf4.scratch((8, 8), torch.float16, device).shape == (8, 8)
    assert nf4.scratch((4, 8), torch.float32, device).dtype == torch.float32
    nf4.release_scratch()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(14336, 4096), (1024, 4096), (4096, 14336), (151936, 1024), (777, 334)])
def test_real_shapes(dtype, shape):
    parameter, expected = quantised(torch.device("cuda"), shape, dtype)
    state = nf4.nf4_state(parameter)
    out = nf4.scratch(shape, dtype, torch.device("cuda"))
    for _ in range(2):
        assert torch.equal(nf4.dequantise(state, out), expected)
