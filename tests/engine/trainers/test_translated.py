"""States of one AdamW, gone on with by another: moments stay what they were, as nearly as 8 bits tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")
import bitsandbytes

from finetui.engine.trainers.optimizers import Muon
from finetui.engine.trainers.translated import translated
from finetui.kernels.adamw import AdamW
from finetui.kernels.blockwise import dequantised

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((40, 130), (7,))  # 8 bits, the last block a part of one; 32 bits
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01}
Make = Callable[[list[torch.nn.Parameter]], Any]
MAKERS: dict[str, Make] = {
    "fused": lambda params: AdamW(params, states="8bit", **OPTIONS),
    "bitsandbytes": lambda params: bitsandbytes.optim.AdamW8bit(params, **OPTIONS),
}


def begun(make: Make, steps: int = 3) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]
    optimizer = make(params)
    for step in range(steps):
        advance(params, optimizer, step)
    return params, optimizer


def advance(params: list[torch.nn.Parameter], optimizer: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** -torch.rand(p.shape, generator=generator)).to(
            DEVICE
        )
    optimizer.step()


def moments(optimizer: Any, p: torch.nn.Parameter) -> list[torch.Tensor]:
    state = optimizer.state[p]
    if "exp_avg" in state:
        return [dequantised(state, name).float() for name in ("exp_avg", "exp_avg_sq")]
    if state["state1"].is_floating_point():
        return [state["state1"], state["state2"]]
    return [
        bitsandbytes.functional.dequantize_blockwise(
            state[f"state{n}"], absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=256
        )
        for n in (1, 2)
    ]


@pytest.mark.parametrize(("before", "after"), [("fused", "bitsandbytes"), ("bitsandbytes", "fused")])
def test_another_adamw_goes_on_where_one_was(before: str, after: str) -> None:
    params, optimizer = begun(MAKERS[before])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = MAKERS[after](copies)
    told, changed = translated(other, copy.deepcopy(optimizer.state_dict()))
    assert changed
    other.load_state_dict(told)
    assert other.param_groups[0]["weight_decay"] == 0.01
    large, small = zip(params, copies, strict=True)
    for mine, theirs in zip(moments(optimizer, large[0]), moments(other, large[1]), strict=True):
        assert torch.linalg.vector_norm(mine - theirs) < 0.02 * torch.linalg.vector_norm(mine)
    assert all(map(torch.equal, moments(optimizer, small[0]), moments(other, small[1])))
    was = [p.detach().clone() for p in params]
    advance(params, optimizer, 9)
    advance(copies, other, 9)
    for p, q, old in zip(params, copies, was, strict=True):
        step = p.detach() - old
        assert torch.linalg.vector_norm(step - (q.detach() - old)) < 0.1 * torch.linalg.vector_norm(step)
    assert int(other.state[copies[0]]["step"]) == 4


def test_a_second_moment_never_becomes_nothing() -> None:
    params, optimizer = begun(MAKERS["fused"])
    state = optimizer.state[params[0]]
    state["exp_avg_sq"].fill_(1)  # a millionth of the largest one of its block, but not nothing
    state["exp_avg_sq"].view(-1)[::256] = 255
    told, _ = translated(MAKERS["bitsandbytes"](params), optimizer.state_dict())
    made = told["state"][0]
    assert (made["qmap2"][made["state2"].long()] > 0).all()


def test_what_needs_no_other_format_stays_as_it_is() -> None:
    params, optimizer = begun(MAKERS["fused"])
    saved = optimizer.state_dict()
    told, changed = translated(MAKERS["fused"](params), saved)
    assert not changed
    assert told["state"] is saved["state"]
    assert told["param_groups"] == saved["param_groups"]


def test_several_optimisers_as_one_keep_what_they_wrote() -> None:
    params = [torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))]
    muon = Muon(
        [{"params": params, "weight_decay": 0.0}], lr=1e-3, matrices={id(params[0])}, momentum=0.95,
        betas=(0.9, 0.99), eps=1e-8,
    )  # fmt: skip
    saved = muon.state_dict()
    assert translated(muon, saved) == (saved, False)


def test_settings_that_another_adamw_does_not_have_are_ones_own() -> None:
    params, optimizer = begun(lambda params: torch.optim.AdamW(params, **OPTIONS))
    fused = AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], states="fp32", **OPTIONS)
    told, changed = translated(fused, optimizer.state_dict())
    assert not changed  # in 32 bits they are one
    fused.load_state_dict(told)
    advance(params, optimizer, 9)
    advance(fused.param_groups[0]["params"], fused, 9)
    for p, q in zip(params, fused.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
