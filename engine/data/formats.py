"""What the columns of a row mean: the formats, which methods take which, and how one is detected from the first rows.

=================== ================================================================================
messages            ``messages`` or ``conversations``: list of ``{role, content}``; optional ``tools``
sharegpt            ``conversations``: list of ``{from, value}``; optional ``system``, ``tools``
alpaca              ``instruction``, ``input``, ``output`` or ``response``; optional ``system``, ``history``
question-answer     ``question`` + ``answer``, optional ``context``, ``system``: a chat of two turns
prompt-completion   ``prompt`` + ``completion`` or ``response``; each a string or a list of messages
text                ``text`` or ``content``
preference          ``chosen`` + ``rejected``, with or without the prompt; or ranked ``answers``
unpaired-preference any of the chats or prompts above, with a ``label`` (or ``kto_tag``) that is true or false
stepwise            ``prompt``, ``completions``, ``labels``: the steps of a solution, each right or wrong
prompt-only         a prompt; all other columns are kept for rewards
=================== ================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Literal

from ...planner.datasource import DataSource
from ...planner.errors import DataError
from .examples import Role
from .fields import kind
from .files import Refuse, Row, stop
from .sources import read_rows
from .turns import ROLES, keys_of

Format = Literal[
    "messages", "sharegpt", "alpaca", "question-answer", "prompt-completion", "text", "preference",
    "unpaired-preference", "stepwise", "prompt-only",
]  # fmt: skip
Columns = dict[str, str]
_Names = dict[str, tuple[str, ...]]

_LEARNED: tuple[Format, ...] = ("messages", "sharegpt", "alpaca", "question-answer", "prompt-completion", "text")
_PAIRED: tuple[Format, ...] = ("preference",)
_ASKED: tuple[Format, ...] = (*_LEARNED[:-1], "prompt-only")
#: What each method can be trained on. Of equally fitting formats the first is taken.
ACCEPTS: dict[str, tuple[Format, ...]] = {
    "sft": _LEARNED,
    "pretrain": _LEARNED,
    "distill": _LEARNED,
    **dict.fromkeys(("dpo", "ipo", "orpo", "cpo", "simpo", "reward"), _PAIRED),
    "kto": ("unpaired-preference", "preference", "stepwise"),
    **dict.fromkeys(("grpo", "rloo", "ppo"), _ASKED),
}


@dataclass(frozen=True)
class _Shape:
    """The columns of a format: what each is to it -> its accepted names, the usual one first."""

    needs: _Names
    may: _Names
    why: str


_CHAT: _Names = {"system": ("system",), "tools": ("tools",)}
_ANSWERS = ("answer", "response", "output", "solution")
_QUESTIONS = ("question", "instruction", "query", "problem", "input")
_CONTEXT = ("context", "passage", "document")
_SHAPES: dict[Format, tuple[_Shape, ...]] = {
    "messages": (
        _Shape(
            {"messages": ("messages", "conversations", "conversation")},
            _CHAT,
            "{messages} holds lists of {role} and {content}",
        ),
    ),
    "sharegpt": (
        _Shape(
            {"messages": ("conversations", "conversation", "messages")},
            _CHAT,
            "{messages} holds lists of {role} and {content}",
        ),
    ),
    "alpaca": (
        _Shape(
            {"instruction": ("instruction",), "output": ("output", "response", "answer")},
            {"input": ("input", "context"), "history": ("history",), **_CHAT},
            "{instruction} and {output} are there",
        ),
    ),
    "question-answer": (
        _Shape(
            {"question": ("question", "query", "problem", "input"), "answer": _ANSWERS},
            {"context": _CONTEXT, **_CHAT},
            "{question} and {answer} are there",
        ),
    ),
    "prompt-completion": (
        _Shape(
            {"prompt": ("prompt",), "completion": ("completion", "response", "answer", "output")},
            _CHAT,
            "{prompt} and {completion} are there",
        ),
    ),
    "text": (_Shape({"text": ("text", "content")}, {}, "{text} is there"),),
    "preference": (
        _Shape(
            {"chosen": ("chosen", "chosen_response"), "rejected": ("rejected", "rejected_response")},
            {
                "prompt": ("prompt",),
                "messages": ("conversations", "messages"),
                "question": _QUESTIONS,
                "input": ("input",),
                "context": _CONTEXT,
                "history": ("history",),
                "margin": ("margin",),
                **_CHAT,
            },
            "{chosen} and {rejected} are there",
        ),
        _Shape(
            {"prompt": ("prompt", *_QUESTIONS), "answers": ("answers",)}, _CHAT, "{answers} are ranked"
        ),
    ),
    "unpaired-preference": (),
    "stepwise": (
        _Shape(
            {"prompt": ("prompt", *_QUESTIONS), "completions": ("completions",), "labels": ("labels",)},
            {"system": ("system",)},
            "{completions} has steps and {labels} judges them",
        ),
    ),
    "prompt-only": (
        _Shape({"prompt": ("prompt",)}, _CHAT, "{prompt} is there"),
        _Shape({"question": _QUESTIONS}, {"input": ("input",), "context": _CONTEXT, **_CHAT}, "{question} is there"),
    ),
}  # fmt: skip
#: Names of the column that says whether an answer is good.
_LABELS = ("label", "kto_tag")
#: How many rows a format is judged by.
DETECT_ROWS = 100


@dataclass(frozen=True, slots=True)
class Detected:
    """The format of a source: which columns it reads, how sure that is (share of rows that fit), and why.

    ``base`` is the format of judged answers but for their label; ``chat`` says whether plain strings are turns of a
    chat, ``keys`` what role and text of a message are called where the usual names are not, ``roles`` who speaks under
    which name.
    """

    format: Format
    columns: Columns
    confidence: float
    why: str
    base: Format | None = None
    chat: bool = False
    keys: tuple[str, str] | None = None
    roles: Mapping[str, Role] = field(default_factory=lambda: ROLES)


def open_source(source: DataSource, method: str = "sft", refuse: Refuse = stop) -> tuple[Detected, Iterator[Row]]:
    """The format of a source, and all its rows; ``refuse`` is told of rows that can't be read."""
    rows = read_rows(source, refuse=refuse)
    first = list(islice(rows, DETECT_ROWS))
    return detect(first, source, method), chain(first, rows)


def detect(rows: Sequence[Row], source: DataSource | str = "auto", method: str = "sft") -> Detected:
    """The format of some first rows of a source.

    Args:
        rows: the first rows.
        source: what the recipe says about them, or just the name of a format.
        method: what the rows are for.

    Raises:
        DataError: no format of this method fits, naming the columns found, what is accepted, and the methods that
            could use the rows as they are.
    """
    if isinstance(source, str):
        source = DataSource.model_validate({"path": "rows", "format": source})
    if not rows:
        raise DataError("there are no rows to look at", do="Give a source that has rows.")
    accepted = ACCEPTS[method]
    if source.format != "auto":
        if source.format not in accepted:
            what = f"method {method} can't be trained on format {source.format}"
            raise DataError(what, where=source.path, do=f"{_serves(source.format)} It takes {', '.join(accepted)}.")
        found = _best([source.format], rows, source)
        if found is None:
            raise _nearly([source.format], rows, source) or _not(source.format, rows, source)
        return _with_roles(found, source)
    found = _best(accepted, rows, source, judging=method == "kto")
    judged = _best(["unpaired-preference"], rows, source) if found and accepted == _LEARNED else None
    if found is not None and judged is None:
        return _with_roles(found, source)
    if found is None and (near := _nearly(accepted, rows, source)) is not None:
        raise near
    other = judged or _best([name for name in _SHAPES if name not in accepted], rows, source)
    if other is None:
        raise _unknown(rows, accepted)
    what = f"the rows are in {other.format} format ({other.why}), which method {method} can't train on"
    do = _serves(other.format)
    if found is not None:
        do += f" Or set format: {found.format}, to learn every answer, good or bad."
    raise DataError(what, where=rows[0].where, do=do)


#: Formats whose rows say who speaks.
_SPOKEN = {"messages", "sharegpt", "prompt-completion", "preference", "prompt-only", "stepwise"}


def _with_roles(found: Detected, source: DataSource) -> Detected:
    if not source.roles:
        return found
    if (found.base or found.format) not in _SPOKEN:
        what = f"roles has no effect on format {found.format}, in which nobody is named"
        raise DataError(what, where=source.path, do="Remove it, or set format:.")
    return replace(found, roles={**ROLES, **{name.strip().lower(): role for name, role in source.roles.items()}})


def _best(
    names: Sequence[Format], rows: Sequence[Row], source: DataSource, *, judging: bool = False
) -> Detected | None:
    found: list[Detected] = []
    for name in names:
        if name == "unpaired-preference":
            found += [d for d in [_score_judged(rows, source, judging)] if d]
        found += [d for shape in _SHAPES[name] if (d := _score(name, shape, rows, source)) is not None]
    return max(found, key=lambda d: d.confidence, default=None)  # ties go to the first, which is the more specific


def _score(name: Format, shape: _Shape, rows: Sequence[Row], source: DataSource) -> Detected | None:
    """How well a format fits, or None if it does not fit a single row or has no use for a column that was named."""
    given = {part: column for part, column in source.columns.items() if part not in ("role", "content")}
    if not given.keys() <= shape.needs.keys() | shape.may.keys():
        return None
    keys = _keys(name, source)
    columns: Columns = {}
    for part, names in shape.needs.items():
        names = (given[part],) if part in given else names
        counts = {column: sum(_fits(name, part, row.values.get(column), keys) for row in rows) for column in names}
        best = max(names, key=lambda column: counts[column])
        if not counts[best]:
            return None
        columns[part] = best
    fitting = sum(all(_fits(name, part, row.values.get(c), keys) for part, c in columns.items()) for row in rows)
    if not fitting:
        return None
    first, second = keys or (("from", "value") if name == "sharegpt" else ("role", "content"))
    why = shape.why.format(**columns, role=first, content=second)
    for part, names in shape.may.items():
        names = (given[part],) if part in given else names
        there = next((c for c in names if any(row.values.get(c) is not None for row in rows)), None)
        if there is not None and there not in columns.values():
            columns[part] = there
            why += f", with {there}"
    chat = source.chat if source.chat != "auto" else ("question" in columns or name == "alpaca")
    return Detected(name, columns, fitting / len(rows), why, chat=chat, keys=keys)


def _score_judged(rows: Sequence[Row], source: DataSource, judging: bool = False) -> Detected | None:
    """Any chat or prompt with its answer, beside a column that is true or false; where rows are there to be judged
    (``judging``), or the recipe says so, also 1 or 0, yes or no."""
    names = (source.columns["label"],) if "label" in source.columns else _LABELS
    said = judging or source.format == "unpaired-preference" or "label" in source.columns
    label = next((name for name in names if all(_is_label(row.values.get(name), said) for row in rows)), None)
    rest = source.model_copy(update={"columns": {k: v for k, v in source.columns.items() if k != "label"}})
    base = _best(_LEARNED[:-1], rows, rest) if label is not None else None
    if base is None or label is None:
        return None
    columns = {**base.columns, "label": label}
    why = f"{label} judges them: {base.why}"
    return Detected(
        "unpaired-preference", columns, base.confidence, why, base=base.format, chat=base.chat, keys=base.keys
    )


def _is_label(value: Any, said: bool) -> bool:
    """A class number of another task is no judgement, unless it is said to be."""
    if isinstance(value, bool):
        return True
    return said and str(value).strip().lower() in {"true", "false", "0", "1", "0.0", "1.0", "yes", "no"}


def _keys(name: Format, source: DataSource) -> tuple[str, str] | None:
    if not {"role", "content"} & source.columns.keys():
        return None
    usual = ("from", "value") if name == "sharegpt" else ("role", "content")
    return source.columns.get("role", usual[0]), source.columns.get("content", usual[1])


def _fits(name: Format, part: str, value: Any, keys: tuple[str, str] | None) -> bool:
    if part == "messages":
        if isinstance(value, str):
            return name == "messages" and value.lstrip().startswith("[{")
        usual = ("from", "value") if name == "sharegpt" else ("role", "content")
        return isinstance(value, list) and keys_of(value, keys) == (keys or usual)
    if part in ("prompt", "completion", "chosen", "rejected"):
        return isinstance(value, str) or keys_of(value, keys) is not None
    if part == "answers":
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "rank" in value[0]
    if part in ("completions", "labels"):
        return isinstance(value, list) and bool(value)
    return isinstance(value, str)


def _nearly(names: Sequence[Format], rows: Sequence[Row], source: DataSource) -> DataError | None:
    """The error where all columns of a format are there, but one of them holds nothing that it could read."""
    there = set(_columns(rows))
    for name in names:
        for shape in _SHAPES[name]:
            parts = {part: (source.columns[part],) if part in source.columns else n for part, n in shape.needs.items()}
            columns = {part: next((n for n in names if n in there), None) for part, names in parts.items()}
            if not columns or None in columns.values():
                continue
            keys = _keys(name, source)
            for part, column in columns.items():
                values = [row.values.get(str(column)) for row in rows]
                if any(_fits(name, part, value, keys) for value in values):
                    continue
                holds = f"column {column!r} holds {kind(values[0])} where format {name} reads"
                if part == "messages":
                    first, second = keys or (("from", "value") if name == "sharegpt" else ("role", "content"))
                    what = f"{holds} a list of messages with {first} and {second}"
                    return DataError(what, where=rows[0].where, do="Name the keys with columns: {role: …, content: …}.")
                if part in ("completions", "labels", "answers"):
                    return DataError(f"{holds} a list", where=rows[0].where, do="Write it as a list.")
                return DataError(f"{holds} text", where=rows[0].where, do="Write it as text, or name another column.")
    return None


def _serves(name: str) -> str:
    methods = [method for method, formats in ACCEPTS.items() if name in formats]
    return f"It serves method {', '.join(methods)}."


def _not(name: Format, rows: Sequence[Row], source: DataSource) -> DataError:
    listed = ", ".join(_columns(rows)) or "none"
    shapes = _SHAPES[name]
    parts = {part for shape in shapes for part in (*shape.needs, *shape.may, "role", "content")}
    if shapes and (useless := [part for part in source.columns if part not in parts]):
        do = f"{name} has {', '.join(sorted(parts))}."
        return DataError(f"format {name} has no use for columns.{useless[0]}", where=source.path, do=do)
    missing = [column for column in source.columns.values() if column not in _columns(rows)]
    if missing and not {"role", "content"} & source.columns.keys():
        return DataError(f"there is no column {missing[0]!r}, only {listed}", where=rows[0].where, do="Check columns:.")
    needed = "; or ".join(" and ".join("/".join(names) for names in shape.needs.values()) for shape in shapes)
    needed = needed or "label and the columns of a chat or a prompt with its completion"
    what = f"the rows are not in {name} format: their columns are {listed}"
    return DataError(what, where=rows[0].where, do=f"{name} needs {needed}; or set format: auto.")


def _unknown(rows: Sequence[Row], accepted: Sequence[Format]) -> DataError:
    listed = ", ".join(_columns(rows)) or "none"
    do = f"Accepted: {'; '.join(_USUAL[name] for name in accepted)}. Or name them: columns: {{prompt: ..., ...}}."
    return DataError(f"the format is not recognised: the columns are {listed}", where=rows[0].where, do=do)


_USUAL: Mapping[Format, str] = {
    "messages": "messages [{role, content}]",
    "sharegpt": "conversations [{from, value}]",
    "alpaca": "instruction, input, output",
    "question-answer": "question, answer",
    "prompt-completion": "prompt, completion",
    "text": "text",
    "preference": "prompt, chosen, rejected",
    "unpaired-preference": "prompt, completion, label",
    "stepwise": "prompt, completions, labels",
    "prompt-only": "prompt",
}


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.values))
