"""A followed step against the bytes that were measured on real tensors, and against the planner's formula."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetui.engine.exact import step
from finetui.engine.exact.step import follow
from finetui.planner.architecture import Architecture
from finetui.planner.errors import ModelError, RecipeError
from finetui.planner.hardware import GIB, Node, find_gpu
from finetui.planner.memory import cublas_workspaces
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

LLAMA = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
TOKENS = 2 * 512
#: Bytes per token of the 16-bit copies of one layer's pairs.
PAIRS = 2 * 16 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 704)) / TOKENS


def _plan(config=None, *, framework="transformers", tuning="full", policy="none", **more):
    tree = {
        "model": "x", "tuning": {"type": tuning}, "sequence_length": 512, "micro_batch": 2, "batch_size": 2,
        "optimizer": {"name": "adamw"}, "hardware": {"gpu": "B200", "checkpointing": policy, "precision": "bf16"},
    }  # fmt: skip
    recipe = Recipe.build(tree | more, source="test")
    architecture = Architecture.from_config(config or LLAMA, "x")
    return make_plan(recipe, architecture, Node(find_gpu("B200")), None, framework=framework)


def _followed(config=None, *, framework="transformers", **more):
    return follow(config or LLAMA, _plan(config, framework=framework, **more).resolved, "x", framework=framework)


def _per_layer(moment="loss", **more):
    """Bytes that the second layer added to a moment's activations, per token."""
    one, two = (
        _followed({**LLAMA, "num_hidden_layers": layers}, **more).peaks[moment].terms["activations"]
        for layers in (2, 3)
    )
    return (two - one) / TOKENS


def test_full_fine_tuning_keeps_what_saved_tensor_hooks_counted_on_real_tensors():
    hidden, inner, q, kv, heads = 256, 704, 256, 128, 4
    # The formula in planner/activations.py; the 8 bytes there are two per-layer scalars, not one pair per token.
    expected = 16 * hidden + 8 * inner + 4 * q + 4 * kv + 4 * heads + 8
    assert _per_layer() == pytest.approx(expected, abs=8)


def test_checkpointing_keeps_the_input_of_each_layer():
    assert _per_layer(policy="full") == pytest.approx(2 * 256, abs=2)


def test_our_layers_keep_what_their_policy_says():
    hidden, inner, q, kv, heads, ranks = 256, 704, 256, 128, 4, 7 * 16
    expected = 4 * hidden + 4 * inner + 4 * q + 4 * kv + 4 * heads + 2 * ranks
    assert _per_layer(framework="finetui", tuning="lora") == pytest.approx(expected + PAIRS, rel=0.01)


def test_our_layers_keep_no_more_where_their_weights_are_trained():
    hidden, inner, q, kv, heads = 256, 704, 256, 128, 4
    expected = 4 * hidden + 4 * inner + 4 * q + 4 * kv + 4 * heads
    assert _per_layer(framework="finetui") == pytest.approx(expected, abs=2)
    assert _per_layer(framework="finetui", policy="full") == pytest.approx(2 * hidden, abs=2)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_layers_that_stay_stock_are_computed_again_in_the_trainers_own_mode(tuning):
    """A model comes in evaluation mode, in which no layer is computed again, and PEFT's wrapper says otherwise."""
    stock = {"hardware": {"gpu": "B200", "checkpointing": "full", "precision": "bf16", "kernels": "off"}}
    assert _per_layer(framework="finetui", tuning=tuning, **stock) <= 2 * 256 + (PAIRS if tuning == "lora" else 0) + 2


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_what_waits_in_host_memory_is_on_the_device_no_more(micro, packing):
    heads, ranks = 4, 7 * 16
    shape = {"micro_batch": micro, "batch_size": micro, "sequence_length": TOKENS // micro, "packing": packing}
    kept = _per_layer(framework="finetui", tuning="lora", policy="offload", **shape)
    assert kept <= 4 * heads + 2 * ranks + PAIRS + 16


@pytest.mark.parametrize("policy", ["none", "full", "offload"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo2", "phi3", "granite"])
def test_layers_of_other_shapes_keep_and_need_what_the_formula_says(model_type, policy):
    hidden, inner, q, kv, heads = 256, 704, 256, 128, 4
    changes = {"model_type": model_type, "residual_multiplier": 0.5, "vocab_size": 256}
    one, two = ({**LLAMA, **changes, "num_hidden_layers": layers} for layers in (3, 4))
    more = {"framework": "finetui", "tuning": "lora", "policy": policy}
    followed, longer = _followed(one, **more), _followed(two, **more)
    after, merged = model_type in ("gemma3_text", "olmo2"), model_type == "phi3"
    everything = 4 * hidden + 4 * q + 4 * kv + 4 * inner + 4 * heads + (2 * hidden if after else 0)
    kept = {"none": everything, "full": 2 * hidden, "offload": 4 * heads}[policy]
    kept += 2 * 16 * (4 if merged else 7) + (4 if after else 0)
    kept += 2 * 16 * (4 * hidden + q + q + 2 * kv + 3 * inner) / TOKENS if merged else PAIRS
    grown = longer.peaks["loss"].terms["activations"] - followed.peaks["loss"].terms["activations"]
    assert grown / TOKENS == pytest.approx(kept, abs=2)
    planned = _plan(one, **more).memory.allocated_gib * GIB - cublas_workspaces(find_gpu("B200"))
    kernels = TOKENS * 8 * q  # of attention, which the planner has and a step on fake tensors has not
    assert 0.96 * followed.allocated < planned < 1.04 * followed.allocated + kernels


def test_a_window_narrower_than_a_row_costs_no_mask():
    mistral = {**LLAMA, "model_type": "mistral"}
    kept = [
        _followed({**mistral, "sliding_window": window}, framework="finetui", tuning="lora").peaks["loss"].terms
        for window in (128, None)
    ]
    assert kept[0]["activations"] == pytest.approx(kept[1]["activations"], abs=1.1 * 512**2)


def test_attentions_backward_takes_as_much_for_packed_rows_as_for_others():
    config = {**LLAMA, "vocab_size": 64, "intermediate_size": 64}  # so that attention is the crest
    apart, packed = (
        _followed(config, framework="finetui", tuning="lora", policy="offload", packing=packing).peaks["backward"].bytes
        for packing in (False, True)
    )
    documents = 4 * 2  # halves of rows, each rounded up
    assert packed - apart == pytest.approx(4 * 4 * 128 * documents * 65, rel=0.25)


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_static_terms_are_exact(tuning):
    plan = _plan(framework="finetui", tuning=tuning)
    followed = follow(LLAMA, plan.resolved, "x")
    assert (followed.parameters, followed.trainable) == (plan.model.parameters, plan.model.trainable)
    terms = followed.peaks["loss"].terms
    wide = 4 if tuning != "full" else 2
    assert terms["optimizer"] == pytest.approx(2 * wide * plan.model.trainable, rel=0.015)
    if tuning == "full":
        assert terms["weights"] == pytest.approx(2 * plan.model.parameters, rel=0.001)
    else:
        assert terms["adapter"] == pytest.approx(4 * plan.model.trainable, rel=0.001)
    if tuning == "qlora":
        linear = sum(layer.count * layer.linear_weights for layer in Architecture.from_config(LLAMA).layers)
        outside = 2 * (plan.model.parameters - linear)
        assert terms["weights"] == pytest.approx(outside + 0.516 * linear, rel=0.03)  # and tables of codes


def test_gradients_of_earlier_micro_batches_are_there_when_a_plan_accumulates():
    plan = _plan(framework="trl")
    once = follow(LLAMA, plan.resolved, "x", framework="trl")
    often = follow(LLAMA, replace(plan.resolved, accumulation=4), "x", framework="trl")
    assert once.peaks["loss"].terms.get("gradients", 0) == 0
    assert often.peaks["loss"].terms["gradients"] == pytest.approx(2 * plan.model.parameters, rel=0.001)


def test_all_logits_cost_more_than_tiles():
    config = {**LLAMA, "vocab_size": 65536}
    tiles, everything = (_followed(config, framework=name, tuning="lora") for name in ("trl", "transformers"))
    logits = 65536 * TOKENS
    assert everything.allocated - tiles.allocated > 6 * logits


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128}),
        ("gemma2", {"sliding_window": 128}),
    ],
)
def test_other_architectures_are_followed(model_type, more):
    """Experts, attention sinks, soft caps."""
    config = {**LLAMA, "model_type": model_type, **more}
    followed = _followed(config, framework="trl", tuning="lora", policy="full")
    assert followed.allocated > 2 * followed.parameters


def test_a_family_that_the_planner_does_not_know_is_followed():
    config = {**LLAMA, "model_type": "helium"}
    followed = _followed(config, framework="trl", tuning="lora")
    assert followed.parameters == Architecture.from_config({**LLAMA}).parameters


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model_type": "brandnew", "auto_map": {"AutoConfig": "x"}}, "no model_type 'brandnew'.*is not run"),
        ({"model_type": "t5"}, "no causal language model for t5"),
        ({"num_attention_heads": 0}, "can't be built|can't read it"),
    ],
)
def test_what_transformers_can_not_build_is_refused_in_words(more, words):
    with pytest.raises(ModelError, match=words):
        follow({**LLAMA, **more}, _plan().resolved, "x", framework="trl")


def test_frameworks_and_methods_that_are_not_followed_are_errors():
    resolved = _plan().resolved
    with pytest.raises(RecipeError, match="code of unsloth is not followed"):
        follow(LLAMA, resolved, "x", framework="unsloth")
    with pytest.raises(RecipeError, match="loss of dpo is not followed"):
        follow(LLAMA, replace(resolved, method="dpo"), "x", framework="trl")


def test_a_defect_of_finetui_is_not_blamed_on_the_model(monkeypatch):
    monkeypatch.setattr(step, "score", lambda: None)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        _followed(framework="trl", tuning="lora")
