"""From a recipe to rows: holdout, truncation, packing, and a cache that is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import finetui.engine.data.prepare as module
from finetui.engine.data.holdout import holdout_size
from finetui.engine.data.labels import IGNORED
from finetui.engine.data.prepare import DataSettings, Prepared, prepare
from finetui.planner.errors import DataError
from finetui.planner.recipe import Recipe

Make = Callable[..., Any]


def chats(count: int, answer: str = "The answer to {i}.") -> str:
    lines = []
    for i in range(count):
        question = {"role": "user", "content": f"What is {i}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": answer.format(i=i)}]}) + "\n")
    return "".join(lines)


def recipe(*paths: str, **options: Any) -> Recipe:
    return Recipe.build({"model": "m", "data": [{"path": path} for path in paths], **options})


@pytest.fixture
def run(tmp_path: Path, make_tokenizer: Make) -> Callable[..., Prepared]:
    def _run(wanted: Recipe, tokenizer: Any = None, **settings: Any) -> Prepared:
        settings = {"sequence_length": 64, **settings}
        return prepare(wanted, DataSettings(**settings), tokenizer or make_tokenizer(), tmp_path / "cache")

    return _run


def test_facts_and_rows(run: Callable[..., Prepared], write: Any) -> None:
    path = write("x.jsonl", chats(40))
    made = run(recipe(path))
    facts = made.facts
    assert (facts.examples, facts.train_rows, facts.eval_rows, facts.truncated, facts.dropped) == (40, 38, 2, 0, 0)
    assert made.evaluation is not None
    rows = [*made.train, *made.evaluation]
    assert facts.tokens == sum(len(row["input_ids"]) for row in rows)
    assert facts.trained_tokens == sum(label != IGNORED for row in rows for label in row["labels"])
    assert facts.train_trained_tokens == sum(label != IGNORED for row in made.train for label in row["labels"])
    assert facts.max_length == max(len(row["input_ids"]) for row in rows)
    assert facts.formats == {path: "messages: messages holds lists of role and content"}


def test_holdout_depends_on_the_seed_alone(run: Callable[..., Prepared], write: Any) -> None:
    path = write("x.jsonl", chats(60))
    held = [run(recipe(path), seed=seed).evaluation[:]["input_ids"] for seed in (1, 2)]
    assert held[0] != held[1]
    assert held[0] == run(recipe(path), seed=1, sequence_length=63).evaluation[:]["input_ids"]


@pytest.mark.parametrize(
    ("rows", "holdout", "expected"),
    [
        (19, "auto", 0),
        (20, "auto", 1),
        (1000, "auto", 50),
        (9000, "auto", 200),
        (10, 0.2, 2),
        (10, 0.0, 0),
        (2, 0.9, 1),
    ],
)
def test_holdout_size(rows: int, holdout: float | str, expected: int) -> None:
    assert holdout_size(rows, holdout) == expected


def test_an_eval_source_replaces_the_holdout(run: Callable[..., Prepared], write: Any) -> None:
    data = [{"path": write("t.jsonl", chats(40))}, {"path": write("e.jsonl", chats(3)), "split": "eval"}]
    made = run(Recipe.build({"model": "m", "data": data}))
    assert (made.facts.train_rows, made.facts.eval_rows) == (40, 3)


def test_packed_rows_hold_the_same_trained_tokens(run: Callable[..., Prepared], write: Any) -> None:
    wanted = recipe(write("x.jsonl", chats(50)), evaluation={"holdout": 0.1})
    plain, packed = run(wanted, sequence_length=256), run(wanted, sequence_length=256, packing=True)
    assert packed.facts.train_rows < plain.facts.train_rows / 2
    assert packed.facts.train_trained_tokens == plain.facts.train_trained_tokens
    assert all(len(row["input_ids"]) == sum(row["seq_lengths"]) <= 256 for row in packed.train)
    documents = sorted(tuple(row["input_ids"]) for row in plain.train)
    split = []
    for row in packed.train:
        ids = row["input_ids"]
        for length in row["seq_lengths"]:
            split.append(tuple(ids[:length]))
            ids = ids[length:]
    assert sorted(split) == documents


def test_cut_answers_are_counted_and_lost_ones_dropped(run: Callable[..., Prepared], write: Any) -> None:
    long_question = json.dumps({"prompt": "What is the answer? " * 40, "completion": "It."}) + "\n"
    long_answer = json.dumps({"prompt": "What?", "completion": "The answer is a short one. " * 40}) + "\n"
    made = run(recipe(write("x.jsonl", long_question + long_answer)))
    assert (made.facts.examples, made.facts.truncated, made.facts.dropped) == (1, 2, 1)
    assert made.facts.warnings == (
        "1 of 2 rows have no answer within 64 tokens and are left out",
        "1 of 1 rows are longer than 64 tokens and lose their end",
    )
    assert len(made.train[0]["input_ids"]) == 64


def test_nothing_to_train_is_refused_with_the_reason(run: Callable[..., Prepared], write: Any, tmp_path: Path) -> None:
    rows = json.dumps({"prompt": "What is the answer? " * 40, "completion": "It."}) + "\n"
    with pytest.raises(DataError, match="no token would be trained: in every row the answer starts after token 64"):
        run(recipe(write("x.jsonl", rows * 3)))
    assert list((tmp_path / "cache").iterdir()) == []


def test_long_texts_are_split_not_cut(run: Callable[..., Prepared], write: Any, make_tokenizer: Make) -> None:
    text = "The answer is a short one. " * 60
    made = run(recipe(write("x.txt", text), method="pretrain", evaluation={"holdout": 0.0}), train_on="all")
    tokens = [token for row in made.train for token in row["input_ids"]]
    tokenizer = make_tokenizer()
    assert tokens == [*tokenizer(text.rstrip())["input_ids"], tokenizer.eos_token_id]
    assert (made.facts.split, made.facts.truncated) == (1, 0)
    assert made.evaluation is None


def test_a_bad_row_leaves_nothing_behind(run: Callable[..., Prepared], write: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:301: the line is not valid JSON"):
        run(recipe(write("x.jsonl", chats(300) + "{oops\n")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_is_read_again(run: Callable[..., Prepared], write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(write("x.jsonl", chats(30)))
    first = run(wanted)
    monkeypatch.setattr(module, "encode_batch", None)  # a second tokenisation would raise
    again = run(wanted)
    assert (again.facts, again.path) == (first.facts, first.path)
    assert again.train[:] == first.train[:]


def test_the_cache_knows_content_tokenizer_template_and_settings(
    run: Callable[..., Prepared], write: Any, make_tokenizer: Make, family: Any
) -> None:
    wanted = recipe(write("x.jsonl", chats(3)))
    paths = {
        run(wanted).path,
        run(wanted, packing=True).path,
        run(wanted, sequence_length=63).path,
        run(wanted, train_on="all").path,
        run(wanted, make_tokenizer(kind="metaspace")).path,
        run(wanted, make_tokenizer(family.template + "{# other #}")).path,
        run(recipe(write("x.jsonl", chats(3, "Other {i}.")))).path,
    }
    assert len(paths) == 7


def test_many_processes_may_ask_at_once(run: Callable[..., Prepared], write: Any, tmp_path: Path) -> None:
    wanted = recipe(write("x.jsonl", chats(30)))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: run(wanted), range(4)))
    assert len({item.path for item in made}) == 1
    assert all(item.train[:] == made[0].train[:] for item in made)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [made[0].path.name]


def test_progress_ends_at_the_number_of_examples(write: Any, make_tokenizer: Make, tmp_path: Path) -> None:
    seen: list[int] = []
    prepare(recipe(write("x.jsonl", chats(300))), DataSettings(64), make_tokenizer(), tmp_path / "c", seen.append)
    assert seen == [256, 300]


def test_no_data(run: Callable[..., Prepared]) -> None:
    with pytest.raises(DataError, match="the recipe names no data"):
        run(Recipe.build({"model": "m"}))
