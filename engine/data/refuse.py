"""What is done about rows that can't be used: stop at the first, or leave them out, count them and name the first."""

from __future__ import annotations

from ...planner.datasource import DataSource
from ...planner.errors import DataError


class Refused:
    """The rows of one source that could not be used, under its policy ``on_bad_row``."""

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self.count = 0
        self.error: DataError | None = None
        """What is wrong with the first of them."""

    def __call__(self, error: DataError) -> None:
        """Take note of a row, or raise what is wrong with it."""
        if self._source.on_bad_row == "stop":
            do = f"{error.do} Or set on_bad_row: skip, to leave such rows out and have them counted.".lstrip()
            raise DataError(error.what, where=error.where, do=do) from None
        self.count += 1
        self.error = self.error or error

    @property
    def first(self) -> str:
        """The first row left out, and why."""
        return f"{self.error.where}: {self.error.what}" if self.error else ""

    def told(self) -> list[str]:
        """One line about the rows left out, if there are any."""
        if not self.count:
            return []
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        return [f"{rows} of {self._source.path} can't be used and are left out; the first: {self.first}"]
