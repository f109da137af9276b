"""Chat templates as pieces of text, and as Ollama's templates, held against what Jinja writes.

The templates are those of real families, as TRL ships them; the Go side is a small interpreter of what we emit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")
import trl

from finetui.engine.data.examples import Message
from finetui.engine.data.template import render
from finetui.engine.export.ollama import go_template, modelfile
from finetui.engine.export.turn_form import TurnForm, find
from finetui.planner.errors import RunError

SHIPPED = Path(trl.__file__).parent / "chat_templates"
FAMILIES = (
    "cohere", "deepseekv3", "gemma", "gemma3", "glm4moe", "idefics3", "lfm2", "llama3", "llama3_1", "phi3", "qwen2_5",
    "qwen3", "qwen3_instruct_2507", "smolvlm",
)  # fmt: skip
#: Two that TRL does not ship: Zephyr's turns are no special tokens; Mistral's system message is in the last turn.
OTHERS = {
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and s %}{{ s + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] + eos_token }}{% endif %}{% endfor %}",
}  # fmt: skip
SAID = ("Why {{ x }}?", "As it is.", "Ah.", "Yes!\n\nReally.", "So?", "So.", "?")
TURNS = [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(SAID)]
SYSTEM = Message("system", "Be brief, and kind.")


@pytest.fixture
def template_of(byte_level: Any) -> Callable[[str], tuple[Any, list[str]]]:
    """A tokenizer with a family's template, and the tokens that the template writes."""

    def make(name: str) -> tuple[Any, list[str]]:
        tokenizer = byte_level()
        if name not in OTHERS and not (SHIPPED / f"{name}.jinja").is_file():
            pytest.skip("this release of TRL does not ship it")
        tokenizer.chat_template = OTHERS.get(name) or (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
        found = re.findall(r"<\|[A-Za-z_0-9]+\|>|<(?:start|end)_of_turn>|<｜[^<>\s]+｜>", tokenizer.chat_template)
        return tokenizer, sorted({*found, "<s>", "</s>"})

    return make


def form_of(tokenizer: Any, special: Sequence[str]) -> TurnForm:
    return find(lambda messages: render(tokenizer, messages, "the probe", prompt=True), special)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_ollama_writes_what_the_template_writes(name: str, template_of: Any) -> None:
    tokenizer, special = template_of(name)
    form = form_of(tokenizer, special)
    emitted = go_template(form)
    systems = [[], [SYSTEM]] if form.system else [[]]
    for count in (1, 3, 5, 7):
        for system in systems:
            messages = [*system, *TURNS[:count]]
            wanted = render(tokenizer, messages, "the chat", prompt=True)
            assert form.write(messages) == wanted
            assert go(emitted, messages) == wanted


def test_where_system_messages_go(template_of: Any) -> None:
    forms = {name: form_of(*template_of(name)) for name in ("qwen3", "gemma", "gemma3", "mistral", "zephyr")}
    assert {name: form.folded for name, form in forms.items()} == {
        "qwen3": "", "gemma": "", "gemma3": "first", "mistral": "last", "zephyr": "",
    }  # fmt: skip
    assert forms["gemma"].system is None
    assert forms["qwen3"].system == ("<|im_start|>system\n", "<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes or repeats"),
        ("{% for m in messages %}{{ loop.index }}:{{ m.content }}\n{% endfor %}", "not always written alike"),
    ],
)
def test_what_ollama_can_not_say_is_refused(template: str, why: str, byte_level: Any) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    with pytest.raises(RunError, match=why) as caught:
        form_of(tokenizer, [])
    assert "--to gguf" in caught.value.do


def test_a_modelfile(template_of: Any) -> None:
    form = form_of(*template_of("qwen3"))
    text = modelfile("m-q8_0.gguf", form, ["<|im_end|>", 'a"b'], {"temperature": 0.6}, "Be brief.")
    lines = text.splitlines()
    assert lines[0] == "FROM ./m-q8_0.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert r'PARAMETER stop "a\"b"' in lines
    assert "PARAMETER temperature 0.6" in lines
    assert lines[-1] == 'SYSTEM """Be brief."""'
    assert go_template(form) in text
    with pytest.raises(RunError, match="quotation marks"):
        modelfile("m.gguf", form, [], {}, 'say """ twice')


# --- as much of Go's text/template as is emitted


def go(template: str, messages: Sequence[Message]) -> str:
    """A template of Ollama's, carried out."""
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    tree, rest = _block([(i % 2 == 1, piece) for i, piece in enumerate(pieces)])
    assert not rest
    rows = [{"Role": m.role, "Content": m.content} for m in messages]
    root = {"Messages": rows, "System": "\n\n".join(m.content for m in messages if m.role == "system")}
    return _run(tree, root, {"$": root})


def _block(tokens: list[tuple[bool, str]]) -> tuple[list[Any], list[tuple[bool, str]]]:
    tree: list[Any] = []
    while tokens:
        action, text = tokens[0]
        if action and (text == "end" or text.startswith("else")):
            return tree, tokens
        tokens = tokens[1:]
        if action and text.startswith("range "):
            inner, tokens = _block(tokens)
            tree.append(("range", text.split(":= ")[1], inner))
            tokens = tokens[1:]
        elif action and text.startswith("if "):
            branches, condition = [], text.removeprefix("if ")
            while True:
                inner, tokens = _block(tokens)
                branches.append((condition, inner))
                end, tokens = tokens[0][1], tokens[1:]
                if end == "end":
                    break
                condition = end.removeprefix("else").removeprefix(" if ") or "true"
            tree.append(("if", branches))
        else:
            tree.append(("do" if action else "text", text))
    return tree, []


def _run(tree: list[Any], dot: Any, names: dict[str, Any]) -> str:
    out = ""
    for kind, *rest in tree:
        if kind == "text":
            out += rest[0]
        elif kind == "range":
            for number, item in enumerate(_value(rest[0], dot, names)):
                out += _run(rest[1], item, {**names, "$i": number})
        elif kind == "if":
            chosen = next((inner for test, inner in rest[0] if test == "true" or _value(test, dot, names)), [])
            out += _run(chosen, dot, names)
        elif ":= " in rest[0]:
            name, value = rest[0].split(" := ")
            names[name] = _value(value, dot, names)
        else:
            out += str(_value(rest[0], dot, names))
    return out


def _value(text: str, dot: Any, names: dict[str, Any]) -> Any:
    words = re.findall(r'"[^"]*"|[()]|[^\s()]+', text)

    def one() -> Any:
        word = words.pop(0)
        if word == "(":
            found = call()
            assert words.pop(0) == ")"
            return found
        if word.startswith('"'):
            return word[1:-1]
        if word.startswith("$."):
            return names["$"][word[2:]]
        if word.startswith("."):
            return dot[word[1:]]
        return names[word] if word in names else int(word)

    def call() -> Any:
        if words[0] not in ("eq", "and", "not", "len", "slice"):
            return one()
        verb, given = words.pop(0), []
        while words and words[0] != ")":
            given.append(one())
        verbs: dict[str, Callable[..., Any]] = {
            "eq": lambda a, b: a == b, "and": lambda a, b: a and b, "not": lambda a: not a, "len": len,
            "slice": lambda rows, start: rows[start:],
        }  # fmt: skip
        return verbs[verb](*given)

    return call()
