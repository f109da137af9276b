"""The user's settings: a mistake in the file costs a default, never a run, and writing one leaves the rest alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetui.planner.errors import SettingsError
from finetui.planner.hardware import load_offers
from finetui.planner.preferences import DEFAULTS, SETTINGS, load, parsed, save, settings_path, shown, source


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return settings_path()


def test_without_a_file_all_is_default(path: Path) -> None:
    assert load() == DEFAULTS
    assert not path.exists()


def test_what_is_kept_is_read_again(path: Path) -> None:
    for name, text in (("theme", "light"), ("refresh_hz", "2"), ("bell", "off"), ("providers", "runpod, lambda"),
                       ("alert_command", "notify-send 'a: b # c'"), ("keys", "plan.save=S")):  # fmt: skip
        save(name, parsed(name, text))
    now = load()
    assert (now.theme, now.refresh_hz, now.bell, now.providers) == ("light", 2.0, False, ("runpod", "lambda"))
    assert now.alert_command == "notify-send 'a: b # c'"
    assert now.keys == {"plan.save": "S"}
    assert now.problems == ()
    assert [entry.name for entry in path.parent.iterdir()] == ["settings.yaml"]  # nothing half-written is left


def test_comments_and_order_stay(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(
        "# mine\ntheme: light  # at night\nkeys:\n  plan.save: S\n  # hm\n  plan.open: O\n# after\nbell: no\n"
    )
    save("theme", "dark")
    save("keys", {"plan.save": "X"})
    save("bell", True)
    assert path.read_text() == "# mine\ntheme: dark  # at night\nkeys: {plan.save: X}\n# after\n"


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    (tmp_path / "dotfiles.yaml").write_text("theme: light\n")
    path.symlink_to(tmp_path / "dotfiles.yaml")
    save("theme", "dark")
    assert path.is_symlink()
    assert (tmp_path / "dotfiles.yaml").read_text() == "theme: dark\n"


@pytest.mark.parametrize("text", ["a: [", "- a", "\x00", "theme", "&a [*a]", "{" * 500])
def test_a_broken_file_is_told_once_and_all_is_default(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    now = load()
    assert len(now.problems) == 1
    assert "settings.yaml" in now.problems[0]
    assert now.theme == DEFAULTS.theme
    with pytest.raises(SettingsError):
        save("theme", "dark")
    assert path.read_text() == text


def test_what_is_wrong_has_its_default_and_the_rest_holds(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("thme: light\nrefresh_hz: 99\nbell: no\nproviders: runpod\n")
    now = load()
    assert (now.refresh_hz, now.bell, now.providers) == (1.0, False, ())
    assert len(now.problems) == 3
    assert "Did you mean 'theme'?" in now.problems[0]
    assert "0.1 to 4" in now.problems[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [("theme", "lihgt"), ("refresh_hz", "fast"), ("refresh_hz", "nan"), ("bell", "maybe"), ("nosuch", "1")],
)
def test_what_can_not_be_is_refused(path: Path, name: str, text: str) -> None:
    with pytest.raises(SettingsError):
        save(name, parsed(name, text))
    assert not path.exists()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_what_is_shown_is_read_back(path: Path, setting: object) -> None:
    name = setting.name  # type: ignore[attr-defined]
    value = getattr(DEFAULTS, name)
    assert parsed(name, shown(name, value)) == value


def test_the_environment_comes_first(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from finetui.engine.run import default_root

    monkeypatch.delenv("FINETUI_RUNS", raising=False)
    save("runs", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
    assert source("runs", load()) == "file"
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "other"))
    assert default_root() == tmp_path / "other"
    assert source("runs", load()) == "$FINETUI_RUNS"


def test_offers_of_some_providers_alone(path: Path) -> None:
    everyone = {offer.provider for offer in load_offers()}
    save("providers", ("RunPod",))
    assert {offer.provider for offer in load_offers()} == {"runpod"}
    save("providers", ("nosuch",))
    assert {offer.provider for offer in load_offers()} == everyone
