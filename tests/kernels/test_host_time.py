"""What a layer launches, by count: a launch more is time that the host of a small model's GPU does not have.

Each number may fall; whoever makes one rise says here what for. How long they take says ``tests/bench/host_time.py``.
"""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import wide
from finetui.tests.bench import host_time
from finetui.tests.bench.host_time import ARMS, counts_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU stands in for")

#: (launches, of them Triton's, of them copies, views, allocations) of one layer's forward and backward.
MOST = {
    "llama-lora": (56, 13, 1, 126, 30),
    "llama-lora-inputs": (68, 14, 1, 151, 33),
    "qwen3-lora": (63, 20, 1, 144, 40),
    "llama-full": (37, 12, 2, 72, 19),
}


@pytest.mark.parametrize("name", ARMS)
def test_a_layer_launches_no_more_than_it_did(name):
    counts = counts_of(ARMS[name])
    found = (counts.launches, counts.triton, counts.copies, counts.views, counts.allocations)
    assert all(mine <= most for mine, most in zip(found, MOST[name], strict=True)), (found, dict(counts.kinds))


def test_the_sums_of_lora_are_scaled_by_the_products_that_make_them():
    assert "mul_" not in counts_of(ARMS["llama-lora"]).kinds
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    torch.testing.assert_close(wide.mm_fp32(a, b, 0.37), (a @ b) * 0.37)
    halved = wide.mm_fp32(a.bfloat16(), b.bfloat16(), 0.37)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, (a.bfloat16().float() @ b.bfloat16().float()) * 0.37)


def test_what_is_counted_is_what_is_launched():
    base, x, w, out = torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3), torch.empty(4, 3)
    with host_time.counting() as counts:
        torch.addmm(base, x, w, out=out)  # copies base first
        base.addmm_(x, w)  # does not
        torch.addmm(base, x, w, beta=0, out=out)  # nor does this, which does not look at base
        base.t().view(3, 4).detach()
    assert counts.kinds == {"addmm": 2, "addmm_": 1, "addmm's copy": 1}
    assert (counts.launches, counts.copies, counts.views) == (4, 1, 3)
