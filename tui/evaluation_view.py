"""An evaluation as plain text: every figure of every model, what is better and what is worse, and answers side by side.

It reads the tree that an evaluation is kept as (:mod:`finetui.engine.evaluation.records`), so that a kept one is shown
as a new one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .columns import Column

#: Figures that are shares whatever their rows are.
_SHARES = {"accuracy", "exact_match", "f1", "rouge_l", "likelier", "reward_accuracy"}
_NAMES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "token accuracy",
    "exact_match": "exact match",
    "f1": "word F1",
    "rouge_l": "ROUGE-L",
    "likelier": "better answer likelier",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
}
_SIGNS = {"better": "▲ better", "worse": "▼ worse", "no difference": "· same", "too few rows": "? few rows"}
Tree = Mapping[str, Any]


def table_of(tree: Tree) -> tuple[list[Column], list[dict[str, str]]]:
    """A row per figure, a column per model; beside one model alone also the difference with its interval."""
    models = tree["models"]
    labels = [str(model["label"]) for model in models]
    verdicts = {(one["model"], one["figure"]): one for one in tree["differences"]}
    compared = {one["model"] for one in tree["differences"]}
    columns = [Column("figure"), *(Column(label, right=True, least=8) for label in labels)]
    alone = len(compared) == 1
    if alone:
        columns.append(Column("difference", right=True, rank=1))
    if compared:
        columns.append(Column("verdict"))
    rows = []
    for name in dict.fromkeys(name for model in models for name in model["figures"]):
        kept = [model["figures"].get(name) for model in models]
        shown = next(figure for figure in kept if figure is not None)
        row = {"figure": name_of(name, shown), "difference": "", "verdict": ""}
        row |= {
            label: "–" if figure is None else value_of(name, figure) for label, figure in zip(labels, kept, strict=True)
        }
        told = [(label, verdicts[label, name]) for label in labels if (label, name) in verdicts]
        if alone and told:
            row["difference"] = difference_of(name, shown, told[0][1])
        row["verdict"] = "  ".join(
            _SIGNS.get(one["verdict"], one["verdict"]) + ("" if alone else f" ({label})") for label, one in told
        )
        rows.append(row)
    return columns, rows


def name_of(name: str, figure: Tree) -> str:
    """``loss``, ``wiki.txt: loss``, ``gsm8k: exact_match``, ``numeric, pass@1``."""
    kind, *rest = name.split("/")
    if kind == "also":
        return f"{'/'.join(rest[:-1])}: {_NAMES.get(rest[-1], rest[-1])}"
    if kind == "tasks":
        return f"{'/'.join(rest[:-1])}: {rest[-1]}"
    if kind == "score":
        return "/".join(rest) + (", pass@1" if figure["interval"] == "wilson" else "")
    return _NAMES.get(name, name)


def value_of(name: str, figure: Tree | None) -> str:
    """A figure; with the interval of a share of answers, which are few."""
    value = figure["value"] if figure is not None else None
    if figure is None or value is None:
        return "–"
    if not _is_share(name, figure):
        return f"{value:.4g}"
    if figure["interval"] != "wilson" or figure["low"] is None:
        return f"{value:.1%}"
    return f"{value:.1%} ({100 * figure['low']:.0f}–{100 * figure['high']:.0f})"


def difference_of(name: str, figure: Tree, told: Tree) -> str:
    """``-0.42 (-0.45 … -0.39)``; of shares in percentage points."""
    if told["value"] is None:
        return "–"
    factor, form = (100, "+.1f") if _is_share(name, figure) else (1, "+.3g")
    value, low, high = (
        None if told[key] is None else format(told[key] * factor, form) for key in ("value", "low", "high")
    )
    return f"{value}" if low is None else f"{value} ({low} … {high})"


def _is_share(name: str, figure: Tree) -> bool:
    return name.rpartition("/")[2] in _SHARES or figure["interval"] == "wilson"


def summary_of(tree: Tree) -> list[str]:
    """The verdicts in words, one line per model: what got better, what got worse, and what nobody can tell."""
    lines = []
    for label in dict.fromkeys(one["model"] for one in tree["differences"]):
        mine = [one for one in tree["differences"] if one["model"] == label]
        figures = next(model["figures"] for model in tree["models"] if model["label"] == label)
        named: dict[str, list[str]] = {}
        for one in mine:
            named.setdefault(one["verdict"], []).append(name_of(one["figure"], figures[one["figure"]]))
        parts = [f"{verdict}: {', '.join(named[verdict])}" for verdict in _SIGNS if verdict in named]
        lines.append(f"{label} against {mine[0]['against']}: {'; '.join(parts)}")
    return lines


def samples_of(samples: Sequence[Tree], count: int) -> Iterator[str]:
    """The first questions, with what was expected, what each model said, and how that was marked."""
    for sample in samples[:count]:
        yield ""
        yield f"asked     {_line(sample['prompt'])}"
        if sample["expected"]:
            yield f"expected  {_line(' | '.join(sample['expected']))}"
        for label, answer in sample["answers"].items():
            marks = sample["scores"].get(label, {})
            told = ", ".join(
                f"{name.removeprefix('score/')} {value:.3g}" for name, value in marks.items() if value is not None
            )
            yield f"{label}  {_line(answer)}" + (f"  [{told}]" if told else "")


def _line(text: str, most: int = 600) -> str:
    """A text in one line, its end left out where it is long."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"
