"""What each tuning trains: counts against PEFT's own, numerics, and the beginnings of adapters."""

from __future__ import annotations

import warnings

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.errors import RecipeError, UserError
from finetui.planner.hardware import cpu_node
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

torch = pytest.importorskip("torch")

from finetui.engine.models.adapt import adapt  # noqa: E402
from finetui.engine.models.ground import Ground  # noqa: E402
from finetui.engine.models.initial import as_on_disk, as_trained, lora_layers  # noqa: E402

#: Unequal widths, so that no two terms can stand in for each other.
SHAPE = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
SHAPES = {
    "llama": SHAPE,
    "qwen3": {**SHAPE, "tie_word_embeddings": True},
    "phi3": SHAPE,
    "gpt2": {"vocab_size": 211, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128},
    "gpt_neox": {key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "head_dim")},
    "qwen2_moe": {
        **SHAPE, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28,
        "shared_expert_intermediate_size": 36,
    },
}  # fmt: skip
TUNINGS = {
    "full": "full",
    "freeze": {"type": "freeze", "trained_layers": 2},
    "lora": {"type": "lora", "rank": 4},
    "lora of two modules": {"type": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]},
    "rslora": "rslora",
    "lora+": "lora+",
    "dora": {"type": "dora", "rank": 4},
    "pissa": {"type": "pissa", "rank": 4},
    "olora": "olora",
    "eva": "eva",
    "gaussian": {"type": "lora", "init": "gaussian"},
    "adalora": {"type": "adalora", "rank": 4},
    "ia3": "ia3",
    "ia3 of two modules": {"type": "ia3", "targets": ["v_proj", "down_proj"]},
    "vera": {"type": "vera", "rank": 32},
    "oft": {"type": "oft", "block_size": 4},
    "loha": {"type": "loha", "rank": 4},
    "lokr": {"type": "lokr", "rank": 4},
    "lokr of high rank": {"type": "lokr", "rank": 64},
    "prompt": {"type": "prompt", "virtual_tokens": 7},
    "prefix": {"type": "prefix", "virtual_tokens": 7},
    "head beside": {"type": "lora", "rank": 4, "modules_to_save": ["lm_head"]},
    "embeddings beside": {"type": "lora", "rank": 4, "modules_to_save": ["embed_tokens"]},
    "new tokens": {"type": "lora", "rank": 4, "new_tokens": ["<a>", "<b>", "<c>"]},
    "experts": {"type": "lora", "rank": 4, "targets": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
}
LLAMA_NAMES = {"lora of two modules", "ia3 of two modules", "embeddings beside", "experts"}


def _applies(tuning: str, shape: str) -> bool:
    if tuning == "experts":
        return shape == "qwen2_moe"
    if tuning in LLAMA_NAMES:
        return shape in ("llama", "qwen3")
    if shape == "gpt2" and tuning.split()[0] in ("oft", "loha", "lokr"):  # its modules are no nn.Linear
        return False
    return not (tuning == "head beside" and shape == "gpt_neox")


def _model(shape: str, device: str = "meta", **more):
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape, **(SHAPES[shape] | more)))


def _resolved(tuning, shape: str = "llama", **recipe):
    architecture = Architecture.from_config({"model_type": shape, **SHAPES[shape]}, shape)
    plan = make_plan(Recipe.build({"model": "m", "tuning": tuning, **recipe}), architecture, cpu_node())
    return plan.resolved, plan.model.trainable


def _quietly(model, resolved, ground=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapt(model, resolved, "base", ground)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_planner_counts_what_peft_trains(tuning: str, shape: str) -> None:
    if not _applies(tuning, shape):
        pytest.skip("this architecture has no such modules")
    resolved, trainable = _resolved(TUNINGS[tuning], shape)
    adapted = _quietly(_model(shape), resolved)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == trainable


def _logits(model, dtype=None):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 19)[None]).logits


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "tuning", [{"type": "pissa", "rank": 4}, {"type": "olora", "rank": 4, "rank_stabilized": True}]
)
def test_what_is_taken_out_of_the_weights_is_in_the_pairs(tuning, shape: str) -> None:
    resolved, _ = _resolved(tuning, shape)
    before = _logits(_model(shape, "cpu"))
    adapted = _quietly(_model(shape, "cpu"), resolved)
    assert torch.allclose(_logits(adapted), before, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(_logits(adapted), before, atol=1e-3)


def test_pissa_takes_the_largest_singular_values() -> None:
    resolved, _ = _resolved({"type": "pissa", "rank": 4})
    whole = torch.linalg.svdvals(_model("llama", "cpu").model.layers[0].mlp.down_proj.weight.detach())
    adapted = _quietly(_model("llama", "cpu"), resolved)
    rest = adapted.base_model.model.model.layers[0].mlp.down_proj.get_base_layer().weight
    assert rest.norm().item() == pytest.approx(whole[4:].norm().item(), rel=2e-3)


def test_a_taken_out_pair_is_written_as_one_that_fits_the_whole_weights(tmp_path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    resolved, _ = _resolved({"type": "pissa", "rank": 4})
    adapted = _quietly(_model("llama", "cpu"), resolved)
    for _, layer in lora_layers(adapted):
        layer.lora_B["default"].weight.data += 0.02 * torch.randn_like(layer.lora_B["default"].weight)
    with as_on_disk(adapted) as state:
        adapted.save_pretrained(tmp_path, state_dict=state, save_embedding_layers=False)
    assert adapted.peft_config["default"].r == 4
    elsewhere = PeftModel.from_pretrained(_model("llama", "cpu"), tmp_path)
    assert torch.allclose(_logits(elsewhere), _logits(adapted), atol=1e-5)
    trained = as_trained(load_file(tmp_path / "adapter_model.safetensors"), adapted)
    path, layer = next(lora_layers(adapted))
    assert torch.equal(trained[f"{path}.lora_B.weight"], layer.lora_B["default"].weight)


def test_loftq_makes_up_for_a_part_of_what_four_bits_lose(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from finetui.engine.models.initial import _Checkpoint

    _model("llama", "cpu", hidden_size=64, head_dim=16, num_attention_heads=4).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    resolved, _ = _resolved({"type": "loftq", "rank": 8}, hardware={"device": "cpu"})
    adapted = _quietly(base, resolved, Ground(folder=tmp_path))
    import bitsandbytes as bnb

    whole = _Checkpoint(tmp_path)
    for path, layer in lora_layers(adapted):
        weight = layer.get_base_layer().weight
        lost = whole.tensor(path.removeprefix("base_model.model.") + ".weight")
        lost = lost - bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        pair = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        best = torch.linalg.svdvals(lost)[8:].norm() / lost.norm()
        assert ((lost - pair).norm() / lost.norm()).item() == pytest.approx(best.item(), rel=0.02)


def test_eva_begins_along_the_main_directions_of_the_data() -> None:
    resolved, _ = _resolved({"type": "eva", "rank": 4})
    rows = [{"input_ids": torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(n))} for n in range(4)]
    adapted = _quietly(_model("llama", "cpu"), resolved, Ground(rows=lambda: iter(rows)))
    seen: list[torch.Tensor] = []
    layer = adapted.base_model.model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        for row in rows:
            adapted(**row)
    handle.remove()
    x = torch.cat(seen)
    a = layer.lora_A["default"].weight.detach()
    assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-4)
    kept, best = (x @ a.T).norm() ** 2, (torch.linalg.svdvals(x)[:4] ** 2).sum()
    assert kept / best > 0.97
    assert not layer.lora_B["default"].weight.any()


def test_only_an_adapter_of_the_same_shape_goes_on(tmp_path) -> None:
    first, _ = _resolved({"type": "lora", "rank": 4})
    made = _quietly(_model("llama", "cpu"), first)
    for _, layer in lora_layers(made):
        layer.lora_B["default"].weight.data.normal_()
    made.save_pretrained(tmp_path, save_embedding_layers=False)
    again, _ = _resolved({"type": "lora", "rank": 4, "start_from": str(tmp_path)})
    assert torch.equal(_logits(_quietly(_model("llama", "cpu"), again)), _logits(made))
    for other, words in (
        ({"rank": 8}, "r 4, and the recipe says 8"),
        ({"rank": 4, "targets": ["q_proj"]}, "other modules"),
        ({"rank": 4, "use_dora": True}, "use_dora False, and the recipe says True"),
        ({"rank": 4, "start_from": str(tmp_path / "none")}, "no adapter here"),
    ):
        resolved, _ = _resolved({"type": "lora", "start_from": str(tmp_path), **other})
        with pytest.raises(UserError, match=words):
            _quietly(_model("llama", "cpu"), resolved)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_experts_are_named_once(targets) -> None:
    """PEFT counts them once, so the planner must not count them twice."""
    architecture = Architecture.from_config({"model_type": "qwen3_moe", **SHAPES["qwen2_moe"]}, "mix")
    tuning = {"type": "lora", "rank": 4, "targets": targets, "target_parameters": ["mlp.experts.down_proj"]}
    with pytest.raises(RecipeError, match=r"down_proj has no effect: targets put adapters on the experts of mix"):
        make_plan(Recipe.build({"model": "m", "tuning": tuning}), architecture, cpu_node())


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ({"type": "lora", "modules_to_save": ["nonsense"]}, "no module named 'nonsense'"),
        ({"type": "freeze", "trained_layers": 9}, "has 4 layers, not 9"),
        ({"type": "freeze", "trained_modules": ["nonsense"]}, "no module named 'nonsense'"),
        ({"type": "oft", "block_size": 32}, "block_size 32 does not divide the width 48"),
        ({"type": "lora", "target_parameters": ["mlp.experts.down_proj"]}, "no expert weights"),
        ({"type": "lora", "targets": ["c_attn"]}, "no linear module named 'c_attn'"),
    ],
)
def test_what_a_model_does_not_have_is_said_before_it_is_loaded(tuning, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        _resolved(tuning)


def test_whole_modules_are_fp32_and_speak_the_base_format() -> None:
    resolved, _ = _resolved({"type": "lora", "rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]})
    adapted = _quietly(_model("llama", "cpu").to(torch.bfloat16), resolved)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert adapted.get_input_embeddings()(torch.arange(3)).dtype == torch.bfloat16
