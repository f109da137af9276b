"""A tokenizer made ready for training: a chat template, an end token, and a pad token that is not the end token.

Chat templates are rendered by transformers' own sandboxed Jinja, so training sees what inference will see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...planner.errors import DataError, ModelError
from .formats import Message

#: ChatML (OpenAI 2023), with markers around what the assistant says. ``END`` is filled in by :func:`_chatml`.
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + 'END' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- message['content'] + 'END' + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Tokens that models keep for padding or for nothing, the most fitting first.
_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|fim_pad|>", "<|vision_pad|>")
_RESERVED = re.compile(
    r"<\|reserved_special_token_\d+\|>|<unused\d+>|<\|extra_\d+\|>|<\|placeholder\d+\|>|\[unused\d+\]"
)
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def prepare_tokenizer(tokenizer: Any, chat_template: str = "auto") -> tuple[str, ...]:
    """Set the template, end token and pad token of a tokenizer in place; return what was decided, for display.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: ``auto`` (the tokenizer's own, else ChatML) or the path of a Jinja file.

    Raises:
        DataError: the template file can't be read or is not valid Jinja.
        ModelError: no end-of-sequence token can be found.
    """
    notes: list[str] = []
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token_id is None:
        end = next((token for token in _ENDS if token in vocabulary), None)
        if end is None:
            what = "the tokenizer has no end-of-sequence token, so answers could never end"
            raise ModelError(what, where=str(tokenizer.name_or_path), do="Set eos_token in tokenizer_config.json.")
        tokenizer.eos_token = end
        notes.append(f"end token: {end}, because the tokenizer names none")
    notes += _set_template(tokenizer, chat_template, vocabulary)
    notes += _set_pad(tokenizer, vocabulary)
    tokenizer.padding_side = "right"
    return tuple(notes)


def _set_template(tokenizer: Any, chat_template: str, vocabulary: dict[str, int]) -> list[str]:
    if chat_template != "auto":
        path = Path(chat_template).expanduser()
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the chat template can't be read ({error})", where=str(path), do="Check chat_template."
            ) from None
        tokenizer.chat_template = template
        try:
            render(tokenizer, [Message("user", "a"), Message("assistant", "b")], str(path))
        except DataError as error:
            raise DataError(error.what, where=str(path), do="Mend the template.") from error
        return [f"chat template: {path.name}"]
    if tokenizer.chat_template:
        return ["chat template: the tokenizer's own"]
    end = "<|im_end|>" if "<|im_end|>" in vocabulary else tokenizer.eos_token
    tokenizer.chat_template = _CHATML.replace("END", end)
    return [f"chat template: ChatML with {end} at the end of a turn, because the tokenizer has none"]


def _set_pad(tokenizer: Any, vocabulary: dict[str, int]) -> list[str]:
    taken = set(stop_token_ids(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return []
    was = (
        f"it was {tokenizer.pad_token}, which also ends answers" if tokenizer.pad_token else "the tokenizer names none"
    )
    reserved = sorted((t for t in vocabulary if _RESERVED.fullmatch(t)), key=lambda t: vocabulary[t])
    candidates = [*_PADS, *reserved[:1], tokenizer.unk_token]
    pad = next((t for t in candidates if t in vocabulary and vocabulary[t] not in taken), None)
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
        return [
            f"pad token: {tokenizer.eos_token}, for want of a free one; padding is told apart by the attention mask"
        ]
    tokenizer.pad_token = pad
    return [f"pad token: {pad}, because {was}"]


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: end of sequence, and what the chat template writes after the assistant's text."""
    stops = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        text = render(tokenizer, [Message("user", "a"), Message("assistant", _PROBE)], "chat template")
        tail = text.partition(_PROBE)[2]
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
        stops += [i for i in ids if i in added and i not in stops]
    return [i for i in stops if i is not None]


#: Stands for an answer; a template can neither change it nor hold it.
_PROBE = "FinetuiProbe"


def has_markers(tokenizer: Any) -> bool:
    """Whether the chat template marks what the assistant says with ``{% generation %}``."""
    return isinstance(tokenizer.chat_template, str) and _GENERATION.search(tokenizer.chat_template) is not None


def render(tokenizer: Any, messages: Sequence[Message], where: str, *, prompt: bool = False) -> str:
    """The text of a conversation; with ``prompt``, followed by what asks for the next answer.

    Raises:
        DataError: the template raises, with the row it raised on.
    """
    return _render(tokenizer, messages, where, add_generation_prompt=prompt)[0]


def render_marked(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the character spans that its template marks as generated."""
    return _render(tokenizer, messages, where, return_assistant_tokens_mask=True)


def _render(
    tokenizer: Any, messages: Sequence[Message], where: str, **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        rendered: Any = render_jinja_template(
            conversations=[chat],
            chat_template=tokenizer.get_chat_template(),
            **options,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        what = f"the chat template refuses this conversation ({error})"
        do = "Change the row, or set chat_template: to a template that takes it."
        raise DataError(what, where=where, do=do) from error
    texts, spans = rendered
    marked: list[tuple[int, int]] = list(spans[0]) if spans else []
    return texts[0], marked
