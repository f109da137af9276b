"""One table of keys: no two meanings for a key, a letter for every function key, and a method behind each row."""

from __future__ import annotations

import re

import pytest

from finetui.tui.app import FinetuiApp
from finetui.tui.keys import KEYS, SCOPES, keys_of
from finetui.tui.screens.compare import CompareScreen
from finetui.tui.screens.data import DataScreen
from finetui.tui.screens.gpus import GpusScreen
from finetui.tui.screens.launch import LaunchScreen
from finetui.tui.screens.logs import LogsScreen
from finetui.tui.screens.monitor import MonitorScreen
from finetui.tui.screens.plan import PlanScreen
from finetui.tui.screens.runs import RunsScreen
from finetui.tui.screens.settings import SettingsScreen
from finetui.tui.widgets.field import Field
from finetui.tui.widgets.term_rows import TermRows

OWNERS = {
    "app": FinetuiApp,
    "plan": PlanScreen,
    "field": Field,
    "terms": TermRows,
    "gpus": GpusScreen,
    "data": DataScreen,
    "launch": LaunchScreen,
    "monitor": MonitorScreen,
    "runs": RunsScreen,
    "compare": CompareScreen,
    "logs": LogsScreen,
    "settings": SettingsScreen,
}


@pytest.mark.parametrize("scope", SCOPES)
def test_no_key_means_two_things_on_one_screen(scope: str) -> None:
    rows = keys_of(scope) + (keys_of("app") if scope != "app" else [])
    keys = [key for row in rows for key in row.keys.split(",")]
    assert sorted(keys) == sorted(set(keys))


def test_the_fields_of_the_plan_take_no_key_of_their_screen() -> None:
    field, plan = ({key for row in keys_of(scope) for key in row.keys.split(",")} for scope in ("field", "plan"))
    assert not field & plan


def test_every_function_key_has_a_twin() -> None:
    for row in KEYS:
        names = row.keys.split(",")
        assert any(not re.fullmatch(r"f\d+", name) for name in names), row


def test_no_key_that_multiplexers_and_web_terminals_keep() -> None:
    taken = {"ctrl+a", "ctrl+b", "ctrl+s", "ctrl+q", "ctrl+z", "ctrl+c", "ctrl+@", "ctrl+w", "ctrl+t"}
    for row in KEYS:
        for name in row.keys.split(","):
            assert name not in taken, row
            assert not name.startswith(("alt+", "super+", "meta+")), row


@pytest.mark.parametrize("row", KEYS, ids=lambda row: f"{row.scope}-{row.keys}")
def test_something_happens(row: object) -> None:
    from finetui.tui.keys import Key

    assert isinstance(row, Key)
    name = row.action.partition("(")[0]
    owner = FinetuiApp if name.startswith("app.") else OWNERS[row.scope]
    assert callable(getattr(owner, f"action_{name.removeprefix('app.')}", None))
    assert row.help
