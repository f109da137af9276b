"""Which verbs begin with processes that wait for a run, and what becomes of those of a command that is refused."""

from __future__ import annotations

import pytest

from finetui.engine import standby
from finetui.tui.cli import main


class Waiting:
    """Stands in for processes."""

    made: list[Waiting]

    def __init__(self) -> None:
        self.dismissed = False
        self.made.append(self)

    def dismiss(self) -> None:
        self.dismissed = True


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Waiting]:
    """All that were made."""
    pytest.importorskip("torch")
    Waiting.made = []
    monkeypatch.setattr(standby, "Standby", Waiting)
    return Waiting.made


@pytest.mark.parametrize("words", [["run", "nowhere.yaml"], ["resume", "no-such-run"]])
def test_what_waited_for_a_command_that_is_refused_is_dismissed(words: list[str], made: list[Waiting]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert [one.dismissed for one in made] == [True]


@pytest.mark.parametrize(
    "words", [["run", "nowhere.yaml", "--check"], ["run", "--help"], ["plan", "nowhere.yaml"], ["stop", "no-such-run"]]
)
def test_nothing_waits_for_what_starts_no_run(words: list[str], made: list[Waiting]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert made == []


def test_a_machine_that_can_not_train_has_nothing_waiting(made: list[Waiting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby.importlib.util, "find_spec", lambda _: None)
    with standby.standing_by():
        assert made == []
