"""What every preference method keeps of a run: exact resume, whole figures, samples, a reference that stays put."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import torch

from finetui.engine.run import Run
from finetui.engine.trainers.batches import even_batches
from finetui.engine.trainers.reference import ReferenceScores, starts_as_its_base
from finetui.engine.worker import attempt

from .conftest import events, losses

MakeRun = Callable[..., Run]
PowerCut = Callable[..., AbstractContextManager[None]]
FIGURES = {"rewards/chosen", "rewards/rejected", "rewards/margins"}


def figures(run: Run, *, held_out: bool = False) -> dict[int, dict[str, float]]:
    """The latest figures of each step."""
    told = [
        event for event in events(run, "metrics") if any(k.startswith("eval_") for k in event["values"]) == held_out
    ]
    return {event["step"]: event["values"] for event in told}


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "cpo", "simpo"])
def test_learns_to_prefer_and_says_so(method_run: MakeRun, method: str) -> None:
    recipe: dict[str, Any] = {"evaluation": {"holdout": 0.2, "every": 4}}
    if method == "orpo":
        recipe["preference"] = {"beta": 5.0}  # so that twelve steps are not spent on likelihood alone
    run = method_run(method, "lora", recipe, steps=12, micro_batch=8)
    assert attempt(run) == 0, run.events_path.read_text()
    told = figures(run)
    assert sorted(told) == list(range(1, 13))
    assert set(told[12]) >= FIGURES | ({"kl"} if method == "kto" else {"rewards/accuracies"})
    assert all(math.isfinite(value) for values in told.values() for value in values.values())
    assert told[12]["rewards/margins"] > told[1]["rewards/margins"]
    held_out = figures(run, held_out=True)
    assert sorted(held_out) == [0, 4, 8, 12]
    assert {f"eval_{name}" for name in FIGURES} <= set(held_out[12])
    assert held_out[12]["eval_rewards/margins"] > held_out[0]["eval_rewards/margins"]
    assert {sample["step"] for sample in events(run, "sample")} == {0, 12}
    assert events(run, "warning") == []
    assert not (run.output_path / "ref").exists()


@pytest.mark.parametrize(
    ("method", "tuning", "preference"),
    [
        ("dpo", "lora", {}),
        ("dpo", "full", {}),
        ("kto", "lora", {}),
        ("kto", "full", {}),
        ("kto", "lora", {"loss": "bco"}),
        ("orpo", "lora", {}),
        ("reward", "lora", {}),
        ("reward", "full", {}),
    ],
)
def test_an_interrupted_run_continues_exactly(
    method_run: MakeRun, power_cut: PowerCut, method: str, tuning: str, preference: dict[str, Any]
) -> None:
    recipe = {"preference": preference} if preference else {}
    recipe |= {"evaluation": {"holdout": 0.2, "every": 2}}
    whole, cut = (method_run(method, tuning, recipe, accumulation=2) for _ in range(2))
    assert attempt(whole) == 0
    with power_cut():
        assert attempt(cut) == 1
    assert attempt(cut) == 0
    assert [step["step"] for step in events(cut, "step")] == [1, 2, 3, 3, 4, 5, 6]
    assert losses(cut) == losses(whole)
    assert figures(cut) == figures(whole)
    assert events(cut, "step")[-1]["tokens"] == events(whole, "step")[-1]["tokens"]
    assert figures(cut, held_out=True)[6] == figures(whole, held_out=True)[6]


@pytest.mark.parametrize("method", ["dpo", "orpo", "cpo", "reward"])
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(method_run: MakeRun, method: str) -> None:
    whole = method_run(method, "full", steps=3, micro_batch=8)
    cut = method_run(method, "full", steps=3, micro_batch=2, accumulation=4)
    assert attempt(whole) == attempt(cut) == 0
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


def test_a_full_model_needs_no_copy_of_itself(method_run: MakeRun) -> None:
    ahead = method_run("dpo", "full", steps=4)
    live = method_run("dpo", "full", {"preference": {"reference": "live"}}, steps=4)
    assert attempt(ahead) == attempt(live) == 0
    assert losses(ahead) == pytest.approx(losses(live), rel=1e-5)
    assert [event["what"] for event in events(live, "fallback")] == ["a copy of the model is held as reference"]
    assert events(ahead, "fallback") == []
    assert any("reference" in event["phase"] for event in events(ahead, "phase"))
    (scores,) = (ahead.path / "data").glob("reference-*/train/rank0.jsonl")
    assert len([line for line in scores.read_text().splitlines() if line]) == 16  # the rows of four steps of four


def test_stop_while_the_reference_is_computed(method_run: MakeRun) -> None:
    run = method_run("dpo", "full", steps=4)
    run.request("stop")
    assert attempt(run) == 0
    assert events(run, "step") == []
    run.withdraw("stop")
    assert attempt(run) == 0
    assert len(losses(run)) == 4


def test_adapters_that_change_the_base_keep_a_copy_as_reference(method_run: MakeRun) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = method_run("dpo")
    model = AutoModelForCausalLM.from_pretrained(run.recipe.model)
    assert not starts_as_its_base(model, nullcontext())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert starts_as_its_base(adapted, nullcontext())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not starts_as_its_base(adapted, nullcontext())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("method", "tuning"), [("kto", "lora"), ("dpo", "qlora"), ("orpo", "lora")])
def test_adapters_in_fp32_on_a_base_in_16_bits(method_run: MakeRun, method: str, tuning: str, device: str) -> None:
    reference = {"preference": {"reference": "live"}} if method == "dpo" else {}
    run = method_run(method, tuning, reference, precision="bf16", steps=1, device=device)
    assert attempt(run) == 0, run.events_path.read_text()


def test_scores_are_read_back_and_only_the_missing_are_computed(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def score(rows: list[int]) -> list[tuple[float, float]]:
        asked.append(rows)
        return [(0.1 * row, -1 / 3 * row) for row in rows]

    def complete(stop: bool) -> Any:
        return ReferenceScores(tmp_path, 0, 1).complete(
            [4, 0, 2, 3], score, size=2, device=torch.device("cpu"), stopped=lambda: stop, told=lambda *_: None
        )

    assert complete(stop=True) is None
    with open(tmp_path / "rank0.jsonl", "a") as file:
        file.write("[2, 0.")  # killed in the middle of a line
    assert complete(stop=False) == {row: (0.1 * row, -1 / 3 * row) for row in (4, 0, 2, 3)}
    assert asked == [[4, 0], [2, 3]]


@pytest.mark.parametrize(("rows", "size", "world"), [(10, 4, 1), (10, 4, 2), (3, 2, 4), (9, 4, 2), (1, 4, 1)])
def test_every_rank_measures_as_many_batches(rows: int, size: int, world: int) -> None:
    parts = [list(even_batches(rows, size, world, rank)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(1 <= len(chosen) <= size for part in parts for chosen, _ in part)
    share: dict[int, float] = {}
    for part in parts:
        for chosen, weight in part:
            for row in chosen:
                share[row] = share.get(row, 0.0) + weight / len(chosen)
    assert share == pytest.approx(dict.fromkeys(range(rows), 1 / rows))


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_a_reward_model_loads_and_tells_good_from_bad(method_run: MakeRun, tuning: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = method_run("reward", tuning, {"evaluation": {"holdout": 0.2, "every": 10}}, steps=20, micro_batch=8)
    assert attempt(run) == 0, run.events_path.read_text()
    told = figures(run)
    assert set(told[20]) >= {"rewards/accuracies", "rewards/margins", "rewards/mean", "rewards/min", "rewards/max"}
    assert figures(run, held_out=True)[20]["eval_rewards/accuracies"] == 1.0
    output = run.output_path
    if tuning == "full":
        model: Any = AutoModelForSequenceClassification.from_pretrained(output)
        assert json.loads((output / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    else:
        base = AutoModelForSequenceClassification.from_pretrained(run.recipe.model, num_labels=1)
        model = PeftModel.from_pretrained(base, str(output))
    tokenizer = AutoTokenizer.from_pretrained(output)
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = ["what is colour 5? blue like the sky</s>", "what is colour 5? green as</s>"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        good, bad = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert good > bad


def test_what_a_method_can_not_be_asked_is_said(method_run: MakeRun) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetui.engine.chat import load_tuned
    from finetui.planner.errors import RunError

    reward, pairs = method_run("reward", steps=1), method_run("dpo", steps=1)
    assert attempt(reward) == attempt(pairs) == 0
    with pytest.raises(RunError, match="scores answers, it does not write"):
        load_tuned(reward)
    words = torch.arange(3, 12)[None]
    base = AutoModelForCausalLM.from_pretrained(pairs.recipe.model)
    with torch.no_grad():
        untuned = base(words).logits
        expected = PeftModel.from_pretrained(base, str(pairs.output_path))(words).logits
        spoken = load_tuned(pairs).model(words).logits
    torch.testing.assert_close(spoken, expected)
    assert not torch.allclose(spoken, untuned, atol=1e-4)


def test_a_reward_adapter_merges_into_a_model_that_scores(method_run: MakeRun, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from finetui.engine.export.merged import export_merged

    run = method_run("reward", "lora", steps=3)
    assert attempt(run) == 0
    export_merged(run, tmp_path / "merged")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.num_labels == 1
