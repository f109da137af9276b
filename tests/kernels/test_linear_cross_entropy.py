"""Linear + cross-entropy against float64: options, masks, chunks, normalisation, and what must not be computed."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import linear_cross_entropy as lce
from finetui.kernels.selfcheck import compare

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def batch(device, dtype=torch.float32, rows=11, features=24, words=103, keep=0.6):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, features, generator=generator)
    weight = torch.randn(words, features, generator=generator) * 0.5
    labels = torch.randint(0, words, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) > keep] = -100
    labels[-1] = words - 1
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def verdict(hidden, weight, labels, own_options=None, **options):
    def ours(h, w):
        return lce.linear_cross_entropy(h, w, labels, **options, **(own_options or {}))

    def stock(h, w):
        return lce.linear_cross_entropy_reference(h, w, labels, **options)

    return compare(ours, stock, stock, (hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0},
        {"logit_scale": 0.25},
        {"z_loss": 1e-2},
        {"softcap": 30.0, "logit_scale": 2.0, "z_loss": 0.1},
        {"weighting": "dft"},
        {"weighting": "eaft"},
        {"weighting": "dft", "softcap": 30.0, "logit_scale": 2.0, "z_loss": 0.1},
        {"weighting": "eaft", "softcap": 30.0, "logit_scale": 0.5, "z_loss": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [4, 1024])
def test_loss_and_gradients_are_as_close_to_float64_as_stock(device, dtype, options, chunk):
    result = verdict(*batch(device, dtype), {"chunk_rows": chunk}, **options)
    assert result.ok, result.why


def test_weights_are_those_of_the_papers(device):
    """Written out row by row in float64; a constant, so that its gradient is that of the plain loss, weighed."""
    hidden, weight, labels = batch(device)
    rows = (labels != -100).nonzero().flatten()
    table = (hidden.double() @ weight.double().T)[rows].log_softmax(-1)
    plain = -table[torch.arange(len(rows)), labels[rows]]
    among = table.topk(20).values.softmax(-1)
    expected = {"dft": (-plain).exp(), "eaft": -(among * among.log()).sum(-1) / torch.log(torch.tensor(20.0))}
    for weighting, weights in expected.items():
        assert 0 < weights.min() < weights.max() < 1
        h = hidden.clone().requires_grad_()
        loss = lce.linear_cross_entropy(h, weight, labels, weighting=weighting, num_items=1)
        loss.backward()
        assert loss.item() == pytest.approx(float((weights * plain).sum()), rel=1e-5)
        again = hidden.double().requires_grad_()
        logs = torch.nn.functional.cross_entropy((again @ weight.double().T)[rows], labels[rows], reduction="none")
        (weights * logs).sum().backward()
        torch.testing.assert_close(h.grad.double(), again.grad, rtol=1e-4, atol=1e-6)


def test_few_words_have_an_entropy_too(device):
    hidden, weight, labels = batch(device, words=7)
    result = verdict(hidden, weight, labels, weighting="eaft")
    assert result.ok, result.why


def test_rows_longer_than_a_block(device, monkeypatch):
    monkeypatch.setattr(lce, "_BLOCK", 16)
    result = verdict(*batch(device, torch.float16), softcap=5.0)
    assert result.ok, result.why


def test_a_half_loss_of_very_many_items_keeps_its_gradient(device):
    result = verdict(*batch(device, torch.float16), num_items=1000)  # p/N would be below fp16's smallest number
    assert result.ok, result.why
    hidden, weight, labels = batch(device, torch.float16)
    loss = lce.linear_cross_entropy(hidden, weight, labels, num_items=torch.tensor(7))
    assert loss.item() == pytest.approx(
        lce.linear_cross_entropy_reference(hidden, weight, labels, num_items=7).item(), 1e-3
    )


def test_frozen_head_and_expanded_batch_dimensions(device):
    hidden, weight, labels = batch(device, rows=12)
    hidden = hidden.view(3, 4, -1).requires_grad_()
    lce.linear_cross_entropy(hidden, weight, labels.view(3, 4)).backward()
    (expected,) = torch.autograd.grad(lce.linear_cross_entropy_reference(hidden, weight, labels), hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-6)
    assert weight.grad is None


def test_tied_head_gets_its_own_part_of_the_gradient(device):
    _, weight, labels = batch(device)
    ids = torch.arange(labels.numel(), device=device)
    gradients = []
    for loss in (lce.linear_cross_entropy, lce.linear_cross_entropy_reference):
        tied = weight.clone().requires_grad_()
        loss(torch.nn.functional.embedding(ids, tied).tanh(), tied, labels).backward()
        gradients.append(tied.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_fp32_head_under_half_hidden_states(device):
    hidden, weight, labels = batch(device, torch.float16)
    weight = weight.float().requires_grad_()
    lce.linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad.dtype == torch.float32
    (expected,) = torch.autograd.grad(lce.linear_cross_entropy_reference(hidden, weight, labels), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=2e-2, atol=1e-4)


def test_autocast_computes_in_its_dtype(device):
    hidden, weight, labels = batch(device)
    hidden.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = lce.linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    half = lce.linear_cross_entropy(hidden.detach().bfloat16(), weight, labels)
    assert torch.equal(loss, half)
    assert hidden.grad.dtype == torch.float32


def test_no_label_at_all_is_zero_not_nan(device):
    hidden, weight, labels = batch(device)
    for labelled in (None, 0, 5):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = lce.linear_cross_entropy(h, w, torch.full_like(labels, -100), labelled=labelled)
        loss.backward()
        assert loss.item() == 0
        assert not h.grad.any()
        assert not w.grad.any()


def test_ignored_rows_are_not_computed(device):
    hidden, weight, labels = batch(device)
    hidden[labels == -100] = torch.nan
    h = hidden.requires_grad_()
    loss = lce.linear_cross_entropy(h, weight, labels)
    loss.backward()
    assert loss.isfinite()
    assert not h.grad[labels == -100].any()
    assert h.grad.isfinite().all()


def test_the_count_may_be_given_as_a_bound_but_not_too_small(device):
    hidden, weight, labels = batch(device)
    count = int((labels != -100).sum())
    expected = lce.linear_cross_entropy(hidden, weight, labels)
    for bound in (count, count + 2, labels.numel(), 10 * labels.numel()):
        h = hidden.clone().requires_grad_()
        loss = lce.linear_cross_entropy(h, weight, labels, labelled=bound, chunk_rows=3)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert h.grad[labels != -100].any(dim=1).all()
        assert not h.grad[labels == -100].any()
    assert lce.linear_cross_entropy(hidden, weight, labels, labelled=count - 1).isnan()


@pytest.mark.parametrize("label", [103, 10**6, -1, -2])
def test_a_label_outside_the_vocabulary_is_not_passed_over(device, label):
    hidden, weight, labels = batch(device)
    labels[0] = label
    assert lce.linear_cross_entropy(hidden, weight, labels).isnan()


def test_other_ignore_index_and_shift(device):
    hidden, weight, labels = batch(device, rows=12)
    ids = torch.where(labels == -100, 0, labels).view(2, 6)
    shifted = lce.shift_labels(ids, ignore_index=0)
    assert shifted[:, -1].tolist() == [0, 0]
    assert torch.equal(shifted[:, :-1], ids[:, 1:])
    loss = lce.linear_cross_entropy(hidden.view(2, 6, -1), weight, shifted, ignore_index=0)
    stock = torch.nn.functional.cross_entropy(
        (hidden.view(2, 6, -1) @ weight.T)[:, :-1].flatten(0, 1), ids[:, 1:].reshape(-1), ignore_index=0
    )
    torch.testing.assert_close(loss, stock)


def test_evaluation_keeps_no_gradient(device):
    hidden, weight, labels = batch(device)
    with torch.no_grad():
        loss = lce.linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, lce.linear_cross_entropy_reference(hidden, weight, labels).detach())


def test_shapes_that_do_not_fit_are_refused(device):
    hidden, weight, labels = batch(device)
    with pytest.raises(ValueError, match="do not fit"):
        lce.linear_cross_entropy(hidden, weight, labels[:-1])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [128256, 151937])
def test_real_shapes(dtype, words):
    result = verdict(*batch(torch.device("cuda"), dtype, rows=2100, features=1024, words=words, keep=0.7))
    assert result.ok, result.why


@pytest.mark.cuda
def test_the_host_never_waits_if_the_count_is_given():
    hidden, weight, labels = batch(torch.device("cuda"), torch.bfloat16, rows=64, features=64, words=1000)
    hidden.requires_grad_()
    lce.linear_cross_entropy(hidden, weight, labels, labelled=60).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        lce.linear_cross_entropy(hidden, weight, labels, labelled=60, num_items=100).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("rows", [5, 90])
def test_a_trained_bf16_head_in_one_product_and_in_several(device, chunk, rows):
    """With few features many rows are too many to wait for one product."""
    hidden, weight, labels = batch(device, torch.bfloat16, rows=rows, features=8)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = lce.linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk)
    got = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5, device=device))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(0.5 * lce.linear_cross_entropy_reference(*wide, labels), wide)
    for one, truth in zip(got, expected, strict=True):
        assert (one.double() - truth).norm() < 2e-2 * truth.norm()
        assert one.dtype == torch.bfloat16


def test_a_bf16_batch_without_a_label(device):
    hidden, weight, labels = batch(device, torch.bfloat16)
    weight.requires_grad_()
    lce.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)).backward()
    assert not weight.grad.any()


def test_a_second_gradient_of_one_loss_is_refused(device):
    hidden, weight, labels = batch(device)
    hidden.requires_grad_()
    loss = lce.linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("settings", [{}, {"_STAGES": 3, "_LAST_USE": ""}, {"_LANE": 4}], ids=str)
def test_rows_of_many_blocks_have_their_labels_wherever_these_are(device, monkeypatch, softcap, settings):
    for name, value in {"_BLOCK": 16, "_WARPS": 1, **settings}.items():
        monkeypatch.setattr(lce, name, value)
    words, targets = 37, torch.tensor([0, 15, 16, 36, -1, 37, -2], device=device)
    logits = torch.randn(len(targets), words, generator=torch.Generator().manual_seed(0)).to(device)
    z = logits.double().requires_grad_()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    known = (targets >= 0) & (targets < words)
    expected = torch.nn.functional.cross_entropy(capped[known], targets[known], reduction="none")
    lse = capped.logsumexp(1)[targets != -1].sum() - capped[known].gather(1, targets[known, None]).sum()
    (gradient,) = torch.autograd.grad(lse, z)  # of an unknown label: that of no word
    losses = torch.full((len(targets),), 7.0, device=device)
    right = torch.full((len(targets),), 7, dtype=torch.int32, device=device)
    lce.rows_of_loss(logits, (targets, losses, right, losses), 1.0, softcap, 0.0, "nll", gradient=True)
    torch.testing.assert_close(losses[known].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-4, atol=1e-6)
    assert losses[4] == 0
    assert losses[5:].isnan().all()
    assert right[known].tolist() == (capped[known].argmax(1) == targets[known]).int().tolist()
    assert right[4:].tolist() == [0, 0, 0]
