"""Whole evaluations of runs that were trained for a moment: what they say is what training said, and does not depend
on how the work is cut."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from finetui.engine.evaluation.answers import Generation
from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.planner.errors import ModelError, RecipeError, RunError
from finetui.planner.rollout import Reward

from ..yardstick import evaluate_run
from .conftest import figures

MakeRun = Callable[..., Run]
Evaluate = Callable[..., dict[str, Any]]
ANSWERS = ("red like a rose", "blue like the sky", "green as grass", "as white as snow")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def metrics(run: Run) -> dict[str, float]:
    """The run's own held-out figures, the newest."""
    told = [event.data["values"] for event in read_events(run.events_path) if event.type == "metrics"]
    return next(one for one in reversed(told) if any(name.startswith("eval_") for name in one))


@pytest.mark.parametrize("tuning", ["lora", "full", "qlora", "prompt"])
def test_the_loss_is_that_of_the_run_for_the_model_and_for_its_base(
    trained_run: MakeRun, evaluated: Evaluate, tuning: str
) -> None:
    run = trained_run(tuning=tuning, learning_rate=3e-3 if tuning == "full" else 1e-2)
    told = evaluated(run)
    assert [model["label"] for model in told["models"]] == ["base", run.name]
    for label, base in (("base", True), (run.name, False)):
        held_out, mine = evaluate_run(run, base=base), figures(told, label)
        assert mine["loss"] == pytest.approx(held_out.loss, rel=1e-5)
        assert mine["accuracy"] == pytest.approx(held_out.accuracy, abs=1e-6)
        assert mine["perplexity"] == pytest.approx(math.exp(held_out.loss), rel=1e-4)
    difference = next(one for one in told["differences"] if one["figure"] == "loss")
    assert difference["value"] == pytest.approx(figures(told)["loss"] - figures(told, "base")["loss"], abs=2e-6)
    assert difference["verdict"] == "too few rows"  # four of 28


def test_the_same_in_batches_of_any_size_packed_or_not_with_the_bytes_of_the_answers(
    trained_run: MakeRun, evaluated: Evaluate
) -> None:
    plain, packed = (trained_run(packing=packing, recipe={"evaluation": {"holdout": 0.4}}) for packing in (False, True))
    one, many = (evaluated(plain, batch=size, answers=11) for size in (1, 7))
    for label in ("base", plain.name):
        assert figures(one, label) == pytest.approx(figures(many, label), rel=1e-5)
    assert [sample["answers"] for sample in one["samples"]] == [sample["answers"] for sample in many["samples"]]
    assert [s["expected"][0] in ANSWERS for s in one["samples"]] == [True] * 11
    assert one["samples"][0]["prompt"].endswith("?")
    apart = evaluated(packed, batch=3)
    assert apart["rows"]["count"] == one["rows"]["count"] == 11
    assert figures(apart, "base")["loss"] == pytest.approx(figures(one, "base")["loss"], rel=1e-5)
    loss = one["evaluation"].entries[0].figures["loss"]
    read = sum(len(sample["expected"][0]) for sample in one["samples"])
    assert figures(one, "base")["bits_per_byte"] == pytest.approx(sum(loss.parts) / math.log(2) / read, rel=1e-5)


def test_answers_are_those_of_one_prompt_alone(trained_run: MakeRun, evaluated: Evaluate) -> None:
    import torch

    from finetui.engine.chat import load_tuned
    from finetui.engine.data.template import stop_token_ids

    run = trained_run(tuning="full", learning_rate=5e-3, steps=30, recipe={"evaluation": {"holdout": 0.3}})
    told = evaluated(run, answers=64, base=False, batch=5, generation=Generation(12))
    tuned = load_tuned(run, device="cpu")
    questions = told["evaluation"].questions
    assert len({len(question.ids) for question in questions}) > 1  # so that batches are padded
    for question, sample in zip(questions, told["samples"], strict=True):
        out = tuned.model.generate(
            input_ids=torch.tensor([question.ids]), do_sample=False, max_new_tokens=12, use_cache=True,
            eos_token_id=stop_token_ids(tuned.tokenizer),
        )  # fmt: skip
        alone = tuned.tokenizer.decode(out[0, len(question.ids) :], skip_special_tokens=True).strip()
        assert sample["answers"][run.name] == alone
    assert any(sample["answers"][run.name] for sample in told["samples"])


@pytest.mark.slow
def test_draws_do_not_depend_on_the_batch_but_on_the_seed(trained_run: MakeRun, evaluated: Evaluate) -> None:
    run = trained_run(steps=1, recipe={"evaluation": {"holdout": 0.3}})

    def said(seed: int, batch: int) -> list[str]:
        told = evaluated(run, answers=6, base=False, batch=batch, generation=Generation(6, 1.0, seed))
        return [sample["answers"][run.name] for sample in told["samples"]]

    assert said(1, 1) == said(1, 4) != said(2, 4)


@pytest.mark.parametrize(
    ("method", "tuning"),
    [
        ("dpo", "lora"),
        ("reward", "lora"),
        pytest.param("dpo", "full", marks=pytest.mark.slow),
        pytest.param("simpo", "lora", marks=pytest.mark.slow),
    ],
)
def test_preferences_are_those_of_the_run(
    trained_run: MakeRun, evaluated: Evaluate, tmp_path: Path, method: str, tuning: str
) -> None:
    rows = [
        {"prompt": f"{'what is ' * (1 + i % 3)}colour {i}?", "chosen": f" {ANSWERS[i % 4]}",
         "rejected": f" {ANSWERS[(i + 1) % 4][: 6 + i % 5]}"} for i in range(24)
    ]  # fmt: skip
    data = write(tmp_path / "pairs.jsonl", rows)
    run = trained_run(
        tuning=tuning, recipe={"method": method, "data": str(data), "evaluation": {"holdout": 0.25, "every": 6}},
        method=method, learning_rate=1e-3 if tuning == "full" else 1e-2,
    )  # fmt: skip
    told = evaluated(run)
    mine, theirs = figures(told), metrics(run)
    if method != "simpo":  # which has no reference
        assert mine["reward_margin"] == pytest.approx(theirs["eval_rewards/margins"], rel=1e-3, abs=1e-5)
        assert mine["reward_accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"], abs=1e-5)
    assert set(mine) == {"reward_accuracy", "reward_margin"} | (set() if method == "reward" else {"likelier"})
    assert [model["label"] for model in told["models"]] == (["base"] if method != "reward" else []) + [run.name]


@pytest.mark.slow
def test_judged_answers(trained_run: MakeRun, evaluated: Evaluate, tmp_path: Path) -> None:
    rows = [{"prompt": f"colour {i}?", "completion": f" {ANSWERS[i % 4]}", "label": i % 3 != 0} for i in range(24)]
    recipe = {"method": "kto", "data": str(write(tmp_path / "judged.jsonl", rows)), "evaluation": {"holdout": 0.3}}
    run = trained_run(recipe=recipe, method="kto")
    told = evaluated(run)
    assert set(figures(told)) == {"reward_accuracy", "reward_margin"}
    theirs, entry = metrics(run), told["evaluation"].entries[-1]
    good = [c.good[0] for c in held_out(run)]
    margins = entry.figures["reward_margin"].parts
    mean = sum(margin for margin, is_good in zip(margins, good, strict=True) if is_good) / sum(good)
    assert mean == pytest.approx(theirs["eval_rewards/chosen"], rel=1e-3, abs=1e-5)


def held_out(run: Run) -> Any:
    from finetui.engine.evaluation.rows import held_out_rows
    from finetui.engine.models.load import load_tokenizer

    return held_out_rows(run, load_tokenizer(run.output_path)[0], None).compared


def test_prompts_are_answered_and_marked_by_the_rewards_of_the_recipe_or_by_others(
    trained_run: MakeRun, evaluated: Evaluate, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def shout(prompts, completions, place):\n    return [float(p == 'home') for p in place]\n"
    )
    rows = [{"prompt": f"colour {i}?", "answer": "red", "place": "home" if i % 2 else "away"} for i in range(12)]
    data = write(tmp_path / "prompts.jsonl", rows)
    recipe = {"method": "grpo", "data": str(data), "evaluation": {"holdout": 0.3}, "rewards": ["exact-answer"],
              "rollout": {"max_completion_length": 4, "num_generations": 2}}  # fmt: skip
    run = trained_run(recipe=recipe, method="grpo", micro_batch=2, steps=1)
    told = evaluated(run, answers=8)
    assert {"exact_match", "f1", "rouge_l", "score/exact-answer"} == set(figures(told))
    by_name = {"rewards": (Reward(function=f"{tmp_path}/mine.py:shout"), Reward(function="regex", pattern="."))}
    told = evaluated(run, data=str(data), limit=7, answers=7, base=False, **by_name)
    assert figures(told)["score/shout"] == pytest.approx(3 / 7, abs=1e-6)
    shout = told["models"][0]["figures"]["score/shout"]
    assert (shout["interval"], shout["rows"]) == ("wilson", 7)
    with pytest.raises(RecipeError, match="name the file itself with --data"):
        evaluated(run, answers=4, rewards=(Reward(function="python-tests"),))


def test_checkpoints_and_runs_side_by_side_ask_one_base_once(trained_run: MakeRun, evaluated: Evaluate) -> None:
    first, second = trained_run(), trained_run(learning_rate=1e-4)
    told = evaluated(first, second, checkpoints=["4", "result"])
    labels = [model["label"] for model in told["models"]]
    assert labels == ["base", f"{first.name} step-000004", first.name, f"{second.name} step-000004", second.name]
    assert {one["against"] for one in told["differences"]} == {"base"}
    told_by_run = {event.data["step"]: event.data["loss"] for event in read_events(first.events_path)
                   if event.type == "eval"}  # fmt: skip
    assert figures(told, labels[1])["loss"] == pytest.approx(told_by_run[4], rel=1e-5)
    assert figures(told, labels[2])["loss"] == pytest.approx(told_by_run[6], rel=1e-5)
    assert told["notes"] == []
    plain = evaluated(first, second, base=False)
    assert {(one["model"], one["against"]) for one in plain["differences"]} == {(second.name, first.name)}


def test_rows_that_may_have_been_seen_and_prompts_without_room_are_told(
    trained_run: MakeRun, evaluated: Evaluate, rows_file: Path
) -> None:
    first, other = trained_run(steps=1), trained_run(steps=1, recipe={"evaluation": {"holdout": 0.3}})
    told = evaluated(first, other, base=False)
    assert told["notes"] == [f"the rows are held out by {first.name}: {other.name} may have been trained on them"]
    told = evaluated(first, base=False, data=str(rows_file), limit=2)
    assert told["notes"] == [f"{first.name} was trained on {rows_file}: its figures say nothing of new rows"]
    told = evaluated(first, base=False, answers=4, generation=Generation(242))  # of a window of 256
    assert told["notes"][0].endswith("prompts leave no room for an answer of 242 tokens")
    assert told["rows"]["answered"] < 4


def test_rows_of_a_file_text_beside_them_and_models_that_are_no_runs(
    trained_run: MakeRun, evaluated: Evaluate, tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    run = trained_run(tuning="full", steps=1)
    data = write(tmp_path / "more.jsonl", [{"question": f"colour {i}?", "answer": ANSWERS[i % 4]} for i in range(5)])
    (tmp_path / "plain.txt").write_text("The sky is blue and the grass is green. " * 20)
    asked: dict[str, Any] = {"data": str(data), "limit": 4, "answers": 3, "also": (str(tmp_path / "plain.txt"),)}
    told = evaluated(run, **asked)
    assert (told["rows"]["count"], told["rows"]["answered"]) == (4, 3)
    assert {"also/plain.txt/loss", "also/plain.txt/bits_per_byte", "loss", "f1"} <= set(figures(told))
    model = evaluated(model_folder("llama"), **asked)
    assert [one["label"] for one in model["models"]] == ["llama"]
    assert figures(model)["loss"] == pytest.approx(figures(told, "base")["loss"], rel=1e-6)
    with pytest.raises(RunError, match="no run with held-out rows"):
        evaluated(model_folder("llama"))


@pytest.mark.slow
def test_an_adapter_folder_is_held_against_its_base(
    trained_run: MakeRun, evaluated: Evaluate, tmp_path: Path, model_folder: Callable[[str], Path], rows_file: Path
) -> None:
    from finetui.engine.export import export_run

    run = trained_run()
    adapter = export_run(run, "adapter", tmp_path / "adapter")
    apart, own = (evaluated(each, data=str(rows_file)) for each in (adapter, run))
    assert [one["label"] for one in apart["models"]] == ["base", "adapter"]
    assert figures(apart)["loss"] == pytest.approx(figures(own)["loss"], rel=1e-6)
    config = json.loads((adapter / "adapter_config.json").read_text())
    other = tmp_path / "wide"
    _wide(model_folder("llama"), other)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    with pytest.raises(ModelError, match="does not fit its base"):
        evaluated(adapter, data=str(rows_file))


def _wide(folder: Path, target: Path) -> None:
    """The same model with a wider MLP, which no adapter of the other fits."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size = 2 * config.intermediate_size
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)


def test_what_can_not_be_evaluated_says_why(
    trained_run: MakeRun, evaluated: Evaluate, training_run: MakeRun, rows_file: Path
) -> None:
    run = trained_run(steps=2, recipe={"evaluation": {"holdout": 0.0}})
    with pytest.raises(RunError, match="held no rows out"):
        evaluated(run)
    told = evaluated(run, also=(str(rows_file),), limit=3)  # something is left to measure
    assert "this run held no rows out" in told["notes"][0]
    assert set(figures(told)) == {
        f"also/rows.jsonl/{name}" for name in ("loss", "perplexity", "bits_per_byte", "accuracy")
    }
    with pytest.raises(RunError, match=r"no checkpoint 'step-000007'.*step-000002"):
        evaluated(run, checkpoints=["7"])
    with pytest.raises(RunError, match="named twice"):
        evaluated(run, run)
    with pytest.raises(RunError, match="has not written a model yet"):
        evaluated(training_run())
    with pytest.raises(RunError, match="there is no run"):
        evaluated("nothing-of-that-name")


def test_memory_that_runs_out(trained_run: MakeRun, evaluated: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a batch: half of it, the same figures, and a word. Over the model itself: an error that says what to do."""
    import torch

    from finetui.engine.evaluation import likelihood, voices
    from finetui.planner.errors import HardwareError

    run = trained_run(steps=1, recipe={"evaluation": {"holdout": 0.3}})
    plain = evaluated(run)
    scored = likelihood._scored

    def narrow(model: Any, head: Any, batch: dict[str, Any]) -> Any:
        if len(batch["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scored(model, head, batch)

    monkeypatch.setattr(likelihood, "_scored", narrow)
    told = evaluated(run)
    assert figures(told) == pytest.approx(figures(plain), rel=1e-5)
    assert told["notes"] == [f"{run.name}: loss: out of memory with 8 rows at once; going on with 4",
                             f"{run.name}: loss: out of memory with 4 rows at once; going on with 2"]  # fmt: skip

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(likelihood, "_scored", full)
    with pytest.raises(HardwareError, match="out of memory over one row of"):
        evaluated(run)
    monkeypatch.setattr(voices, "load_base", full)
    with pytest.raises(HardwareError, match="out of memory over the model itself"):
        evaluated(run)
