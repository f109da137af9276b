"""RecipeView: a recipe as YAML, each line marked by whether it differs from the recipe that it came from."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipe_changes import Mark
from .lines import Line, Lines, wrapped

_ROLES = {"+": "good", "-": "bad", " ": ""}


class RecipeView(Lines):
    """As high as it has to be: put it into something that scrolls."""

    def __init__(self) -> None:
        super().__init__()
        self._changes: Sequence[tuple[Mark, str]] = ()

    def show(self, changes: Sequence[tuple[Mark, str]]) -> None:
        """Draw marked lines."""
        self._changes = changes
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        marked = any(mark != " " for mark, _ in self._changes)
        return [
            line
            for mark, text in self._changes
            for line in wrapped(f"{mark} {text}" if marked else text, width, _ROLES[mark], indent="    ")
        ]
