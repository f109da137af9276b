"""A chat template as pieces of text around messages, found by writing probes with it.

Ollama has templates of its own, in Go's language, and no way to run Jinja. A template is not recognised by its name:
conversations of words that appear nowhere else are written with it, and what stands between those words is what it
puts there. A form is kept only if it writes every probe as the template does, token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...planner.errors import DataError, RunError
from ..data.examples import Message

Write = Callable[[Sequence[Message]], str]
"""A conversation as the text of a prompt."""
_S, _U, _A, _V, _B, _W = "Sjq1", "Ukx2", "Aqz3", "Vjw4", "Bxk5", "Wzj6"
_SYSTEM = Message("system", _S)
_ONE = [Message("user", _U)]
_TWO = [*_ONE, Message("assistant", _A), Message("user", _V)]
_THREE = [*_TWO, Message("assistant", _B), Message("user", _W)]


@dataclass(frozen=True)
class TurnForm:
    """What stands where in a conversation.

    Args:
        head: before the first turn, without a system message; a default one may be part of it.
        user: before what a user says.
        answer: between that and the answer that follows.
        ask: in its place where the answer is asked for.
        end: after an answer.
        system: before and after a system message, at the beginning, in place of ``head``; None without one.
        folded: the turn that the system message is written into instead, between ``user`` and what the user says:
            ``first`` or ``last``.
    """

    head: str
    user: str
    answer: str
    ask: str
    end: str
    system: tuple[str, str] | None = None
    folded: str = ""

    def write(self, messages: Sequence[Message]) -> str:
        """A conversation whose roles take turns, as the form has it."""
        system = next((message.content for message in messages if message.role == "system"), "")
        turns = [message for message in messages if message.role != "system"]
        whole = bool(system) and self.system is not None and not self.folded
        before, after = self.system or ("", "")
        text = f"{before}{system}{after}" if whole else self.head
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            if turn.role == "user":
                here = self.folded and system and (last if self.folded == "last" else number == 0)
                text += self.user + (f"{before}{system}{after}" if here else "") + turn.content
                text += self.ask if last else self.answer
            else:
                text += turn.content + self.end
        return text


def find(write: Write, special: Sequence[str]) -> TurnForm:
    """The form of a template.

    Args:
        write: the template.
        special: tokens at whose beginning turns are cut apart rather than within.

    Raises:
        RunError: it is of no form that is known here.
    """
    one, two = _around(write(_ONE), _U), _around(write(_TWO), _U, _A, _V)
    if one is None or two is None:
        raise _formless("it changes or repeats what is said")
    first, ask = one
    answer, between = two[1], two[2]
    user = _cut(_common_end(first, between), special)
    form = TurnForm(first.removesuffix(user), user, answer, ask, between.removesuffix(user))
    form = _with_system(form, write)
    systems = [[], [_SYSTEM]] if form.system else [[]]
    for turns in (_ONE, _TWO, _THREE):
        for system in systems:
            if form.write([*system, *turns]) != write([*system, *turns]):
                raise _formless("its turns are not always written alike")
    return form


def _with_system(form: TurnForm, write: Write) -> TurnForm:
    """The form with the place of a system message."""
    try:
        text = write([_SYSTEM, *_ONE])
        longer = write([_SYSTEM, *_TWO])
    except DataError:
        return form
    parts = _around(text, _S, _U)
    if parts is None:
        return form  # it is left out without a word
    before, after, _ = parts
    if after.endswith(form.user) and form.user:
        return _replace(form, (before, after.removesuffix(form.user)), "")
    opening = form.head + form.user
    if not before.startswith(opening):
        raise _formless("a system message changes what stands before it")
    folded = "last" if longer.find(_S) > longer.find(_A) else "first"
    return _replace(form, (before.removeprefix(opening), after), folded)


def _replace(form: TurnForm, system: tuple[str, str], folded: str) -> TurnForm:
    return TurnForm(form.head, form.user, form.answer, form.ask, form.end, system, folded)


def _around(text: str, *words: str) -> list[str] | None:
    """What stands before, between and after words; None unless each is there once and in that order."""
    parts: list[str] = []
    for word in words:
        part, found, text = text.partition(word)
        if not found or word in text:
            return None
        parts.append(part)
    return [*parts, text]


def _common_end(a: str, b: str) -> str:
    alike = 0
    while alike < min(len(a), len(b)) and a[-1 - alike] == b[-1 - alike]:
        alike += 1
    return a[len(a) - alike :]


def _cut(text: str, special: Sequence[str]) -> str:
    """The longest end of a text that begins with a special token, or all of it."""
    places = [place for token in special if token and (place := text.find(token)) >= 0]
    return text[min(places) :] if places else text


def _formless(why: str) -> RunError:
    return RunError(
        f"the chat template can't be written as one of Ollama's: {why}",
        where="chat template",
        do="Use --to gguf: llama-server runs the template itself.",
    )
