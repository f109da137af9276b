"""Make what presets/tiny and presets/data ship from the facts beside this file.

    python tests/presets/make_tiny.py

Every fact is asked in each way that questions.yaml knows. The tokenizer (byte-level BPE) is trained on the result and
on general.txt. The output is the same, byte for byte, for the same ``tokenizers`` release.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

HERE = Path(__file__).parent
PRESETS = HERE.parents[1] / "presets"
VOCABULARY = 1792
SEED = 7
#: Token 0 pads, 1 begins a turn, 2 ends one. The pad token is none that is ever learned.
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def questions() -> dict[str, list[dict[str, list[dict[str, str]]]]]:
    """The rows of both splits, in ``messages`` form and in a fixed random order."""
    facts = yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))
    ways = yaml.safe_load((HERE / "questions.yaml").read_text(encoding="utf-8"))
    splits: dict[str, list[dict[str, list[dict[str, str]]]]] = {}
    for split in ("train", "eval"):
        rows = []
        for fact in facts:
            for way in ways[fact["kind"]][split]:
                question = way.format(**fact)
                question = (
                    question
                    if question.startswith(("nvidia", "finetui", "tmux", "bfloat", "float"))
                    else question[0].upper() + question[1:]
                )
                rows.append({"messages": [turn("user", question), turn("assistant", fact["answer"])]})
        random.Random(SEED).shuffle(rows)
        splits[split] = rows
    return splits


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make_data(splits: dict[str, list[dict[str, list[dict[str, str]]]]]) -> None:
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (PRESETS / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")


def make_tokenizer(splits: dict[str, list[dict[str, list[dict[str, str]]]]]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for row in splits["train"] for message in row["messages"]]
    texts += (HERE / "general.txt").read_text(encoding="utf-8").splitlines() * 4
    roles = ["user\n", "assistant\n", "system\n"] * 1000  # as often as in rendered conversations
    tokenizer.train_from_iterator([*roles, *texts], trainer)
    folder = PRESETS / "tiny"
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "model_max_length": 1024,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    made = questions()
    make_data(made)
    make_tokenizer(made)
