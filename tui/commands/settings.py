"""``finetui settings``: what you want of finetui whatever the recipe: theme, units, alerts, prices, keys, folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ...planner.errors import SettingsError
from ...planner.preferences import (
    DEFAULTS,
    SETTINGS,
    Value,
    checked,
    load,
    parsed,
    save,
    settings_path,
    shown,
    source,
)  # fmt: skip
from .options import JsonFlag

ChangesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="NAME=VALUE", help="What to change, such as theme=light.")
]
DefaultFlag = Annotated[
    list[str] | None, typer.Option("--default", metavar="NAME", help="Back to its default; may be repeated.")
]
PathFlag = Annotated[bool, typer.Option("--path", help="Print where the file is, and nothing else.")]


def settings(
    changes: ChangesArgument = None, default: DefaultFlag = None, path: PathFlag = False, as_json: JsonFlag = False
) -> None:
    """Show your settings, or change some. For example: finetui settings theme=light keys.plan.save=S"""
    if path:
        print(settings_path())
        return
    wanted: dict[str, Value] = {}  # all of it is checked before any of it is kept
    for change in changes or ():
        wanted |= _change(change, wanted)
    for name in default or ():
        wanted |= _back(name, wanted)
    if isinstance(own := wanted.get("keys"), dict):
        _check_keys(own)
    for name, value in wanted.items():
        save(name, value)
    now = load()
    for problem in now.problems:
        print(f"! {problem}", file=sys.stderr)
    rows = [(item, getattr(now, item.name), source(item.name, now)) for item in SETTINGS]
    if as_json:
        answer: dict[str, Any] = {
            "path": str(settings_path()),
            "settings": {item.name: {"value": value, "source": where} for item, value, where in rows},
            "problems": list(now.problems),
        }
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    from ..console import Console

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for item, value, where in rows:
        table.add_row(item.name, shown(item.name, value) or "–", where, item.help)
    out = Console(highlight=False)
    out.print(f"{settings_path()}\n", soft_wrap=True)
    out.print(table)


def _change(text: str, wanted: Mapping[str, Value]) -> dict[str, Value]:
    """``theme=light``; ``keys.plan.save=S`` is one key among the user's own, and without a value none of its own."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"{text!r} changes nothing", do="Write NAME=VALUE, such as theme=light.")
    if not name.startswith("keys."):
        return {name: parsed(name, value)}
    have = wanted.get("keys", dict(load().keys))
    own = dict(have) if isinstance(have, dict) else {}
    own.pop(name.removeprefix("keys."), None)
    return {"keys": {**own, **({name.removeprefix("keys."): value} if value else {})}}


def _back(name: str, wanted: Mapping[str, Value]) -> dict[str, Value]:
    if name.startswith("keys."):
        return _change(f"{name}=", wanted)
    value = getattr(DEFAULTS, name, None)
    return {name: checked(name, list(value) if isinstance(value, tuple) else value)}


def _check_keys(own: dict[str, str]) -> None:
    """Refuse keys that are none or would mean two things.

    Raises:
        SettingsError: with the first such key.
    """
    from ..keys import key_map

    _, problems = key_map(own)
    if problems:
        raise SettingsError(problems[0].removeprefix("keys: "), where="keys", do="Choose another key.")
