"""Patching: what is recognised, that nothing else is touched, and that losses and gradients stay stock's."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from finetui.kernels import patch, recognise, rms_norm, selfcheck
from finetui.kernels.patch import patch_model, unpatch
from finetui.kernels.replacement import Replacement

VOCABULARY = 61
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Norm(nn.Module):
    def __init__(self, form, columns=24, eps=1e-5):
        super().__init__()
        self.weight, self.eps, self.form = nn.Parameter(torch.ones(columns)), eps, form

    def forward(self, x):
        return rms_norm.rms_norm_reference(x, self.weight, self.eps, self.form)


class MLP(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def tiny(kind, **sizes):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **sizes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def loss_and_gradients(model):
    ids = torch.randint(3, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(3)).to(model.device)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", rms_norm.FORMS)
def test_the_form_of_a_norm_is_found_by_running_it(form):
    assert recognise.norm(Norm(form)) == recognise.Norm(form, 1e-5)


def test_norms_that_behave_otherwise_are_left(device):
    class Centred(Norm):
        def forward(self, x):
            return super().forward(x - x.mean(-1, keepdim=True))

    class OtherEps(Norm):
        def forward(self, x):
            return rms_norm.rms_norm_reference(x, self.weight, 3e-5, self.form)

    class Gated(Norm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    model = nn.ModuleDict({"a": Centred("cast-first"), "b": OtherEps("cast-first"), "c": Gated("cast-first")}).to(
        device
    )
    report = patch_model(model)
    assert [item.replaced for item in report.items] == [False, False, False]
    assert "forward" not in vars(model["a"])


@pytest.mark.parametrize(
    ("act", "name"),
    [(nn.SiLU(), "silu"), (nn.GELU(approximate="tanh"), "gelu-tanh"), (nn.GELU(), "gelu-erf"), (nn.ReLU(), None)],
)
def test_activations_are_known_by_their_values(act, name):
    assert recognise.activation_of(act, torch.device("cpu")) == name


def test_mlps_that_behave_otherwise_are_left(device):
    class Multiplied(MLP):
        def forward(self, x):
            return super().forward(x) * 1.5

    class Dropped(MLP):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    model = nn.ModuleDict({"a": Multiplied(), "b": Dropped().eval(), "c": MLP(nn.Tanh()), "d": MLP()}).to(device)
    report = patch_model(model)
    assert {item.path: item.replaced for item in report.items} == {"a": False, "b": False, "c": False, "d": True}
    assert "does more" in report.items[0].why
    assert "Tanh" in report.items[2].why
    assert not model["b"].training


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text", "olmo2", "phi3"])
def test_losses_and_gradients_of_real_models_stay_the_same(device, kind):
    model = with_lora(tiny(kind)).to(device)
    loss, gradients = loss_and_gradients(model)
    report = patch_model(model)
    # Whole layers have tests of their own (test_decoder_layer.py); with eager attention they are left as they are.
    assert {item.kernel for item in report.left} <= {"decoder_layer"}, report.summary()
    assert {item.kernel for item in report.replaced} == {*patch.KERNELS} - {"decoder_layer"}
    new_loss, new_gradients = loss_and_gradients(model)
    torch.testing.assert_close(new_loss, loss, rtol=1e-5, atol=0)
    assert new_gradients.keys() == gradients.keys()
    for name, gradient in new_gradients.items():
        assert gradient.any(), name
        assert (gradient - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name
    assert unpatch(model) == len({item.path for item in report.replaced})
    assert torch.equal(loss_and_gradients(model)[0], loss)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"lora_dropout": 0.1}, "dropout"), ({"use_dora": True}, "left to PEFT"), ({"lora_bias": True}, "has a bias")],
)
def test_adapters_of_other_kinds_are_left_to_peft(device, options, why):
    model = with_lora(tiny("llama"), **options).to(device)
    report = patch_model(model, only=["lora", "glu"])
    assert all(why in item.why for item in report.left)
    assert {item.kernel for item in report.left} == {"lora"}
    model.eval()  # dropout would differ from one run to the next
    loss, gradients = loss_and_gradients(model)
    unpatch(model)
    expected_loss, expected = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


def test_adapters_that_change_after_patching(device):
    model = with_lora(tiny("llama")).to(device)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, SIZES["hidden_size"], device=device)
    patch_model(model)
    ours, off = layer(x), None
    with model.disable_adapter():
        off = layer(x)
    assert "switched off" in patch.fallbacks(model)[0].why
    torch.testing.assert_close(off, layer.base_layer(x))
    assert (ours - off).norm() > 0.01 * off.norm()
    model.merge_adapter()
    torch.testing.assert_close(layer(x), ours, rtol=1e-3, atol=1e-5)
    model.unmerge_adapter()
    layer.base_layer.weight.requires_grad_(True)  # PEFT's own forward gives a trained base its gradient
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad.any()


def test_hooks_on_projections_still_fire(device):
    model = with_lora(tiny("llama")).to(device)
    patch_model(model)
    seen = []
    model.base_model.model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    loss_and_gradients(model)
    assert seen == [1]


def test_nf4_models_keep_their_losses_and_gradients(device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Whole blocks per row: bitsandbytes' CPU code takes one scale for all blocks of narrower weights.
    model = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16).half()
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                linear = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.float16, quant_type="nf4"
                )
                linear.load_state_dict(child.state_dict())
                setattr(parent, name, linear)
    model = with_lora(model.to(device)).train()  # in evaluation, bitsandbytes repacks weights for some CPUs
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    loss, gradients = loss_and_gradients(model)
    report = patch_model(model)
    # Whole layers have tests of their own (test_decoder_layer.py); with eager attention they are left as they are.
    assert {item.kernel for item in report.left} <= {"decoder_layer"}, report.summary()
    assert sum(item.kernel == "lora" for item in report.replaced) == 14
    new_loss, new_gradients = loss_and_gradients(model)
    torch.testing.assert_close(new_loss, loss, rtol=2e-3, atol=0)
    for name, gradient in gradients.items():
        assert (new_gradients[name] - gradient).norm() <= 2e-2 * gradient.norm(), name


def test_a_checkpointed_model_keeps_its_gradients(device):
    model = with_lora(tiny("llama")).to(device).train()
    _, gradients = loss_and_gradients(model)
    patch_model(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():  # so that proofs happen within a checkpointed forward, as for an unforeseen dtype
        if patch.STATE in vars(module):
            vars(module)[patch.STATE].verdicts.clear()
    selfcheck.forget()
    selfcheck.cache_file().unlink()
    _, new_gradients = loss_and_gradients(model)
    for name, gradient in gradients.items():
        assert (new_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_an_fp32_model_under_autocast(device):
    model = with_lora(tiny("qwen3")).to(device).train()
    _, exact = loss_and_gradients(model)

    def error(gradients):
        return sum((gradients[name] - exact[name]).norm() ** 2 for name in exact) ** 0.5

    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model)
        report = patch_model(model, dtype=torch.bfloat16)
        new_loss, new_gradients = loss_and_gradients(model)
    assert {item.kernel for item in report.left} <= {"decoder_layer"}, report.summary()
    assert patch.fallbacks(model) == []
    torch.testing.assert_close(new_loss, loss, rtol=2e-3, atol=0)
    # The interpreter cuts to bf16 where a GPU rounds, which alone doubles an error.
    assert error(new_gradients) <= (1.2 if device.type == "cuda" else 2.5) * error(gradients)


def test_rotary_of_another_layout_or_kind(device):
    assert {i.why for i in patch_model(tiny("cohere").to(device), only=["rope"]).items} == {"interleaved"}
    assert {i.why for i in patch_model(tiny("glm").to(device), only=["rope"]).items} == {"interleaved-shared"}


def test_only_this_instance_is_touched(device):
    model, other = tiny("llama").to(device), tiny("llama").to(device)
    forward, keys = type(model.model.norm).forward, list(model.state_dict())
    patch_model(model)
    assert type(model.model.norm).forward is forward
    assert list(model.state_dict()) == keys
    assert not any("forward" in vars(module) for module in other.modules())


def test_only_the_kernels_asked_for(device):
    model = nn.ModuleDict({"norm": Norm("cast-first"), "mlp": MLP()}).to(device)
    assert [item.path for item in patch_model(model, only=["glu"]).replaced] == ["mlp"]
    with pytest.raises(ValueError, match="no such kernel: gelu"):
        patch_model(model, only=["gelu"])


def test_twice_is_once_and_copies_stand_alone(device):
    model = nn.ModuleDict({"norm": Norm("cast-last"), "mlp": MLP()}).to(device)
    assert len(patch_model(model).replaced) == len(patch_model(model).replaced) == 2
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin["norm"].weight.mul_(3)
    x = torch.randn(2, 24, device=device)
    torch.testing.assert_close(twin["norm"](x), 3 * model["norm"](x))
    assert unpatch(model) == 2
    assert unpatch(twin) == 2


def test_a_forward_that_something_else_replaced_is_left(device):
    norm = Norm("cast-first").to(device)
    hooked = norm.forward = lambda x: x  # as accelerate's hooks do
    report = patch_model(nn.Sequential(norm))
    assert "already replaced" in report.items[0].why
    assert norm.forward is hooked


def test_an_unproven_kernel_is_not_used(device, monkeypatch):
    monkeypatch.setattr(selfcheck, "prove_rms_norm", lambda *_: selfcheck.Verdict(False, "output 0: error"))
    report = patch_model(nn.Sequential(Norm("cast-first").to(device)))
    assert (report.items[0].replaced, report.items[0].why) == (False, "output 0: error")


def test_an_input_of_another_dtype_is_proven_when_it_comes(device, monkeypatch):
    model = nn.Sequential(Norm("cast-first").to(device))
    patch_model(model)
    monkeypatch.setattr(selfcheck, "prove_rms_norm", lambda *_: selfcheck.Verdict(False, "inexact"))
    assert patch.fallbacks(model) == []
    monkeypatch.setattr(rms_norm, "rms_norm", None)  # using the kernel would now be an error
    x = torch.randn(2, 24, device=device).half()
    torch.testing.assert_close(model(x), rms_norm.rms_norm_reference(x, model[0].weight, 1e-5))
    assert patch.fallbacks(model) == [Replacement("0", "rms_norm", False, "inexact")]
    assert model(torch.randn(2, 24, device=device).double()).dtype == torch.float64
    assert "float64" in patch.fallbacks(model)[0].why


def test_meta_weights_are_left():
    with torch.device("meta"):
        model = nn.ModuleDict({"norm": Norm("cast-first"), "mlp": MLP()})
    assert all("not loaded" in item.why for item in patch_model(model).items)


def test_modules_without_a_gpu_are_left(monkeypatch):
    from finetui.kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    report = patch_model(nn.ModuleDict({"norm": Norm("cast-first"), "mlp": MLP()}))
    assert [item.replaced for item in report.items] == [False, False]
    assert report.summary()[0] == "rms_norm: 1 left (it is on cpu, and these kernels need a GPU; norm)"


def test_without_triton_everything_is_left():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from finetui.kernels.patch import patch_model\n"
        "print(*patch_model(torch.nn.RMSNorm(8)).summary())"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("all: 1 left (Triton can't be imported")


def test_a_patched_module_pickles(device):
    norm = nn.Sequential(nn.RMSNorm(16, eps=1e-5)).to(device)
    assert patch_model(norm).replaced
    assert unpatch(pickle.loads(pickle.dumps(norm))) == 1
