"""Evaluations on disk: what came out, and each answer, in the directory of the run.

    runs/<name>/evaluations/
      20261122-181500-held-out.json            figures, intervals, differences (:func:`as_tree`)
      20261122-181500-held-out.samples.jsonl   one question per line, with the answer and the marks of every model

A JSON file is there only when its samples are: they are written first, and each is replaced whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.errors import RunError
from ...planner.version import VERSION
from ..durable import reported_as_disk_error, write_atomically
from ..modes import FOLDER
from ..run import Run

if TYPE_CHECKING:
    from .evaluation import Entry, Evaluation

FOLDER_NAME = "evaluations"
#: Figures whose sum over rows is nats, and the one that follows from each.
_PERPLEXITY = ("loss", "perplexity")


def as_tree(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values for JSON; a figure that there is none of is None, and fields may be added in later releases."""
    wanted = evaluation.wanted
    generation = dataclasses.asdict(wanted.generation)
    return {
        "finetui": VERSION,
        "time": round(time.time(), 3),
        "rows": {"source": evaluation.source, "count": evaluation.rows, "answered": len(evaluation.questions)},
        "settings": {"limit": wanted.limit, **(generation if evaluation.questions else {})},
        "models": [_entry(entry) for entry in evaluation.entries],
        "differences": [
            {
                "model": label,
                "against": other,
                "figure": name,
                "value": _number(found.value),
                "low": _number(found.low),
                "high": _number(found.high),
                "rows": found.rows,
                "verdict": found.verdict,
            }
            for label, other, name, found in evaluation.differences
        ],
        "notes": evaluation.notes,
    }


def _entry(entry: Entry) -> dict[str, Any]:
    subject, figures = entry.subject, {}
    for name, figure in entry.figures.items():
        low, high = figure.interval()
        figures[name] = {
            "value": _number(figure.value),
            "low": _number(low),
            "high": _number(high),
            "rows": figure.rows,
            "lower_is_better": figure.lower_is_better,
            "interval": "wilson" if figure.binary else "bootstrap",
        }
        if name.rpartition("/")[2] == _PERPLEXITY[0] and not name.startswith("tasks/"):
            told = {key: _number(math.exp(min(value, 700.0))) for key, value in
                    (("value", figure.value), ("low", low), ("high", high))}  # fmt: skip
            figures[name.removesuffix(_PERPLEXITY[0]) + _PERPLEXITY[1]] = {**figures[name], **told}
    return {
        "label": entry.label,
        "base": entry.base,
        "run": subject.run.name if subject.run else None,
        "checkpoint": None if entry.base else subject.checkpoint or None,
        "model": subject.model if entry.base else str(subject.folder),
        "figures": figures,
    }


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def samples(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Each question with what every model said to it, and how that was marked."""
    answered = [entry for entry in evaluation.entries if entry.answers]
    return [
        {
            "row": row,
            "prompt": question.shown,
            "expected": question.expected,
            "answers": {entry.label: entry.answers[row].text for entry in answered},
            "scores": {
                entry.label: {name: None if values[row] is None else round(values[row] or 0.0, 6)
                              for name, values in entry.marks.items()}
                for entry in answered
            },
        }
        for row, question in enumerate(evaluation.questions)
    ]  # fmt: skip


def save(evaluation: Evaluation, run: Run, name: str) -> Path:
    """Write an evaluation into a run's directory; returns the path of its figures.

    Args:
        name: what it was about: letters, digits, ``.``, ``_`` and ``-``; all else becomes ``-``.

    Raises:
        RunError: the directory can't be written.
        TrainingError: the disk is full (cause ``disk``).
    """
    folder = run.path / FOLDER_NAME
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "evaluation"
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{plain}"
    try:
        with reported_as_disk_error("the evaluation can't be written", folder):
            folder.mkdir(mode=FOLDER, exist_ok=True)
            free = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
            stem = next(one for one in free if not (folder / f"{one}.json").exists())
            target = folder / f"{stem}.json"
            lines = [json.dumps(sample, ensure_ascii=False) for sample in samples(evaluation)]
            tree = as_tree(evaluation) | {"samples": f"{stem}.samples.jsonl" if lines else None}
            if lines:
                write_atomically(folder / f"{stem}.samples.jsonl", "\n".join(lines) + "\n")
            write_atomically(target, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        what, do = f"the evaluation can't be written ({error.strerror})", "Keep it with --out FILE."
        raise RunError(what, where=str(folder), do=do) from error
    return target


def evaluations_of(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Names and trees of a run's evaluations, oldest first; a file that is none is passed over."""
    found: list[tuple[str, dict[str, Any]]] = []
    for path in sorted((run.path / FOLDER_NAME).glob("*.json")):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if _is_one(tree):
            found.append((path.stem, tree))
    return found


def _is_one(tree: Any) -> bool:
    """Whether a tree has all that is shown of an evaluation."""
    try:
        known = {str(model["label"]): model["figures"] for model in tree["models"]}
        for figures in known.values():
            for figure in figures.values():
                _ = [figure[key] for key in ("value", "low", "high", "interval")]
        for one in tree["differences"]:
            _ = [one[key] for key in ("against", "value", "low", "high", "verdict")], known[one["model"]][one["figure"]]
        return isinstance(tree["rows"]["source"], str) and isinstance(tree["rows"]["count"], int)
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
