"""Plan: every edit plans anew, errors stand beside their field, nothing that is typed ends the app."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input, OptionList, Static

from finetui.planner.errors import HubError, ModelError
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.planner.terms import Part, Term
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.screens.editor import SEARCH_S
from finetui.tui.widgets.bars import KeyBar
from finetui.tui.widgets.facts import Facts, Reasons
from finetui.tui.widgets.field import Field
from finetui.tui.widgets.memory_bar import MemoryBar
from finetui.tui.widgets.term_list import TermList

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


def field(app: FinetuiApp, key: str) -> Field:
    return app.screen.query_one(f"#field-{key}", Field)


async def test_the_first_picture_says_everything(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        memory, facts = app.screen.query_one(MemoryBar).text, app.screen.query_one(Facts).text
        for word in ("✔ fits", "10.2 of 79.2 GiB", "9.3–11.3 GiB", "weights", "activations", "context"):
            assert word in memory
        for word in ("5,123 tokens/s", "22 min", "$0.91 at $2.49/h", "43.6 M of 8.19 B"):
            assert word in facts
        assert "messages, 41,208 rows, 6.75 M tok" in field(app, "data").text
        assert "checkpointing full" in app.screen.query_one(Reasons).text
        assert "? Help" in app.screen.query_one(KeyBar).text


async def test_an_arrow_plans_anew(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "tuning-type").focus()
        await pilot.press("left", "left")
        await settle(pilot)
        assert app.recipe is not None
        assert app.recipe.tuning.type == "full"
        assert "–" in field(app, "tuning-rank").text
        field(app, "hardware-gpu").focus()
        await pilot.press("right", "right")
        await settle(pilot)
        assert "✘ does not fit" in app.screen.query_one(MemoryBar).text
        assert "rank 8 instead" in app.screen.query_one(Reasons).text
        await pilot.press("m")
        await settle(pilot)
        assert "this machine" in field(app, "hardware-gpu").text


async def test_an_error_stands_below_its_field(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "tuning-rank").focus()
        await pilot.press("enter", *"many", "enter")
        await settle(pilot)
        assert "✘" in field(app, "tuning-rank").text
        assert "must be a whole number" in " ".join(field(app, "tuning-rank").text.split())
        assert "no plan: see tuning.rank" in app.screen.query_one(MemoryBar).text
        assert app.plan is None
        await pilot.press("enter", *"32", "enter")
        await settle(pilot)
        assert app.plan is not None
        assert app.plan.resolved.rank == 32


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("model", "missing/model", "Did you mean 'Qwen/Qwen3-8B'?"), ("data", "/d/broken.jsonl", "broken.jsonl:731")],
)
async def test_what_the_planner_refuses_is_said(
    app_of: AppOf, settle: Settle, key: str, value: str, message: str
) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, key).focus()
        await pilot.press("enter")
        app.screen.query_one(Input).value = value
        await pilot.press("enter")
        await settle(pilot)
        assert message in app.screen.query_one(Reasons).text + field(app, key).text


async def test_a_mistake_in_the_planner_costs_one_plan(app_of: AppOf, backend: Backend, settle: Settle) -> None:
    def fail(recipe: Recipe) -> Plan:
        raise ZeroDivisionError("oops")

    app = app_of(backend=replace(backend, plan=fail))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "ZeroDivisionError: oops" in app.screen.query_one(Reasons).text
        assert app.is_running


async def test_typing_plans_before_enter_and_escape_takes_it_back(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        field(app, "epochs").focus()
        await pilot.press("enter", *"3")
        await settle(pilot)
        assert app.plan is not None
        assert app.plan.time_s == 3960.0
        await pilot.press("escape")
        await settle(pilot)
        assert app.plan.time_s == 1320.0
        assert "epochs" not in app.draft


async def test_a_model_is_found_by_typing(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("enter", *"llama", "down", "enter")
        await settle(pilot)
        assert app.draft["model"] == "meta-llama/Llama-3.1-8B"


async def test_a_closed_choice_takes_nothing_else(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "tuning-type").focus()
        await pilot.press("enter", *"nosuch", "enter", "escape")
        await settle(pilot)
        assert app.recipe is not None
        assert app.recipe.tuning.type == "qlora"


async def test_only_the_last_of_many_edits_is_shown(app_of: AppOf, backend: Backend, settle: Settle) -> None:
    planned: list[int] = []

    def slow(recipe: Recipe) -> Plan:
        planned.append(recipe.tuning.rank)
        time.sleep(0.15 if recipe.tuning.rank == 32 else 0.0)
        return backend.plan(recipe)

    app = app_of(backend=replace(backend, plan=slow))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "tuning-rank").focus()
        await pilot.press("right")
        await pilot.pause(0.08)
        for _ in range(3):
            field(app, "tuning-rank").action_step(1)
        await settle(pilot)
        assert app.plan is not None
        assert app.plan.resolved.rank == 256
        assert len(planned) < 5


async def test_save_and_open(app_of: AppOf, settle: Settle, tmp_path: Path) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "epochs").focus()
        await pilot.press("right")
        await settle(pilot)
        await pilot.press("s")
        await settle(pilot)
        app.screen.query_one(Input).value = str(tmp_path / "mine.yaml")
        await pilot.press("enter")
        await settle(pilot)
        assert Recipe.load(tmp_path / "mine.yaml").epochs == 2
        await pilot.press("left")
        await settle(pilot)
        await pilot.press("o")
        await settle(pilot)
        app.screen.query_one(Input).value = str(tmp_path / "mine.yaml")
        await pilot.press("enter")
        await settle(pilot)
        assert app.draft["epochs"] == 2
        assert app.recipe_path == tmp_path / "mine.yaml"
        await pilot.press("o")
        app.screen.query_one(Input).value = str(tmp_path / "gone.yaml")
        await pilot.press("enter")
        await settle(pilot)
        assert app.draft["epochs"] == 2


async def test_leaving_an_unsaved_plan_takes_two_presses(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "epochs").focus()
        await pilot.press("right", "q")
        await pilot.pause()
        assert app._exit is False
        await pilot.press("q")
        await pilot.pause()
        assert app._exit is True


async def test_enter_on_a_figure_shows_its_formula(app_of: AppOf, backend: Backend, settle: Settle) -> None:
    part = Part("linear layers in 4 bits", "6,945.8 M × 0.5159 bytes", 3.34)
    weights = Term("weights", "memory", "GiB", 5.66, "parameters × bytes each", (part,), "arXiv:2305.14314")
    speed = Term("speed", "speed", "s", 3.2, "tokens of a step ÷ seconds", (Part("forward", "", 3.2),))
    forward = Term("forward", "speed", "s", 3.2, "tokens × FLOPs ÷ rate", (Part("products", "4,096 × 15 GFLOP", 3.2),))
    terms = {"weights": weights, "speed": speed, "forward": forward}
    app = app_of(backend=replace(backend, explain=lambda recipe: terms))
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        app.screen.query_one(MemoryBar).focus()
        await pilot.pause()
        assert "▸ weights" in app.screen.query_one(MemoryBar).text
        await pilot.press("enter")
        await settle(pilot)
        shown = app.screen.query_one(TermList).text
        for words in ("5.66 GiB", "parameters × bytes each", "6,945.8 M × 0.5159 bytes", "arXiv:2305.14314"):
            assert words in shown
        await pilot.press("escape")
        for _ in range(8):
            await pilot.press("down")
        assert "▸ speed" in app.screen.query_one(Facts).text
        assert "▸" not in app.screen.query_one(MemoryBar).text
        await pilot.press("enter")
        await settle(pilot)
        assert "tokens × FLOPs ÷ rate" in app.screen.query_one(TermList).text


async def test_a_formula_that_can_not_be_had_is_no_crash(app_of: AppOf, backend: Backend, settle: Settle) -> None:
    def explain(recipe: Recipe) -> dict[str, Term]:
        raise ModelError("the config is gone", where="model")

    app = app_of(backend=replace(backend, explain=explain))
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        app.screen.query_one(MemoryBar).focus()
        await pilot.press("enter")
        await settle(pilot)
        assert "the config is gone" in app.screen.query_one(TermList).text


async def test_what_is_not_this_machine_has_a_badge(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        panel = app.screen.query_one("#verdict")
        assert "SIM" not in str(panel.border_title)
        field(app, "hardware-gpu").focus()
        await pilot.press("right", "right")
        await settle(pilot)
        assert "SIM" in str(panel.border_title)


async def test_the_hub_is_searched_while_one_types(app_of: AppOf, backend: Backend, settle: Settle) -> None:
    asked: list[str] = []

    def search(text: str) -> list[str]:
        asked.append(text)
        return ["Qwen/Qwen3-8B", "someone/qwen-tuned"]

    app = app_of(backend=replace(backend, search_hub=search))
    async with app.run_test(size=(80, 30)) as pilot:
        await settle(pilot)
        await pilot.press("enter", *"qwen")
        await pilot.pause(SEARCH_S + 0.2)
        await settle(pilot)
        options = app.screen.query_one(OptionList)
        names = [str(options.get_option_at_index(number).prompt) for number in range(options.option_count)]
        assert names == ["Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "someone/qwen-tuned"]
        assert asked == ["qwen"]
        await pilot.press("down", "down", "down", "enter")
        await settle(pilot)
        assert app.draft["model"] == "someone/qwen-tuned"


async def test_without_a_network_it_says_so(app_of: AppOf, backend: Backend, settle: Settle, tmp_path: Path) -> None:
    def search(text: str) -> list[str]:
        raise HubError("https://huggingface.co can't be reached")

    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    app = app_of(backend=replace(backend, search_hub=search))
    async with app.run_test(size=(80, 30)) as pilot:
        await settle(pilot)
        await pilot.press("enter", *"llama")
        await pilot.pause(SEARCH_S + 0.2)
        await settle(pilot)
        assert "can't be reached" in str(app.screen.query_one("#place", Static).render())
        app.screen.query_one(Input).value = f"{tmp_path}/"
        await settle(pilot)
        options = app.screen.query_one(OptionList)
        assert str(options.get_option_at_index(0).prompt) == str(tmp_path / "mine")
        await pilot.press("down", "enter")
        await settle(pilot)
        assert app.draft["model"] == str(tmp_path / "mine")


async def test_a_preset_opens_by_its_name_and_is_not_written_to(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("o", *"productio", "down", "enter")
        await settle(pilot)
        assert app.origin is not None
        assert app.origin[0] == "production.yaml"
        assert app.draft["tuning"]["rank"] == 64
        await pilot.press("s")
        await settle(pilot)
        assert app.screen.query_one(Input).value == "recipe.yaml"
