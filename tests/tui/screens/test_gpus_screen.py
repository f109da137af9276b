"""GPUs: offers for the plan that stands in the form, and the way back into it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable, Input

from finetui.planner.errors import ModelError
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.form import get
from finetui.tui.offers import price_age, with_frontier
from finetui.tui.screens.offers_compared import OfferColumns, OffersCompared
from finetui.tui.screens.told import Told
from finetui.tui.widgets.offer_details import OfferDetails
from finetui.tui.widgets.scatter import Scatter
from finetui.tui.widgets.text_block import TextBlock

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]
LORA = Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "lora"})


def table(app: FinetuiApp) -> list[list[str]]:
    widget = app.screen.query_one(DataTable)
    return [[str(cell).strip() for cell in widget.get_row_at(index)] for index in range(widget.row_count)]


async def test_offers_cheapest_first_with_the_best_marked(app_of: AppOf, settle: Settle) -> None:
    app = app_of("gpus", recipe=LORA)
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        rows = table(app)
        assert len(rows) == 5
        assert [row[1] for row in rows[:2]] == ["RTX 4090", "RTX 4090"]
        assert rows[0][0].strip() == "◆"
        assert rows[0][-1] == "273 d!"
        assert "1 do not fit" in str(app.screen.query_one(DataTable).border_title)
        details = app.screen.query_one(OfferDetails).text
        assert "$0.31/h of 2025-06-01  old" in details
        assert "https://vast-ai.example/pricing" in details
        assert "◆" in app.screen.query_one(Scatter).text


async def test_sorting_filtering_and_showing_what_does_not_fit(app_of: AppOf, settle: Settle) -> None:
    app = app_of("gpus", recipe=LORA)
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        await pilot.press("s")
        assert (table(app)[0][1], table(app)[0][2]) == ("H100 SXM", "8")
        await pilot.press("f")
        assert table(app)[-1][1] == "T4"
        assert table(app)[-1][4].startswith("✘")
        await pilot.press("slash", *"lambda", "enter")
        await settle(pilot)
        assert {row[-2] for row in table(app)} == {"lambda"}


async def test_spot_prices(app_of: AppOf, settle: Settle) -> None:
    app = app_of("gpus", recipe=LORA)
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        before = table(app)[0][7]
        await pilot.press("i")
        await settle(pilot)
        assert (before, table(app)[0][7]) == ("$0.31", "$0.15")


async def test_marked_offers_side_by_side(app_of: AppOf, settle: Settle) -> None:
    app = app_of("gpus", recipe=LORA)
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        await pilot.press("v")
        assert len(table(app)) == 5
        await pilot.press("space", "j", "space", "v")
        assert len(table(app)) == 2
        assert all(row[0].startswith("*") for row in table(app))


async def test_enter_plans_for_the_machine(app_of: AppOf, settle: Settle) -> None:
    app = app_of("gpus", recipe=LORA)
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        await pilot.press("s", "k", "k", "k", "k", "enter")
        await settle(pilot)
        assert app.current_mode == "plan"
        assert (get(app.draft, "hardware.gpu"), get(app.draft, "hardware.gpus")) == ("H100 SXM", "8")
        assert app.edited


async def test_a_change_is_taken_with_one_key(app_of: AppOf, settle: Settle) -> None:
    app = app_of("gpus", recipe=LORA)
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        await pilot.press("f", "slash", *"t4", "enter")
        await settle(pilot)
        assert "a  tuning.type: qlora" in app.screen.query_one(OfferDetails).text
        await pilot.press("a")
        await settle(pilot)
        assert app.current_mode == "plan"
        assert (get(app.draft, "tuning.type"), get(app.draft, "hardware.gpu")) == ("qlora", "T4")


async def test_an_edited_plan_is_priced_anew(app_of: AppOf, settle: Settle, backend: Backend) -> None:
    asked: list[str] = []

    def offers(recipe: Recipe, spot: bool) -> Any:
        asked.append(recipe.tuning.type)
        return backend.offers(recipe, spot)

    app = app_of("gpus", recipe=LORA, backend=replace(backend, offers=offers))
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("1")
        await settle(pilot)
        await pilot.press("2")
        await settle(pilot)
        assert asked == ["lora"]
        await pilot.press("1", "down", "down", "right")
        await settle(pilot)
        await pilot.press("2")
        await settle(pilot)
        assert asked == ["lora", "qlora"]


async def test_a_recipe_that_can_not_be_planned(app_of: AppOf, settle: Settle, backend: Backend) -> None:
    def offers(recipe: Recipe, spot: bool) -> Any:
        raise ModelError("there is no model 'x/y'")

    app = app_of("gpus", recipe=LORA, backend=replace(backend, offers=offers))
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        assert "there is no model" in app.screen.query_one(OfferDetails).text
        await pilot.press("enter", "a", "space", "k")
        assert app.current_mode == "gpus"


async def test_marked_offers_are_compared_in_a_box(app_of: AppOf, settle: Settle) -> None:
    app = app_of("gpus")
    async with app.run_test(size=(110, 34)) as pilot:
        await settle(pilot)
        await pilot.press("t")
        assert not isinstance(app.screen, OffersCompared)
        await pilot.press("space", "space", "space", "t")
        await settle(pilot)
        assert isinstance(app.screen, OffersCompared)
        lines = {line[:14].strip(): line[14:] for line in app.screen.query_one(OfferColumns).text.splitlines()}
        assert lines["$ run"].count("◆") == 1
        assert lines["provider"].split()[0] in ("vast-ai", "runpod")
        assert "d" in lines["price age"]
        await pilot.press("t")
        await settle(pilot)
        assert not isinstance(app.screen, OffersCompared)


@pytest.mark.parametrize(
    ("as_of", "age"), [("2026-02-20", "9 d"), ("2025-06", "273 d"), ("unknown", "?"), ("", "?"), ("2027-01-01", "0 d")]
)
def test_how_old_a_price_is(as_of: str, age: str, now: float) -> None:
    assert price_age(as_of, now) == age


@pytest.mark.parametrize("size", [(80, 24), (100, 30)])
async def test_time_and_provider_are_shown_where_there_is_room(
    app_of: AppOf, settle: Settle, backend: Backend, size: tuple[int, int]
) -> None:
    def offers(recipe: Recipe, spot: bool) -> Any:
        rows = backend.offers(recipe, spot)
        rows[1] = replace(rows[1], provider="a-provider-of-a-long-name")
        kaggle = replace(rows[0], provider="kaggle", usd=0.0, usd_per_h=0.0, quota="12 h a session, 30 h a week")
        return [replace(kaggle, over="quota"), *rows]

    app = app_of("gpus", recipe=LORA, backend=replace(backend, offers=offers))
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        headings = [str(column.label).strip() for column in app.screen.query_one(DataTable).columns.values()]
        assert {"time", "$/h", "$ run", "provider"} <= set(headings)
        rows = table(app)
        assert rows[0][headings.index("provider")].startswith("a-provider")
        assert rows[-1][headings.index("provider")] == "kaggle"
        assert rows[-1][headings.index("$ run")] == "free!"
        widget = app.screen.query_one(DataTable)
        assert widget.virtual_size.width <= widget.size.width  # nothing to scroll sideways to
        await pilot.press("G", "k", "end", *["j"] * 9)
        await settle(pilot)
        words = app.screen.query_one(OfferDetails).text
        assert "longer than one free session" in words
        assert "quota    12 h a session, 30 h a week" in words


async def test_what_is_free_for_a_session_does_not_lead_before_the_data_is_known(
    app_of: AppOf, settle: Settle, backend: Backend
) -> None:
    def offers(recipe: Recipe, spot: bool) -> Any:
        rows = backend.offers(recipe, spot)
        unknown = replace(rows[0].plan, workload=replace(rows[0].plan.workload, basis="assumed"))
        lent = {"provider": "kaggle", "usd": 0.0, "usd_per_h": 0.0, "quota": "12 h a session"}
        return with_frontier([replace(rows[0], plan=unknown, **lent), *rows])

    app = app_of("gpus", recipe=LORA, backend=replace(backend, offers=offers))
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        rows = table(app)
        assert [row[0] for row in rows if "kaggle" in row] == [""]
        assert "kaggle" in rows[-1]
        assert "free?" in rows[-1]
        await pilot.press(*["j"] * 9)
        await settle(pilot)
        assert "a free session may end first" in " ".join(app.screen.query_one(OfferDetails).text.split())


async def test_a_job_is_written_for_an_offer(app_of: AppOf, settle: Settle, backend: Backend, tmp_path: Path) -> None:
    written: list[tuple[str | None, Any, str, bool, Path]] = []

    def job(recipe: Recipe, provider: str, spot: bool, target: Path) -> list[str]:
        written.append((recipe.hardware.gpu, recipe.hardware.gpus, provider, spot, target))
        return ["start it:", "  sky launch mine.sky.yaml"]

    app = app_of("gpus", recipe=LORA, backend=replace(backend, job=job))
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        await pilot.press("j", "w")
        await settle(pilot)
        assert app.screen.query_one(Input).value == "qwen3-8b-rtx-4090.sky.yaml"
        app.screen.query_one(Input).value = str(tmp_path / "mine")
        await pilot.press("enter")
        await settle(pilot)
        target = tmp_path / "mine.sky.yaml"
        assert written == [("RTX 4090", 1, "runpod", False, target)]
        assert isinstance(app.screen, Told)
        assert "sky launch mine.sky.yaml" in app.screen.query_one(TextBlock).text
        await pilot.press("escape")
        target.write_text("mine already")
        await pilot.press("w")
        app.screen.query_one(Input).value = str(target)
        await pilot.press("enter")
        await settle(pilot)
        await pilot.press("enter")  # no
        await settle(pilot)
        assert len(written) == 1


async def test_a_job_that_can_not_be_written_is_told(app_of: AppOf, settle: Settle, backend: Backend) -> None:
    def job(recipe: Recipe, provider: str, spot: bool, target: Path) -> list[str]:
        raise ModelError("the recipe names no dataset", where="data")

    app = app_of("gpus", recipe=LORA, backend=replace(backend, job=job))
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        await pilot.press("w", "enter")
        await settle(pilot)
        assert not isinstance(app.screen, Told)
        assert [note.message for note in app._notifications] == ["data: the recipe names no dataset."]
        await pilot.press("escape")
        assert not list(app._notifications)
