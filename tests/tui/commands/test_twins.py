"""Every screen has a twin on the command line that answers in plain words and in JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.tests.bench.terminal import Terminal, environment
from finetui.tui.app import FinetuiApp

RECORDED = Path(__file__).parents[1] / "data" / "quickstart"
SMALL = ["--tuning", "lora", "--set", "hardware.device=cpu"]

#: The verb that says what a screen shows, with what it needs; and a word of the answer.
TWINS: dict[str, tuple[list[str], str]] = {
    "plan": (["plan", "quickstart", *SMALL], "speed"),
    "gpus": (["gpus", "Qwen/Qwen3-8B"], "provider"),
    "data": (["data", "quickstart"], "tokens"),
    "launch": (["run", "quickstart", "--check"], "finetui run"),
    "monitor": (["attach", "quickstart"], "held-out loss 0.0204"),
    "runs": (["runs"], "finished"),
    "compare": (["compare", "quickstart", "again"], "again"),
    "logs": (["logs", "quickstart"], "a line"),
    "settings": (["settings"], "theme"),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two runs, the recorded one and its copy, with a log."""
    for name in ("quickstart", "again"):
        shutil.copytree(RECORDED, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "log").mkdir()
        (tmp_path / "runs" / name / "log" / "rank0.log").write_text("a line of rank 0\n", encoding="utf-8")
    return tmp_path


def answer(home: Path, *words: str) -> str:
    said = subprocess.run(
        [sys.executable, "-P", "-m", "finetui", *words], env=environment(home, HF_HUB_OFFLINE="1"), cwd=home,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert said.returncode in (0, 2 if "--check" in words else 0), said.stderr
    return said.stdout


def test_no_screen_is_without_one() -> None:
    assert set(TWINS) == set(FinetuiApp.MODES)


@pytest.mark.parametrize(
    "mode", [mode if mode != "data" else pytest.param(mode, marks=pytest.mark.slow) for mode in TWINS]
)
def test_in_plain_words_and_in_json(home: Path, mode: str) -> None:
    words, expected = TWINS[mode]
    text = answer(home, *words, "--plain")
    assert expected in text
    assert "\x1b" not in text
    parts = answer(home, *words, "--json")
    lines = [json.loads(line) for line in parts.splitlines()] if mode == "monitor" else json.loads(parts)
    assert lines, "an empty answer"


@pytest.mark.parametrize("mode", ["plan", "runs", "compare", "settings"])
def test_plain_words_on_a_terminal_too(home: Path, terminal: Callable[..., Terminal], mode: str) -> None:
    """No colours, no cursor movements, and nothing cut off at the width of the terminal."""
    words, expected = TWINS[mode]
    shown = terminal(words=["-m", "finetui", *words, "--plain"], size=(40, 100))
    assert shown.wait(60.0) == 0
    assert expected.encode() in shown.written
    assert b"\x1b" not in shown.written
    assert not re.search("…", shown.written.decode())
