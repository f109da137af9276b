"""Plan: the field of a teacher stands there for a student alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from finetui.tui.app import FinetuiApp
from finetui.tui.widgets.field import Field

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


async def test_the_field_of_a_teacher_comes_and_goes_with_the_method(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        teacher = app.screen.query_one("#field-distillation-teacher", Field)
        assert not teacher.display
        assert teacher.region.height == 0
        app.screen.query_one("#field-method", Field).focus()
        await pilot.press("right", "right")  # sft, pretrain, distill
        await settle(pilot)
        assert teacher.display
        await pilot.press("right")
        await settle(pilot)
        assert not teacher.display
