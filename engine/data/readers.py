"""From a row and its format to the record that a method learns from: one reader per format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...planner.errors import DataError
from .examples import Example, Judged, Message, Pair, Prompt, Record, Stepwise, Tools, Turns
from .fields import answer, as_list, bad, boolean, kind, objects, string
from .files import Row
from .formats import Columns, Detected, Format
from .turns import check_order, keys_of, read_messages

#: Columns that hold the right answer to a prompt.
_RIGHT = ("answer", "solution", "ground_truth", "target", "expected", "completion", "response", "output", "answers")


def to_records(row: Row, detected: Detected, method: str = "sft") -> list[Record]:
    """What a method learns from one row: one record, or for a pair judged one by one, two.

    Raises:
        DataError: with file, line and field: a missing column, a value of the wrong type, an unknown role, roles out
            of order, an empty answer, two equal answers.
    """
    if method in ("grpo", "rloo", "ppo"):
        return [_read_prompt(row, detected)]
    if method == "kto":
        return list(_judged(row, detected))
    if detected.format == "preference":
        return [_read_pair(row, detected)]
    return [to_example(row, detected)]


def to_example(row: Row, detected: Detected) -> Example:
    """Read one row of a format whose answers are all learned.

    Raises:
        DataError: as :func:`to_records`.
    """
    return _READERS[detected.base or detected.format](row, detected)


def _read_messages(row: Row, detected: Detected) -> Example:
    columns = detected.columns
    column = columns["messages"]
    messages = read_messages(row, column, keys=detected.keys, roles=detected.roles)
    offset = 0
    system = string(row, columns["system"], optional=True) if "system" in columns else ""
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
        offset = 1
    check_order(row, messages, column, offset=offset)
    return Example("chat", row.where, messages=tuple(messages), tools=_tools(row, columns))


def _read_alpaca(row: Row, detected: Detected) -> Example:
    columns = detected.columns
    question = _joined(row, columns["instruction"], columns.get("input"))
    messages = [
        *_opening(row, columns),
        Message("user", question),
        Message("assistant", answer(row, columns["output"])),
    ]
    return Example("chat", row.where, messages=tuple(messages), tools=_tools(row, columns))


def _read_question_answer(row: Row, detected: Detected) -> Example:
    columns = detected.columns
    question, reply = _question(row, columns), answer(row, columns["answer"])
    if not detected.chat:
        return Example("completion", row.where, prompt=question, completion=reply)
    messages = [*_opening(row, columns), Message("user", question), Message("assistant", reply)]
    return Example("chat", row.where, messages=tuple(messages), tools=_tools(row, columns))


def _read_prompt_completion(row: Row, detected: Detected) -> Example:
    columns = detected.columns
    prompt, completion = columns["prompt"], columns["completion"]
    values = row.values.get(prompt), row.values.get(completion)
    if any(isinstance(value, list | dict) for value in values) or detected.chat or "system" in columns:
        before, after = _said(row, prompt, "user", detected), _said(row, completion, "assistant", detected)
        opening = [m for m in _opening(row, columns) if before[0].role != "system"]
        messages = [*opening, *before, *after]
        check_order(row, messages, f"{prompt}+{completion}")
        start = len(messages) - len(after)
        return Example("chat", row.where, messages=tuple(messages), train_from=start, tools=_tools(row, columns))
    return Example("completion", row.where, prompt=string(row, prompt), completion=answer(row, completion))


def _read_text(row: Row, detected: Detected) -> Example:
    text = string(row, detected.columns["text"])
    if not text.strip():
        raise bad(row, detected.columns["text"], "the text is empty", "Remove the row.")
    return Example("text", row.where, text=text)


_READERS: dict[Format, Callable[[Row, Detected], Example]] = {
    "messages": _read_messages,
    "sharegpt": _read_messages,
    "alpaca": _read_alpaca,
    "question-answer": _read_question_answer,
    "prompt-completion": _read_prompt_completion,
    "text": _read_text,
}


# --- two answers


def _read_pair(row: Row, detected: Detected) -> Pair:
    columns = detected.columns
    if "answers" in columns:
        pair = _read_ranked(row, detected)
    else:
        sides = [row.values.get(columns[side]) for side in ("chosen", "rejected")]
        plain = all(isinstance(side, str) for side in sides)
        pair = _read_plain_pair(row, detected) if plain else _read_chat_pair(row, detected)
    if pair.chosen == pair.rejected:
        raise bad(row, columns.get("rejected", "answers"), "both answers are the same", "Remove the row.")
    margin = row.values.get(columns.get("margin", ""))
    if margin is None:
        return pair
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise bad(row, columns["margin"], f"must be a number, not {kind(margin)}")
    return replace(pair, margin=float(margin))


def _read_plain_pair(row: Row, detected: Detected) -> Pair:
    columns = detected.columns
    chosen, rejected = answer(row, columns["chosen"]), answer(row, columns["rejected"])
    prompt = columns.get("prompt")
    asked = isinstance(row.values.get(prompt or ""), list) or "question" in columns or "messages" in columns
    if asked or detected.chat or "system" in columns:
        before = _asked(row, detected)
        if isinstance(before, str):
            raise bad(row, prompt or columns.get("messages", "prompt"), "is text here, and turns in other rows")
        answers = [(Message("assistant", text),) for text in (chosen, rejected)]
        check_order(row, before, prompt or columns.get("messages", "prompt"), answered=False)
        return Pair(row.where, before, answers[0], answers[1], _tools(row, columns))
    if prompt is not None:
        return Pair(row.where, string(row, prompt), chosen, rejected)
    shared = _shared_text(chosen, rejected)
    return Pair(row.where, chosen[:shared], chosen[shared:], rejected[shared:])


def _shared_text(chosen: str, rejected: str) -> int:
    """Where two texts part; a space before that point belongs to the answers, as TRL's ``extract_prompt`` has it."""
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if size is None:
        return min(len(chosen), len(rejected))
    return size - 1 if size and chosen[size - 1] == " " else size


def _read_chat_pair(row: Row, detected: Detected) -> Pair:
    columns = detected.columns
    sides = [tuple(_said(row, columns[side], "assistant", detected)) for side in ("chosen", "rejected")]
    if all(side[0].role == "assistant" for side in sides):
        prompt = _asked(row, detected)
    else:  # the prompt is the turns that both begin with
        shared = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
        if shared == min(map(len, sides)):
            if sides[0] == sides[1]:
                raise bad(row, columns["rejected"], "both answers are the same", "Remove the row.")
            raise bad(row, columns["rejected"], "one conversation is the beginning of the other")
        prompt = sides[0][:shared]
        sides = [side[shared:] for side in sides]
        if not prompt:
            raise bad(row, columns["rejected"], "does not begin with the prompt that chosen begins with")
        if prompt[0].role != "system":
            prompt = (*_opening(row, columns), *prompt)
    for side, name in zip(sides, ("chosen", "rejected"), strict=True):
        check_order(row, (*prompt, *side), columns[name], offset=len(prompt))
    return Pair(row.where, prompt, sides[0], sides[1], _tools(row, columns))


def _read_ranked(row: Row, detected: Detected) -> Pair:
    """The best and the worst of several ranked answers (rank 1 is the best)."""
    column = detected.columns["answers"]
    listed = row.values.get(column)
    ranked = []
    for index, item in enumerate(as_list(listed)):
        text = item.get("answer", item.get("text")) if isinstance(item, dict) else None
        if not isinstance(text, str) or not isinstance(item.get("rank"), int | float):
            raise bad(row, f"{column}[{index}]", "must be an object with answer and rank")
        ranked.append((float(item["rank"]), text))
    ranked.sort(key=lambda pair: pair[0])
    if len(ranked) < 2 or ranked[0][0] == ranked[-1][0]:
        raise bad(row, column, "must hold two answers of different rank")
    asked, best, worst = string(row, detected.columns["prompt"]), ranked[0][1], ranked[-1][1]
    if not detected.chat and detected.columns["prompt"] == "prompt":
        return Pair(row.where, asked, best, worst)
    prompt = (*_opening(row, detected.columns), Message("user", asked))
    sides = [(Message("assistant", side),) for side in (best, worst)]
    return Pair(row.where, prompt, sides[0], sides[1], _tools(row, detected.columns))


# --- one answer and a judgement


def _judged(row: Row, detected: Detected) -> tuple[Judged, ...]:
    if detected.format == "preference":
        pair = _read_pair(row, detected)
        sides = ((pair.chosen, True), (pair.rejected, False))
        return tuple(Judged(row.where, pair.prompt, side, label, pair.tools) for side, label in sides)
    if detected.format == "stepwise":
        steps = read_steps(row, detected)
        text = "\n".join(steps.completions)
        completion: Turns = (Message("assistant", text),) if isinstance(steps.prompt, tuple) else text
        return (Judged(row.where, steps.prompt, completion, all(steps.labels)),)
    column = detected.columns["label"]
    label = boolean(row, column, row.values.get(column))
    example = to_example(row, detected)
    prompt, completion = split_last_answer(example)
    return (Judged(row.where, prompt, completion, label, example.tools),)


def split_last_answer(example: Example) -> tuple[Turns, Turns]:
    """The last answer of an example, and all that stands before it."""
    if example.kind == "completion":
        return example.prompt, example.completion
    messages = example.messages
    # Of a pair or a judged answer every token counts, which those of a system message must not.
    start = max(i + 1 for i, message in enumerate(messages) if message.role in ("user", "system"))
    start = max(start, example.train_from)
    return messages[:start], messages[start:]


def read_steps(row: Row, detected: Detected) -> Stepwise:
    """A solution in steps.

    Raises:
        DataError: steps and labels differ in number, or one is of the wrong type.
    """
    columns = detected.columns
    texts, marks = (as_list(row.values.get(columns[part])) for part in ("completions", "labels"))
    if len(texts) != len(marks):
        raise bad(row, columns["labels"], f"has {len(marks)} labels for {len(texts)} steps")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise bad(row, f"{columns['completions']}[{index}]", f"must be text, not {kind(text)}")
    labels = tuple(boolean(row, f"{columns['labels']}[{i}]", mark) for i, mark in enumerate(marks))
    prompt: Turns = string(row, columns["prompt"]) if isinstance(row.values.get(columns["prompt"]), str) else ()
    if not isinstance(prompt, str) or detected.chat or columns["prompt"] != "prompt":
        prompt = (*_opening(row, columns), *_said(row, columns["prompt"], "user", detected))
    return Stepwise(row.where, prompt, tuple(texts), labels)


# --- a prompt alone


def _read_prompt(row: Row, detected: Detected) -> Prompt:
    columns = detected.columns
    read = {column for part, column in columns.items() if part not in ("answer", "completion", "output")}
    rest = {name: value for name, value in row.values.items() if name not in read}
    if detected.format != "prompt-only":
        example = to_example(row, detected)
        prompt, completion = split_last_answer(example)
        return Prompt(row.where, prompt, _final(completion), rest, example.tools)
    prompt = _asked(row, detected)
    if isinstance(prompt, tuple):
        check_order(row, prompt, columns.get("prompt", "prompt"), answered=False)
    right = next((value for name in _RIGHT if (value := _right(rest.get(name))) is not None), None)
    return Prompt(row.where, prompt, right, rest, _tools(row, columns))


def _right(value: Any) -> str | list[str] | None:
    """The right answer that a column holds, or the list of those that will do; None if it holds neither.

    SQuAD writes such a list as ``{"text": […]}``, TriviaQA as ``{"value": …, "aliases": […]}``.
    """
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, dict):
        listed = value.get("text", value.get("aliases"))
        value = [value["value"], *(listed or [])] if "value" in value else listed
    if not isinstance(value, list) or not value or not all(isinstance(one, str | int | float) for one in value):
        return None
    return list(dict.fromkeys(map(str, value)))


def _final(completion: Turns) -> str:
    return completion if isinstance(completion, str) else completion[-1].content


# --- shared


def _asked(row: Row, detected: Detected) -> Any:
    """The prompt of a pair or of a prompt alone: from whichever column holds it, text or turns."""
    columns = detected.columns
    column = columns.get("prompt") or columns.get("messages")
    if column is None and "question" not in columns:
        what = "there is no prompt: the answers do not begin with it, and no column holds it"
        raise DataError(what, where=row.where, do="Add a column prompt, or name it: columns: {prompt: ...}.")
    if column is not None and isinstance(row.values.get(column), str) and not _is_chat(row, detected):
        return string(row, column)
    if column is None:
        messages = [Message("user", _question(row, columns))]
        if not detected.chat:
            return messages[0].content
    else:
        messages = _said(row, column, "user", detected)
    return (*([] if messages[0].role == "system" else _opening(row, columns)), *messages)


def _is_chat(row: Row, detected: Detected) -> bool:
    """Whether a prompt that is a string opens a chat: the recipe says so, or its answers are turns."""
    if detected.chat or "system" in detected.columns:
        return True
    return keys_of(row.values.get(detected.columns.get("chosen", "")), detected.keys) is not None


def _said(row: Row, column: str, role: Any, detected: Detected) -> list[Message]:
    """A column that holds turns, or the text of one."""
    value = row.values.get(column)
    if isinstance(value, str) and not value.lstrip().startswith('[{"'):
        return [Message(role, value)]
    return read_messages(row, column, keys=detected.keys, roles=detected.roles)


def _opening(row: Row, columns: Columns) -> list[Message]:
    """The system message and the earlier turns of a row that has columns for them."""
    messages: list[Message] = []
    if "system" in columns and (system := string(row, columns["system"], optional=True)):
        messages.append(Message("system", system))
    name = columns.get("history", "")
    for index, pair in enumerate(as_list(row.values.get(name)) if row.values.get(name) else []):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise bad(row, f"{name}[{index}]", "must be a pair [question, answer]")
        if not pair[1].strip():
            raise bad(row, f"{name}[{index}][1]", "the answer is empty", "Fill it in, or remove the pair.")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _question(row: Row, columns: Mapping[str, str]) -> str:
    if "context" in columns and (context := string(row, columns["context"], optional=True)):
        return f"{context}\n\n{string(row, columns['question'])}"
    return _joined(row, columns["question"], columns.get("input"))


def _joined(row: Row, column: str, more: str | None) -> str:
    question = string(row, column)
    extra = string(row, more, optional=True) if more is not None else ""
    return f"{question}\n\n{extra}" if question and extra else question or extra


def _tools(row: Row, columns: Columns) -> Tools:
    return objects(row, columns["tools"], row.values.get(columns["tools"])) if "tools" in columns else ()
