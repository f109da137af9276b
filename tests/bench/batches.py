"""What batches without waste are worth: short samples packed into one row, and a pair's prompt computed once.

    python -P tests/bench/batches.py [--device cuda --layers 16 --width 2048] [--json PATH]

Forward and backward of a Llama with random weights, in turns, by our own batches. Packing: samples of about 200 tokens
(100 to 300) in rows of 4,096, against the same samples padded to 4,096 (what a fixed length does), one by one, and
twenty at a time padded to the longest of them. Pairs: prompts of 100, 300 and 900 tokens with answers of 50 to 150,
four pairs at a time, against both rows of each. Figures are samples per second over those of the other way: above 1,
ours is faster. ``_cpu`` compares seconds of CPU instead of the clock, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 4096


def model_of(asked: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=asked.vocabulary, hidden_size=asked.width, intermediate_size=asked.width * 3,
        num_hidden_layers=asked.layers, num_attention_heads=asked.width // 64, num_key_value_heads=asked.width // 128,
        head_dim=64, max_position_embeddings=LIMIT,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    return LlamaForCausalLM(config).to(asked.device, dtype)


def samples(count: int, low: int, high: int, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    rows = [[draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))] for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def timed(run: Callable[[], None], device: str) -> tuple[float, float]:
    import torch

    began, busy = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - busy


def in_turns(ours: Callable[[], None], theirs: Callable[[], None], asked: argparse.Namespace) -> dict[str, float]:
    """How many times as fast ours is: the median over rounds."""
    shares: list[tuple[float, float]] = []
    for number in range(asked.rounds + 1):
        (mine, busy), (other, used) = timed(ours, asked.device), timed(theirs, asked.device)
        if number:  # the first round also plans and allocates
            shares.append((other / mine, used / busy))
    return {"": statistics.median(s[0] for s in shares), "_cpu": statistics.median(s[1] for s in shares)}


def packing(model: Any, asked: argparse.Namespace) -> dict[str, float]:
    from finetui.engine.data.packing import Collator, join, pack

    made = samples(asked.samples, 100, 300, asked.vocabulary)
    packed = [join([made[i] for i in row]) for row in pack([len(s["input_ids"]) for s in made], LIMIT)]

    def learn(batches: list[list[Any]], multiple_of: int = 1) -> Callable[[], None]:
        collate = Collator(0, multiple_of)

        def run() -> None:
            for rows in batches:
                batch = {name: t.to(asked.device) for name, t in collate(rows).items()}
                model(**batch, use_cache=False).loss.backward()
                model.zero_grad()

        return run

    few = made[: asked.padded]
    ways = {
        "one by one": (made, learn([[s] for s in made])),
        "twenty at a time": (made, learn([made[i : i + 20] for i in range(0, len(made), 20)])),
        "padded to 4096": (few, learn([[s] for s in few], LIMIT)),
    }
    told = {}
    for name, (used, theirs) in ways.items():
        times = in_turns(learn([[row] for row in packed]), theirs, asked)
        told |= {f"packed over {name}{suffix}": t * len(made) / len(used) for suffix, t in times.items()}
    return told


def sharing(model: Any, asked: argparse.Namespace) -> dict[str, float]:
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from finetui.engine.trainers.shared_prompt import Shares, share_prompts

    why = share_prompts(model, LIMIT, contextlib.nullcontext())
    assert not why, why
    told, collate = {}, DataCollatorForPreference(pad_token_id=0)
    for length in (100, 300, 900):
        parts = [samples(asked.pairs, *size, asked.vocabulary, seed) for seed, size in
                 enumerate(((length, length), (50, 150), (50, 150)))]  # fmt: skip
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [{n: p["input_ids"] for n, p in zip(names, three, strict=True)} for three in zip(*parts, strict=True)]
        batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]

        def learn(shared: bool, batches: list[Any] = batches) -> Callable[[], None]:
            def run() -> None:
                for chosen in batches:
                    batch = {name: t.to(asked.device) for name, t in collate(chosen).items()}
                    given = {"shares": Shares.of(chosen, 1)} if shared else {}
                    hidden = model.model(input_ids=batch["input_ids"], use_cache=False, **given).last_hidden_state
                    answers = batch["completion_mask"][:, 1:].bool()
                    logits = model.lm_head(hidden[:, :-1][answers]).float()
                    loss = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:][answers])
                    loss.backward()
                    model.zero_grad()

            return run

        times = in_turns(learn(True), learn(False), asked)
        told |= {f"prompt of {length} shared{suffix}": t for suffix, t in times.items()}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--padded", type=int, default=4, help="how many of them are also padded to 4,096")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model = model_of(asked)
    answer = {name: round(value, 3) for name, value in {**packing(model, asked), **sharing(model, asked)}.items()}
    for name, value in answer.items():
        print(f"{name:32s} {value:8.2f}")
    if asked.json:
        about = {"device": asked.device, "layers": asked.layers, "width": asked.width, "rounds": asked.rounds}
        asked.json.write_text(json.dumps({**about, **answer}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
