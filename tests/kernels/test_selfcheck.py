"""The check fails what is wrong, and remembers what it found exactly as long as it holds."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from finetui.kernels import selfcheck
from finetui.kernels.selfcheck import Verdict, compare, proven


class Scale(torch.autograd.Function):
    """2x whose gradient is what it is told to be."""

    slope = 2.0

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * Scale.slope


def double(x):
    return x * 2


INPUT = (torch.linspace(-3, 3, 50).reshape(5, 10),)


def test_a_right_operation_passes():
    assert compare(Scale.apply, double, double, INPUT) == Verdict(True)


@pytest.mark.parametrize(
    ("slope", "why"), [(2.001, "gradient 0: error"), (0.0, "gradient 0 is zero"), (float("nan"), "not finite")]
)
def test_a_wrong_gradient_fails(monkeypatch, slope, why):
    monkeypatch.setattr(Scale, "slope", slope)
    verdict = compare(Scale.apply, double, double, INPUT)
    assert not verdict.ok
    assert why in verdict.why


def test_a_wrong_output_or_dtype_fails():
    assert "output 0: error" in compare(lambda x: x * 2.001, double, double, INPUT).why
    assert "stock's" in compare(lambda x: (x * 2).half(), double, double, INPUT).why


class Rough(torch.autograd.Function):
    """2x whose gradients are off by a share of themselves, another one in each call."""

    @staticmethod
    def forward(ctx, x, shares):
        ctx.share = shares.pop(0) if shares else 0.0
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2 * (1 + ctx.share), None


@pytest.mark.parametrize(
    ("ours", "ok"),
    [([1.5e-3, *[0.8e-3] * 4], True), ([1.5e-3] * 5, False), ([3e-3, *[0.1e-3] * 4], False)],
    ids=["an unlucky draw", "worse in every draw", "too far off for luck"],
)
def test_a_close_failure_is_judged_by_more_draws(ours, ok):
    stock = [1e-3] * 5
    verdict = compare(lambda x: Rough.apply(x, ours), lambda x: Rough.apply(x, stock), double, INPUT)
    assert verdict.ok is ok, verdict.why


def ask(trial, shape="s", source=__file__):
    return proven("k", source, torch.device("cpu"), shape, trial)


def never():
    raise AssertionError("this verdict should have been remembered")


def test_a_verdict_is_kept_in_memory_and_on_disk():
    assert ask(lambda: Verdict(False, "because", 3.0)).why == "because"
    assert ask(never).why == "because"
    selfcheck.forget()
    assert ask(never) == Verdict(False, "because", 3.0)
    assert ask(lambda: Verdict(True), shape="another").ok
    assert len(json.loads(selfcheck.cache_file().read_text())) == 2


def test_a_changed_kernel_is_proven_again(tmp_path):
    for text in ("one", "two"):
        (tmp_path / f"{text}.py").write_text(text)
    ask(lambda: Verdict(False, "wrong"), source=str(tmp_path / "one.py"))
    assert ask(lambda: Verdict(True), source=str(tmp_path / "two.py")).ok


def test_whose_code_a_module_is_is_known_by_version_or_by_hash(monkeypatch, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    known = selfcheck.origins(adapted)
    assert [origin.partition(" ")[0] for origin in known] == ["peft", "torch"]
    monkeypatch.setattr("peft.__version__", "99")
    assert "peft 99" in selfcheck.origins(adapted)

    def written(name, text):
        (tmp_path / f"{name}.py").write_text(f"import torch\nclass Own(torch.nn.Module):\n    {text}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return selfcheck.origins(importlib.import_module(name).Own())

    one, other = written("code_a", "size = 1"), written("code_b", "size = 2")
    assert one[0].partition(" ")[2] != other[0].partition(" ")[2]


def test_an_error_is_a_failed_verdict_that_is_not_stored():
    verdict = ask(lambda: 1 / 0)
    assert verdict == Verdict(False, "ZeroDivisionError: division by zero")
    assert not selfcheck.cache_file().exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_spoilt_cache_is_replaced(text):
    selfcheck.cache_file().parent.mkdir()
    selfcheck.cache_file().write_text(text)
    assert ask(lambda: Verdict(True)).ok
    assert len(json.loads(selfcheck.cache_file().read_text())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "file" / "below"))
    assert ask(lambda: Verdict(True)).ok


def test_kernels_pass_here_and_leave_the_random_state_alone(device):
    before = torch.random.get_rng_state()
    assert selfcheck.prove_rms_norm(device, torch.float16, torch.float32, 48, 1e-5, "cast-first").ok
    assert selfcheck.prove_glu(device, torch.bfloat16, 77, "gelu-erf").ok
    assert torch.equal(before, torch.random.get_rng_state())
