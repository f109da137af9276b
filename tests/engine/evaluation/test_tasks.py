"""Tasks of lm-eval: what it is called with, how its answers become figures; and where it is installed, a whole task."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine.evaluation import tasks
from finetui.engine.evaluation.batches import Batches
from finetui.engine.evaluation.tasks import Tasks, arguments, figures_of, load_tasks
from finetui.engine.evaluation.voices import Voice
from finetui.engine.models.load import Numerics
from finetui.engine.run import Run
from finetui.planner.errors import HubError, MissingExtraError, RunError

from .conftest import figures


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"finetui\[eval\]"):
        load_tasks(Tasks(("gsm8k",)))


@pytest.mark.parametrize(
    ("numerics", "autocast"),
    [(Numerics(torch.float32, None), None), (Numerics(torch.bfloat16, torch.bfloat16), torch.bfloat16)],
)
def test_the_model_in_memory_is_the_one_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, numerics: Numerics, autocast: Any
) -> None:
    stub = ModuleType("lm_eval.models.huggingface")
    stub.HFLM = SimpleNamespace  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", stub)
    model, tokenizer = object(), object()
    voice = Voice("base", True, model, tokenizer, torch.device("cpu"), numerics)
    told = arguments(voice, Tasks(("a", "b"), fewshot=5, limit=9, as_chat=True), "manager", ["a", "b"], 4)
    asked = told.pop("model")
    assert asked.pretrained is model  # 4-bit or not, its adapter on or off: whatever it is
    assert asked.tokenizer is tokenizer
    assert (asked.batch_size, asked.mixed_precision_dtype, asked.backend) == (4, autocast, "causal")
    assert {k: told[k] for k in ("tasks", "num_fewshot", "limit", "apply_chat_template", "task_manager")} == {
        "tasks": ["a", "b"], "num_fewshot": 5, "limit": 9, "apply_chat_template": True, "task_manager": "manager",
    }  # fmt: skip


def test_figures_question_by_question_where_there_are_such() -> None:
    sample = [{"doc_id": i, "filter": "none", "acc": float(i < 3), "word_perplexity": (-2.0, 3)} for i in (3, 1, 0, 2)]
    told = figures_of({
        "results": {"mine": {"alias": "mine", "sample_len": 4, "acc,none": 0.75, "acc_stderr,none": 0.1,
                             "word_perplexity,none": 7.5, "f1,strict": 0.5}},
        "samples": {"mine": sample},
        "higher_is_better": {"mine": {"acc": True, "word_perplexity": False}},
    })  # fmt: skip
    assert set(told) == {"tasks/mine/acc", "tasks/mine/word_perplexity", "tasks/mine/f1,strict"}
    assert told["tasks/mine/acc"].parts == (1.0, 1.0, 1.0, 0.0)  # by number of the question
    assert told["tasks/mine/word_perplexity"].lower_is_better
    assert (told["tasks/mine/word_perplexity"].value, told["tasks/mine/word_perplexity"].rows) == (7.5, 1)


def test_why_a_task_can_not_be_made_ready() -> None:
    offline = tasks._unloadable("gsm8k", ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub"))
    assert isinstance(offline, HubError)
    assert "task gsm8k is not here and the Hub can't be reached" in str(offline)
    assert isinstance(tasks._unloadable("mine", FileNotFoundError("rows.jsonl")), HubError)
    broken = tasks._unloadable("mine", KeyError("doc_to_text"))
    assert isinstance(broken, RunError)
    assert "task mine can't be made ready (KeyError: 'doc_to_text')" in str(broken)


def test_progress_bars_become_progress_and_words_go_on() -> None:
    told: list[tuple[str, int, int]] = []
    stream = io.StringIO()
    bars = tasks._Bars("base: ", lambda *words: told.append(words), stream)
    bars.write("\rRunning loglikelihood requests:  42%|####2     | 25/60 [00:00<00:00, 76.22it/s]")
    bars.write("\r100%|##########| 20/20 [00:00<00:00, 368.92it/s]")
    bars.write("\n")
    bars.write("a warning")
    assert told == [("base: Running loglikelihood requests", 25, 60), ("base: tasks", 20, 20)]
    assert stream.getvalue() == "a warning"


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_a_task_of_ones_own(
    trained_run: Callable[..., Run], evaluated: Callable[..., dict[str, Any]], tmp_path: Path, tuning: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The share of right answers is that of the likelihoods which we measure ourselves, for the model and its base."""
    from finetui.engine.evaluation.likelihood import Learned, row_losses
    from finetui.engine.evaluation.subjects import subjects
    from finetui.engine.evaluation.voices import tokenizer_of, voices

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    choices = ["red like a rose", "blue like the sky", "green as grass", "as white as snow"]
    rows = [{"question": f"colour {i}?", "choices": choices, "label": i % 4} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    run = trained_run(tuning=tuning, steps=4)
    told = evaluated(run, tasks=Tasks((str(tmp_path / "colours.yaml"),)))
    (subject,) = subjects([str(run.path)], [], "cpu")
    tokenizer = tokenizer_of(subject)
    for voice in voices(subject, tokenizer, base=True, emit=lambda _: None):
        right = 0
        for row in rows:
            asked = tokenizer(row["question"])["input_ids"]
            said = [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in choices]
            options = [Learned(asked + ids, [-100] * len(asked) + ids) for ids in said]
            losses = row_losses(voice, options, Batches(4, pytest.fail), "", lambda *_: None)
            right += min(range(4), key=lambda i: losses[i].loss) == row["label"]
        mine = figures(told, "base" if voice.base else run.name)
        assert mine["tasks/colours/acc"] == pytest.approx(right / len(rows), abs=1e-6), voice.label
    with pytest.raises(RunError, match=r"knows no task 'gsm8kk'.*gsm8k"):
        load_tasks(Tasks(("gsm8kk",)))
