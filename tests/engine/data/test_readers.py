"""Every spelling of pairs, judgements, prompts and steps; tools, parts and weights; and what is said of bad ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetui.engine.data.examples import Example, Judged, Message, Pair, Prompt, Record
from finetui.engine.data.files import Row
from finetui.engine.data.formats import ACCEPTS, detect
from finetui.engine.data.readers import to_records
from finetui.planner.datasource import DataSource
from finetui.planner.errors import DataError, RecipeError
from finetui.planner.recipe import Recipe

Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
ASKED = (Message("user", "q"),)
GOOD, BAD = (Message("assistant", "a"),), (Message("assistant", "b"),)


def records(values: dict[str, Any], method: str, **source: Any) -> list[Record]:
    row = Row(values, "rows.jsonl:7")
    return to_records(row, detect([row], DataSource(path="rows.jsonl", **source), method), method)


PAIRS: dict[str, dict[str, Any]] = {
    "trl chat": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "implicit prompt": {"chosen": [Q, A], "rejected": [Q, B]},
    "prompt text, chats that repeat it (ultrafeedback)": {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]},
    "prompt text, answers as messages": {"prompt": "q", "chosen": [A], "rejected": [B]},
    "sharegpt with ranking": {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
    "intel": {"question": "q", "chosen": "a", "rejected": "b"},
    "argilla": {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
    "icr": {"input": "q", "chosen": "a", "rejected": "b"},
    "nectar": {
        "question": "q",
        "answers": [{"answer": "c", "rank": 2.0}, {"answer": "a", "rank": 1}, {"answer": "b", "rank": 3}],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(kind: str) -> None:
    assert records(PAIRS[kind], "dpo") == [Pair("rows.jsonl:7", ASKED, GOOD, BAD)]


def test_pairs_with_system_input_and_history() -> None:
    row = {"system": "s", "instruction": "q", "input": "x", "chosen": "a", "rejected": "b", "history": [["h", "i"]]}
    (pair,) = records(row, "orpo")
    assert isinstance(pair, Pair)
    assert pair.prompt == (
        Message("system", "s"),
        Message("user", "h"),
        Message("assistant", "i"),
        Message("user", "q\n\nx"),
    )


def test_pairs_of_plain_text() -> None:
    plain = {"prompt": "q ", "chosen": "a", "rejected": "b"}
    assert records(plain, "dpo") == [Pair("rows.jsonl:7", "q ", "a", "b")]
    assert records(plain, "dpo", chat=True) == [Pair("rows.jsonl:7", (Message("user", "q "),), GOOD, BAD)]
    (pair,) = records({"chosen": "Human: hi Bot: yes", "rejected": "Human: hi Bot: no"}, "dpo")
    assert isinstance(pair, Pair)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Human: hi Bot:", " yes", " no")


JUDGED: dict[str, dict[str, Any]] = {
    "trl": {"prompt": [Q], "completion": [A], "label": True},
    "kto_tag": {"messages": [Q, A], "kto_tag": True},
    "sharegpt": {"conversations": [HUMAN, GPT], "label": True},
    "alpaca": {"instruction": "q", "output": "a", "label": True},
    "question": {"question": "q", "answer": "a", "label": True},
    "steps": {"question": "q", "completions": ["a"], "labels": [True]},
}


@pytest.mark.parametrize("kind", JUDGED)
def test_judged_answers(kind: str) -> None:
    assert records(JUDGED[kind], "kto") == [Judged("rows.jsonl:7", ASKED, GOOD, True)]


def test_a_pair_is_two_judged_answers_and_one_wrong_step_spoils_a_solution() -> None:
    assert [r.label for r in records(PAIRS["intel"], "kto") if isinstance(r, Judged)] == [True, False]
    (steps,) = records({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "kto")
    assert steps == Judged("rows.jsonl:7", "q", "a\nb", False)


@pytest.mark.parametrize("label", ["true", "1", 1, 1.0, "True"])
def test_labels_of_csv_files(label: Any) -> None:
    (judged,) = records({"prompt": "q", "completion": "a", "good": label}, "kto", columns={"label": "good"})
    assert isinstance(judged, Judged)
    assert judged.label is True


def test_prompts_and_their_answers() -> None:
    (prompt,) = records({"question": "q", "answer": "4", "level": 3}, "grpo")
    assert prompt == Prompt("rows.jsonl:7", ASKED, "4", {"answer": "4", "level": 3})
    (prompt,) = records({"prompt": [Q, A, Q], "ground_truth": "4"}, "rloo")
    assert isinstance(prompt, Prompt)
    assert (len(prompt.prompt), prompt.answer) == (3, "4")
    (prompt,) = records({"problem": "q"}, "ppo")
    assert prompt == Prompt("rows.jsonl:7", ASKED, None, {})
    (prompt,) = records({"messages": [Q, A], "id": 5}, "grpo")
    assert prompt == Prompt("rows.jsonl:7", ASKED, "a", {"id": 5})


@pytest.mark.parametrize(
    ("columns", "right"),
    [
        ({"answer": ["4", "four", "4"]}, ["4", "four"]),
        ({"answers": [4, 4.5]}, ["4", "4.5"]),
        ({"answers": {"text": ["Paris"], "answer_start": [7]}}, ["Paris"]),
        ({"answer": {"value": "NYC", "aliases": ["New York"], "type": "x"}}, ["NYC", "New York"]),
        ({"answer": [], "target": "5"}, "5"),
        ({"answers": [{"rank": 1}]}, None),
    ],
)
def test_prompts_may_have_several_right_answers(columns: dict[str, Any], right: Any) -> None:
    (prompt,) = records({"question": "q", **columns}, "grpo")
    assert prompt == Prompt("rows.jsonl:7", ASKED, right, columns)


SYSTEM = {"role": "system", "content": "s"}


def test_system_messages_may_stand_between_turns() -> None:
    (example,) = records({"messages": [SYSTEM, Q, A, SYSTEM, Q, SYSTEM, A]}, "sft")
    assert isinstance(example, Example)
    assert [m.role[0] for m in example.messages] == list("suasusa")
    (prompt,) = records({"prompt": [Q, SYSTEM]}, "grpo")
    assert isinstance(prompt, Prompt)
    assert [m.role for m in prompt.prompt if not isinstance(m, str)] == ["user", "system"]
    (judged,) = records({"messages": [Q, SYSTEM, A], "label": True}, "kto")
    assert isinstance(judged, Judged)
    assert judged.completion == GOOD
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(DataError, match=r"messages\[2\]: a system message stands between a tool call and its answer"):
        records({"messages": [Q, call, SYSTEM, {"role": "tool", "content": "t"}, A]}, "sft")
    with pytest.raises(DataError, match="the last message of the prompt is from system, so nothing is asked"):
        records({"prompt": [SYSTEM]}, "grpo")


def test_a_mapping_is_one_line() -> None:
    (example,) = records({"q": "x", "a": "y"}, "sft", columns={"question": "q", "answer": "a"})
    assert isinstance(example, Example)
    assert [m.content for m in example.messages] == ["x", "y"]
    (example,) = records({"q": "x", "a": "y"}, "sft", columns={"prompt": "q", "completion": "a"})
    assert isinstance(example, Example)
    assert (example.kind, example.prompt) == ("completion", "x")
    chat = [{"speaker": "human", "said": "x"}, {"speaker": "bot", "said": "y"}]
    (example,) = records(
        {"dialog": chat}, "sft", columns={"messages": "dialog", "role": "speaker", "content": "said"}
    )  # fmt: skip
    assert isinstance(example, Example)
    assert [m.role for m in example.messages] == ["user", "assistant"]
    (pair,) = records(
        {"q": "x", "good": "y", "bad": "z"}, "dpo", columns={"question": "q", "chosen": "good", "rejected": "bad"}
    )
    assert isinstance(pair, Pair)
    assert pair.rejected == (Message("assistant", "z"),)


def test_mappings_that_can_not_be() -> None:
    with pytest.raises(DataError, match=r"there is no column 'w', only q, a"):
        records({"q": "x", "a": "y"}, "sft", format="question-answer", columns={"question": "w", "answer": "a"})
    with pytest.raises(DataError, match=r"format text has no use for columns\.question"):
        records({"q": "x"}, "sft", format="text", columns={"question": "q"})
    with pytest.raises(RecipeError, match=r"no format has a 'promt'\. Did you mean prompt"):
        Recipe.build({"model": "m", "data": {"path": "x.jsonl", "columns": {"promt": "q"}}})


def test_context_stands_before_the_question() -> None:
    (example,) = records({"context": "c", "question": "q", "answer": "a"}, "sft")
    assert isinstance(example, Example)
    assert example.messages[0].content == "c\n\nq"


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
WANTED = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_tools_calls_and_their_results() -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    row = {
        "messages": [Q, calling, {"role": "tool", "content": "1", "tool_call_id": "1"}, A],
        "tools": json.dumps([{"type": "function", "function": {"name": "add", "parameters": None}}]),
    }
    (example,) = records(row, "sft")
    assert isinstance(example, Example)
    assert example.messages[1] == Message("assistant", "", tool_calls=(WANTED,))
    assert example.messages[2] == Message("tool", "1", tool_call_id="1")
    assert example.tools == ({"type": "function", "function": {"name": "add"}},)
    sharegpt = [HUMAN, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]
    sharegpt += [{"from": "observation", "value": "1"}, GPT]
    (example,) = records({"conversations": sharegpt}, "sft")
    assert isinstance(example, Example)
    assert example.messages[1].tool_calls[0]["function"] == WANTED["function"]


def test_parts_weights_and_thoughts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "train": False}]
    answer = {"role": "assistant", "content": parts, "reasoning_content": "hm"}
    (example,) = records({"messages": [Q, {**A, "weight": 0}, Q, answer]}, "sft")
    assert isinstance(example, Example)
    assert example.messages[1] == Message("assistant", "a", trained=False)
    assert example.messages[3] == Message("assistant", "one two", reasoning="hm", untrained=((4, 7),))


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "a"}, r"rows\.jsonl:7: rejected: both answers are the same"),
    ("dpo", {"chosen": [Q, A], "rejected": [Q, A]}, r"rejected: both answers are the same"),
    ("dpo", {"chosen": [Q, A], "rejected": [{"role": "user", "content": "z"}, B]}, r"rejected: does not begin with"),
    ("dpo", {"prompt": "q", "chosen": " ", "rejected": "a"}, r"chosen: the answer is empty"),
    ("dpo", {"prompt": [Q, A], "chosen": [A], "rejected": [B]}, r"chosen\[0\]: roles are out of order"),
    ("kto", {"prompt": "q", "completions": ["a"], "labels": [True, False]}, r"labels: has 2 labels for 1 steps"),
    ("grpo", {"prompt": [Q, A, A]}, r"prompt\[2\]: roles are out of order"),
    ("sft", {"messages": [Q, {**A, "weight": 0.5}]}, r"messages\[1\]\.weight: is 0\.5, but a message counts"),
    ("sft", {"messages": [Q, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     r"messages\[1\]\.tool_calls\[0\]\.arguments: is not valid JSON"),
    ("sft", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A]},
     r"messages\[0\]\.content\[0\]: holds an image\. finetui trains on text alone"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "values", "message"), BROKEN)
def test_what_is_said_of_bad_rows(method: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        records(values, method)


def test_a_mismatch_names_what_was_found_and_whom_it_serves() -> None:
    with pytest.raises(
        DataError, match=r"in preference format .* which method sft can't train on\. It serves method dpo"
    ):
        records(PAIRS["trl chat"], "sft")
    with pytest.raises(DataError, match=r"in text format .* method dpo .*It serves method sft, pretrain"):
        records({"text": "t"}, "dpo")
    with pytest.raises(DataError, match=r"unpaired-preference .*It serves method kto\. Or set format: messages"):
        records(JUDGED["kto_tag"], "sft")
    assert isinstance(records(JUDGED["kto_tag"], "sft", format="messages")[0], Example)
    with pytest.raises(DataError, match=r"method dpo can't be trained on format alpaca"):
        records({"instruction": "q", "output": "a"}, "dpo", format="alpaca")


def test_a_number_called_label_is_no_judgement() -> None:
    assert isinstance(records({"prompt": "q", "completion": "a", "label": 3}, "sft")[0], Example)


def test_every_method_of_a_recipe_has_its_formats() -> None:
    from typing import get_args

    from finetui.planner.datasource import DataFormat
    from finetui.planner.recipe import Method

    assert set(get_args(Method)) == set(ACCEPTS)
    assert {name for formats in ACCEPTS.values() for name in formats} == set(get_args(DataFormat)) - {"auto"}
