"""Labels: exactly the answers and what ends them, for the templates of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetui.engine.data.examples import Example, Message
from finetui.engine.data.labels import IGNORED, Encoded, encode, encode_batch
from finetui.engine.data.template import prepare_tokenizer
from finetui.planner.errors import DataError

Make = Callable[..., Any]


def conversation(*contents: str, train_from: int = 0) -> Example:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], content) for i, content in enumerate(contents))
    return Example("chat", "x:1", messages=messages, train_from=train_from)


def spans(encoded: Encoded) -> list[list[int]]:
    """The runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def texts(encoded: Encoded, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(run, skip_special_tokens=False).lstrip(" ") for run in spans(encoded)]


def as_dicts(example: Example) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in example.messages]


QUESTIONS = ("What is e?", "e", "And <|that|> thing?", "The answer,\nin two lines.", "user", "What is e?")


def test_every_answer_and_its_end_and_nothing_else(family: Any, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(family.template)
    encoded = encode(conversation(*QUESTIONS), tokenizer)
    think = "<think>\n\n</think>\n\n" if "</think>" in family.template else ""
    expected = [content + family.closing for content in QUESTIONS[1:-1:2]]
    assert texts(encoded, tokenizer) == [*expected, think + QUESTIONS[-1] + family.last_closing]


def test_tokens_are_those_of_the_template_and_of_inference(family: Any, make_tokenizer: Make) -> None:
    """An independent re-rendering: transformers' own tokens of the chat, and of the prompt that inference sees."""
    tokenizer = make_tokenizer(family.template)
    example = conversation(*QUESTIONS)
    encoded = encode(example, tokenizer)
    whole = tokenizer.apply_chat_template(as_dicts(example), return_dict=True)["input_ids"]
    assert encoded.input_ids[: len(whole)] == whole
    assert encoded.input_ids[len(whole) :] in ([], [tokenizer.eos_token_id])
    prompt = tokenizer.apply_chat_template(as_dicts(example)[:-1], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    first = next(i for i in range(len(prompt) - 2, len(encoded.labels)) if encoded.labels[i] != IGNORED)
    if "<think>\n' }}" not in family.template:  # the one family whose prompt is not how its conversations go on
        assert encoded.input_ids[:first] == prompt
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


def test_system_message_and_trimmed_answers(make_tokenizer: Make, family: Any) -> None:
    tokenizer = make_tokenizer(family.template)
    example = Example("chat", "x:1", messages=(Message("system", "Be brief."), *conversation("Hm?", "Yes.  ").messages))
    if "System role" in family.template or "must alternate" in family.template:
        with pytest.raises(DataError, match=r"x:1: the chat template refuses this conversation"):
            encode(example, tokenizer)
    else:
        assert texts(encode(example, tokenizer), tokenizer)[0].endswith(family.last_closing)
        assert "brief" not in texts(encode(example, tokenizer), tokenizer)[0]


def test_metaspace_tokenizer(make_tokenizer: Make, family: Any) -> None:
    tokenizer = make_tokenizer(family.template, kind="metaspace")
    encoded = encode(conversation("What is it?", "The answer", "And?", "A short one."), tokenizer)
    assert [text.count("answer") + text.count("short") for text in texts(encoded, tokenizer)] == [1, 1]
    assert not any("?" in text for text in texts(encoded, tokenizer))


def test_a_prompt_of_messages_is_not_trained(make_tokenizer: Make, family: Any) -> None:
    tokenizer = make_tokenizer(family.template)
    encoded = encode(conversation("a?", "first", "b?", "second", train_from=3), tokenizer)
    assert len(spans(encoded)) == 1
    assert "second" in texts(encoded, tokenizer)[0]


def test_prompt_and_completion_split_at_the_boundary(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    for kind in ("bytes", "metaspace"):
        tokenizer = make_tokenizer(None, kind=kind)
        for prompt, completion in (
            ("What is the an", "swer"),
            ("What is ", "the answer"),
            ("q:", " a"),
            ("", "answer"),
        ):
            encoded = encode(Example("completion", "x:1", prompt=prompt, completion=completion), tokenizer)
            trained = [label for label in encoded.labels if label != IGNORED]
            assert encoded.input_ids[-len(trained) :] == trained
            assert trained[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(trained[:-1]).strip() == completion.strip()
            assert tokenizer.decode(encoded.input_ids[: -len(trained)]).strip() == prompt.strip()


def test_text_is_trained_whole_and_ends(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    encoded = encode(Example("text", "x:1", text="The answer."), tokenizer)
    assert encoded.labels == encoded.input_ids == [*tokenizer("The answer.")["input_ids"], tokenizer.eos_token_id]


def test_bos_is_put_where_the_tokenizer_puts_it(make_tokenizer: Make) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(None)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    for example in (
        Example("text", "x:1", text="The answer."),
        Example("completion", "x:1", prompt="q", completion="a"),
    ):
        encoded = encode(example, tokenizer)
        assert encoded.input_ids.count(bos) == 1
        assert (encoded.input_ids[0], encoded.labels[0]) == (bos, IGNORED)


def test_train_on_all(make_tokenizer: Make) -> None:
    encoded = encode(conversation("q", "a"), make_tokenizer(), train_on="all")
    assert encoded.labels == encoded.input_ids


def test_truncation_is_counted(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    whole = encode(conversation("q", "The answer."), tokenizer)
    cut = encode(conversation("q", "The answer."), tokenizer, max_length=len(whole.input_ids) - 3)
    assert (cut.input_ids, cut.labels, cut.cut) == (whole.input_ids[:-3], whole.labels[:-3], 3)


def test_a_batch_is_its_examples(make_tokenizer: Make, family: Any) -> None:
    tokenizer = make_tokenizer(family.template)
    examples = [
        conversation("a", "b"),
        conversation(*QUESTIONS),
        Example("completion", "x:1", prompt="p", completion="c"),
    ]
    assert encode_batch(examples, tokenizer) == [encode(example, tokenizer) for example in examples]


def test_a_template_that_loses_the_answer_is_refused(make_tokenizer: Make) -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] | upper }}{% endfor %}!"
    with pytest.raises(DataError, match=r"x:1: the chat template rewrites message 2"):
        encode(conversation("q", "The answer."), make_tokenizer(template))


def test_the_shipped_tokenizer() -> None:
    from transformers import AutoTokenizer

    from finetui.engine.models.tiny import tiny_folder

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    assert prepare_tokenizer(tokenizer) == ("chat template: the tokenizer's own",)
    encoded = encode(conversation("What is LoRA?", "Two small matrices."), tokenizer)
    assert texts(encoded, tokenizer) == ["Two small matrices.<|im_end|>"]
    masks: Any = tokenizer.apply_chat_template(
        as_dicts(conversation("What is LoRA?", "Two small matrices.")),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert [int(label != IGNORED) for label in encoded.labels] == masks["assistant_masks"]


def test_tokens_are_placed_the_same_with_and_without_offsets(make_tokenizer: Make) -> None:
    import random

    from finetui.engine.data.tokens import Marked, Tokens

    draw = random.Random(0)
    words = [
        "The answer",
        " is",
        "\n",
        "  ",
        "é",
        "文字",
        "🙂",
        "e\u0301",
        "<|im_end|>",
        "</s>",
        "3.14",
        "\t",
        " [INST] ",
    ]
    items = []
    for _ in range(400):
        text = "".join(draw.choices(words, k=draw.randint(1, 12)))
        cuts = sorted(draw.sample(range(len(text) + 1), k=min(len(text) + 1, 4)))
        items.append(Marked(text, tuple(zip(cuts[0::2], cuts[1::2], strict=False))))
    by_width, by_offset = Tokens(make_tokenizer()), Tokens(make_tokenizer())
    assert by_width._widths is not None
    by_offset._widths = None
    assert by_width.encode(items) == by_offset.encode(items)
    assert Tokens(make_tokenizer(kind="metaspace"))._widths is None


def test_a_system_message_in_between_is_read_and_not_trained(make_tokenizer: Make, family: Any) -> None:
    """A template may refuse or drop it, which is told; where it is written, answers alone are trained."""
    tokenizer = make_tokenizer(family.template)
    turns = [*conversation("a?", "first", "b?", "second").messages]
    example = Example("chat", "x:1", messages=(*turns[:2], Message("system", "Now be rude."), *turns[2:]))
    try:
        encoded = encode(example, tokenizer)
    except DataError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "refuses this conversation" in said or "leaves out message 3" in said
        return
    assert "Now be rude." in tokenizer.decode(encoded.input_ids)
    trained = texts(encoded, tokenizer)
    assert ["first" in trained[0], "second" in trained[1], len(trained)] == [True, True, 2]
    assert not any("rude" in text or "?" in text for text in trained)
