"""DataFacts and LengthHistogram: what a recipe's data holds, in words and as bars."""

from __future__ import annotations

from .. import format  # noqa: A004
from ..data_look import DataLook, report_facts, source_facts, troubles
from .lines import Line, Lines, wrapped

_LABEL = 12


class DataFacts(Lines):
    """What is wrong, counts, and sources. As high as it has to be: put it into something that scrolls."""

    def __init__(self) -> None:
        super().__init__()
        self._look: DataLook | None = None
        self._words: tuple[str, str] = ("", "")

    def show(self, look: DataLook | None, words: str = "", role: str = "dim") -> None:
        """Draw a look at data; without one, ``words`` say why."""
        self._look, self._words = look, (words, role)
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if self._look is None:
            return wrapped(self._words[0], width, self._words[1])
        lines: list[Line] = []
        report = self._look.report
        if report is not None:
            for trouble in troubles(report):
                lines += wrapped(f"! {trouble}", width, "warn", indent="  ")
            for label, text in report_facts(report):
                body = wrapped(text, max(width - _LABEL, 8))
                lines.append([(label.ljust(_LABEL), "dim"), *body[0]])
                lines += [[(" " * _LABEL, ""), *rest] for rest in body[1:]]
        for source in self._look.survey.sources:
            lines += wrapped(source.path, width, "bold")
            lines += wrapped(f"  {source_facts(source)}", width, "", indent="  ")
        for note in self._look.notes:
            lines += wrapped(note, width, "dim")
        return lines


class LengthHistogram(Lines):
    """How long the examples are, in tokens; what lies beyond the sequence length stands out."""

    TITLED = True

    def __init__(self) -> None:
        super().__init__()
        self._look: DataLook | None = None

    def show(self, look: DataLook | None) -> None:
        """Draw the lengths of a look at data."""
        self._look = look
        self.redraw()

    def title(self, width: int) -> Line:
        """What is counted."""
        return [("tokens per example", "bold")]

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        report = self._look.report if self._look else None
        if report is None or not report.histogram:
            return [[], [("no lengths yet", "dim")]]
        most = max(item.count for item in report.histogram)
        label = max(len(f"{item.stop - 1:,}") for item in report.histogram)
        counted = max(len(format.count(item.count)) for item in report.histogram)
        note = " cut" if report.histogram[-1].start >= report.sequence_length else ""
        room = max(width - label - counted - len(note) - 3, 1)
        lines: list[Line] = []
        for item in report.histogram:
            beyond = item.start >= report.sequence_length
            bar = "█" * round(room * item.count / most) or ("▏" if item.count else "")
            lines.append(
                [
                    (f"≤{item.stop - 1:>{label},} ", "dim"),
                    (bar.ljust(room), "warn" if beyond else "accent"),
                    (f" {format.count(item.count):>{counted}}{note if beyond and item.count else ''}", ""),
                ]
            )
        return lines
