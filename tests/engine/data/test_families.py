"""Twenty templates that TRL has no training version of: what is trained is found again by rendering anew.

The check knows nothing of spans. It replaces one answer after the other: whatever then changes in the text was part of
an answer, and must be trained; whatever stays whichever answers are given was not, and must not be, but for what ends
an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from finetui.engine.data.examples import Example, Message
from finetui.engine.data.labels import IGNORED, end_tokens, mark
from finetui.engine.data.labels import encode as encode_example
from finetui.engine.data.template import prepare_tokenizer, render, training_template

Make = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """A template, what closes an answer in mid-conversation and at the end, and its end of sequence."""

    template: str
    closing: str
    last_closing: str | None = None
    eos: str = "</s>"


def turns(user: str, assistant: str, prompt: str, *, system: str = "", head: str = "", tail: str = "") -> str:
    """A template that writes each turn by itself; ``@`` stands for the content."""

    def text(pattern: str) -> str:
        before, _, after = pattern.partition("@")
        return f"{{{{ {before!r} }}}}{{{{ m['content'] }}}}{{{{ {after!r} }}}}"

    opening = "{% if m['role'] == 'system' %}" + text(system) + "{% elif" if system else "{% if"
    return (
        f"{head}{{% for m in messages %}}{opening} m['role'] == 'user' %}}{text(user)}"
        f"{{% elif m['role'] == 'assistant' %}}{text(assistant)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}{tail}"
    )


# The system message is written into the first question, as Llama 2, Mistral and Gemma 2 do.
_MERGED = (
    "{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
)
FAMILIES: dict[str, Family] = {
    "llama2": Family(
        _MERGED + "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first and lead %}{{ '<<SYS>>\n' + lead + '<</SYS>>\n\n' }}{% endif %}"
        "{{ m['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        " </s>",
    ),
    "mistral-tekken": Family(
        _MERGED + "{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
        "{% if loop.last and lead %}{{ lead }}{% endif %}{{ m['content'] + '[/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "vicuna": Family(
        turns("USER: @ ", "ASSISTANT: @</s>", "ASSISTANT:", system="@ ", head="{{ bos_token }}"), "</s>"
    ),
    "alpaca": Family(
        turns(
            "### Instruction:\n@\n\n", "### Response:\n@</s>\n\n", "### Response:\n",
            head="Below is an instruction.\n\n", system="@\n\n",
        ),
        "</s>",
    ),
    "chatml": Family(
        turns("<|im_start|>user\n@<|im_end|>\n", "<|im_start|>assistant\n@<|im_end|>\n", "<|im_start|>assistant\n"),
        "<|im_end|>",
    ),
    "zephyr": Family(turns("<|user|>\n@</s>\n", "<|assistant|>\n@</s>\n", "<|assistant|>\n"), "</s>"),
    "phi4": Family(
        turns(
            "<|im_start|>user<|im_sep|>@<|im_end|>", "<|im_start|>assistant<|im_sep|>@<|im_end|>",
            "<|im_start|>assistant<|im_sep|>", system="<|im_start|>system<|im_sep|>@<|im_end|>",
        ),
        "<|im_end|>",
    ),
    "llama3-trimmed": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "gemma2": Family(
        _MERGED + "{{ bos_token }}{% for m in rest %}{% set role = 'model' if m['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\n' }}{% if loop.first %}{{ lead }}{% endif %}"
        "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "command-r": Family(
        turns(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>@<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>@<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", head="{{ bos_token }}",
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek-coder": Family(
        turns("### Instruction:\n@\n", "### Response:\n@\n<|EOT|>\n", "### Response:\n", head="{{ bos_token }}"),
        "\n<|EOT|>", eos="<|EOT|>",
    ),
    "deepseek-v2": Family(
        turns("User: @\n\n", "Assistant: @<｜end▁of▁sentence｜>", "Assistant:", head="{{ bos_token }}"),
        "<｜end▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>",
    ),
    "falcon": Family(
        turns("User: @\n\n", "Falcon: @<|endoftext|>\n\n", "Falcon:", system="@\n\n"),
        "<|endoftext|>", eos="<|endoftext|>",
    ),
    "granite": Family(
        turns(
            "<|start_of_role|>user<|end_of_role|>@<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>@<|end_of_text|>\n", "<|start_of_role|>assistant<|end_of_role|>",
            system="<|start_of_role|>system<|end_of_role|>@<|end_of_text|>\n",
        ),
        "<|end_of_text|>", eos="<|end_of_text|>",
    ),
    "olmo2": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "chatglm3": Family(
        turns(" <|user|>\n@", " <|assistant|>\n@", " <|assistant|>", head="[gMASK]sop"), " <|user|>", "</s>"
    ),
    "internlm2": Family(
        turns(
            "<|im_start|>user\n@<|im_end|>\n", "<|im_start|>assistant\n@<|im_end|>\n", "<|im_start|>assistant\n",
            head="{{ bos_token }}", system="<|im_start|>system\n@<|im_end|>\n",
        ),
        "<|im_end|>",
    ),
    "openchat": Family(
        turns(
            "GPT4 Correct User: @<|end_of_turn|>", "GPT4 Correct Assistant: @<|end_of_turn|>",
            "GPT4 Correct Assistant:", head="{{ bos_token }}",
        ),
        "<|end_of_turn|>", eos="<|end_of_turn|>",
    ),
    "exaone": Family(
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '[|system|][|endofturn|]\n' }}{% endif %}"
        "{{ '[|' + m['role'] + '|]' + m['content'] }}{% if m['role'] == 'user' %}{{ '\n' }}"
        "{% else %}{{ '[|endofturn|]\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
        "[|endofturn|]", eos="[|endofturn|]",
    ),
    "solar": Family(
        turns("### User:\n@\n\n", "### Assistant:\n@</s>\n\n", "### Assistant:\n", system="### System:\n@\n\n"), "</s>"
    ),
    "stablelm": Family(
        turns("<|user|>\n@<|endoftext|>\n", "<|assistant|>\n@<|endoftext|>\n", "<|assistant|>\n"), "<|endoftext|>",
        eos="<|endoftext|>",
    ),
    # Thoughts of earlier turns are forgotten, the last turn keeps its own.
    "forgetful": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set text = m['content'] %}"
        "{% if m['role'] == 'assistant' and not loop.last and '</think>' in text %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    # The last answer is closed by another token than those before it.
    "channels": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' }}"
        "{{ m['content'] }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "<|end|>", "<|return|>", eos="<|return|>",
    ),
}  # fmt: skip
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^<>\s]+｜>|\[\|endofturn\|\]")
QUESTIONS = ("What is it?", "And that?", "Why?")
ANSWERS = ("It is e.", "The answer,\nin two lines.", "So it is")
OTHERS = ("Zebra x.", "Quite another\n\nthing, with more words.", "no")


def conversation(answers: tuple[str, ...]) -> tuple[Message, ...]:
    pairs = zip(QUESTIONS, answers, strict=True)
    return tuple(m for q, a in pairs for m in (Message("user", q), Message("assistant", a)))


@pytest.fixture(params=sorted(FAMILIES))
def chosen(request: pytest.FixtureRequest, make_tokenizer: Make) -> tuple[Family, Any]:
    family = FAMILIES[request.param]
    new = set(_SPECIAL.findall(family.template + family.eos))
    tokenizer = make_tokenizer(family.template)
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(token for token in new if token not in known)})
    tokenizer.eos_token = family.eos
    prepare_tokenizer(tokenizer)
    return family, tokenizer


def test_there_are_twenty() -> None:
    assert len(FAMILIES) >= 20
    assert all(training_template(family.template) == family.template for family in FAMILIES.values())


def opened(text: str) -> str:
    """An answer without what the model writes before its first word."""
    return text.lstrip(" \n").removeprefix("<|channel|>final<|message|>")


def test_what_is_trained_is_what_changes_with_the_answers(chosen: tuple[Family, Any]) -> None:
    family, tokenizer = chosen
    marked = mark(Example("chat", "x:1", messages=conversation(ANSWERS)), tokenizer, "answers", end_tokens(tokenizer))
    assert marked.text == render(tokenizer, conversation(ANSWERS), "x:1")
    assert len(marked.spans) == 3
    for turn, (start, stop) in enumerate(marked.spans):
        answers = tuple(OTHERS[i] if i == turn else answer for i, answer in enumerate(ANSWERS))
        other = render(tokenizer, conversation(answers), "x:1")
        # All that stands around the answer stays as it is when the answer is another one ...
        assert other.startswith(marked.text[:start])
        closing = family.closing if turn < 2 or family.last_closing is None else family.last_closing
        tail = marked.text[stop:]
        assert other.endswith(tail)
        # ... and within the span there is nothing but the answer and what closes it.
        wanted = ANSWERS[turn] + ("" if turn == 2 and marked.eos else closing)
        assert opened(marked.text[start:stop]) == wanted
        assert opened(other[start : len(other) - len(tail)]) == OTHERS[turn] + wanted.removeprefix(ANSWERS[turn])


def test_prompts_are_as_at_inference_and_every_answer_ends(chosen: tuple[Family, Any]) -> None:
    family, tokenizer = chosen
    example = Example("chat", "x:1", messages=conversation(ANSWERS))
    encoded = encode_example(example, tokenizer)
    prompt = tokenizer(
        render(tokenizer, example.messages[:1], "x:1", prompt=True), add_special_tokens=False
    )["input_ids"]  # fmt: skip
    start = encoded.spans[0][0]
    if family.template.count("lead") == 0:  # where the system message moves, so does the text before the first answer
        assert encoded.input_ids[:start] == prompt
    assert all(label == IGNORED for label in encoded.labels[:start])
    closings = [tokenizer.decode(encoded.input_ids[stop - 1 : stop]) for _, stop in encoded.spans]
    ends = {family.closing.strip(), (family.last_closing or family.closing).strip()}
    assert set(closings) <= ends
    last = encode_example(example, tokenizer, train_on="last-answer")
    assert last.spans == encoded.spans[-len(last.spans) :]
    assert sum(stop - start for start, stop in last.spans) < sum(stop - start for start, stop in encoded.spans)
