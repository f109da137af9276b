"""Whole decoder layers of real architectures: the numbers of their own code, under every save policy."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from finetui.kernels import decoder_layer, decoder_mlp, layers, linear_cross_entropy, selfcheck
from finetui.kernels.attention import Documents, takes_documents
from finetui.kernels.decoder_layer import Keeping
from finetui.kernels.patch import fallbacks, patch_model, unpatch
from finetui.kernels.replacement import STATE

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


def model(device, architecture="llama", targets="all-linear", **changes):
    torch.manual_seed(0)
    config = CONFIGS[architecture](**(SMALL | changes))
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    base.requires_grad_(False)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    return adapted.train()


def gradients(adapted, batch=None, **more):
    ids = torch.arange(12).reshape(2, 6).to(next(adapted.parameters()).device) % 32
    batch = batch or {"input_ids": ids, "labels": ids}
    adapted.zero_grad()
    out = adapted(**batch, use_cache=False, **more)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}


def same(mine, stock):
    assert torch.allclose(mine[0], stock[0], atol=1e-5)
    assert mine[1].keys() == stock[1].keys()
    for name, expected in stock[1].items():
        assert (mine[1][name] - expected).norm() <= 2e-5 * expected.norm(), name


def layer_items(report):
    return [item for item in report.items if item.kernel == "decoder_layer"]


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("policy", decoder_layer.POLICIES)
def test_losses_and_gradients_are_those_of_the_architecture(device, architecture, policy):
    adapted = model(device, architecture)
    stock = gradients(adapted)
    report = patch_model(adapted, only=["decoder_layer"], keeping=Keeping(policy))
    assert [item.replaced for item in layer_items(report)] == [True, True], report.summary()
    same(gradients(adapted), stock)
    assert fallbacks(adapted) == []
    assert unpatch(adapted) == 2


def test_a_layer_of_another_transformers_is_proven_again(device, monkeypatch):
    judged = []
    compare = selfcheck.compare
    monkeypatch.setattr(selfcheck, "compare", lambda *args, **more: judged.append(1) or compare(*args, **more))
    patch_model(model(device), only=["decoder_layer"])
    patch_model(model(device), only=["decoder_layer"])
    assert len(judged) == 1
    monkeypatch.setattr("transformers.__version__", "99")
    patch_model(model(device), only=["decoder_layer"])
    assert len(judged) == 2


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj"], ["o_proj"]])
def test_some_projections_without_adapters(device, targets):
    adapted = model(device, targets=targets)
    stock = gradients(adapted)
    assert all(item.replaced for item in layer_items(patch_model(adapted, only=["decoder_layer"])))
    same(gradients(adapted), stock)


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj"], ["down_proj"], ["q_proj"]])
def test_the_mlp_in_pieces_of_rows(device, monkeypatch, targets):
    adapted = model(device, targets=targets)
    stock = gradients(adapted)
    monkeypatch.setattr(decoder_mlp, "PIECE", 5)
    patch_model(adapted, only=["decoder_layer"], keeping=Keeping("inputs"))
    same(gradients(adapted), stock)


def test_padding_by_mask_is_respected(device):
    adapted = model(device)
    ids = torch.arange(12, device=device).reshape(2, 6) % 32
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=device)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    stock = gradients(adapted, batch)
    patch_model(adapted, only=["decoder_layer"], keeping=Keeping("inputs+attention"))
    same(gradients(adapted, batch), stock)


@pytest.mark.parametrize("told", [False, True])
def test_packed_documents_do_not_see_each_other(device, told):
    adapted = model(device)
    ids = torch.arange(12, device=device).reshape(2, 6) % 32
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]], device=device)
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids}
    stock = gradients(adapted, batch)
    patch_model(adapted, only=["decoder_layer"])
    starts = torch.tensor([0, 3, 5, 6, 12], dtype=torch.int32, device=device)
    more = {"documents": Documents((3, 2, 1, 6), starts)} if told else {}
    same(gradients(adapted, batch, **more), stock)
    assert fallbacks(adapted) == []
    wrong = {"documents": Documents((12,), starts[[0, 4]])}
    if told and takes_documents(adapted.get_input_embeddings().weight, 8):  # on a GPU not in fp32: a mask serves there
        with pytest.raises(AssertionError):
            same(gradients(adapted, batch, **wrong), stock)


@pytest.mark.parametrize(("policy", "kind"), zip(decoder_layer.POLICIES, ("packed", "dense", "dense"), strict=True))
def test_the_last_layer_leaves_out_what_nobody_looks_at(device, policy, kind):
    adapted = model(device)
    ids = torch.arange(12, device=device).reshape(2, 6) % 32
    labels = torch.tensor([[-100, -100, 2, 3, -100, 5], [-100] * 5 + [11]], device=device)
    batch = {"input_ids": ids, "labels": labels}
    if kind == "packed":
        batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]], device=device)
        batch["labels"] = labels.index_fill(1, torch.tensor([3], device=device), -100)
    stock = gradients(adapted, batch)
    patch_model(adapted, only=["decoder_layer"], keeping=Keeping(policy))
    shifted = linear_cross_entropy.shift_labels(batch["labels"])
    count = int((shifted != -100).sum())
    rows = linear_cross_entropy.labelled_rows(shifted, count + 3)  # a bound that is too large
    assert rows.tolist() == [*torch.nonzero(shifted.view(-1) != -100).view(-1).tolist(), 12, 12, 12]
    same(gradients(adapted, batch, needed=decoder_layer.Needed(rows)), stock)
    assert fallbacks(adapted) == []
    with pytest.raises(AssertionError):  # it does leave rows out
        same(gradients(adapted, batch, needed=decoder_layer.Needed(rows[:1])), stock)


def test_only_the_last_layer_of_a_model_is_last(device):
    adapted = model(device)
    backbone = adapted.get_base_model().model
    assert not layers.ends_with_ours(backbone, STATE)
    patch_model(adapted, only=["decoder_layer"])
    assert layers.ends_with_ours(backbone, STATE)
    backbone.layers.append(torch.nn.Identity())
    assert not layers.ends_with_ours(backbone, STATE)
    assert not layers.ends_with_ours(torch.nn.Linear(1, 1), STATE)


def test_the_last_layers_may_keep_more_than_the_others(device):
    adapted = model(device, num_hidden_layers=3)
    stock = gradients(adapted)
    items = layer_items(patch_model(adapted, only=["decoder_layer"], keeping=Keeping("inputs", whole=2)))
    assert [item.why for item in items] == ["inputs", "all-but-elementwise", "all-but-elementwise"]
    same(gradients(adapted), stock)
    assert Keeping("inputs", whole=9).of(0, 3) == ("all-but-elementwise", False)
    assert Keeping("inputs+attention", whole=1, parks=True).of(1, 3) == ("inputs+attention", True)


def test_adapters_switched_off_run_the_layers_own_code(device):
    adapted = model(device)
    patch_model(adapted, only=["decoder_layer"], keeping=Keeping("inputs+attention"))
    before = [p.requires_grad for p in adapted.parameters()]
    with adapted.disable_adapter():
        embeddings = torch.randn(1, 4, 16, device=device, requires_grad=True)
        adapted(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
    assert embeddings.grad.any()
    assert next(item.why for item in fallbacks(adapted)) == "its adapters are switched off or merged"
    assert [p.requires_grad for p in adapted.parameters()] == before


def test_eager_attention_is_left(device):
    adapted = model(device)
    adapted.base_model.model.config._attn_implementation = "eager"
    items = layer_items(patch_model(adapted, only=["decoder_layer"]))
    assert [item.why for item in items] == ["its attention is eager, not sdpa"] * 2


def test_a_layer_that_computes_otherwise_than_it_looks_is_left(device, monkeypatch):
    adapted = model(device)
    layer = adapted.base_model.model.model.layers[0]
    own = type(layer.mlp.down_proj).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x, **rest: 0.5 * x + self.mlp(self.input_layernorm(x)))
    items = layer_items(patch_model(adapted, only=["decoder_layer"]))
    assert not any(item.replaced for item in items)
    assert "something else than a plain decoder layer" in items[0].why
    assert type(layer.mlp.down_proj).forward is own


def test_a_second_backward_is_refused(device):
    adapted = model(device)
    patch_model(adapted, only=["decoder_layer"])
    ids = torch.arange(6, device=device).reshape(1, 6)
    loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_less_is_kept_the_stricter_the_policy(device):
    adapted = model(device)
    sizes = []
    for policy in decoder_layer.POLICIES:
        patch_model(adapted, only=["decoder_layer"], keeping=Keeping(policy))
        layer = adapted.base_model.model.model.layers[0]
        kept = []
        original = decoder_layer._Kept

        def listen(*args, _original=original, _kept=kept, **kwargs):
            _kept.append(_original(*args, **kwargs))
            return _kept[-1]

        decoder_layer._Kept = listen
        try:
            x = torch.randn(1, 4, 16, device=device)
            tables = (torch.ones(1, 4, 8, device=device), torch.zeros(1, 4, 8, device=device))
            out = layer(x, position_embeddings=tables, attention_mask=None)
        finally:
            decoder_layer._Kept = original
        held = kept[0]
        tensors = [held.x, held.out, held.s, *(held.projected or ()), *(held.mlp.gate_up or ())]
        sizes.append(sum(t.numel() for t in tensors if t is not None) // 4)
        del out
    hidden, q, kv, wide = 16, 16, 8, 24
    assert sizes == [hidden, 2 * hidden + q, 2 * hidden + 2 * q + 2 * kv + 2 * wide]
