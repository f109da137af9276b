"""What the columns of a row mean: five formats, detected over the first rows, read into one :class:`Example`.

============== =====================================================================================
messages       ``messages`` or ``conversations``: list of ``{role, content}``
sharegpt       ``conversations``: list of ``{from, value}``
alpaca         ``instruction``, ``input``, ``output`` or ``response``; optional ``system``, ``history``
prompt-        ``prompt`` + ``completion`` or ``response``; ``question`` + ``answer``; each a string or
completion     a list of messages
text           ``text`` or ``content``
============== =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

from ...planner.datasource import DataSource
from ...planner.errors import DataError
from .files import Row
from .sources import read_rows

Format = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"]
Role = Literal["system", "user", "assistant"]

#: Spellings of the three roles, in messages and in ShareGPT.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
_TOOLS = {"tool", "function", "observation", "function_call", "ipython"}
#: The columns of each format: role of the column -> its accepted names, the usual one first.
_COLUMNS: dict[Format, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages", "conversations", "conversation")},
    "sharegpt": {"messages": ("conversations", "conversation", "messages")},
    "alpaca": {"instruction": ("instruction",), "answer": ("output", "response")},
    "prompt-completion": {
        "prompt": ("prompt", "question", "query", "input"),
        "completion": ("completion", "response", "answer", "output"),
    },
    "text": {"text": ("text", "content")},
}
_OPTIONAL: dict[Format, dict[str, tuple[str, ...]]] = {
    "sharegpt": {"system": ("system",)},
    "alpaca": {"input": ("input", "context"), "system": ("system",), "history": ("history",)},
}
_WHY = {
    "messages": "{messages} holds lists of role and content",
    "sharegpt": "{messages} holds lists of from and value",
    "alpaca": "{instruction} and {answer} are there",
    "prompt-completion": "{prompt} and {completion} are there",
    "text": "{text} is there",
}
_PREFERENCE = {"chosen", "rejected"}
#: How many rows a format is judged by.
DETECT_ROWS = 100


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row, whatever it was written as: a chat, a prompt with its completion, or a text.

    ``kind`` says which of the fields count. Only assistant turns from index ``train_from`` on are answers.
    """

    kind: Literal["chat", "completion", "text"]
    where: str
    messages: tuple[Message, ...] = ()
    train_from: int = 0
    prompt: str = ""
    completion: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Detected:
    """The format of a source: which columns it reads, how sure that is (share of rows that fit), and why."""

    format: Format
    columns: dict[str, str]
    confidence: float
    why: str


def open_source(source: DataSource) -> tuple[Detected, Iterator[Row]]:
    """The format of a source, and all its rows."""
    rows = read_rows(source)
    first = list(islice(rows, DETECT_ROWS))
    return detect(first, source.format), chain(first, rows)


def detect(rows: Sequence[Row], wanted: str = "auto") -> Detected:
    """The format of some first rows of a source, or the columns of the ``wanted`` one.

    Raises:
        DataError: no format fits, naming the columns found and what is accepted.
    """
    if not rows:
        raise DataError("there are no rows to look at", do="Give a source that has rows.")
    candidates = [wanted] if wanted != "auto" else list(_COLUMNS)
    found = [d for name in candidates if (d := _score(name, rows)) is not None]  # type: ignore[arg-type]
    if found:
        return max(found, key=lambda d: d.confidence)  # ties go to the more specific format, which is listed first
    columns = list(dict.fromkeys(key for row in rows for key in row.values))
    listed = ", ".join(columns) or "none"
    if wanted != "auto":
        needed = " and ".join("/".join(names) for names in _COLUMNS[wanted].values())  # type: ignore[index]
        what = f"the rows are not in {wanted} format: their columns are {listed}"
        raise DataError(what, where=rows[0].where, do=f"{wanted} needs {needed}; or set format: auto.")
    if set(columns) >= _PREFERENCE:
        what = f"the rows are preference pairs (columns {listed}), which method sft can't train on"
        raise DataError(what, where=rows[0].where, do="Keep the chosen answer, in one of the formats of sft.")
    raise DataError(
        f"the format is not recognised: the columns are {listed}",
        where=rows[0].where,
        do=(
            "Accepted: messages [{role, content}]; conversations [{from, value}]; instruction, input, output; "
            "prompt, completion; question, answer; text."
        ),
    )


def _score(name: Format, rows: Sequence[Row]) -> Detected | None:
    """How well a format fits, or None if it does not fit a single row."""
    columns: dict[str, str] = {}
    for part, names in _COLUMNS[name].items():
        counts = {column: sum(_fits(name, part, row.values.get(column)) for row in rows) for column in names}
        best = max(names, key=lambda column: counts[column])
        if not counts[best]:
            return None
        columns[part] = best
    fitting = sum(all(_fits(name, part, row.values.get(c)) for part, c in columns.items()) for row in rows)
    if not fitting:
        return None
    why = _WHY[name].format(**columns)
    for part, names in _OPTIONAL.get(name, {}).items():
        there = next((column for column in names if any(column in row.values for row in rows)), None)
        if there is not None:
            columns[part] = there
            why += f", with {there}"
    return Detected(name, columns, fitting / len(rows), why)


def _fits(name: Format, part: str, value: Any) -> bool:
    if name in ("messages", "sharegpt"):
        keys = {"role", "content"} if name == "messages" else {"from", "value"}
        first = value[0] if isinstance(value, list) and value else None
        return isinstance(first, dict) and keys <= first.keys()
    if name == "prompt-completion":
        return isinstance(value, str) or _fits("messages", "messages", value)
    return isinstance(value, str)


def to_example(row: Row, detected: Detected) -> Example:
    """Read one row.

    Raises:
        DataError: with file, line and field: a missing column, a value that is no string, an unknown role, roles out
            of order, an empty answer.
    """
    return _READERS[detected.format](row, detected.columns)


def _read_messages(row: Row, columns: dict[str, str]) -> Example:
    column = columns["messages"]
    messages = _messages(row, column, "role", "content")
    return _chat(row, messages, column)


def _read_sharegpt(row: Row, columns: dict[str, str]) -> Example:
    column = columns["messages"]
    messages = _messages(row, column, "from", "value")
    system = _string(row, columns["system"], optional=True) if "system" in columns else ""
    if system and messages and messages[0].role != "system":
        messages.insert(0, Message("system", system))
        return _chat(row, messages, column, offset=1)
    return _chat(row, messages, column)


def _read_alpaca(row: Row, columns: dict[str, str]) -> Example:
    messages: list[Message] = []
    if "system" in columns and (system := _string(row, columns["system"], optional=True)):
        messages.append(Message("system", system))
    history = row.values.get(columns["history"]) if "history" in columns else None
    for index, pair in enumerate(history or []):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise _bad(row, f"history[{index}]", "must be a pair [question, answer]")
        if not pair[1].strip():
            raise _bad(row, f"history[{index}][1]", "the answer is empty", "Fill it in, or remove the pair.")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = _string(row, columns["instruction"])
    if "input" in columns and (more := _string(row, columns["input"], optional=True)):
        question = f"{question}\n\n{more}" if question else more
    messages += [Message("user", question), Message("assistant", _answer(row, columns["answer"]))]
    return Example("chat", row.where, messages=tuple(messages))


def _read_prompt_completion(row: Row, columns: dict[str, str]) -> Example:
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(row.values.get(prompt), list) or isinstance(row.values.get(completion), list):
        before = _messages(row, prompt, "role", "content")
        after = _messages(row, completion, "role", "content")
        return _chat(row, before + after, f"{prompt}+{completion}", train_from=len(before))
    return Example("completion", row.where, prompt=_string(row, prompt), completion=_answer(row, completion))


def _read_text(row: Row, columns: dict[str, str]) -> Example:
    text = _string(row, columns["text"])
    if not text.strip():
        raise _bad(row, columns["text"], "the text is empty", "Remove the row.")
    return Example("text", row.where, text=text)


_READERS: dict[Format, Callable[[Row, dict[str, str]], Example]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt-completion": _read_prompt_completion,
    "text": _read_text,
}


def _messages(row: Row, column: str, role_key: str, content_key: str) -> list[Message]:
    value = row.values.get(column)
    if column not in row.values:
        raise _missing(row, column)
    if not isinstance(value, list) or not value:
        raise _bad(row, column, "must be a list of messages" if value != [] else "the list of messages is empty")
    messages = []
    for index, item in enumerate(value):
        field = f"{column}[{index}]"
        if not isinstance(item, dict):
            raise _bad(row, field, f"must be an object with {role_key} and {content_key}")
        if role_key not in item:
            raise _bad(row, field, f"{role_key!r} is missing")
        name = item[role_key]
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if item.get("tool_calls") or (isinstance(name, str) and name in _TOOLS):
            raise _bad(row, field, "tool calls can't be trained on yet", "Remove the row.")
        if role is None:
            raise _bad(row, f"{field}.{role_key}", f"unknown role {name!r}", "Use system, user or assistant.")
        content = item.get(content_key)
        if not isinstance(content, str):
            problem = f"{content_key!r} is missing" if content is None else f"must be text, not {_kind(content)}"
            raise _bad(row, f"{field}.{content_key}", problem)
        messages.append(Message(role, content))
    return messages


def _chat(row: Row, messages: list[Message], column: str, *, train_from: int = 0, offset: int = 0) -> Example:
    """Check the order of turns: an optional system message, then user and assistant in turn, an answer at the end."""
    expected: Role = "user"
    for index, message in enumerate(messages):
        field = f"{column}[{index - offset}]" if "+" not in column else f"{column}, message {index + 1}"
        if message.role == "system":
            if index:
                raise _bad(row, field, "a system message must come first")
            continue
        if message.role != expected:
            what = f"roles are out of order: {message.role} where {expected} was expected"
            raise _bad(row, field, what, "After an optional system message, user and assistant take turns.")
        if message.role == "assistant" and not message.content.strip():
            raise _bad(row, field, "the answer is empty", "Fill it in, or remove the row.")
        expected = "assistant" if message.role == "user" else "user"
    if messages[-1].role != "assistant":
        what = f"the last message is from {messages[-1].role}, so there is no answer to learn"
        raise _bad(row, column, what, "End every conversation with an assistant message.")
    return Example("chat", row.where, messages=tuple(messages), train_from=train_from)


def _string(row: Row, column: str, *, optional: bool = False) -> str:
    value = row.values.get(column)
    if value is None and optional:
        return ""
    if column not in row.values:
        raise _missing(row, column)
    if not isinstance(value, str):
        raise _bad(row, column, f"must be text, not {_kind(value)}")
    return value


def _answer(row: Row, column: str) -> str:
    answer = _string(row, column)
    if not answer.strip():
        raise _bad(row, column, "the answer is empty", "Fill it in, or remove the row.")
    return answer


def _missing(row: Row, column: str) -> DataError:
    found = ", ".join(row.values) or "none"
    return DataError(
        f"column {column!r} is missing; the row has {found}", where=row.where, do="Add it, or remove the row."
    )


def _bad(row: Row, field: str, what: str, do: str = "Mend the row, or remove it.") -> DataError:
    return DataError(what, where=f"{row.where}: {field}", do=do)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
