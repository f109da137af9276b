"""Formats: detection, reading, and every error with its line and field."""

from __future__ import annotations

from typing import Any

import pytest

from finetui.engine.data.examples import Example, Message
from finetui.engine.data.files import Row
from finetui.engine.data.formats import detect
from finetui.engine.data.readers import to_example, to_records
from finetui.planner.datasource import DataSource
from finetui.planner.errors import DataError

U, A, S = "user", "assistant", "system"


def read(values: dict[str, Any], wanted: str = "auto") -> Example:
    row = Row(values, "rows.jsonl:7")
    return to_example(row, detect([row], wanted))


def turns(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in pairs)


def chat(*pairs: tuple[str, str], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


FOUND: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("messages", {"messages": chat((U, "q"), (A, "a"))}, turns((U, "q"), (A, "a"))),
    ("messages", {"conversations": chat((S, "s"), (U, "q"), (A, "a"))}, turns((S, "s"), (U, "q"), (A, "a"))),
    ("messages", {"prompt": "q", "messages": chat((U, "q"), (A, "a")), "text": "t"}, turns((U, "q"), (A, "a"))),
    (
        "sharegpt",
        {"system": "s", "conversations": chat(("human", "q"), ("gpt", "a"), keys=("from", "value"))},
        turns((S, "s"), (U, "q"), (A, "a")),
    ),
    ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, turns((U, "i\n\nx"), (A, "o"))),
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, turns((U, "i"), (A, "o"))),
    ("alpaca", {"instruction": "i", "context": "x", "response": "o"}, turns((U, "i\n\nx"), (A, "o"))),
    (
        "alpaca",
        {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]},
        turns((S, "s"), (U, "q"), (A, "a"), (U, "i"), (A, "o")),
    ),
]


@pytest.mark.parametrize(("name", "values", "expected"), FOUND)
def test_chats(name: str, values: dict[str, Any], expected: tuple[Message, ...]) -> None:
    row = Row(values, "x:1")
    assert detect([row]).format == name
    assert to_example(row, detect([row])).messages == expected


@pytest.mark.parametrize(("p", "c"), [("prompt", "completion"), ("prompt", "response"), ("prompt", "output")])
def test_prompt_and_completion(p: str, c: str) -> None:
    example = read({p: "q", c: "a"})
    assert (example.kind, example.prompt, example.completion) == ("completion", "q", "a")


def test_prompt_and_completion_as_messages_train_the_completion_only() -> None:
    example = read({"prompt": chat((U, "q"), (A, "a"), (U, "r")), "completion": chat((A, "b"))})
    assert (example.kind, example.train_from, len(example.messages)) == ("chat", 3, 4)


def test_text() -> None:
    assert read({"content": "words", "id": 3}).text == "words"


def test_confidence_is_the_share_of_rows_that_fit() -> None:
    rows = [Row({"instruction": "i", "output": "o"}, "x:1")] * 3 + [Row({"text": "t"}, "x:4")]
    found = detect(rows)
    assert (found.format, found.confidence, found.why) == ("alpaca", 0.75, "instruction and output are there")


def test_a_wanted_format_is_taken_even_if_another_fits_better() -> None:
    assert read({"instruction": "i", "output": "o", "text": "t"}, "text").text == "t"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": chat((U, "q"), ("wizard", "a"))}, r"rows\.jsonl:7: messages\[1\]\.role: unknown role 'wizard'"),
    ({"messages": chat((A, "a"))}, r"messages\[0\]: roles are out of order: assistant where user was expected"),
    ({"messages": chat((U, "q"), (U, "q"), (A, "a"))}, r"messages\[1\]: roles are out of order"),
    ({"messages": chat((U, "q"), (A, "a"), (S, "s"))}, r"messages: the last message is from system"),
    ({"messages": chat((U, "q"), (S, "s"), (U, "r"))}, r"messages\[2\]: roles are out of order: user where assistant"),
    ({"messages": chat((U, "q"))}, r"messages: the last message is from user"),
    ({"messages": chat((U, "q"), (A, " \n"))}, r"messages\[1\]: the answer is empty"),
    ({"messages": [*chat((U, "q")), {"role": A}]}, r"messages\[1\]\.content: 'content' is missing"),
    ({"messages": [*chat((U, "q")), {"content": "a"}]}, r"messages\[1\]: 'role' is missing"),
    ({"messages": [*chat((U, "q")), {"role": A, "content": 3}]}, r"messages\[1\]\.content: must be text, not a number"),
    ({"messages": [*chat((U, "q")), "a"]}, r"messages\[1\]: must be an object with role and content"),
    ({"messages": chat((U, "q"), ("tool", "t"), (A, "a"))}, r"messages\[1\]: roles are out of order: tool where assis"),
    (
        {"conversations": chat(("human", "q"), ("narrator", "a"), keys=("from", "value"))},
        r"conversations\[1\]\.from: unknown role",
    ),
    (
        {"system": "s", "conversations": chat(("gpt", "a"), keys=("from", "value"))},
        r"conversations\[0\]: roles are out of",
    ),
    ({"instruction": "i", "output": ""}, r"rows\.jsonl:7: output: the answer is empty"),
    ({"instruction": "i", "output": "o", "history": [["q"]]}, r"history\[0\]: must be a pair"),
    ({"prompt": "q", "completion": " "}, r"completion: the answer is empty"),
    ({"text": " "}, r"text: the text is empty"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_rows_are_told_with_line_and_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(values)


def test_a_later_row_without_the_column() -> None:
    found = detect([Row({"instruction": "i", "output": "o"}, "x:1")])
    with pytest.raises(DataError, match=r"x:2: column 'output' is missing; the row has instruction, reply"):
        to_example(Row({"instruction": "i", "reply": "o"}, "x:2"), found)
    with pytest.raises(DataError, match=r"x:3: output: must be text, not null"):
        to_example(Row({"instruction": "i", "output": None}, "x:3"), found)


def test_unknown_columns_are_listed_with_what_is_accepted() -> None:
    with pytest.raises(
        DataError, match=r"x:1: the format is not recognised: the columns are body, title\. Accepted: mess"
    ):
        detect([Row({"body": "b", "title": "t"}, "x:1")])
    with pytest.raises(DataError, match=r"in preference format .* It serves method dpo, ipo"):
        detect([Row({"prompt": "p", "chosen": "c", "rejected": "r"}, "x:1")])
    with pytest.raises(DataError, match=r"not in alpaca format: .*alpaca needs instruction and output/response"):
        detect([Row({"text": "t"}, "x:1")], "alpaca")


def test_more_spellings_of_roles_and_results_of_tools_that_are_objects() -> None:
    keys = ("from", "value")
    assert read({"conversations": chat(("prompter", "q"), ("AI", "a"), keys=keys)}).messages == turns(
        (U, "q"), (A, "a")
    )
    call = {"name": "f", "arguments": {"x": 1}}
    conversation = [
        {"from": "human", "value": "q"}, {"from": "tool_call", "value": call},
        {"from": "tool_response", "value": {"t": "é", "gone": None}}, {"from": "gpt", "value": "a"},
    ]  # fmt: skip
    said = read({"conversations": conversation}).messages
    assert said[1].tool_calls == ({"type": "function", "function": call},)
    assert (said[2].role, said[2].content) == ("tool", '{"t": "é"}')
    with pytest.raises(DataError, match=r"conversations\[0\]\.value: must be text, not an object"):
        read({"conversations": [{"from": "human", "value": {}}, {"from": "gpt", "value": "a"}]})


@pytest.mark.parametrize(
    ("values", "method", "message"),
    [
        ({"question": "1+1", "answer": 2}, "sft", r"column 'answer' holds a number where format question-answer reads"),
        ({"instruction": "q", "output": b"a"}, "sft", r"column 'output' holds bytes where format alpaca reads text"),
        ({"messages": [{"who": U, "said": "q"}]}, "sft", r"a list of messages with role and content\. Name the keys"),
        ({"prompt": "q", "chosen": "a", "rejected": 1}, "dpo", r"'rejected' holds a number where format preference"),
        ({"prompt": "q"}, "sft", r"the rows are in prompt-only format"),
    ],
)  # fmt: skip
def test_a_column_of_the_wrong_type_is_named(values: dict[str, Any], method: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        detect([Row(values, "x:1")], "auto", method)


@pytest.mark.parametrize(("good", "bad"), [(1, 0), ("True", "False"), ("yes", "no"), (True, False)])
def test_what_judges_an_answer_where_answers_are_there_to_be_judged(good: Any, bad: Any) -> None:
    rows = [Row({"prompt": "q", "completion": "a", "label": label}, "x:1") for label in (good, bad)]
    found = detect(rows, "auto", "kto")
    assert found.format == "unpaired-preference"
    assert [record.label for row in rows for record in to_records(row, found, "kto")] == [True, False]  # type: ignore[union-attr]
    if not isinstance(good, bool):  # the class of another task, as far as sft can tell
        assert detect(rows, "auto", "sft").format == "prompt-completion"


def test_roles_of_ones_own() -> None:
    source = DataSource(path="x", roles={"Customer": "user", "agent": "assistant"})
    rows = [Row({"messages": chat(("customer", "q"), ("Agent", "a"))}, "x:1")]
    assert to_example(rows[0], detect(rows, source)).messages == turns((U, "q"), (A, "a"))
    mixed = Row({"messages": chat((U, "q"), ("agent", "a"))}, "x:2")  # the usual ones go on
    assert to_example(mixed, detect([mixed], source)).messages == turns((U, "q"), (A, "a"))
    pair = Row({"prompt": chat(("customer", "q")), "chosen": chat(("agent", "a")), "rejected": chat((A, "b"))}, "x:3")
    (record,) = to_records(pair, detect([pair], source, "dpo"), "dpo")
    assert record.prompt == turns((U, "q"))  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"unknown role 'customer'\. .* roles: \{customer: user\}"):
        to_example(rows[0], detect(rows))
    with pytest.raises(DataError, match=r"roles has no effect on format alpaca"):
        detect([Row({"instruction": "i", "output": "o"}, "x:1")], source)
