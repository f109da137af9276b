"""From a recipe to rows: holdout, truncation, packing, and a cache that is whole or absent."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import finetui.engine.data.prepare as module
from finetui.engine.data.files import Row
from finetui.engine.data.holdout import holdout_size
from finetui.engine.data.labels import IGNORED
from finetui.engine.data.prepare import prepare
from finetui.engine.data.prepared import DataSettings, Prepared
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
    monkeypatch.setattr(module, "_Build", None)  # a second tokenisation would raise
    again = run(wanted)
    assert (again.facts, again.path) == (first.facts, first.path)
    assert again.train[:] == first.train[:]


@pytest.mark.parametrize("file", ["facts.json", "train.arrow"])
def test_what_a_power_cut_left_of_the_cache_is_made_again(file: str, run: Callable[..., Prepared], write: Any) -> None:
    path = write("rows.jsonl", chats(12))
    first = run(recipe(path))
    held = first.train[:]
    (first.path / file).write_bytes(b"")
    again = run(recipe(path))
    assert again.train[:] == held
    assert again.facts == first.facts


@pytest.mark.parametrize("packing", [False, True])
def test_one_other_word_gives_another_mark(packing: bool, run: Callable[..., Prepared], write: Any) -> None:
    text = chats(200)
    assert text.count("answer to 101") == 1
    before = run(recipe(write("rows.jsonl", text)), packing=packing)
    same = run(recipe(write("moved.jsonl", text)), packing=packing)
    other = run(recipe(write("rows.jsonl", text.replace("answer to 101", "answer of 101"))), packing=packing)
    assert before.facts.mark == same.facts.mark != other.facts.mark
    assert len(before.facts.mark) == 24


@pytest.mark.parametrize("set_aside", [True, False])
def test_what_a_run_has_set_aside_from_the_collector_stays_so(
    run: Callable[..., Prepared], write: Any, set_aside: bool
) -> None:
    try:
        if set_aside:
            gc.freeze()
        before = gc.get_freeze_count()
        run(recipe(write("x.jsonl", chats(30))))
        assert (gc.get_freeze_count() >= before > 0) if set_aside else gc.get_freeze_count() == 0
    finally:
        gc.unfreeze()


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
    prepare(recipe(write("x.jsonl", chats(600))), DataSettings(64), make_tokenizer(), tmp_path / "c", seen.append)
    assert seen == [512, 600, 600]


def test_no_data(run: Callable[..., Prepared]) -> None:
    with pytest.raises(DataError, match="the recipe names no data"):
        run(Recipe.build({"model": "m"}))


def alpaca(count: int, mark: str = "") -> str:
    rows = ({"instruction": f"What is {mark}{i}?", "output": f"The answer {i}."} for i in range(count))
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_bad_rows_stop_the_run_or_are_left_out_and_counted(run: Callable[..., Prepared], write: Any) -> None:
    bad = (
        '{oops\n[1]\n{"instruction": "q", "output": ""}\n{"instruction": "q"}\n'
        + json.dumps({"output": "\ud800"})
        + "\n"
    )
    path = write("x.jsonl", alpaca(20) + bad + alpaca(20, "b"))
    with pytest.raises(DataError, match=r"x\.jsonl:21: the line is not valid JSON"):
        run(recipe(path))
    facts = run(Recipe.build({"model": "m", "data": {"path": path, "on_bad_row": "skip"}})).facts
    assert (facts.examples, facts.skipped) == (40, 5)
    assert facts.warnings[0].startswith(
        f"5 rows of {path} can't be used and are left out; the first: {path}:21: the line"
    )


def test_bytes_that_are_no_text_cost_one_row(run: Callable[..., Prepared], write: Any) -> None:
    path = write("x.jsonl", alpaca(5).encode() + b'{"instruction": "\xff"}\n' + alpaca(5, "b").encode())
    facts = run(Recipe.build({"model": "m", "data": {"path": path, "on_bad_row": "skip"}})).facts
    assert (facts.examples, facts.skipped) == (10, 1)
    assert ":6: byte 0xff" in facts.warnings[0]


def test_a_template_that_raises_costs_its_rows(run: Callable[..., Prepared], write: Any, make_tokenizer: Make) -> None:
    from finetui.engine.data.template import prepare_tokenizer

    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(strict)
    prepare_tokenizer(tokenizer)
    rows = alpaca(5) + json.dumps({"system": "s", "instruction": "q", "output": "a"}) + "\n" + alpaca(5, "b")
    path = write("x.jsonl", rows)
    with pytest.raises(DataError, match=r"x\.jsonl:6: the chat template refuses this conversation \(no system\)"):
        run(recipe(path), tokenizer)
    facts = run(Recipe.build({"model": "m", "data": {"path": path, "on_bad_row": "skip"}}), tokenizer).facts
    assert (facts.examples, facts.skipped) == (10, 1)


def test_when_every_row_is_bad_the_first_is_named(run: Callable[..., Prepared], write: Any) -> None:
    path = write("x.jsonl", '{"instruction": "q", "output": ""}\n' * 5)
    with pytest.raises(DataError, match=r"every row was refused; the first: .*x\.jsonl:1: output: the answer is empty"):
        run(Recipe.build({"model": "m", "data": {"path": path, "on_bad_row": "skip"}}))


def test_tokens_without_embedding_are_refused_by_row(
    run: Callable[..., Prepared], write: Any, make_tokenizer: Make
) -> None:
    path = write("x.jsonl", alpaca(3))
    tokenizer = make_tokenizer()
    first = tokenizer.convert_tokens_to_ids("system")
    what = rf"x\.jsonl:1: token 'system' has number {first}, but the model has embeddings for {first} tokens"
    with pytest.raises(DataError, match=what):
        run(recipe(path), tokenizer, embeddings=first)
    assert run(recipe(path), tokenizer, embeddings=len(tokenizer)).facts.examples == 3


def test_weights_repeat_and_thin_out_a_source_but_not_what_is_held_out(
    run: Callable[..., Prepared], write: Any
) -> None:
    often, seldom = write("a.jsonl", alpaca(40, "often ")), write("b.jsonl", alpaca(40, "seldom "))
    data = [{"path": often, "weight": 2.5}, {"path": seldom, "weight": 0.25}]
    made = run(Recipe.build({"model": "m", "data": data, "evaluation": {"holdout": 0.1}}))
    rows = [tuple(row["input_ids"]) for row in made.train]
    assert made.evaluation is not None
    held = {tuple(row["input_ids"]) for row in made.evaluation}
    assert len(held) == 8
    assert not held & set(rows)
    counts = {row: rows.count(row) for row in rows}
    assert sorted(counts.values())[-1] == 3
    assert len(rows) == made.facts.train_examples == pytest.approx(2.5 * 36 + 0.25 * 36, abs=8)
    assert made.facts.train_tokens == sum(map(len, rows))
    again = run(Recipe.build({"model": "m", "data": data, "evaluation": {"holdout": 0.1}, "seed": 42}))
    assert again.path == made.path


def test_only_the_last_answer(run: Callable[..., Prepared], write: Any, make_tokenizer: Make) -> None:
    chat = [
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    ]
    path = write("x.jsonl", json.dumps({"messages": chat}) + "\n")
    row = run(recipe(path), train_on="last-answer").train[0]
    assert make_tokenizer().decode([label for label in row["labels"] if label != IGNORED]) == "b<|im_end|>"


def test_lengths_of_rows_that_are_not_packed(run: Callable[..., Prepared], write: Any) -> None:
    path = write("x.jsonl", chats(30))
    plain, packed = run(recipe(path)), run(recipe(path), packing=True)
    assert plain.lengths() == [len(row["input_ids"]) for row in plain.train]
    assert packed.lengths() is None


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_without_end_is_read_as_far_as_the_run_needs(
    run: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    read = 0

    def endless(source: Any, *, streaming: bool) -> Any:
        nonlocal read
        assert streaming
        for line in itertools.count():
            read += 1
            chat = [{"role": "user", "content": f"What is {line}?"}, {"role": "assistant", "content": "It is so."}]
            yield Row({"messages": chat}, f"{source.path}/train:{line}")

    monkeypatch.setattr("finetui.engine.data.sources.read_hub", endless)
    monkeypatch.setattr("finetui.engine.data.sources.hub_mark", lambda _: "1")
    source = {"path": "org/endless", "streaming": True}
    asked = Recipe.build({"model": "m", "data": [source], "max_steps": 100, "evaluation": {"holdout": 0.1}})
    made = run(asked, rows=800, packing=packing)
    assert 800 <= made.facts.train_rows < 800 + 1024
    assert read < 12_000
    assert made.facts.formats["org/endless"].endswith("examples are enough for 100 steps")
    # What is asked for is part of what the rows are kept under: a longer run reads on.
    assert run(asked, rows=1600, packing=packing).facts.train_rows >= 1600


def test_weights_that_leave_nothing(run: Callable[..., Prepared], write: Any) -> None:
    path = write("x.jsonl", chats(4))
    with pytest.raises(DataError, match=r"no example is left to train on: of 4, 0 are held out\. .*raise weight"):
        run(Recipe.build({"model": "m", "data": [{"path": path, "weight": 0.001}]}))


def test_half_a_character_costs_its_row(run: Callable[..., Prepared], write: Any) -> None:
    rows = chats(3) + chats(1, answer="cut \ud83d") + chats(1, answer="whole \U0001f600")
    path = write("x.jsonl", rows)
    message = r"x\.jsonl:4: the text holds half of a character \(\\ud83d without.*\. Or set on_bad_row: skip"
    with pytest.raises(DataError, match=message):
        run(recipe(path))
    skipping = Recipe.build({"model": "m", "data": [{"path": path, "on_bad_row": "skip"}]})
    facts = run(skipping).facts
    assert (facts.examples, facts.skipped) == (4, 1)


def test_prompts_that_a_reward_can_not_judge_are_counted(run: Callable[..., Prepared], write: Any) -> None:
    rows = [{"prompt": f"What is {i}?", **({"answer": str(i)} if i < 6 else {})} for i in range(8)]
    path = write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"model": "m", "data": path, "method": "grpo", "evaluation": {"holdout": 0.0}}
    judged = Recipe.build({**wanted, "rewards": ["numeric", {"function": "regex", "pattern": "x"}]})
    assert run(judged, method="grpo").facts.warnings == (
        "2 of 8 prompts have nothing in column 'answer', so numeric can't judge their answers",
    )


def test_one_answer_or_several_per_row(run: Callable[..., Prepared], write: Any) -> None:
    rows = [{"prompt": f"What is {i}?", "answer": ["zero", "0"] if i == 0 else str(i)} for i in range(4)]
    path = write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"model": "m", "data": path, "method": "grpo", "evaluation": {"holdout": 0.0}, "rewards": "exact-answer"}
    made = run(Recipe.build(wanted), method="grpo")
    assert made.facts.warnings == ()
    assert [made.train[i]["answer"] for i in range(4)] == [["zero", "0"], ["1"], ["2"], ["3"]]


def test_what_a_folder_leaves_out_is_told(run: Callable[..., Prepared], write: Any, tmp_path: Path) -> None:
    write("set/train.jsonl", chats(3))
    write("set/test.jsonl", chats(2))
    facts = run(recipe(str(tmp_path / "set"))).facts
    assert facts.examples == 3
    assert facts.formats[str(tmp_path / "set")].endswith("; test.jsonl left out, by name of another split")
