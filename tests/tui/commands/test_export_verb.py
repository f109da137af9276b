"""``finetui export`` as a user meets it: what it refuses, what it prints, and where it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from finetui.engine import export as engine
from finetui.engine.export import Exported
from finetui.engine.run import Run
from finetui.tui.cli import main


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    """A run without a model."""
    return make_run("mine")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the engine was asked for, in place of exporting it."""
    calls: list[tuple[Any, ...]] = []

    def export(run: Run, to: str, destination: Path, *, quant: str | None, system: str, tell: Any) -> Exported:
        calls.append((run.name, to, destination, quant, system))
        for done in range(3):
            tell("writing", done, 2)
        return Exported(destination, ("it stops",), ("it differs",), ("llama-server -m it",))

    monkeypatch.setattr(engine, "export", export)
    return calls


def finetui(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["export", *words])
    return int(left.value.code or 0), *capsys.readouterr()


def test_the_folder_is_data_and_the_rest_is_talk(run: Run, asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = finetui(capsys, str(run.path), "--to", "gguf", "--quant", "Q4_K_M")
    folder = run.path / "export" / "gguf-q4_k_m"
    assert (code, out.splitlines()) == (0, [str(folder)])
    early = f"! the run is {run.status.state}: this is what it had learned by its last checkpoint"
    assert err.splitlines() == ["writing …", "  it stops", early, "! it differs", "Use it with: llama-server -m it"]
    assert asked == [("mine", "gguf", folder, "Q4_K_M", "")]


def test_json(run: Run, asked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--to", "ollama", "--system", "Hi.", "--out", str(tmp_path / "o"), "--json")
    _, out, _ = finetui(capsys, str(run.path), *words)
    told = json.loads(out)
    assert {key: told[key] for key in ("run", "format", "path", "checked", "use")} == {
        "run": "mine", "format": "ollama", "path": str(tmp_path / "o"), "checked": ["it stops"],
        "use": ["llama-server -m it"],
    }  # fmt: skip
    assert told["notes"][-1] == "it differs"
    assert asked == [("mine", "ollama", tmp_path / "o", None, "Hi.")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--to", "onnx"), "Use adapter, merged, gguf, ollama, vllm."),
        (("--to", "gguf"), "has not written a model yet"),
        (("--to", "merged", "--quant", "f16"), "Leave --quant out"),
        (("--to", "vllm", "--system", "Hi."), "Leave --system out"),
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(
    words: tuple[str, ...], expected: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    code, out, err = finetui(capsys, str(run.path), *words)
    assert (code, out) == (2, "")
    assert expected in " ".join(err.split())
    assert not (run.path / "export").exists()
