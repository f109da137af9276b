"""``finetui settings`` and ``finetui plan --explain``: the plain twins of the Settings screen and of a formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetui.planner.preferences import load, settings_path
from finetui.tui import format  # noqa: A004
from finetui.tui.cli import main

PLAN = ["plan", "Qwen/Qwen3-8B", "--tuning", "qlora", "--gpu", "RTX4090"]


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("FINETUI_RUNS", raising=False)
    yield
    format.use_memory_unit("GiB")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    return int(left.value.code or 0)


def test_settings_are_changed_shown_and_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("settings", "theme=light", "keys.plan.save=S", "keys.plan.open=O", "bell=off") == 0
    out = capsys.readouterr().out
    assert str(settings_path()) in out.replace("\n", "")
    assert "plan.save=S plan.open=O" in " ".join(out.split())
    assert (load().theme, dict(load().keys), load().bell) == ("light", {"plan.save": "S", "plan.open": "O"}, False)
    assert run("settings", "--default", "theme", "--default", "keys.plan.open", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["settings"]["theme"] == {"value": "auto", "source": "default"}
    assert answer["settings"]["keys"] == {"value": {"plan.save": "S"}, "source": "file"}
    assert run("settings", "--path") == 0
    assert capsys.readouterr().out.strip() == str(settings_path())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("theme=lihgt", "Did you mean 'light'?"),
        ("thme=light", "Did you mean 'theme'?"),
        ("theme", "NAME=VALUE"),
        ("refresh_hz=0", "0.1 to 4"),
        ("keys.plan.save=o", "o would be both plan.save and plan.open"),
        ("keys.nosuch=x", "there is no command 'nosuch'"),
    ],
)
def test_what_can_not_be_is_refused(capsys: pytest.CaptureFixture[str], change: str, told: str) -> None:
    assert run("settings", change) == 2
    assert told in capsys.readouterr().err
    assert not settings_path().exists()


def test_a_broken_file_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settings_path().parent.mkdir(parents=True)
    settings_path().write_text("theme: [")
    assert run(*PLAN) == 0
    both = capsys.readouterr()
    assert both.err.count("settings.yaml") == 1
    assert "fits on RTX-4090" in both.out
    assert run(*PLAN, "--json") == 0
    assert capsys.readouterr().err == ""


def test_units_of_plain_output_but_never_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    run("settings", "memory_unit=GB")
    capsys.readouterr()
    run(*PLAN)
    assert "of 25.4 GB" in capsys.readouterr().out
    run(*PLAN, "--json")
    assert json.loads(capsys.readouterr().out)["hardware"]["memory_gib"] < 24


def test_a_term_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*PLAN, "--explain", "weights") == 0
    out = capsys.readouterr().out
    assert "parameters × bytes each" in out
    assert "6,945.8 M × 0.5159 bytes" in " ".join(out.split())
    assert run(*PLAN, "--explain", "memory", "--json") == 0
    terms = json.loads(capsys.readouterr().out)["terms"]
    assert {term["name"] for term in terms} >= {"weights", "activations", "context"}
    assert all(term["unit"] == "GiB" for term in terms)
    assert run(*PLAN, "--explain", "weihgts") == 2
    assert "Did you mean 'weights'?" in capsys.readouterr().err
    assert run(*PLAN, "--explain", "weights", "--exact") == 2
