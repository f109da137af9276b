"""A million Alpaca rows: how soon the format is known, how fast rows become tokens, what it takes, how soon it resumes.

    python -P tests/bench/data.py [--rows 1000000] [--tokenizer FOLDER] [--folder FOLDER] [--json FILE]

The rows are sentences of Python's own documentation, put together at random (about 100 tokens each); the tokenizer,
unless one is given, is a byte-level BPE of 32,000 tokens trained on them, with ChatML. Our way from file to rows on
disk is compared with the tokenizer alone, called as other programs call it (``tokenizer(texts)``, 1,000 texts a
call, all cores) on the same 20,000 rows, in five turns: 1 is as fast. ``backend`` is the Rust part of it, without
transformers. ``_cpu`` compares seconds of CPU instead, which other work on the machine changes less. Memory is the peak
of the process that prepares (``ru_maxrss``, mapped files included).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLE, ROUNDS = 20_000, 5
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentences() -> list[str]:
    """English, as much as every Python has of it."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topic.split()) for topic in topics.values())
    return [s for s in re.split(r"(?<=[.:]) ", text) if 20 < len(s) < 240]


def write_rows(path: Path, count: int) -> None:
    chosen, draw = sentences(), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {
                "instruction": draw.choice(chosen),
                "input": draw.choice(chosen) if draw.random() < 0.4 else "",
                "output": " ".join(draw.choices(chosen, k=draw.randint(1, 5))),
            }
            file.write(json.dumps(row) + "\n")


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sentences(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def raw_speed(tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """Rows per second of the tokenizer alone, as transformers calls it and its Rust part; and CPU seconds of a row."""
    speeds = {}
    calls = {
        "raw": lambda batch: tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"],
        "backend": lambda batch: tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False),
    }
    for name, call in calls.items():
        began, busy = time.perf_counter(), time.process_time()
        for start in range(0, len(texts), 1000):
            call(texts[start : start + 1000])
        speeds[name] = len(texts) / (time.perf_counter() - began)
        speeds[f"{name}_cpu"] = (time.process_time() - busy) / len(texts)
    return speeds


def work(rows: Path, tokenizer_folder: Path, cache: Path) -> dict[str, Any]:
    """One process: detect, the tokenizer alone and ours in turn, then all the rows."""
    from finetui.engine.data.prepare import prepare
    from finetui.engine.data.prepared import DataSettings
    from finetui.engine.data.preview import survey
    from finetui.planner.recipe import Recipe

    recipe = Recipe.build({"model": "m", "data": str(rows), "evaluation": {"holdout": 0.0}})
    began = time.perf_counter()
    found = survey(recipe)
    answer: dict[str, Any] = {"format": found.sources[0].format, "detect_s": time.perf_counter() - began}
    from transformers import AutoTokenizer

    from finetui.engine.data.examples import Message
    from finetui.engine.data.template import prepare_tokenizer, render

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    prepare_tokenizer(tokenizer)
    texts = []
    with rows.open(encoding="utf-8") as file:
        for line, _ in zip(file, range(SAMPLE), strict=False):
            row = json.loads(line)
            question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
            chat = [Message("user", question), Message("assistant", row["output"])]
            texts.append(render(tokenizer, chat, "x"))
    settings = DataSettings(2048)
    # The very same rows, first by the tokenizer alone, then from file to rows on disk, in turn.
    part = Recipe.build({**recipe.to_dict(), "data": [{"path": str(rows), "limit": SAMPLE}]})
    turns: dict[str, list[float]] = {name: [] for name in ("raw", "raw_cpu", "backend", "backend_cpu")}
    for round_number in range(ROUNDS + 1):
        speed = raw_speed(tokenizer, texts)
        began, busy = time.perf_counter(), time.process_time()
        prepare(part, settings, tokenizer, cache / str(round_number))
        wall, cpu = time.perf_counter() - began, time.process_time() - busy
        for name in turns if round_number else ():  # the first round also imports
            mine, theirs = (cpu, speed[name]) if name.endswith("_cpu") else (wall, 1 / speed[name])
            turns[name].append(theirs * SAMPLE / mine)
    answer |= {f"of_{name}": [round(x, 3) for x in sorted(shares)] for name, shares in turns.items()}
    answer |= {f"of_{name}_median": statistics.median(shares) for name, shares in turns.items()}
    began = time.perf_counter()
    made = prepare(recipe, settings, tokenizer, cache)
    seconds = time.perf_counter() - began
    answer["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    answer |= {"rows": made.facts.examples, "tokens": made.facts.tokens, "prepare_s": seconds}
    began = time.perf_counter()
    prepare(recipe, settings, tokenizer, cache).train[-1]
    answer["resume_s"] = time.perf_counter() - began
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--folder", type=Path, help="where rows and tokenizer are kept for the next time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs=3, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        print(json.dumps(work(*asked.work)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows, tokenizer = folder / f"alpaca-{asked.rows}.jsonl", asked.tokenizer or folder / "tokenizer"
        if not rows.exists():
            write_rows(rows, asked.rows)
        if not tokenizer.exists():
            make_tokenizer(tokenizer)
        # The rows are made in another process than the one whose memory is measured.
        command = [sys.executable, "-P", __file__, "--work", str(rows), str(tokenizer), f"{scratch}/cache"]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
        answer = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    for name, value in answer.items():
        print(f"{name:18s} {value if not isinstance(value, float) else round(value, 3)}")
    if asked.json:
        asked.json.write_text(json.dumps(answer, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
