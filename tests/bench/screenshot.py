"""Draws the README's picture, or any screen, from the real app as SVG.

    python tests/bench/screenshot.py docs/monitor.svg                            Monitor on the recorded quickstart run
    python tests/bench/screenshot.py docs/monitor.svg --run runs/my-run          Monitor on a run of yours
    python tests/bench/screenshot.py docs/plan.svg --screen plan --recipe r.yaml Plan, made by the real planner

The recorded run in tests/tui/data/quickstart is a real one, on two CPU cores; only its paths were shortened.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import shutil
import tempfile
from pathlib import Path

from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.widgets.bars import MODES

RECORDED = Path(__file__).parents[1] / "tui" / "data" / "quickstart"


async def draw(app: FinetuiApp, target: Path, size: tuple[int, int], keys: list[str]) -> None:
    """Run the app without a terminal until it has come to rest, and write its picture."""
    async with app.run_test(size=size) as pilot:
        for key in ["", *keys]:
            if key:
                await pilot.press(key)
            for _ in range(4):
                await pilot.pause(0.25)
                await app.workers.wait_for_complete()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(app.export_screenshot(title="finetui"), encoding="utf-8")


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--run", type=Path, default=RECORDED)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--screen", choices=[mode for _, mode, _ in MODES], default="monitor")
    parser.add_argument("--size", default="100x30", help="columns x rows")
    parser.add_argument("--keys", nargs="*", default=[], help="keys to press first, by Textual's names")
    arguments = parser.parse_args()
    width, height = (int(number) for number in arguments.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / arguments.run.name
        shutil.copytree(arguments.run, copy, ignore=shutil.ignore_patterns("checkpoints", "output", "tensorboard"))
        run = Run(copy)
        events = read_events(run.events_path)
        # The clock stands where the run ended, so that the same run always gives the same picture.
        backend = dataclasses.replace(Backend(), runs=lambda: [run], now=lambda: events[-1].time if events else 0.0)
        recipe = Recipe.load(arguments.recipe) if arguments.recipe else run.recipe
        app = FinetuiApp(arguments.screen, run, recipe, backend=backend)
        asyncio.run(draw(app, arguments.target, (width, height), arguments.keys))


if __name__ == "__main__":
    main()
