"""SteadyStylesheet: Textual's stylesheet, which parses a rule again only when it can come to something else."""

from __future__ import annotations

from typing import Any

from textual.css.stylesheet import Stylesheet
from textual.css.types import CSSLocation


class SteadyStylesheet(Stylesheet):
    """A stylesheet for an app that refreshes its styles more often than its theme.

    Textual 8.2.8 forgets every parsed rule on each refresh, and before its first picture an app with modes refreshes
    three times. What a rule comes to depends on its text and on the theme's variables alone.
    """

    def set_variables(self, variables: dict[str, str]) -> None:
        """Take new variables; the same ones again change nothing."""
        if variables != self._variables:
            super().set_variables(variables)
            self._require_parse = True
            self._rules_map = None

    def add_source(self, css: str, read_from: CSSLocation | None = None, *arguments: Any, **named: Any) -> None:
        """Add rules; a source that is there already may change its rank among the others."""
        before = self.source.get(read_from) if read_from else None
        super().add_source(css, read_from, *arguments, **named)
        if before is not None and self.source[read_from] != before:  # type: ignore[index]
            self._require_parse = True
            self._rules_map = None

    def reparse(self) -> None:
        """Parse what is new; the rest is known."""
        self.rules  # noqa: B018 - parses where that is due
