"""The second way of calling a model: whose heads allow it, and that scale and cap of the logits are read rightly."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetui.engine.evaluate import score
from finetui.engine.trainers.head import Wanted, give_token_loss
from finetui.kernels import decoder_mlp
from finetui.kernels.patch import patch_model

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def model(kind, **changes):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | changes)))
    torch.nn.init.normal_(made.get_output_embeddings().weight, std=2.0)  # large logits, so that a cap acts
    return made


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
    ],
)
def test_heads_of_one_matrix_are_taken(kind, changes):
    made = model(kind, **changes)
    assert give_token_loss(made, contextlib.nullcontext()) == ""
    ids = torch.arange(6).reshape(1, 6)
    assert made(input_ids=ids).logits.shape == (1, 6, 32)


def test_a_trial_prepares_no_attention_that_nothing_else_will_use():
    """cuDNN takes a second for each new shape; afterwards all ways of attention are as they were."""
    made, seen = model("llama"), []
    ways = torch.backends.cuda
    before = (ways.cudnn_sdp_enabled(), ways.flash_sdp_enabled(), ways.math_sdp_enabled())
    made.model.layers[0].register_forward_hook(
        lambda *_: seen.append((ways.cudnn_sdp_enabled(), ways.math_sdp_enabled()))
    )
    assert give_token_loss(made, contextlib.nullcontext()) == ""
    assert seen == [(False, True)]
    assert (ways.cudnn_sdp_enabled(), ways.flash_sdp_enabled(), ways.math_sdp_enabled()) == before


@pytest.mark.parametrize("weighting", ["nll", "dft", "eaft"])
@pytest.mark.parametrize(("kind", "changes"), [("granite", {"logits_scaling": 4.0}), ("gemma2", {})])
def test_the_loss_is_that_of_the_trainers_own_head(kind, changes, weighting):
    """Scale and cap act on the weights too: those are made of the logits that the model means."""
    made = model(kind, **changes)
    ids = torch.arange(1, 13).reshape(2, 6)
    labels = torch.where(ids % 4 == 0, -100, ids)
    count = int((labels[:, 1:] != -100).sum())
    stock = score(made, {"input_ids": ids, "labels": labels}, fused=False, weighting=weighting)
    (stock.loss / count).backward()
    wanted = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    assert give_token_loss(made, contextlib.nullcontext()) == ""
    out = made(input_ids=ids, labels=labels, token_loss=Wanted(torch.tensor(float(count)), count, weighting=weighting))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(stock.loss.item() / count, rel=1e-5)
    assert int(out.right) == int(stock.right)
    for name, gradient in wanted.items():
        torch.testing.assert_close(made.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)


def test_a_scale_that_is_not_in_the_config_is_noticed():
    made = model("llama")
    stock = made.forward

    def doubled(*args, **kwargs):
        out = stock(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    made.forward = doubled
    assert "not scale and cap" in give_token_loss(made, contextlib.nullcontext())
    assert made.forward is doubled


def test_other_heads_are_left():
    biased = model("llama")
    biased.lm_head = torch.nn.Linear(16, 32, bias=True)
    assert "not one plain matrix" in give_token_loss(biased, contextlib.nullcontext())
    heard = model("llama")
    heard.lm_head.register_forward_hook(lambda *_: None)
    assert "listens" in give_token_loss(heard, contextlib.nullcontext())


def test_the_last_layer_is_spared_positions_without_a_label(monkeypatch):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    made = peft.get_peft_model(model("llama").requires_grad_(False), lora).train()
    assert all(item.replaced for item in patch_model(made, only=["decoder_layer"]).items)
    assert give_token_loss(made, contextlib.nullcontext()) == ""
    rows = []
    stock = decoder_mlp.forward
    monkeypatch.setattr(decoder_mlp, "forward", lambda s, *rest, **more: rows.append(len(s)) or stock(s, *rest, **more))

    def trained(labels, *, alone):
        made.zero_grad()
        wanted = Wanted(torch.tensor(2.0), int((labels[:, 1:] != -100).sum()), alone=alone)
        out = made(input_ids=torch.arange(6).reshape(1, 6), labels=labels, token_loss=wanted)
        out.loss.backward()
        return torch.cat([out.loss.detach().view(1), *(p.grad.view(-1) for p in made.parameters() if p.requires_grad)])

    few = torch.tensor([[-100, -100, -100, 3, -100, 5]])
    spared, whole = trained(few, alone=True), trained(few, alone=False)
    assert (spared - whole).norm() < 1e-5 * whole.norm()
    assert rows == [2, 6]
    trained(torch.full((1, 6), -100), alone=True)  # nothing to compute is no shape for a kernel
    assert rows[2:] == [6]
