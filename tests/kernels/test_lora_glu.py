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


@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 40, 3), (17, 33, 16)])
def test_forward_and_backward(device, activation, dtype, rows, columns, rank):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    g, u, dh = random(rows, columns), random(rows, columns), random(rows, columns)
    xa = random(rows, 2 * rank).split(rank, dim=1)
    b, scalings = (random(columns, rank), random(columns, rank)), (0.5, 2.0)
    wide = [
        (base.double() + s * x.double() @ w.double().t()).requires_grad_()
        for base, s, x, w in zip((g, u), scalings, xa, b, strict=True)
    ]
    exact = glu.glu_reference(*wide, activation)
    exact.backward(dh.double())
    close(lora_glu.forward(g, u, xa, b, scalings, activation), exact, dtype)
    lora_glu.backward(dh, g, u, xa, b, scalings, activation)
    for got, truth in zip((g, u, dh), (wide[0].grad, wide[1].grad, exact), strict=True):
        close(got, truth, dtype)
