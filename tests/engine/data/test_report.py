"""The report names what spoils training before it is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from finetui.engine.data.prepared import DataSettings
from finetui.engine.data.report import Report, histogram, look
from finetui.planner.recipe import Recipe

Make = Callable[..., Any]


@pytest.fixture
def report(write: Any, make_tokenizer: Make) -> Callable[..., Report]:
    def _report(rows: list[Any], method: str = "sft", length: int = 64, tokenizer: Any = None, **more: Any) -> Report:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        data = [{"path": write("x.jsonl", text), **more.pop("source", {})}, *more.pop("data", [])]
        recipe = Recipe.build({"model": "m", "method": method, "data": data, **more})
        return look(recipe, tokenizer or make_tokenizer(), DataSettings(length, method=method))

    return _report


def row(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


def told(report: Report, text: str) -> bool:
    return any(text in warning for warning in report.warnings)


def test_counts(report: Any, make_tokenizer: Make) -> None:
    made = report([row(f"What is {i}?", "The answer.") for i in range(40)], epochs=3)
    assert (made.rows, made.whole, made.examples, made.warnings, made.problems) == (40, True, 40, [], [])
    assert made.planned_tokens == 3 * made.tokens
    assert made.tokens == pytest.approx(40 * made.mean, abs=40)
    assert sum(item.count for item in made.histogram) == 40
    assert made.scripts == {"Latin": 1.0}
    answer = len(make_tokenizer()("The answer.<|im_end|>")["input_ids"])
    assert made.trained_share == pytest.approx(40 * answer / made.tokens, abs=1e-4)


def test_what_is_cut_and_what_is_lost(report: Any) -> None:
    made = report([row("q", "The answer. " * 40), row("What? " * 60, "a"), row("q", "a")])
    assert (made.truncated, made.dropped) == (1, 1)
    assert made.cut_tokens > 100
    assert told(made, "1 of 3 examples have no answer within 64 tokens")
    assert told(made, "1 of 3 examples are cut")


def test_what_is_left_out_for_its_length(report: Any) -> None:
    rows = [row("q", "The answer. " * 40), row("q", "a")]
    made = report(rows, source={"too_long": "drop"})
    assert (made.overlong, made.truncated, made.dropped, made.cut_tokens) == (1, 0, 0, 0)
    assert made.tokens == report(rows[1:]).tokens
    assert told(made, "1 of 2 examples are longer than 64 tokens: left out")


def test_duplicates_and_leaks(report: Any, write: Any) -> None:
    rows = [row(f"What is {i % 8}?", "The answer.") for i in range(10)]
    held = write("e.jsonl", "".join(json.dumps(item) + "\n" for item in (rows[0], row("new", "one"))))
    made = report(rows, data=[{"path": held, "split": "eval"}])
    assert (made.repeated, made.leaked) == (2, 1)
    assert told(made, "2 of 10 examples are the same as an earlier one")
    assert told(made, "1 evaluation examples are also trained on")


def test_answers_that_never_end(report: Any, make_tokenizer: Make) -> None:
    # The template writes no end after answers in mid-conversation; the last one gets the tokenizer's own.
    endless = (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    made = report([{"messages": [*chat, *chat]}, {"messages": chat}], tokenizer=make_tokenizer(endless))
    assert made.unended == 1
    assert told(made, "would not learn to stop")


def test_bad_rows_are_counted_by_kind_whatever_the_recipe_does_about_them(report: Any) -> None:
    rows = [row("q", "a"), row("q", ""), row("q", " "), "{oops", {"instruction": "q"}, row("r", "b")]
    made = report(rows)
    assert (made.examples, made.bad_rows) == (2, 4)
    assert (made.problems[0].count, made.problems[0].what) == (2, "the answer is empty")
    assert made.problems[0].where.endswith("x.jsonl:2: output")


def test_scripts_special_tokens_and_plain_prompts(report: Any) -> None:
    made = report([row("한국어", "Это ответ."), row("質問", "答え<|im_end|>ですよ")])
    assert {"Cyrillic", "Han", "Hiragana"} <= set(made.scripts)
    assert made.with_special == 1
    assert told(made, "hold special tokens in their own words")
    assert told(report([{"prompt": "q", "completion": "a"}]), "set chat: true")
    assert not told(report([{"prompt": "q", "completion": "a"}], source={"chat": True}), "set chat: true")


def test_pairs_and_judgements(report: Any) -> None:
    pairs = [{"question": f"{i}?", "chosen": "The answer is a long one. " * 3, "rejected": "No."} for i in range(9)]
    made = report(pairs, "dpo", 256)
    assert made.chosen_mean > 3 * made.rejected_mean
    assert told(made, "learn to talk longer")
    made = report([{"prompt": f"{i}", "completion": "a", "label": True} for i in range(5)], "kto")
    assert made.good_share == 1.0
    assert told(made, "there is nothing to compare")


def test_prompts_have_nothing_to_train_on_yet(report: Any) -> None:
    made = report([{"question": f"{i}?", "answer": "4"} for i in range(5)], "grpo")
    assert (made.examples, made.trained_tokens, made.warnings) == (5, 0, [])


def test_histogram_has_round_bins_and_holds_all() -> None:
    lengths = [*range(100, 200), 5000]
    bins = histogram(lengths)
    assert sum(item.count for item in bins) == 101
    assert {item.stop - item.start for item in bins[:-1]} == {20}
    assert (bins[0].start, bins[-1].stop) == (100, 5001)
    assert [(b.start, b.stop, b.count) for b in histogram([7])] == [(7, 8, 1)]
