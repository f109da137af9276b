"""A pair whose prompt is computed once gives what its two rows give: log-probabilities, gradients, whole runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("trl")
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from finetui.engine.run import Run
from finetui.engine.trainers.shared_prompt import Layout, Shares, share_prompts
from finetui.engine.worker import attempt
from finetui.planner.errors import RecipeError
from finetui.planner.recipe import Recipe

from .conftest import events, losses

MakeRun = Callable[..., Run]
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE, "qwen3": SHAPE, "mistral": {**SHAPE, "sliding_window": 40}, "gemma": SHAPE, "olmo2": SHAPE,
    "gemma3_text": {**SHAPE, "sliding_window": 40}, "gpt2": GPT2,
}  # fmt: skip


def model_of(family: str, attention: str = "sdpa", **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, SHAPE), **more})
    config._attn_implementation = attention
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def rows() -> list[dict[str, list[int]]]:
    """Pairs of unequal lengths; one has a prompt of a single token."""
    draw = torch.Generator().manual_seed(0)
    lengths = ((9, 4, 7), (1, 5, 2), (14, 1, 1))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: torch.randint(1, 97, (n,), generator=draw).tolist() for name, n in zip(names, three, strict=True)}
        for three in lengths
    ]


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_every_token_is_found_again(multiple_of: int) -> None:
    batch = DataCollatorForPreference(pad_token_id=0)(rows())
    layout = Layout.of(Shares.of(rows(), multiple_of), batch["input_ids"].shape[1], torch.device("cpu"))
    shared = batch["input_ids"].flatten()[layout.take]
    assert shared.shape[1] == -(-20 // multiple_of) * multiple_of
    assert shared[0, :20].tolist() == [token for ids in rows()[0].values() for token in ids]
    real = batch["attention_mask"].bool()
    assert torch.equal(shared.flatten()[layout.back][real], batch["input_ids"][real])
    looks = layout.mask[0, 0]
    assert looks[12].nonzero().flatten().tolist() == list(range(13))  # the last of the better answer
    assert looks[19].nonzero().flatten().tolist() == [*range(9), *range(13, 20)]  # and of the worse one
    assert layout.positions[0, :20].tolist() == [*range(13), *range(9, 16)]


@pytest.mark.parametrize(("family", "attention"), [*((name, "sdpa") for name in FAMILIES), ("llama", "eager")])
def test_log_probabilities_and_gradients_are_those_of_separate_rows(family: str, attention: str) -> None:
    model = model_of(family, attention)
    batch = DataCollatorForPreference(pad_token_id=0)(rows())
    ids, answers = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    assert share_prompts(model, 32, contextlib.nullcontext()) == ""
    found = []
    for given in ({}, {"shares": Shares.of(rows(), 4)}):
        model.zero_grad()
        hidden = model.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state[:, :-1]
        logps = model.get_output_embeddings()(hidden).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][answers]
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        found.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (alone, gradients), (shared, theirs) = found
    exact = 1e-10 if family == "gpt2" else 1e-5  # the others take norms in fp32 whatever the model is in
    torch.testing.assert_close(shared, alone, rtol=0, atol=exact)
    torch.testing.assert_close(theirs, gradients, rtol=0, atol=exact * float(gradients.abs().max()))
    assert gradients.abs().max() > 1


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("mistral", {"sliding_window": 16}, "sees 16 tokens, and sequences have up to 32"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "not the same|no mask and positions"),  # distances, not positions
        ("mamba", {}, "not the same|no mask and positions|takes no mask"),
    ],
)
def test_models_that_can_not_share_say_why(family: str, more: dict[str, Any], why: str) -> None:
    model = model_of(family, "eager" if family != "mistral" else "sdpa", **more)
    assert re.search(why, share_prompts(model, 32, contextlib.nullcontext()))
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize(
    ("method", "tuning", "preference"),
    [
        ("dpo", "lora", {}),
        ("dpo", "full", {"loss": {"sigmoid": 1.0, "sft": 0.5}}),  # whose reference is computed ahead
        ("ipo", "qlora", {"reference": "precomputed"}),
        ("orpo", "lora", {}),
        ("simpo", "full", {}),
    ],
)
def test_a_run_is_the_same_with_and_without(
    method_run: MakeRun, method: str, tuning: str, preference: dict[str, Any]
) -> None:
    runs = []
    for share in (False, True):
        asked = {"preference": {**preference, "share_prompt": share}, "evaluation": {"holdout": 0.2, "every": 4}}
        runs.append(method_run(method, tuning, asked, steps=4, accumulation=2))
        assert attempt(runs[-1]) == 0, runs[-1].events_path.read_text()
    apart, shared = runs
    assert losses(shared) == pytest.approx(losses(apart), rel=2e-5)
    for told in ("metrics", "eval"):
        names = [{k: v for k, v in (e.get("values") or e).items() if k != "phase"} for e in events(apart, told)]
        same = [e.get("values") or e for e in events(shared, told)]
        assert len(same) == len(names) > 1
        for mine, theirs in zip(same, names, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    said = [line["line"] for line in events(shared, "log") if "computed once" in line["line"]]
    assert len(said) == 1
    assert "% fewer tokens" in said[0]
    assert not [line for line in events(apart, "log") if "computed once" in line["line"]]
    assert events(shared, "step")[-1]["tokens"] == events(apart, "step")[-1]["tokens"]
    assert events(shared, "fallback") == events(apart, "fallback")


def test_what_can_not_be_asked_is_an_error() -> None:
    asked = {"model": "m", "preference": {"share_prompt": True}}
    with pytest.raises(RecipeError, match="share_prompt has no effect when method is kto"):
        Recipe.build({**asked, "method": "kto"})
    with pytest.raises(RecipeError, match="can't be shared with tuning prompt"):
        Recipe.build({**asked, "method": "dpo", "tuning": {"type": "prompt", "virtual_tokens": 4}})
