"""One plan for the draft of a form, as a thread makes it: with its recipe, or with the error that stands in its way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..planner.errors import FinetuiError
from ..planner.plan import Plan
from .backend import Backend
from .form import Tree, recipe_of

if TYPE_CHECKING:
    from ..planner.recipe import Recipe


@dataclass(frozen=True)
class Planned:
    """Recipe, plan and what the data is; or why there is none."""

    recipe: Recipe | None = None
    plan: Plan | None = None
    data: str = ""
    error: FinetuiError | None = None


class DraftPlanner:
    """Plans drafts; looks at each dataset once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._described: dict[str, str] = {}

    def plan(self, draft: Tree) -> Planned:
        """Plan a draft. Never raises: a mistake of ours must cost one plan, not the screen with the form on it."""
        try:
            recipe = recipe_of(draft)
            return Planned(recipe, self._backend.plan(recipe), self._describe(recipe))
        except FinetuiError as error:
            return Planned(error=error)
        except Exception as error:
            what = f"the planner failed ({type(error).__name__}: {error})"
            return Planned(error=FinetuiError(what, do="Please report this with the recipe."))

    def _describe(self, recipe: Recipe) -> str:
        key = repr([source.model_dump() for source in recipe.data])
        if recipe.data and key not in self._described:
            self._described[key] = "; ".join(self._backend.data(recipe))
        return self._described.get(key, "")
