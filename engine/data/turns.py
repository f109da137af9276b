"""The turns of a chat as rows write them: OpenAI's messages, ShareGPT's, tool calls, parts, and who may follow whom."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .examples import Message, Role, Span
from .fields import bad, boolean, kind, missing, objects, without_nulls
from .files import Row

#: Spellings of the roles, in messages and in ShareGPT; ``function_call`` and ``tool_call`` are answers that only call
#: tools. ``prompter`` is OpenAssistant's; bard and bing are among those of the first ShareGPT dumps.
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
    "ai": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "prompter": "user",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")
#: What a message's text and its role may be called.
KEYS = (("role", "content"), ("from", "value"))
_MEDIA = ("image", "image_url", "input_image", "video", "audio", "input_audio")


def keys_of(value: Any, chosen: tuple[str, str] | None = None) -> tuple[str, str] | None:
    """The names of role and text in a list of messages, or in one message; None if it is neither."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        return None
    if chosen is not None:
        return chosen if chosen[0] in first else None
    # Arrow adds every key to every message, so the text of a call may be null but its key is there.
    return next((keys for keys in KEYS if keys[0] in first and (keys[1] in first or first.get("tool_calls"))), None)


def read_messages(
    row: Row,
    column: str,
    value: Any = None,
    keys: tuple[str, str] | None = None,
    roles: Mapping[str, Role] = ROLES,
) -> list[Message]:
    """The messages of a column.

    Args:
        row: where it stands, for errors.
        column: its name, for errors.
        value: what it holds, if that is not simply the row's column.
        keys: names of role and text where they are not the usual ones.
        roles: who speaks under which name, in small letters.

    Raises:
        DataError: with file, line, column and number of the message.
    """
    if value is None:
        if column not in row.values:
            raise missing(row, column)
        value = row.values[column]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV can't hold a list
        value = list(objects(row, column, value))
    if not isinstance(value, list) or not value:
        what = f"must be a list of messages, not {kind(value)}" if value != [] else "the list of messages is empty"
        raise bad(row, column, what)
    role_key, text_key = keys or keys_of(value) or KEYS[0]
    return [_message(row, f"{column}[{index}]", item, role_key, text_key, roles) for index, item in enumerate(value)]


def _message(row: Row, field: str, item: Any, role_key: str, text_key: str, roles: Mapping[str, Role]) -> Message:
    if not isinstance(item, dict):
        raise bad(row, field, f"must be an object with {role_key} and {text_key}")
    if role_key not in item:
        raise bad(row, field, f"{role_key!r} is missing")
    name = item[role_key]
    role = roles.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        do = f"Use system, user, assistant or tool, or say who that is: roles: {{{name}: user}}."
        raise bad(row, f"{field}.{role_key}", f"unknown role {name!r}", do)
    value, called = item.get(text_key), name in _CALLS
    if isinstance(value, dict) and (called or role == "tool"):  # what a call gives or takes, not yet written as text
        value = json.dumps(without_nulls(value), ensure_ascii=False)
    text, untrained = _text(row, f"{field}.{text_key}", value, text_key, bool(item.get("tool_calls")))
    if len(item) == 2 and text_key in item and not called:
        return Message(role, text, untrained=untrained)
    calls = _calls(row, field, item, role)
    if called:
        text, calls = "", _called(row, f"{field}.{text_key}", text)
    return Message(
        role,
        text,
        trained=_trained(row, field, item),
        reasoning=_optional(row, field, item, "reasoning_content") or _optional(row, field, item, "thinking"),
        tool_calls=calls,
        name=_optional(row, field, item, "name") if role == "tool" else "",
        tool_call_id=_optional(row, field, item, "tool_call_id"),
        untrained=untrained,
    )


def _text(row: Row, field: str, value: Any, key: str, calls: bool) -> tuple[str, tuple[Span, ...]]:
    """The text of a message and the spans of it without loss; a list of parts is joined."""
    if isinstance(value, str):
        return value, ()
    if value is None and calls:
        return "", ()
    if not isinstance(value, list):
        raise bad(row, field, f"{key!r} is missing" if value is None else f"must be text, not {kind(value)}")
    text, untrained = "", []
    for index, part in enumerate(value):
        here = f"{field}[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        named = part.get("type", "text") if isinstance(part, dict) else kind(part)
        if named in _MEDIA:
            do = "finetui trains on text alone: remove the row, or the part."
            raise bad(row, here, f"holds an {named.removesuffix('_url')}", do)
        piece = part.get("text", part.get("content")) if isinstance(part, dict) else None
        if not isinstance(piece, str):
            raise bad(row, here, f"is a part of type {named!r} without text")
        if not _trained(row, here, part):
            untrained.append((len(text), len(text) + len(piece)))
        text += piece
    return text, tuple(untrained)


def _trained(row: Row, field: str, item: dict[str, Any]) -> bool:
    """``train: false`` (Axolotl) and ``weight: 0`` (OpenAI) leave a message out of the loss."""
    for key in ("train", "training", "weight"):
        if (value := item.get(key)) is None:
            continue
        if key == "weight" and (isinstance(value, bool) or value not in (0, 1)):
            what = f"is {value!r}, but a message counts for the loss (1) or does not (0)"
            raise bad(row, f"{field}.{key}", what, "Use 0 or 1.")
        if not boolean(row, f"{field}.{key}", value):
            return False
    return True


def _optional(row: Row, field: str, item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise bad(row, f"{field}.{key}", f"must be text, not {kind(value)}")
    return value or ""


def _calls(row: Row, field: str, item: dict[str, Any], role: Role) -> tuple[dict[str, Any], ...]:
    listed = item.get("tool_calls") or item.get("function_call")
    if not listed:
        return ()
    if role != "assistant":
        raise bad(row, f"{field}.tool_calls", f"a {role} message can't call tools")
    calls = objects(row, f"{field}.tool_calls", listed)
    return tuple(_call(row, f"{field}.tool_calls[{index}]", call) for index, call in enumerate(calls))


def _called(row: Row, field: str, text: str) -> tuple[dict[str, Any], ...]:
    """ShareGPT's function_call turn: its text is the call, or a list of calls, as JSON."""
    calls = objects(row, field, text)
    if not calls:
        raise bad(row, field, "the function call is empty")
    return tuple(_call(row, field, call) for call in calls)


def _call(row: Row, field: str, call: dict[str, Any]) -> dict[str, Any]:
    """A call as the OpenAI API writes it, but with its arguments as an object, which is what templates take."""
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise bad(row, field, "the call names no function", 'Write it as {"name": ..., "arguments": {...}}.')
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise bad(row, f"{field}.arguments", f"is not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(arguments, dict):
        raise bad(row, f"{field}.arguments", f"must be an object, not {kind(arguments)}")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": name, "arguments": without_nulls(arguments)},
    }
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def check_order(row: Row, messages: Sequence[Message], column: str, *, offset: int = 0, answered: bool = True) -> None:
    """User and assistant in turn, tools after the answers that call them; system messages first or in between.

    Args:
        row: where it stands, for errors.
        messages: the whole conversation.
        column: its name, for errors.
        offset: messages that are not part of the column.
        answered: it must end with an answer; else with something to be answered.

    Raises:
        DataError: naming the first message that is out of place.
    """
    before, calls = "", False
    for index, message in enumerate(messages):
        role = message.role
        field = f"{column}[{index - offset}]" if "+" not in column else f"{column}, message {index + 1}"
        if role == "system":  # instructions may change on the way; whose turn it is does not
            if calls:
                raise bad(row, field, "a system message stands between a tool call and its answer")
            continue
        expected = {"": "user", "user": "assistant", "tool": "assistant"}.get(before, "tool" if calls else "user")
        if role != expected and not (role == "tool" and before in ("tool", "assistant")):
            what = f"roles are out of order: {role} where {expected} was expected"
            do = "User and assistant take turns; system messages may stand before any of them."
            raise bad(row, field, what, do if "tool" not in (role, expected) else "A tool answers what called it.")
        if role == "assistant" and not (message.content.strip() or message.tool_calls):
            raise bad(row, field, "the answer is empty", "Fill it in, or remove the row.")
        before, calls = role, bool(message.tool_calls)
    last = messages[-1].role if answered else before or "system"
    if answered and last != "assistant":
        what = f"the last message is from {last}, so there is no answer to learn"
        raise bad(row, column, what, "End every conversation with an assistant message.")
    if not answered and last not in ("user", "tool"):
        raise bad(row, column, f"the last message of the prompt is from {last}, so nothing is asked")
