"""Make the shipped data of the methods beyond supervised fine-tuning from the facts beside this file.

    python tests/presets/make_pairs.py

pairs.jsonl: a question with its answer and with the answer to another question of its kind, which is wrong here.
judged.jsonl: the same as single answers, marked right or wrong. sums.jsonl: sums with their results, for methods that
learn from a reward. text.txt: the answers by themselves, as paragraphs to read. The output is the same, byte for byte,
every time.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "presets" / "data"
SEED = 11
PAIRS, SUMS = 240, 200


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pairs() -> list[dict[str, Any]]:
    """Questions with a right and a wrong answer, in a fixed random order."""
    facts = yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))
    ways = yaml.safe_load((HERE / "questions.yaml").read_text(encoding="utf-8"))
    draw = random.Random(SEED)
    rows = []
    for fact in facts:
        others = [
            other["answer"] for other in facts if other["kind"] == fact["kind"] and other["answer"] != fact["answer"]
        ]
        for way in ways[fact["kind"]]["train"]:
            question = way.format(**fact)
            rows.append(
                {
                    "prompt": [turn("user", question[0].upper() + question[1:])],
                    "chosen": [turn("assistant", fact["answer"])],
                    "rejected": [turn("assistant", draw.choice(others))],
                }
            )
    draw.shuffle(rows)
    return rows[:PAIRS]


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pair as one answer, good and bad in turn."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(rows)
    ]


def sums() -> list[dict[str, Any]]:
    """Sums of two numbers below a hundred."""
    draw = random.Random(SEED)
    rows = []
    for _ in range(SUMS):
        a, b = draw.randrange(2, 100), draw.randrange(2, 100)
        rows.append({"prompt": [turn("user", f"What is {a} + {b}? Answer with the number.")], "answer": str(a + b)})
    return rows


def text() -> str:
    """The answers in the order of the facts, five to a paragraph."""
    facts = yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))
    answers = list(dict.fromkeys(fact["answer"] for fact in facts))
    return "\n\n".join(" ".join(answers[i : i + 5]) for i in range(0, len(answers), 5)) + "\n"


def main() -> None:
    """Write the four files."""
    rows = pairs()
    for name, written in (("pairs", rows), ("judged", judged(rows)), ("sums", sums())):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
        (DATA / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (DATA / "text.txt").write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
