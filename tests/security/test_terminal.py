"""Nothing that comes from elsewhere reaches a terminal as a command, whatever the verb."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from textual.color import Color
from textual.strip import Strip

from finetui.engine.events import EventLog, Fallback, GpuSample, LogLine, Phase, Sample, Warn
from finetui.engine.planning import plan_for
from finetui.engine.run import Run
from finetui.planner.printable import is_printable, printable, unstyled
from finetui.planner.recipe import Recipe
from finetui.tui.cli import main
from finetui.tui.console import Console
from finetui.tui.outlet import GuardedStream
from finetui.tui.printable_filter import PrintableFilter, cell_for_cell

#: A title, colours of both kinds, a cursor that goes up, a line that reads backwards, and a bell.
EVIL = "x\x1b]0;owned\x07\x1b[2A\x1b[31m\x9b31m\x9d0;y\x9c\u202eevil\u2066\x08\x7f\r"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that has evil words wherever words can stand."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = Recipe.build({"model": "Qwen/Qwen3-0.6B", "hardware": {"gpu": "RTX-4090"}, "data": f"{EVIL}.jsonl"})
    run = Run.create(recipe, plan_for(recipe.with_overrides({"data": []})), name="evil")
    for name in ("plan.json", "run.json"):
        tree = json.loads((run.path / name).read_text())
        for part, key in ((tree.get("model"), "name"), (tree.get("hardware"), "gpu"), (tree, "message"), (tree, "do")):
            if isinstance(part, dict) and (key in part or name == "run.json"):
                part[key] = EVIL
        tree.setdefault("warnings", []).append(EVIL) if name == "plan.json" else tree.update(state="failed")
        (run.path / name).write_text(json.dumps(tree))
    with EventLog(run.events_path) as log:
        for payload in (
            Warn(EVIL, EVIL, EVIL), LogLine(0, EVIL), Fallback(EVIL, EVIL), Phase(EVIL, EVIL), Sample(0, EVIL, EVIL),
            GpuSample(0, EVIL, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, [EVIL]),
        ):  # fmt: skip
            log.append(payload)
    run.log_path(0).write_text(f"{EVIL}\nsecond\n")
    return run


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """All that a verb prints."""
    before = sys.stdout, sys.stderr
    try:
        main(arguments)
    except SystemExit:
        pass
    finally:
        sys.stdout, sys.stderr = before
    captured = capsys.readouterr()
    return captured.out + captured.err


VERBS: dict[str, list[str]] = {
    "runs": ["runs"], "runs --json": ["runs", "--json"], "logs": ["logs", "evil"],
    "logs --events": ["logs", "evil", "--events"], "attach --plain": ["attach", "evil", "--plain"],
    "attach --json": ["attach", "evil", "--json"], "compare": ["compare", "evil", "evil"], "stop": ["stop", "evil"],
    "export": ["export", "evil", "--to", "adapter"], "an unknown run": ["attach", EVIL], "an unknown verb": [EVIL],
    "an unknown flag": ["plan", f"--{EVIL}"], "plan of a folder": ["plan", "MODEL"],
    "plan of a folder --json": ["plan", "MODEL", "--json"], "fit": ["fit", "MODEL"], "data": ["data", "RECIPE"],
    "data --json": ["data", "RECIPE", "--json"], "plan of a recipe": ["plan", "RECIPE"], "advise": ["advise", "MODEL"],
    "a bad recipe": ["plan", "BAD"], "gpus": ["gpus", "MODEL", "--top", "2"], "trust": ["trust", EVIL],
    "a bad override": ["plan", "MODEL", "--set", f"{EVIL}={EVIL}"], "resume": ["resume", EVIL],
    "cluster": ["cluster", "RECIPE", "--to", "slurm", "--gpu", "H100"],
    "import": ["import", "FOREIGN"], "import of a recipe": ["import", "RECIPE"],
    "merge": ["merge", "MODEL", EVIL, "--method", "linear", "--weights", "0.5,0.5", "-o", "merged", "--dry-run"],
    "eval": ["eval", "evil"], "eval of a folder": ["eval", "MODEL", "--data", EVIL],
    "report": ["report", "evil"], "settings": ["settings"], "a bad setting": ["settings", EVIL, EVIL],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_verbs(verb: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"model {EVIL}".replace("/", "_")
    folder.mkdir()
    config = {"model_type": f"odd{EVIL}", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "vocab_size": 320, "hidden_act": EVIL, "architectures": [EVIL]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": EVIL, "completion": EVIL}, {EVIL: EVIL}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model": str(folder), "data": [{"path": "./rows.jsonl", "on_bad_row": "skip"}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "bad.yaml").write_text(json.dumps({"model": EVIL, EVIL: EVIL, "epochs": EVIL}))
    (tmp_path / "foreign.yaml").write_text(
        json.dumps(
            {"base_model": str(folder), "sequence_len": 512, "datasets": [{"path": EVIL, "type": EVIL}], EVIL: EVIL}
        )
    )
    places = {
        "FOREIGN": tmp_path / "foreign.yaml",
        "MODEL": folder,
        "RECIPE": tmp_path / "recipe.yaml",
        "BAD": tmp_path / "bad.yaml",
    }
    text = said([str(places.get(word, word)) for word in VERBS[verb]], capsys)
    assert text.strip()
    assert [line for line in text.splitlines() if not is_printable(line)] == []
    assert is_printable(text)


def test_every_verb_is_tried() -> None:
    from finetui.tui.cli import VERBS as ALL

    tried = {words[0] for words in VERBS.values()}
    # These start processes, load models, serve, or draw what the tests of their screens look at.
    apart = {"run", "quickstart", "chat", "serve", "top", "bench", "doctor"}
    assert set(ALL) - tried - apart == set()


@given(st.text())
def test_printable(text: str) -> None:
    shown = printable(text)
    assert is_printable(shown)
    assert shown == text or not is_printable(text)
    assert is_printable(unstyled(text))


@given(st.recursive(st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_json_stays_the_same_json(tree: Any) -> None:
    text = json.dumps(tree, ensure_ascii=False)
    assert json.loads(printable(text)) == json.loads(json.dumps(tree))


@pytest.mark.parametrize(
    ("text", "left"),
    [("\x1b[1;31mred\x1b[0m", "red"), ("\x1b]0;title\x07x", "x"), ("\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
     ("\x9b31mred", "red"), ("\x1bPq#0\x1b\\x", "x"), ("\x1bc!", "!"), ("a\tb\nc", "a\tb\nc"), ("\x1b[", ""),
     ("a\rb", "a\\u000db"), ("naïve ünïcode 你好 👩‍💻", "naïve ünïcode 你好 👩‍💻")],
)  # fmt: skip
def test_unstyled(text: str, left: str) -> None:
    assert unstyled(text) == left


def test_console_keeps_its_own_colours_alone() -> None:
    stream = io.StringIO()
    console = Console(file=GuardedStream(stream), force_terminal=True, color_system="standard", width=200)
    table = Table(title=Text(EVIL))
    table.add_row(EVIL, Text(EVIL, style="red"))
    console.print(table)
    drawn = stream.getvalue()
    assert "\x1b[31m" in drawn
    assert "\x1b]" not in drawn
    assert "\x1b[2A" not in drawn
    assert "\x9b" not in drawn
    assert "\u202e" not in drawn


def test_the_app_shows_nothing_that_a_terminal_obeys() -> None:
    strip = Strip([Segment(f"a{EVIL}b\n\t"), Segment("plain")])
    filtered = strip.apply_filter(PrintableFilter(), Color(0, 0, 0))
    assert is_printable("".join(segment.text for segment in filtered))
    assert "\n" not in filtered.text
    assert filtered.cell_length == strip.cell_length
    assert cell_for_cell("x\x1b[31my") == "x[31my"


def test_the_app_has_that_filter_on_every_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    from finetui.tui.app import FinetuiApp

    for ascii_only in (False, True):
        kinds = [type(each).__name__ for each in FinetuiApp(ascii_only=ascii_only).get_line_filters()]
        assert "PrintableFilter" in kinds


def test_no_other_way_out() -> None:
    """Rules that keep it so: one console, and no bytes written past the guard."""
    root = Path(__file__).parents[2]
    looks: dict[str, Callable[[str], bool]] = {
        "rich's own console": lambda text: "rich.console import Console" in text,
        "bytes past the guard": lambda text: "stdout.buffer" in text or "stderr.buffer" in text,
    }
    for path in (root / "tui").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for rule, found in looks.items():
            assert path.name == "console.py" or not found(text), f"{rule}: {path}"
    assert os.path.exists(root / "tui" / "console.py")
