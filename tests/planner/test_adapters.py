"""What PEFT's adapters keep of a forward pass: the table against the installed library, and what plans make of it."""

from __future__ import annotations

import dataclasses

import pytest

from finetui.planner.adapters import ELSEWHERE, KEPT
from finetui.planner.architecture import Architecture
from finetui.planner.hardware import GIB, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.layer import Linear
from finetui.planner.memory import peak_memory
from finetui.planner.settings import Settings
from finetui.planner.stacks import STACKS

WIDE, NARROW, HEADS = 256, 128, 4
SHAPE = {
    "hidden_size": WIDE, "intermediate_size": 2 * WIDE, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 64,
}  # fmt: skip
CONFIGS = {
    "vera": ("VeraConfig", {"r": 8}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "loha": ("LoHaConfig", {"r": 8}),
    "lokr": ("LoKrConfig", {"r": 8}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 100}),
    "road": ("RoadConfig", {"variant": "road_2", "group_size": 32}),
    "waveft": ("WaveFTConfig", {"n_frequency": 100}),
}


def saved(kind: str | None, layers: int, tokens: int) -> int:
    """Bytes that one forward saves for backward, parameters not counted."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).to(torch.bfloat16)
    if kind is None:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    else:
        name, options = CONFIGS[kind]
        model = peft.get_peft_model(model, getattr(peft, name)(target_modules=["q_proj", "v_proj"], **options))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=torch.randint(0, 64, (1, tokens)), use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_table_is_what_the_installed_library_keeps(kind):
    pytest.importorskip("peft")
    modules = [Linear("q_proj", WIDE, WIDE), Linear("v_proj", WIDE, NARROW)]
    of_layer = {}
    for tokens in (64, 128):  # of the second layer, beside what the layer keeps without the adapter
        grown = [saved(k, 2, tokens) - saved(k, 1, tokens) for k in (kind, None)]
        of_layer[tokens] = grown[0] - grown[1]
    slope = (of_layer[128] - of_layer[64]) / 64
    fixed = of_layer[64] - 64 * slope
    kept = KEPT[kind]
    assert slope == pytest.approx(kept.per_token(modules), rel=0.1, abs=260)  # and its rank-wide products
    weights = sum(module.weight for module in modules)
    assert fixed == pytest.approx(kept.fixed(modules, 8), rel=0.15, abs=3 * weights)  # small blocks


def test_changes_of_weights_are_kept_by_each_layer():
    name = "meta-llama/Llama-3.2-3B"
    llama, plain = Architecture.from_config(find_config(name)[1], name), STACKS["transformers"]
    base = Settings("lora", 512, checkpointing="none", targets=("q_proj", "v_proj"), kind="c3a", trained=10**6)
    gpu = find_gpu("L40S")
    c3a, fourier = (
        peak_memory(llama, dataclasses.replace(base, kind=kind), plain, gpu).allocated_gib
        for kind in ("c3a", "fourierft")
    )
    weights = llama.num_layers * llama.hidden * (llama.query_width + llama.kv_width)
    assert fourier - c3a == pytest.approx(4 * weights / GIB, rel=0.15)


def test_kinds_without_a_count_of_their_own_take_the_one_that_is_said():
    from finetui.planner.trained import trained_parameters

    name = "meta-llama/Llama-3.2-3B"
    llama = Architecture.from_config(find_config(name)[1], name)
    for kind in ELSEWHERE:
        assert trained_parameters(llama, Settings("lora", 512, kind=kind, trained=12345)) == 12345
