"""What a row is, once it is read: a conversation or text to learn, a pair, a judged answer, a prompt, or judged steps.

The kinds are those of TRL's dataset formats: language modelling and prompt-completion (:class:`Example`), preference
(:class:`Pair`), unpaired preference (:class:`Judged`), prompt-only (:class:`Prompt`), stepwise supervision
(:class:`Stepwise`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Span = tuple[int, int]


# Messages and examples are made by the million, and a frozen dataclass takes three times as long to make.
@dataclass(slots=True)
class Message:
    """One turn of a chat.

    ``tool_calls`` are objects as the OpenAI API writes them, with their arguments as objects; ``name`` and
    ``tool_call_id`` say what a tool's answer belongs to. An answer with ``trained=False`` has no loss, nor have the
    ``untrained`` character spans of its content.
    """

    role: Role
    content: str
    trained: bool = True
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""
    untrained: tuple[Span, ...] = ()


#: Plain text, which no chat template touches, or the turns of a chat.
Turns = str | tuple[Message, ...]
Tools = tuple[dict[str, Any], ...]


@dataclass(slots=True)
class Example:
    """Something to learn by heart: a chat, a prompt with its completion, or a text.

    ``kind`` says which of the fields count. Only assistant turns from index ``train_from`` on are answers.
    """

    kind: Literal["chat", "completion", "text"]
    where: str
    messages: tuple[Message, ...] = ()
    train_from: int = 0
    prompt: str = ""
    completion: str = ""
    text: str = ""
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first, and by how much it is better if that is known."""

    where: str
    prompt: Turns
    chosen: Turns
    rejected: Turns
    tools: Tools = ()
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer, and whether it is a good one."""

    where: str
    prompt: Turns
    completion: Turns
    label: bool
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to be answered, the answer that is right if there is one, or all that are, and the row's other columns
    for rewards."""

    where: str
    prompt: Turns
    answer: str | list[str] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Stepwise:
    """A solution in steps, and for each step whether it is right."""

    where: str
    prompt: Turns
    completions: tuple[str, ...]
    labels: tuple[bool, ...]


Record = Example | Pair | Judged | Prompt | Stepwise
