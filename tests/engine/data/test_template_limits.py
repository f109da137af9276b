"""Templates that would hang the process or eat the machine end as an error."""

from __future__ import annotations

import time
from typing import Any

import pytest

from finetui.engine.data import template_limits
from finetui.engine.data.examples import Message
from finetui.engine.data.template import render
from finetui.planner.errors import DataError

ASK = [Message("user", "a")]


class Tokenizer:
    """As much of a tokenizer as rendering needs."""

    special_tokens_map: dict[str, str] = {}  # noqa: RUF012
    chat_template = ""

    def get_chat_template(self, tools: Any = None) -> str:
        return self.chat_template


def told(template: str) -> str:
    return render(Tokenizer(), ASK, "rows.jsonl:1", template=template)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 1)
    monkeypatch.setattr(template_limits, "MEMORY", 256 << 20)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
        ("{{ 9 ** (9 ** 9) }}", "does not end"),
        ("{{ ('a' * 9000000000)[0] }}", "needs more than"),
        ("{% set x = namespace(v='aaaaaaaa') %}{% for i in range(40) %}{% set x.v = x.v + x.v %}{% endfor %}", "needs"),
        ("{{ 'a' * 3000000 }}", "3,000,000 characters"),
    ],
)
def test_bombs(template: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        told(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ (messages|attr('__class__')).__base__ }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{% for m in messages %}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    ],
)
def test_escapes_and_nonsense_are_errors(template: str) -> None:
    with pytest.raises(DataError, match="refuses this conversation"):
        told(template)


def test_a_row_has_a_time_limit() -> None:
    def endless() -> None:
        with template_limits.within(0.05, "rows.jsonl:1"):
            while True:
                time.sleep(0.01)

    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template takes longer"):
        endless()


def test_a_good_template_is_rendered() -> None:
    assert told("{% for m in messages %}{{ m.content }}!{% endfor %}") == "a!"
