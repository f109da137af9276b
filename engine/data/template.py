"""A tokenizer made ready for training: a chat template, an end token, and a pad token that is not the end token.

Chat templates are rendered by transformers' own sandboxed Jinja, so training sees what inference will see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...planner.errors import DataError, ModelError
from .examples import Message, Span, Tools
from .template_limits import ROW_S, prove, within

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
_TRAINING = "_training.jinja"
#: A special token as templates write it.
_TOKEN = re.compile(r"<\|[A-Za-z_]+\|>|<(?:start|end)_of_turn>|<｜[^<>\s]+｜>")
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def prepare_tokenizer(tokenizer: Any, chat_template: str = "auto") -> tuple[str, ...]:
    """Set the template, end token and pad token of a tokenizer in place; return what was decided, for display.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: ``auto`` (the tokenizer's own, else ChatML), ``chatml``, a family's name, or a Jinja file.

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
    if chat_template not in ("auto", "chatml"):
        path = Path(chat_template).expanduser()
        named = not path.suffix and not path.is_file()
        tokenizer.chat_template = _of_family(path.name, vocabulary) if named else _from_file(path)
        try:
            render(tokenizer, [Message("user", "a"), Message("assistant", "b")], str(path))
        except DataError as error:
            raise DataError(error.what, where=str(path), do="Mend the template.") from error
        return [f"chat template: {'that of ' if named else ''}{path.name}"]
    if tokenizer.chat_template and chat_template == "auto":
        return ["chat template: the tokenizer's own"]
    end = "<|im_end|>" if "<|im_end|>" in vocabulary else tokenizer.eos_token
    tokenizer.chat_template = _CHATML.replace("END", end)
    why = "as the recipe asks" if chat_template == "chatml" else "because the tokenizer has none"
    return [f"chat template: ChatML with {end} at the end of a turn, {why}"]


def _from_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"the chat template can't be read ({error})"
        raise DataError(what, where=str(path), do="Check chat_template.") from None


def _of_family(name: str, vocabulary: dict[str, int]) -> str:
    """A family's template, as TRL ships it; the tokenizer must have its special tokens, or it would spell them out."""
    known = {path.stem: path for path in _shipped("*.jinja") if not path.name.endswith(_TRAINING)}
    if name not in known:
        near = get_close_matches(name, known, n=3) or sorted(known)
        do = f"Use chatml, {', '.join(near)}, or the path of a .jinja file."
        raise DataError(f"there is no chat template called {name!r}", where="chat_template", do=do)
    template = known[name].read_text(encoding="utf-8")
    lacking = sorted({token for token in _TOKEN.findall(template) if token not in vocabulary})
    if lacking:
        what = f"the tokenizer has no token {', '.join(lacking[:4])}, which the template of {name} writes"
        raise DataError(what, where="chat_template", do="Use chatml, or the template of this model's own family.")
    return template


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


def closing_token(tokenizer: Any) -> str | None:
    """The special token right after an answer that is not the last one, if there is one.

    It is often the end token, but not where the last turn ends differently (gpt-oss), and where turns have no end at
    all it is what opens the next one (GLM).
    """
    if not tokenizer.chat_template:
        return None
    turns = [Message("user", "a"), Message("assistant", _PROBE), Message("user", "b")]
    try:
        text = render(tokenizer, turns, "chat template")
    except DataError:
        return None
    ids = tokenizer(text.partition(_PROBE)[2].lstrip(), add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return str(tokenizer.convert_ids_to_tokens(ids[0])) if ids and ids[0] in added else None


#: Stands for an answer; a template can neither change it nor hold it.
_PROBE = "FinetuiProbe"


def has_markers(template: str) -> bool:
    """Whether a chat template marks what the assistant says with ``{% generation %}``."""
    return _GENERATION.search(template) is not None


@lru_cache(maxsize=64)
def training_template(template: str) -> str:
    """The version of a chat template that conversations are trained with.

    TRL ships such versions for many families: they mark answers, and write each turn as it was when it was the last
    one, thoughts included. One is taken only if its original is this very template; else the template is its own.
    """
    if has_markers(template):
        return template
    for marked in _shipped(f"*{_TRAINING}"):
        original = marked.with_name(marked.name.removesuffix(_TRAINING) + ".jinja")
        if original.is_file() and original.read_text(encoding="utf-8") == template:
            return marked.read_text(encoding="utf-8")
    return template


def _shipped(pattern: str) -> list[Path]:
    """Files among TRL's chat templates; none where it is not installed."""
    trl = find_spec("trl")
    roots = trl.submodule_search_locations or () if trl else ()
    return sorted(path for root in roots for path in Path(root, "chat_templates").glob(pattern))


def writes_own_turns(tokenizer: Any) -> bool:
    """Whether the tokenizer came with a chat template of its own, rather than being given ours."""
    template = tokenizer.chat_template
    return bool(template) and not str(template).startswith(_CHATML.partition("END")[0])


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    *,
    prompt: bool = False,
    tools: Tools = (),
    template: str | None = None,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: its template is used.
        messages: the turns.
        where: their row, for errors.
        prompt: add what asks for the next answer.
        tools: what the assistant may call.
        template: another template than the tokenizer's.

    Raises:
        DataError: the template raises, with the row it raised on, or leaves out what the row holds.
    """
    return _render(tokenizer, messages, where, tools, template, add_generation_prompt=prompt)[0]


def render_marked(
    tokenizer: Any, messages: Sequence[Message], where: str, *, tools: Tools = (), template: str | None = None
) -> tuple[str, list[Span]]:
    """The text of a conversation, and the character spans that its template marks as generated."""
    return _render(tokenizer, messages, where, tools, template, return_assistant_tokens_mask=True)


def own_template(tokenizer: Any, tools: Tools = ()) -> str:
    """The tokenizer's template; some have another one for conversations with tools."""
    return str(tokenizer.get_chat_template(tools=list(tools) or None))


def as_dict(message: Message, *, parts: bool = False) -> dict[str, Any]:
    """A message as chat templates take it; with ``parts``, its content is a list of one part."""
    content = [{"type": "text", "text": message.content}] if parts else message.content
    made: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning:  # templates know it under either name
        made |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.tool_calls:
        made["tool_calls"] = list(message.tool_calls)
    made |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key))}
    return made


def _render(
    tokenizer: Any, messages: Sequence[Message], where: str, tools: Tools, template: str | None, **options: Any
) -> tuple[str, list[Span]]:
    template = template or own_template(tokenizer, tools)
    _refuse_silent_loss(template, messages, tools, where)
    names = tuple(tokenizer.special_tokens_map.items())
    _proven(template, names)
    parts = _wants_parts(template, names)
    try:
        with within(ROW_S, where):
            chat = [as_dict(message, parts=parts) for message in messages]
            rendered = _jinja(template, names, chat, tools, **options)
    except _errors() as error:
        what = f"the chat template refuses this conversation ({error})"
        do = "Change the row, or set chat_template: to a template that takes it."
        raise DataError(what, where=where, do=do) from error
    texts, spans = rendered
    _refuse_lost_system(texts[0], messages, where)
    marked: list[Span] = list(spans[0]) if spans else []
    return texts[0], marked


def _errors() -> tuple[type[Exception], ...]:
    """What templates raise of themselves, and by using a value wrongly."""
    from jinja2 import TemplateError

    deep = (RecursionError, SyntaxError, MemoryError)  # of what Jinja makes of too deep an expression
    return (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, *deep)


def _jinja(template: str, names: tuple[tuple[str, Any], ...], chat: Any, tools: Tools = (), **options: Any) -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(
        conversations=[chat], tools=list(tools) or None, chat_template=template, **options, **dict(names)
    )


@lru_cache(maxsize=64)
def _proven(template: str, names: tuple[tuple[str, Any], ...]) -> None:
    """Refuse a template that does not end, or not within reason, on short conversations of different shapes."""
    turns = [as_dict(Message(role, _PROBE)) for role in ("user", "assistant")]
    system = as_dict(Message("system", _PROBE))
    chats = (turns[:1], turns, [system, *turns], turns * 4)

    def lengths() -> int:
        longest = 0
        for chat in chats:
            with suppress(*(kind for kind in _errors() if kind is not MemoryError)):
                longest = max(longest, len(_jinja(template, names, chat)[0][0]))
        return longest

    _errors()  # imported here, where no limit of the copy is in the way
    with suppress(*_errors()):
        _jinja("{{ messages[0].content }}", names, turns[:1])
    prove(lengths, "chat template")


@lru_cache(maxsize=64)
def _wants_parts(template: str, names: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a template writes content only if it is a list of parts, as those of models that also see images do."""
    for parts in (False, True):
        try:
            texts, _ = _jinja(template, names, [as_dict(Message("user", _PROBE), parts=parts)])
        except _errors():
            continue
        if _PROBE in texts[0]:
            return parts
    return False


def _refuse_silent_loss(template: str, messages: Sequence[Message], tools: Tools, where: str) -> None:
    """A template that does not know of tools or thoughts would leave them out without a word."""
    do = "Set chat_template: to one that writes them, or write them into the content."
    if any(m.tool_calls for m in messages) and "tool_calls" not in template:
        raise DataError("the chat template has no place for tool calls", where=where, do=do)
    if tools and "tools" not in template:
        raise DataError("the chat template has no place for tools", where=where, do=do)
    if any(m.reasoning for m in messages) and "reasoning_content" not in template and "thinking" not in template:
        raise DataError("the chat template has no place for reasoning_content", where=where, do=do)


def _refuse_lost_system(text: str, messages: Sequence[Message], where: str) -> None:
    """A template may look for a system message at the beginning alone, and leave out later ones without a word."""
    for number, message in enumerate(messages[1:], start=2):
        content = message.content.strip() if message.role == "system" else ""
        said = [other.content for other in messages if other.role != "assistant"]
        if content and text.count(content) < sum(other.count(content) for other in said):
            what = f"the chat template leaves out message {number}, a system message after the first turn"
            do = "Set chat_template: to one that writes them (chatml, llama3 …), or move it to the beginning."
            raise DataError(what, where=where, do=do)
