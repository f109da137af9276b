"""The gated unit that adds its own LoRA products, against float64."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import glu, lora_glu

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def close(got, exact, dtype):
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert got.dtype == dtype
    assert (got.double() - exact).norm() <= limit * exact.norm()


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 40, 3), (37, 70, 16), (32, 64, 16)])
def test_forward_and_all_gradients(device, activation, dtype, rows, columns, rank, down):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    g, u, dh, dha = random(rows, columns), random(rows, columns), random(rows, columns), random(rows, rank)
    xa = random(rows, 2 * rank).split(rank, dim=1)
    b, scalings = (random(columns, rank), random(columns, rank)), (0.5, 2.0)
    wide = [x.double().requires_grad_() for x in (*xa, *b, g, u)]
    products = [wide[4 + i] + s * wide[i] @ wide[2 + i].t() for i, s in enumerate(scalings)]
    exact = glu.glu_reference(*products, activation)
    exact.backward(dh.double())
    close(lora_glu.forward(g, u, xa, b, scalings, activation), exact, dtype)
    made = lora_glu.backward(dh, g, u, xa, b, scalings, activation, dha if down else None)
    for got, truth in zip((g, u), wide[4:], strict=True):
        close(got, truth.grad, dtype)
    for got, truth in zip((made.db_gate, made.db_up), wide[2:4], strict=True):
        assert got.dtype == torch.float32
        close(got.to(dtype), truth.grad, dtype)
    assert (made.da_down is None) == (not down)
    if down:
        close(made.da_down.to(dtype), dha.double().t() @ exact, dtype)
