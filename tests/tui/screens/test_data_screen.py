"""Data: facts, lengths and examples of what the plan names, and errors where there are none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from finetui.engine.data.preview import Piece, Sample
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.keys import key_of
from finetui.tui.widgets.bars import KeyBar
from finetui.tui.widgets.data_facts import DataFacts, LengthHistogram
from finetui.tui.widgets.sample_view import SampleView, pieces_in_lines

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


async def test_facts_lengths_and_examples(app_of: AppOf, settle: Settle) -> None:
    app = app_of("data")
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        facts = " ".join(app.screen.query_one(DataFacts).text.split())
        for words in ("/data/support.jsonl", "41,208 rows", "41.0% trained", "ChatML is used", "Hangul 3.0%",
                      "! 1 row: the answer is empty (first: support.jsonl:98). Remove the row."):  # fmt: skip
            assert words in facts, words
        assert "≤2,047" in app.screen.query_one(LengthHistogram).text
        assert "19 cut" in app.screen.query_one(LengthHistogram).text
        assert app.screen.query_one(SampleView).text.splitlines() == [
            "<|im_start|>user⏎",
            "What uses my GPU?<|im_end|>⏎",
            "Run nvidia-smi.·[2J<|im_end|>",
        ]


async def test_the_next_example_and_the_one_before(app_of: AppOf, settle: Settle) -> None:
    app = app_of("data")
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        titles = []
        for key in ("n", "n", "p"):
            await pilot.press(key)
            titles.append(str(app.screen.query_one("#sample").border_title))
        assert titles[0] == "example 2 of 2: support.jsonl:2 (chosen), 4 tokens, 0 trained, 37 cut off"
        assert titles[1].startswith("example 1 of 2: support.jsonl:1, 7 tokens, 3 trained")
        assert titles[2] == titles[0]


async def test_other_data_is_read_and_the_same_is_not_read_twice(
    app_of: AppOf, settle: Settle, backend: Backend
) -> None:
    asked: list[str] = []

    def look(recipe: Recipe) -> Any:
        asked.append(recipe.data[0].path)
        return backend.look(recipe)

    app = app_of("data", backend=replace(backend, look=look))
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press(key_of("plan"))
        await settle(pilot)
        await pilot.press(key_of("data"))
        await settle(pilot)
        assert asked == ["/data/support.jsonl"]
        await pilot.press("r")
        await settle(pilot)
        app.edit({**app.draft, "data": "/data/other.jsonl"})
        await pilot.press(key_of("plan"))
        await settle(pilot)
        await pilot.press(key_of("data"))
        await settle(pilot)
        assert asked == ["/data/support.jsonl", "/data/support.jsonl", "/data/other.jsonl"]


async def test_what_is_wrong_is_said(app_of: AppOf, settle: Settle) -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "data": "/data/broken.jsonl"})
    app = app_of("data", recipe=recipe)
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        text = " ".join(app.screen.query_one(DataFacts).text.split())
        assert "broken.jsonl:731" in text
        assert "Correct the line." in text
        await pilot.press("n", "right_square_bracket")
        assert "Next" not in app.screen.query_one(KeyBar).text


async def test_a_plan_without_data(app_of: AppOf, settle: Settle) -> None:
    app = app_of("data", recipe=Recipe.build({"model": "Qwen/Qwen3-8B"}))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "names no data" in app.screen.query_one(DataFacts).text


def test_wide_letters_and_long_tokens_break_at_the_edge() -> None:
    sample = Sample("x:1", (Piece("학습", 1, True), Piece("abcdef", 2, False), Piece("\n\n", 3, True)), 0)
    lines = pieces_in_lines(sample, 5)
    assert lines == [
        [("학습", "trained"), ("a", "dim")],
        [("bcdef", "dim")],
        [("⏎", "trained")],
        [("⏎", "trained")],
    ]


async def test_tokens_are_marked_without_colour_too(app_of: AppOf, settle: Settle) -> None:
    app = app_of("data")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        view = app.screen.query_one(SampleView)
        assert "[[" not in view.text
        await pilot.press("m")
        assert "[[Run nvidia-smi." in view.text
        assert view.text.rstrip().endswith("<|im_end|>]]")
        await pilot.press("m")
        assert "<|im_start|>|user" in view.text
        await pilot.press("m")
        assert "[[" not in view.text
