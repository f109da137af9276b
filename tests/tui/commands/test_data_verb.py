"""finetui data on bad data: everything that is wrong at once, and the exit code that a run would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetui.tui.cli import main

TINY = str(Path(__file__).parents[3] / "presets" / "tiny")
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
EMPTY = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]}
LONG = {"messages": [{"role": "user", "content": "hi " * 20}, {"role": "assistant", "content": "hello"}]}
CALL = {"function": {"name": "f", "arguments": {}}}
CALLS = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL]}]}


def look(capsys: pytest.CaptureFixture[str], path: Path, rows: list[Any], *words: str) -> tuple[int, str, str]:
    pytest.importorskip("transformers")
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    code = 0
    try:
        main(["data", TINY, "--data", str(path), "--seq-len", "64", *words])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_bad_row_is_counted_though_a_run_would_stop_at_the_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [GOOD, EMPTY, '{"messages": [', GOOD, EMPTY, CALLS]
    code, out, err = look(capsys, tmp_path / "x.jsonl", rows)
    assert code == 2
    assert "tokenised  all 5 rows: 2 examples" in out
    assert "! 2 rows: the answer is empty (first: " in out
    assert "! 1 row: the line is not valid JSON: expecting value at column 15" in out
    assert "! 1 row: the chat template has no place for tool calls" in out
    assert "data: 4 rows can't be used, and a run would stop at the first. Mend them, or set on_bad_row: skip" in err
    code, out, err = look(capsys, tmp_path / "x.jsonl", rows, "--set", "data.0.on_bad_row=skip")
    assert code == 0
    assert out.count("[[") == 2  # both examples are shown, and the row that the template refuses is no obstacle


def test_when_no_row_can_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = look(capsys, tmp_path / "x.jsonl", [CALLS])
    assert (code, "! 1 row: the chat template has no place for tool calls" in out) == (2, True)
    assert "data: not one row can be used" in err


@pytest.mark.parametrize(
    ("row", "words", "said"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, ("--method", "kto"), "all 3 answers are judged good"),
        (GOOD, ("--set", "data.0.weight=0.001"), "the weights leave no example to train on"),
        (LONG, ("--seq-len", "8"), "no token would be trained"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, row: Any, words: tuple[str, ...], said: str
) -> None:
    code, _, err = look(capsys, tmp_path / "x.jsonl", [row] * 3, *words)
    assert code == 2
    assert said in err
