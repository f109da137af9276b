"""Columns of each method: TRL's own tokenised datasets, row for row, where TRL makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.prepare import prepare
from finetui.engine.data.prepared import DataSettings, Prepared
from finetui.engine.data.trl_rows import trl_rows
from finetui.planner.errors import DataError
from finetui.planner.recipe import Recipe

Make = Callable[..., Any]
CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A short one."},
    {"role": "user", "content": "And that?"},
]
GOOD = [{"role": "assistant", "content": "The answer."}]
BAD = [{"role": "assistant", "content": "No answer, and a long one at that."}]
PAIRS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "What is it?", "chosen": " The answer.", "rejected": " Nothing."},
    "implicit-text": {"chosen": "What is it? The answer.", "rejected": "What is it? Nothing."},
    "chat": {"prompt": CHAT, "chosen": GOOD, "rejected": BAD},
    "implicit-chat": {"chosen": CHAT + GOOD, "rejected": CHAT + BAD},
    "more-columns": {"prompt": CHAT, "chosen": GOOD, "rejected": BAD, "unused": 3},
}


@pytest.fixture
def made(write: Any, tmp_path: Path, make_tokenizer: Make) -> Callable[..., Prepared]:
    def _made(
        rows: list[dict[str, Any]], method: str, tokenizer: Any = None, length: int = 256, **more: Any
    ) -> Prepared:
        path = write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        recipe = Recipe.build({"model": "m", "data": {"path": path, **more}, "evaluation": {"holdout": 0.0}})
        return prepare(recipe, DataSettings(length, method=method), tokenizer or make_tokenizer(), tmp_path / "cache")

    return _made


def trl_dataset(trainer: type, rows: list[dict[str, Any]], tokenizer: Any, **config: Any) -> Any:
    """What a trainer of TRL makes of rows, without a model."""
    from types import SimpleNamespace

    from datasets import Dataset

    settings = SimpleNamespace(dataset_num_proc=None, max_length=256, truncation_mode="keep_start", **config)
    bare = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    return trainer._prepare_dataset(bare, Dataset.from_list(rows), tokenizer, settings, "eval")  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_tokenised_as_trl_does(made: Any, make_tokenizer: Make, kind: str) -> None:
    from trl import DPOTrainer, RewardTrainer

    tokenizer = make_tokenizer()
    ours = made([PAIRS[kind]], "dpo", tokenizer).train
    theirs = trl_dataset(DPOTrainer, [PAIRS[kind]], tokenizer)
    assert ours.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert ours[0] == {name: theirs[0][name] for name in ours.column_names}
    scored = made([PAIRS[kind]], "reward", tokenizer).train
    theirs = trl_dataset(RewardTrainer, [PAIRS[kind]], tokenizer)
    assert scored[0] == {name: theirs[0][name] for name in ("chosen_ids", "rejected_ids")}


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_judged_answers_are_tokenised_as_trl_does(made: Any, make_tokenizer: Make, kind: str) -> None:
    from trl import KTOTrainer

    tokenizer = make_tokenizer()
    pair = PAIRS[kind]
    rows = [{"prompt": pair["prompt"], "completion": pair[s], "label": s == "chosen"} for s in ("chosen", "rejected")]
    theirs = trl_dataset(KTOTrainer, rows, tokenizer)
    for source in (rows, [pair]):  # a pair is two judged answers
        ours = made(source, "kto", tokenizer)
        assert ours.train[:] == {name: theirs[:][name] for name in ("prompt_ids", "completion_ids", "label")}
        assert ours.facts.good == 1


def test_prompt_and_answer_join_to_what_the_template_writes(made: Any, make_tokenizer: Make, family: Any) -> None:
    from finetui.engine.data.template import prepare_tokenizer

    tokenizer = make_tokenizer(family.template)
    prepare_tokenizer(tokenizer)
    row = made([PAIRS["chat"]], "dpo", tokenizer).train[0]
    for side, answer in (("chosen_ids", GOOD), ("rejected_ids", BAD)):
        whole = tokenizer.apply_chat_template(CHAT + answer, tokenize=False)
        assert tokenizer.decode([*row["prompt_ids"], *row[side]]).startswith(whole)
        assert answer[0]["content"] in tokenizer.decode(row[side])
        assert answer[0]["content"] not in tokenizer.decode(row["prompt_ids"])


def test_too_long_answers_are_cut_and_rows_without_room_dropped(made: Any) -> None:
    rows = [
        {"prompt": "Q", "chosen": "The answer. " * 50, "rejected": "No."},
        {"prompt": "What is it? " * 50, "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
    ]
    prepared = made(rows, "dpo", length=24)
    facts = prepared.facts
    assert (facts.examples, facts.truncated, facts.dropped) == (2, 2, 1)
    assert len(prepared.train[0]["prompt_ids"] + prepared.train[0]["chosen_ids"]) == 24
    assert facts.trained_tokens == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in prepared.train)
    scored = made(rows, "reward", length=24)  # half an answer has no score
    assert (scored.facts.examples, scored.facts.dropped) == (1, 2)


def test_margins_are_kept_where_every_pair_has_one(made: Any) -> None:
    rows = [{**PAIRS["text"], "margin": 1.5}, {**PAIRS["text"], "margin": 2}]
    assert made(rows, "reward").train["margin"] == [1.5, 2.0]
    assert "margin" not in made([rows[0], PAIRS["text"]], "reward").train.column_names
    with pytest.raises(DataError, match=r"margin: must be a number, not text"):
        made([{**PAIRS["text"], "margin": "high"}], "reward")


def test_answers_that_differ_beyond_the_cut_are_dropped(made: Any) -> None:
    long = "The answer. " * 50
    rows = [{"prompt": "Q", "chosen": long + "a", "rejected": long + "b"}, PAIRS["text"]]
    facts = made(rows, "dpo", length=24).facts
    assert (facts.examples, facts.dropped) == (1, 1)


def test_prompts_keep_their_columns(made: Any, make_tokenizer: Make) -> None:
    rows = [
        {"question": "What is 2 + 2?", "answer": "4", "level": 1, "tests": ["a", "b"]},
        {"question": "What is 3 + 2?", "answer": "5", "level": 2, "tests": []},
    ]
    tokenizer = make_tokenizer()
    ours = made(rows, "grpo", tokenizer).train
    assert ours[1]["prompt"] == [{"role": "user", "content": "What is 3 + 2?"}]
    assert (ours[1]["answer"], ours[1]["level"], ours[0]["tests"]) == ("5", 2, ["a", "b"])
    assert tokenizer.decode(ours[0]["prompt_ids"]).endswith("What is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    told = made([{"messages": CHAT + GOOD}], "grpo").train[0]
    assert (len(told["prompt"]), told["answer"]) == (3, "The answer.")
    raw = made([{"prompt": "2 + 2 =", "solution": 4}], "grpo").train[0]
    assert (raw["prompt"], raw["answer"], raw["solution"]) == ("2 + 2 =", "4", 4)
    with pytest.raises(DataError, match="column 'level' holds values of different types"):
        made([{"prompt": "a", "level": 1}, {"prompt": "b", "level": "high"}], "grpo")


def test_answers_of_one_kind_only_are_refused(made: Any) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": True}] * 3
    with pytest.raises(DataError, match="all 3 answers are judged good"):
        made(rows, "kto")


def test_equal_answers_stop_or_are_counted(made: Any) -> None:
    rows = [PAIRS["text"], {"prompt": "a", "chosen": "b", "rejected": "b"}, PAIRS["text"]]
    with pytest.raises(DataError, match=r"x\.jsonl:2: rejected: both answers are the same"):
        made(rows, "dpo")
    facts = made(rows, "dpo", on_bad_row="skip").facts
    assert (facts.examples, facts.skipped) == (2, 1)
    assert "x.jsonl:2: rejected" in facts.warnings[0].partition("the first: ")[2]


def test_rows_in_trl_format(write: Any) -> None:
    path = write("x.jsonl", json.dumps({"question": "What?", "chosen": "a", "rejected": "b", "system": "s"}) + "\n")
    row = next(trl_rows(Recipe.build({"model": "m", "data": path}), "dpo"))
    assert row == {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }


@pytest.mark.parametrize(
    ("method", "short", "long"),
    [
        ("sft", {"prompt": "Q", "completion": "a"}, {"prompt": "Q", "completion": "The answer. " * 50}),
        ("pretrain", {"text": "short"}, {"text": "long " * 50}),
        ("dpo", PAIRS["text"], {"prompt": "Q", "chosen": "The answer. " * 50, "rejected": "No."}),
        ("reward", PAIRS["text"], {"prompt": "Q", "chosen": "The answer. " * 50, "rejected": "No."}),
    ],
)
def test_what_is_too_long_is_cut_or_left_out_as_the_recipe_says(
    made: Any, method: str, short: dict[str, Any], long: dict[str, Any]
) -> None:
    rows = [short, long, short]
    facts = made(rows, method, length=48, too_long="drop").facts
    assert (facts.examples, facts.truncated, facts.cut_tokens, facts.split) == (2, 0, 0, 0)
    assert facts.warnings == ("1 of 3 rows are longer than 48 tokens and are left out",)
    if method != "reward":  # half an answer has no score: a long pair is left out in any case
        assert made(rows, method, length=48).facts.examples > 2
    with pytest.raises(DataError, match=r"every row is longer than 48 tokens, and too_long: drop leaves such rows out"):
        made([long], method, length=48, too_long="drop")
