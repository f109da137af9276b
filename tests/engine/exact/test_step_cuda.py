"""A followed step against the same step on a GPU: what torch says was allocated at its peak."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.cuda

SHAPE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_followed_bytes_are_those_that_were_allocated(tuning, policy):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetui.engine.exact.step import follow
    from finetui.engine.models.adapt import adapt
    from finetui.engine.models.load import Numerics
    from finetui.planner.architecture import Architecture
    from finetui.planner.hardware import Gpu, Node, find_gpu
    from finetui.planner.memory import cublas_workspaces
    from finetui.planner.recipe import Recipe
    from finetui.planner.solver import make_plan

    tree = {
        "model": "x", "tuning": {"type": tuning}, "sequence_length": 1024, "micro_batch": 4, "batch_size": 4,
        "optimizer": {"name": "adamw"}, "hardware": {"gpu": "H200", "checkpointing": policy, "precision": "bf16"},
    }  # fmt: skip
    architecture = Architecture.from_config(SHAPE, "x")
    recipe = Recipe.build(tree, source="test")
    resolved = make_plan(recipe, architecture, Node(find_gpu("H200")), None, framework="transformers").resolved
    followed = follow(SHAPE, resolved, "x", framework="transformers")

    numerics = Numerics.of(resolved)
    with torch.device("cuda"):
        config = AutoConfig.for_model(**SHAPE)
        model = AutoModelForCausalLM.from_config(config, dtype=numerics.weights, attn_implementation="sdpa")
        model = adapt(model, resolved, "x")
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    if policy == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, 32000, (4, 1024), device="cuda")
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with numerics.context(torch.device("cuda")):
            out = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        if numerics.autocast:
            out.logits.float()
        loss = out.loss
        del out
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    major, minor = torch.cuda.get_device_capability()
    here = Gpu("here", 1.0, 1.0, 1.0, 1.0, compute_capability=f"{major}.{minor}")
    expected = followed.allocated + cublas_workspaces(here)
    measured = torch.cuda.max_memory_allocated()
    print(f"{tuning} {policy}: followed {expected / 2**30:.3f} GiB, measured {measured / 2**30:.3f} GiB")
    assert measured == pytest.approx(expected, rel=0.03)
