"""Answers found in what models say, and judged."""

from __future__ import annotations

import pytest

from finetui.engine.rewards.answers import code_of, exact_answer, final_answer, last_number, matches, numeric
from finetui.engine.rewards.schema import json_schema, unknown_keyword


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("We add. <answer> 42 </answer> Done.", "42"),
        (r"so \boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"an open \boxed{1", r"an open \boxed{1"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("Let me see.\nThe final answer is: Paris.", "Paris"),
        ("The answer is 3.\nNo: the answer is 4.", "4"),
        ("  just this \n", "just this"),
    ],
)
def test_the_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.5", 1234.5), ("-3e4", -3e4), ("about 2/3 of it", 2 / 3), ("40%", 0.4), ("3 then 7", 7.0),
        ("none", None), ("1/0", None), ("$1,000,000", 1e6), (".5", 0.5), ("x = -12", -12.0),
    ],
)  # fmt: skip
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == (None if number is None else pytest.approx(number))


def test_answers_are_compared() -> None:
    assert exact_answer(["It is: <answer>New  York</answer>", "paris", "x"], ["new york", "London", None]) == [
        1,
        0,
        None,
    ]
    assert numeric(["#### 1,000", "the answer is 3.1", "no"], ["1000", 3, 5]) == [1, 0, 0]
    assert numeric(["3.1"], [3.0], tolerance=0.05) == [1]
    assert numeric(["3"], ["three"]) == [None]
    assert matches(["<think>\na\n</think> b", "b"], r"<think>.*</think>") == [1, 0]


def test_any_of_several_answers_will_do() -> None:
    right = [["NYC", "New York"], ["NYC", "New York"], [], ["a", None]]
    assert exact_answer(["the answer is new  york.", "Boston", "x", "A"], right) == [1, 0, None, 1]
    assert numeric(["7", "0.5", "6", "1"], [["7", "8"], ["1/2"], [7, "8"], ["one", []]]) == [1, 1, 0, None]


def test_code_is_the_last_fenced_block() -> None:
    assert code_of("first\n```\nold\n```\nthen\n```python\nnew = 1\n```\nbye") == "new = 1\n"
    assert code_of("```python\ncut = 1") == "cut = 1"
    assert code_of("x = 1") == "x = 1"


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('{"name": "Ann", "age": 3, "tags": ["a", "b"]}', 1),
        ('Here:\n```json\n{"name": "Ann"}\n```', 1),
        ('{"name": "Ann", "age": true}', 0),
        ('{"name": "Ann", "age": 3.0}', 1),
        ('{"name": "Ann", "age": -1}', 0),
        ('{"name": "", "age": 1}', 0),
        ('{"age": 1}', 0),
        ('{"name": "Ann", "more": 1}', 0),
        ('{"name": "Ann", "tags": ["a", "a"]}', 0),
        ('{"name": "Ann", "tags": ["c"]}', 0),
        ("{'name': 'Ann'}", 0),
        ("[" * 100000, 0),
    ],
)
def test_json_of_a_shape(text: str, allowed: int) -> None:
    assert json_schema([text], [PERSON]) == [allowed]


def test_schemas_combine() -> None:
    either = {"anyOf": [{"type": "null"}, {"type": "number", "multipleOf": 0.5}], "not": {"const": 2}}
    assert json_schema(["null", "1.5", "2", "1.3", '"x"'], [either] * 5) == [1, 1, 0, 0, 0]
    one = {"oneOf": [{"type": "integer"}, {"minimum": 3}]}
    assert json_schema(["1", "4", "4.5"], [one] * 3) == [1, 0, 1]


def test_what_is_not_checked_is_named() -> None:
    assert unknown_keyword(PERSON) is None
    assert unknown_keyword({"properties": {"a": {"format": "email"}}}) == "format"
    assert unknown_keyword({"allOf": [{"$ref": "#/x"}]}) == "$ref"
