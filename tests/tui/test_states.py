"""Every screen with nothing, with much, with something wrong, and with little room, at four sizes, as text and styles.

After a wanted change: pytest tests/tui/test_states.py --snapshot-update, then read the difference: a picture is a text
file, with the style of each stretch of each line below it.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
from textual.app import App
from textual.widgets import Input

from finetui.engine.run import Run
from finetui.planner.errors import UserError
from finetui.planner.preferences import DEFAULTS
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend

SIZES = [(60, 20), (80, 24), (100, 30), (160, 50)]
MODES = list(FinetuiApp.MODES)

#: A word that each screen shows once it has come to rest, by state.
SHOWN = {
    "empty": {
        "plan": "fits", "gpus": "no offer", "data": "no data", "launch": "packages", "monitor": "no runs yet",
        "runs": "no runs", "compare": "no runs", "logs": "nothing yet", "settings": "theme",
    },
    "busy": {
        "plan": "fits", "gpus": "vast-ai", "data": "support.jsonl", "launch": "packages", "monitor": "240/412",
        "runs": "qwen3-8b-full", "compare": "held-out", "logs": "line 40", "settings": "theme",
    },
    "failed": {
        "plan": "does not fit", "gpus": "unreachable", "data": "731", "launch": "GPU 1 is lost",
        "monitor": "out of memory", "runs": "out of memory", "compare": "held-out",
        "logs": "CUDA out of memory", "settings": "theme",
    },
}  # fmt: skip

#: Keys that go to what is wrong.
KEYS = {("failed", "runs"): ["down", "down"]}

ModelOnly = {"model": "Qwen/Qwen3-8B", "tuning": "qlora"}


class Picture(SingleFileSnapshotExtension):
    """One text file per picture."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"
    _file_extension = "txt"

    def serialize(self, data: Any, **_: Any) -> str:
        """It is text already."""
        return str(data)


def picture(app: App[Any]) -> str:
    """What the app shows: its lines, then the styles of each line as runs of letters, then what the letters mean."""
    lines, styles, letters = [], [], {}
    for strip in app.screen._compositor.render_strips(app.size):
        line, runs = "", ""
        for segment in strip.simplify():
            style = str(segment.style)
            letter = letters.setdefault(style, (string.ascii_letters + string.digits)[len(letters)])
            line += segment.text
            runs += f"{letter}{segment.cell_length} "
        lines.append(line.rstrip())
        styles.append(runs.rstrip())
    meaning = [f"{letter}: {style}" for style, letter in letters.items()]
    return "\n".join([*lines, "", *styles, "", *meaning, ""])


@pytest.fixture(autouse=True)
def _steady_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Input, "_toggle_cursor", lambda self: None)


@pytest.fixture
def app_in(
    state: str, mode: str, app_of: Callable[..., FinetuiApp], backend: Backend, request: pytest.FixtureRequest
) -> FinetuiApp:
    """The app on one screen in one state."""

    def refuse(*_: Any) -> Any:
        raise UserError("the providers are unreachable", do="The shipped prices are shown with: finetui gpus")

    if state == "empty":
        nothing = dataclasses.replace(backend, offers=lambda recipe, spot: [], data=lambda recipe: [])
        return app_of(mode, recipe=Recipe.build(ModelOnly), backend=nothing)
    runs: list[Run] = request.getfixturevalue("fleet")
    if state == "busy":
        _print(runs[0], [f"line {number}: loading" for number in range(1, 41)])
        return app_of(mode, runs[0])
    _print(
        runs[2], ["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA out of memory. Tried 2.00 GiB"]
    )
    checks = list(backend.check(Recipe.build(ModelOnly), None, Path()))  # type: ignore[arg-type]
    lost = dataclasses.replace(checks[0], name="GPU 1 is lost", status="fail", do="See dmesg for Xid errors.")
    bad = dataclasses.replace(backend, offers=refuse, check=lambda *_: iter([*checks, lost]))
    problems = dataclasses.replace(DEFAULTS, problems=("settings.yaml: themes: there is no such setting.",))
    broken = {"model": "Qwen/Qwen3-8B", "tuning": "full", "hardware": {"gpu": "T4"}}
    data = {"data": "/data/broken.jsonl"} if mode == "data" else {}
    more = {"preferences": problems} if mode == "settings" else {}
    app = app_of(mode, runs[2], recipe=Recipe.build({**broken, **data}), backend=bad, **more)
    app.marked = [runs[2], runs[3]]
    return app


def _print(run: Run, lines: list[str]) -> None:
    run.log_path(0).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


async def at_rest(app: FinetuiApp, pilot: Any, word: str = "", looks: int = 2) -> str:
    """The picture once it shows a word and is the same at some looks in a row."""
    before, same = "", 0
    for _ in range(400):
        await pilot.pause(0.02)
        await app.workers.wait_for_complete()
        now = picture(app)
        same = same + 1 if now == before and word in now else 0
        if same == looks:
            return now
        before = now
    raise AssertionError(f"{word!r} does not come to rest on:\n{before}")


@pytest.mark.parametrize("state", SHOWN)
@pytest.mark.parametrize("mode", MODES)
async def test_a_screen_in_a_state(app_in: FinetuiApp, state: str, mode: str, snapshot: SnapshotAssertion) -> None:
    pictures = snapshot.use_extension(Picture)
    async with app_in.run_test(size=(100, 30)) as pilot:
        await at_rest(app_in, pilot, SHOWN[state][mode] if (state, mode) not in KEYS else "", 6)
        await pilot.press(*KEYS.get((state, mode), []))
        await at_rest(app_in, pilot, SHOWN[state][mode], 6)
        found = {}
        for size in SIZES:
            await pilot.resize_terminal(*size)
            found[size] = await at_rest(app_in, pilot)
    wrong = [size for size in SIZES if found[size] != pictures(name=f"{mode}-{state}-{size[0]}x{size[1]}")]
    assert not wrong, f"another picture at {wrong}"
