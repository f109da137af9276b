"""Attention that is run now and differentiated later, without holding what its caller holds."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from finetui.kernels.attention import Documents, _anchor, _end_to_end, _is_view, attend, gradients
from finetui.kernels.selfcheck import prove_documents


def heads(device, dtype, key_heads, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 6, 4, 8), (batch, 6, key_heads, 8), (batch, 6, key_heads, 8), (batch, 6, 4, 8)]
    return [torch.randn(s, generator=generator).to(device, dtype).transpose(1, 2) for s in shapes]


def expected(q, k, v, dout, mask):
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    keys, values = (t.repeat_interleave(4 // t.shape[1], dim=1) for t in leaves[1:])
    out = torch.nn.functional.scaled_dot_product_attention(leaves[0], keys, values, attn_mask=mask, scale=0.3)
    return out, torch.autograd.grad(out, leaves, dout.double())


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("how", ["causal", "mask", "documents"])
def test_output_and_gradients(device, key_heads, how):
    dtype = torch.bfloat16 if device.type == "cuda" and how == "documents" else torch.float32
    q, k, v, dout = heads(device, dtype, key_heads)
    causal = torch.ones(6, 6, dtype=torch.bool, device=device).tril().expand(2, 1, 6, 6).clone()
    documents = None
    if how == "documents":
        causal[0, :, 4:, :4] = False
        starts = torch.tensor([0, 4, 6, 12], dtype=torch.int32, device=device)
        documents = Documents((4, 2, 6), starts)
    truth = expected(q, k, v, dout, causal)
    out, attended = attend(q, k, v, causal if how == "mask" else None, 0.3, documents)
    # The graph must use what it is given again, not what it saw: here, copies after the originals are spoilt.
    given = [t.clone() for t in (q, k, v, out)]
    if how == "causal" and key_heads == 4:
        for t in (q, k, v):
            t.zero_()
    grads = gradients(attended, *given, dout)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got, exact in zip((out, *grads), (truth[0], *truth[1]), strict=True):
        assert (got.double() - exact).norm() <= limit * exact.norm()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("how", ["causal", pytest.param("documents", marks=pytest.mark.cuda)])  # by pieces on a CPU
def test_nothing_of_the_heads_outlives_its_caller(device, batch, how):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, _ = heads(device, dtype, 4, batch)
    documents = None
    if how == "documents":
        starts = torch.tensor([0, 4, 6 * batch], dtype=torch.int32, device=device)
        documents = Documents((4, 6 * batch - 4), starts)
    out, attended = attend(q, k, v, None, 0.3, documents)
    memory = [StorageWeakRef(t.untyped_storage()) for t in (q, k, v, out)]
    del q, k, v, out
    assert [ref.expired() for ref in memory] == [True] * 4
    assert attended.inputs


def test_views_of_heads_are_known_as_such():
    rows = torch.randn(6, 32)
    for batch in (1, 2):
        head = rows.view(batch, 6 // batch, 4, 8).transpose(1, 2)
        assert _is_view(head.view_as(head), head)
        assert _is_view(_end_to_end(head), head)
        assert not _is_view(head.clone(), head)
        assert not _is_view(head.transpose(1, 2), head)
        assert not _is_view(rows.view(6, 8, 4), head)


@pytest.mark.parametrize("key_heads", [4, 1])
def test_a_window_within_documents_is_the_mask_that_says_the_same(device, key_heads):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, dout = heads(device, dtype, key_heads)
    starts = torch.tensor([0, 5, 6, 12], dtype=torch.int32, device=device)
    documents = Documents((5, 1, 6), starts)
    mask = documents.mask(2, 6, 3)
    assert int(mask.sum()) == 12 + 1 + 15  # three positions for each query, but for the first two of a document
    results = []
    for how in ({"mask": None, "documents": documents, "window": 3}, {"mask": mask}):
        out, attended = attend(q, k, v, scale=0.3, **how)
        results.append((out, *gradients(attended, q, k, v, out, dout)))
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for mine, stock in zip(*results, strict=True):
        assert (mine - stock).norm() <= limit * stock.norm()
    assert prove_documents(device, dtype, 8, 4 // key_heads, windowed=True).ok


def test_what_is_shared_by_all_calls_is_a_tensor_whoever_asks_first():
    _anchor.cache_clear()
    with torch._subclasses.FakeTensorMode():
        attend(*(head.detach() for head in heads(torch.device("cpu"), torch.float32, 4)[:3]), None, 0.3)
    assert type(_anchor()) is torch.Tensor
    assert _anchor().device.type == "cpu"
