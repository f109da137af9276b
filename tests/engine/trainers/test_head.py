"""The second way of calling a model: whose heads allow it, and that scale and cap of the logits are read rightly."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetui.engine.trainers.head import give_token_loss

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
