"""Whole decoder layers whose own weights are trained: the gradients of their own code, and where these are put."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from finetui.kernels import (
    decoder_layer,
    decoder_mlp,
    layerproof,
    layers,
    linear_cross_entropy,
    projection,
    weight_gradient,
)
from finetui.kernels.decoder_layer import Keeping
from finetui.kernels.launch import INTERPRETED
from finetui.kernels.patch import fallbacks, patch_model, unpatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
    pytest.mark.usefixtures("quick_rotation"),
]
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


def model(device, architecture="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = CONFIGS[architecture](**(SMALL | changes))
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).to(device)
    with torch.no_grad():
        for p in made.parameters():  # norms begin at one and biases at zero, which hides what is wrong with them
            p.add_(0.2 * torch.randn_like(p) if p.dim() == 1 else 0)
    return made.train()


def backward(trained, autocast=False, **more):
    device = next(trained.parameters()).device
    ids = torch.arange(8).reshape(2, 4).to(device) % 32
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = trained(**({"input_ids": ids, "labels": ids} | more), use_cache=False).loss
    loss.backward()
    return loss.detach()


def gradients(trained, **more):
    trained.zero_grad()
    loss = backward(trained, **more)
    return loss, {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}


def patch(trained, policy="inputs", **more):
    report = patch_model(trained, only=["decoder_layer"], keeping=Keeping(policy), **more)
    return [(item.replaced, item.why) for item in report.items]


def same(mine, stock, times=1):
    assert torch.allclose(mine[0], stock[0], atol=1e-5)
    assert mine[1].keys() == stock[1].keys()
    for name, expected in stock[1].items():
        assert (mine[1][name] - times * expected).norm() <= 2e-5 * times * expected.norm(), name


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])  # with biases; with norms on queries and keys
def test_gradients_of_all_weights_under_every_policy(device, architecture):
    trained = model(device, architecture)
    stock = gradients(trained)
    assert len(stock[1]) == sum(1 for _ in trained.parameters())
    for policy in decoder_layer.POLICIES:
        assert patch(trained, policy) == [(True, policy)]
        same(gradients(trained), stock)
        assert fallbacks(trained) == []
    assert unpatch(trained) == 1


def test_only_some_of_it_trained(device, monkeypatch):
    """Freezing as tunings do: some layers, single modules; and a layer of which nothing is."""
    monkeypatch.setattr(decoder_mlp, "PIECE", 3)
    trained = model(device, num_hidden_layers=3)
    trained.requires_grad_(False)
    first, _, last = trained.model.layers
    last.requires_grad_(True)
    first.post_attention_layernorm.requires_grad_(True)
    first.self_attn.v_proj.requires_grad_(True)
    stock = gradients(trained)
    assert len(stock[1]) == 2 + 9
    assert patch(trained) == [(True, "inputs")] * 3
    same(gradients(trained), stock)
    assert fallbacks(trained) == []


def test_a_weight_trained_without_its_bias_is_left(device):
    trained = model(device, "qwen2")
    trained.model.layers[0].self_attn.q_proj.bias.requires_grad_(False)
    assert patch(trained) == [(False, "a projection's weight and bias are not trained alike")]


def test_rows_that_nobody_looks_at(device):
    trained = model(device, "qwen3")
    ids = torch.arange(8, device=device).reshape(2, 4)
    labels = torch.tensor([[-100, -100, 2, 3], [-100, -100, -100, 11]], device=device)
    stock = gradients(trained, input_ids=ids, labels=labels)
    patch(trained)
    rows = linear_cross_entropy.labelled_rows(linear_cross_entropy.shift_labels(labels), 5)
    same(gradients(trained, input_ids=ids, labels=labels, needed=decoder_layer.Needed(rows)), stock)
    assert fallbacks(trained) == []


@pytest.fixture
def patched(device):
    trained = model(device)
    assert patch(trained) == [(True, "inputs")]
    return trained


def matrices(trained):
    return [p for p in trained.model.layers.parameters() if p.dim() == 2]


def made(monkeypatch):
    """Where each new gradient of a weight lies; None for those that were added in place."""
    answers, stock = [], weight_gradient.weight_gradient

    def listen(dy, x, weight):
        answer = stock(dy, x, weight)
        answers.append(None if answer is None else answer.data_ptr())
        return answer

    monkeypatch.setattr(projection, "weight_gradient", listen)
    return answers


def test_gradients_are_there_once(patched, monkeypatch):
    """New ones are those that autograd was handed, and further ones are added in place."""
    answers = made(monkeypatch)
    first = gradients(patched)
    assert sorted(answers) == sorted(p.grad.data_ptr() for p in matrices(patched))
    places = [p.grad.data_ptr() for p in matrices(patched)]
    answers.clear()
    loss = backward(patched)
    assert answers == [None] * 7
    assert [p.grad.data_ptr() for p in matrices(patched)] == places
    same((loss, {n: p.grad for n, p in patched.named_parameters()}), first, times=2)


def test_whoever_listens_to_a_gradient_is_told(patched, monkeypatch):
    first = gradients(patched)
    heard, weights = [], matrices(patched)
    weights[0].register_hook(lambda gradient: heard.append(gradient.clone()))
    weights[1].register_post_accumulate_grad_hook(lambda p: heard.append(p.grad.clone()))
    answers = made(monkeypatch)
    backward(patched)
    assert sum(answer is not None for answer in answers) == 2
    names = {id(p): n for n, p in patched.named_parameters()}
    alone, total = first[1][names[id(weights[0])]], 2 * first[1][names[id(weights[1])]]
    assert sorted(gradient.shape for gradient in heard) == sorted(p.shape for p in weights[:2])
    for gradient in heard:
        expected = alone if gradient.shape == alone.shape else total
        torch.testing.assert_close(gradient, expected)


def test_a_process_group_gets_every_gradient_through_autograd(patched, monkeypatch):
    """DDP's reducer waits for autograd to say that a gradient is there."""
    first = gradients(patched)
    answers = made(monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    loss = backward(patched)
    assert all(answer is not None for answer in answers)
    same((loss, {n: p.grad for n, p in patched.named_parameters()}), first, times=2)


def test_gradients_that_are_asked_for_are_not_added_to_others(patched):
    first = gradients(patched)
    weights = matrices(patched)
    ids = torch.arange(8, device=weights[0].device).reshape(2, 4) % 32
    loss = patched(input_ids=ids, labels=ids, use_cache=False).loss
    asked = torch.autograd.grad(loss, weights[:3])
    names = {id(p): n for n, p in patched.named_parameters()}
    for p, gradient in zip(weights[:3], asked, strict=True):
        torch.testing.assert_close(gradient, first[1][names[id(p)]])
    for p in weights:
        torch.testing.assert_close(p.grad, first[1][names[id(p)]])


def test_a_weight_that_changed_meanwhile_is_an_error(patched):
    ids = torch.arange(4, device=patched.lm_head.weight.device).reshape(1, 4)
    loss = patched(input_ids=ids, labels=ids, use_cache=False).loss
    with torch.no_grad():
        matrices(patched)[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed between"):
        loss.backward()


@pytest.mark.parametrize("part", ["weight_gradient", "bias_gradient"])
def test_a_wrong_gradient_of_a_weight_is_found(device, monkeypatch, part):
    trained = model(device, "qwen2")
    stock = getattr(projection, part)
    monkeypatch.setattr(projection, part, lambda *given: stock(*given) * 1.001)
    ((replaced, why),) = patch(trained)
    assert not replaced
    assert "against float64" in why


def test_sixteen_bits_are_as_close_to_float64_as_stock(device):
    trained = model(device, "qwen3", torch.bfloat16)
    exact, stock = gradients(copy.deepcopy(trained).double()), gradients(trained)
    assert patch(trained, dtype=torch.bfloat16) == [(True, "inputs")]
    ours = gradients(trained)
    assert fallbacks(trained) == []
    floor = 3e-2 if INTERPRETED else 1e-3  # the interpreter cuts where a GPU rounds
    for name, truth in exact[1].items():
        mine, theirs = ((g[1][name].double() - truth).norm() / truth.norm() for g in (ours, stock))
        assert mine <= 1.2 * theirs + floor, name


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_fp32_weights_under_autocast(device, architecture):
    """Hidden states are fp32 then, and so are the gradients of weights, whose sums are never rounded."""
    trained = model(device, architecture)
    exact = gradients(copy.deepcopy(trained).double())
    stock = gradients(trained, autocast=True)
    assert patch(trained, dtype=torch.bfloat16) == [(True, "inputs")]
    ours = gradients(trained, autocast=True)
    backward(trained, autocast=True)
    assert fallbacks(trained) == []
    floor = 3e-2 if INTERPRETED else 1e-3
    for name, truth in exact[1].items():
        mine, theirs = ((g[1][name].double() - truth).norm() / truth.norm() for g in (ours, stock))
        assert ours[1][name].dtype == torch.float32
        assert mine <= 1.2 * theirs + floor, name
    names = dict(trained.named_parameters())
    for name, once in ours[1].items():
        torch.testing.assert_close(names[name].grad, 2 * once, rtol=1e-4, atol=1e-6)


def test_ten_steps_are_those_of_stock(device):
    losses = []
    for ours in (False, True):
        trained = model(device, tie_word_embeddings=True)
        if ours:
            patch(trained, "all-but-elementwise")
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        found = []
        for step in range(10):
            found.append(backward(trained).item())
            if step % 2:  # of two micro-batches
                torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.cuda
@pytest.mark.parametrize("policy", decoder_layer.POLICIES)
def test_real_shapes(device, policy):
    """A layer of Qwen3-4B on 8192 tokens, over two micro-batches."""
    shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8}
    with device:
        trained = model(device, "qwen3", torch.bfloat16, **shape, head_dim=128, max_position_embeddings=4096)
        layer = trained.model.layers[0]
        x, dy = (torch.randn(4, 2048, 2560).to(torch.bfloat16) for _ in range(2))
        tables = trained.model.rotary_emb(x, torch.arange(2048)[None])

    def run():
        layer.zero_grad()
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            layer(leaf, position_embeddings=tables, attention_mask=None).backward(dy)
        return [leaf.grad, *(p.grad.clone() for p in layer.parameters())]

    what = layers.found(layer, torch.bfloat16, policy)
    built, own = layers.build(layer, what, x)
    leaves = {id(p): p.detach().double().requires_grad_() for p in own}
    wide = x.double().requires_grad_()
    layerproof.reference(wide, tuple(t.double() for t in tables), built, [*leaves.values()]).backward(dy.double())
    exact = [wide.grad, *(2 * leaves[id(p)].grad for p in layer.parameters())]
    stock = run()
    assert patch(trained, policy, dtype=torch.bfloat16) == [(True, policy)]
    for mine, theirs, truth in zip(run(), stock, exact, strict=True):
        ours, limit = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        assert ours <= 1.2 * limit + 1e-4
    assert fallbacks(trained) == []
