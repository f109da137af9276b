"""Whole layers that are built otherwise than Llama's: norms after attention and MLP or only there, other heads."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetui.kernels import decoder_layer, decoder_mlp, layerproof, layers, linear_cross_entropy
from finetui.kernels.attention import Documents
from finetui.kernels.decoder_layer import Keeping
from finetui.kernels.launch import INTERPRETED
from finetui.kernels.patch import fallbacks, patch_model
from finetui.kernels.replacement import STATE

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
    pytest.mark.usefixtures("quick_rotation"),
]
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOWS = {"sliding_window": 3, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
SHAPES = {
    "norms before and after": ("gemma3_text", WINDOWS),
    "norms after, over all heads": ("olmo3", WINDOWS),
    "norms after, no positions in one layer": ("exaone4", WINDOWS),
    "a factor on what is added": ("granite", {"residual_multiplier": 0.3}),
    "one product for queries, keys and values": ("phi3", {}),
    "one for gate and up, some places turned": ("glm4", {"attention_bias": True}),
    "norms after the rotary embedding": ("hunyuan_v1_dense", {}),
}
IDS = torch.arange(12).reshape(2, 6) + 1


def model(device, shape, *, lora, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    family, more = SHAPES[shape]
    config = AutoConfig.for_model(family, **(SMALL | more | changes))
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).to(device)
    with torch.no_grad():
        for p in made.parameters():  # norms begin at one or at zero, which hides what is wrong with them
            p.add_(0.2 * torch.randn_like(p) if p.dim() == 1 else 0)
    if lora:
        made.requires_grad_(False)
        made = get_peft_model(made, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    return made.train()


def gradients(trained, **more):
    trained.zero_grad()
    ids = IDS.to(next(trained.parameters()).device)
    loss = trained(**({"input_ids": ids, "labels": ids} | more), use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}


def patch(trained, policy="inputs", **more):
    report = patch_model(trained, only=["decoder_layer"], keeping=Keeping(policy), **more)
    assert all(item.replaced for item in report.items), report.summary()


def same(mine, stock):
    assert torch.allclose(mine[0], stock[0], atol=1e-5)
    assert mine[1].keys() == stock[1].keys()
    for name, expected in stock[1].items():
        assert (mine[1][name] - expected).norm() <= 3e-5 * expected.norm(), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_losses_and_gradients_are_stock_under_every_policy(device, shape, lora):
    trained = model(device, shape, lora=lora)
    stock = gradients(trained)
    patch(trained)
    for policy in decoder_layer.POLICIES:
        for module in trained.modules():
            if STATE in vars(module):
                vars(module)[STATE].found = replace(vars(module)[STATE].found, policy=policy)
        same(gradients(trained), stock)
        assert fallbacks(trained) == []


@pytest.mark.parametrize("shape", list(SHAPES)[:2])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "norms"])
def test_the_mlp_in_pieces_of_rows(device, monkeypatch, shape, lora):
    monkeypatch.setattr(decoder_mlp, "PIECE", 5)
    trained = model(device, shape, lora=lora)
    if not lora:  # one norm alone: its gradient is that of all rows, not of the last piece
        trained.requires_grad_(False)
        trained.model.layers[1].post_feedforward_layernorm.requires_grad_(True)
    stock = gradients(trained)
    patch(trained)
    same(gradients(trained), stock)


@pytest.mark.parametrize(
    ("shape", "policy"), zip(list(SHAPES)[:4], (*decoder_layer.POLICIES, "all-but-elementwise"), strict=True)
)
def test_rows_that_nobody_looks_at(device, shape, policy):
    trained = model(device, shape, lora=False, num_hidden_layers=1, layer_types=["sliding_attention"])
    unseen = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0]], device=device) == 1
    labels = IDS.to(device).masked_fill(unseen, -100)
    stock = gradients(trained, labels=labels)
    patch(trained, policy)
    rows = linear_cross_entropy.labelled_rows(linear_cross_entropy.shift_labels(labels), 7)
    same(gradients(trained, labels=labels, needed=decoder_layer.Needed(rows)), stock)
    with pytest.raises(AssertionError):  # it does leave rows out
        same(gradients(trained, labels=labels, needed=decoder_layer.Needed(rows[:1])), stock)


@pytest.mark.parametrize("shape", list(SHAPES)[:3])
def test_packed_documents_longer_and_shorter_than_the_window(device, monkeypatch, shape):
    trained = model(device, shape, lora=True)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0], [0, 1, 0, 1, 2, 0]], device=device)
    stock = gradients(trained, position_ids=positions)
    patch(trained)
    starts = torch.tensor([0, 5, 6, 8, 11, 12], dtype=torch.int32, device=device)
    documents = Documents((5, 1, 2, 3, 1), starts)
    if device.type == "cpu":  # on a GPU attention within documents takes 16-bit values alone
        masks = []
        monkeypatch.setattr(layers, "told_by_mask", lambda *_: masks.append(1))
    same(gradients(trained, position_ids=positions, documents=documents), stock)
    assert fallbacks(trained) == []
    if device.type == "cpu":
        assert not masks  # the window is told to attention as a number


def test_padding_is_hidden_beside_a_window(device):
    trained = model(device, "norms before and after", lora=True)
    mask = torch.tensor([[1] * 6, [1] * 5 + [0]], device=device)
    batch = {"attention_mask": mask, "labels": IDS.to(device).masked_fill(mask == 0, -100)}
    stock = gradients(trained, **batch)
    patch(trained, "inputs+attention")
    same(gradients(trained, **batch), stock)


@pytest.mark.parametrize(("name", "seen"), [("mistral", [3, 3]), ("exaone4", [3, None]), ("llama", [None, None])])
def test_the_window_of_a_layer_is_known_wherever_a_family_writes_it(name, seen):
    more = {"exaone4": WINDOWS, "mistral": {"sliding_window": 3}, "llama": {}}[name]
    config = AutoConfig.for_model(name, **(SMALL | {"num_hidden_layers": 2} | more))
    made = AutoModelForCausalLM.from_config(config)
    assert [layers.window(layer.self_attn) for layer in made.model.layers] == seen


@pytest.mark.parametrize("shape", ["norms before and after", "norms after, over all heads"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "fp32 weights under autocast"])
def test_16_bit_products_are_as_close_to_float64_as_stock(device, shape, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    trained = model(device, shape, lora=False, dtype=dtype)
    exact = gradients(copy.deepcopy(trained).double())

    def run():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            return gradients(trained)

    stock = run()
    patch(trained, dtype=torch.bfloat16)
    ours = run()
    assert fallbacks(trained) == []
    floor = 3e-2 if INTERPRETED else 1e-3  # the interpreter cuts where a GPU rounds
    for name, truth in exact[1].items():
        mine, theirs = ((g[1][name].double() - truth).norm() / truth.norm() for g in (ours, stock))
        assert ours[1][name].dtype == dtype
        assert mine <= 1.2 * theirs + floor, name


def built(device, shape, policy="inputs+attention"):
    """A layer's own description with an input for it, and what of it is trained."""
    torch.manual_seed(0)
    module = model(device, shape, lora=True).base_model.model.model.layers[0]
    x = torch.randn(2, 4, 16, device=device)
    angles = torch.randn(1, 4, 4, device=device)
    tables = tuple(torch.cat((t, t), dim=-1) for t in (angles.cos(), angles.sin()))
    layer, trained = layers.build(module, layers.found(module, torch.float32, policy), x)
    return layer, x, tables, trained


class Elsewhere:
    """Parked tensors, copied away: the backward has to do with the copies."""

    order: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, tensors):
        self.tensors = [t.clone() for t in tensors]
        self.order.append(("park", len(tensors)))

    def take(self):
        self.order.append(("take", len(self.tensors)))
        return self.tensors


@pytest.mark.parametrize("shape", ["norms before and after", "a factor on what is added"])
def test_parked_tensors_come_back_in_the_order_in_which_they_are_needed(device, monkeypatch, shape):
    layer, x, tables, trained = built(device, shape)
    monkeypatch.setattr(decoder_layer.offload, "park", Elsewhere)
    monkeypatch.setattr(Elsewhere, "order", [])
    results = []
    for parks in (False, True):
        leaf = x.clone().requires_grad_()
        out = decoder_layer.decoder_layer(leaf, tables, None, replace(layer, parks=parks), trained)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *trained])])
    for mine, expected in zip(*results, strict=True):
        assert torch.equal(mine, expected)
    first = 1 if layer.norms.after_attention else 2  # with a norm after attention x waits beside what was normed
    assert Elsewhere.order == [("park", first), ("park", 3 - first), ("take", 3 - first), ("take", first)]


@pytest.mark.parametrize("policy", decoder_layer.POLICIES)
def test_what_is_kept_beside_norms_after_attention_and_mlp(device, monkeypatch, policy):
    kept, own = [], decoder_layer._Kept
    layer, x, tables, trained = built(device, "norms before and after", policy)
    monkeypatch.setattr(decoder_layer, "_Kept", lambda *given: kept.append(own(*given)) or kept[-1])
    out = decoder_layer.decoder_layer(x.requires_grad_(), tables, None, layer, trained)
    (held,) = kept
    tensors = [held.x, held.out, held.s, held.o, held.mlp.o, *(held.projected or ()), *(held.mlp.gate_up or ())]
    sizes = sum(t.numel() for t in tensors if t is not None) // 8
    hidden, queries, keys, inner = 16, 32, 16, 24
    expected = {
        "inputs": hidden,
        "inputs+attention": 2 * hidden + queries,
        "all-but-elementwise": 3 * hidden + 2 * queries + 2 * keys + 2 * inner,
    }
    assert sizes == expected[policy]
    assert held.mlp.rstd.shape == (8,)
    del out


def test_nothing_that_was_given_is_written_over(device):
    """Without a norm before it, attention is given the hidden states themselves."""
    layer, x, tables, trained = built(device, "norms after, over all heads")
    for policy in decoder_layer.POLICIES:
        leaf = x.clone().requires_grad_()
        out = decoder_layer.decoder_layer(leaf, tables, None, replace(layer, policy=policy), trained)
        dy = torch.randn_like(out)
        before = dy.clone()
        out.backward(dy)
        assert torch.equal(leaf, x)
        assert torch.equal(dy, before)


def test_a_layer_that_only_looks_like_one_of_these_is_left(device, monkeypatch):
    trained = model(device, "norms before and after", lora=True)
    kind = type(trained.base_model.model.model.layers[0])
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **rest: own(self, x, **rest) * 1.01)
    report = patch_model(trained, only=["decoder_layer"])
    assert "something else than a plain decoder layer" in report.items[0].why
    assert not report.replaced


def test_dropout_on_what_is_added_is_left(device):
    trained = model(device, "one product for queries, keys and values", lora=True, resid_pdrop=0.1)
    (item,) = patch_model(trained, only=["decoder_layer"]).items
    assert (item.replaced, item.why) == (False, "what it adds has dropout")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_composition_in_float64_is_the_layer(device, shape):
    """What proofs are held against is the layer's own code, with tables narrower than a head too."""
    trained = model(device, shape, lora=False)
    what = layerproof.recognise(trained.model.layers[-1], torch.float32, "inputs", parks=False)
    wide = trained.double().model
    x = torch.randn(2, 4, 16, dtype=torch.float64, device=device)
    kinds = ["full_attention"] if SHAPES[shape][0] in ("gemma3_text", "olmo3") else []
    tables = wide.rotary_emb(x, torch.arange(4, device=device)[None], *kinds)
    expected = wide.layers[-1](x, position_embeddings=tables, attention_mask=None)
    layer, own = layers.build(wide.layers[-1], what, x)
    assert torch.allclose(layerproof.reference(x, tables, layer, own), expected, atol=1e-12)
