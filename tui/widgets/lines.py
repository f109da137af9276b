"""Lines: the base of every widget that draws itself.

A widget says what its lines are; only lines that changed are painted again, and each line is a few runs of one style.
That is what keeps a dashboard with eight GPUs at a few kB/s over SSH, where one style per cell costs over 60.
"""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.events import Resize
from textual.geometry import Region, Size
from textual.strip import Strip
from textual.style import Style as VisualStyle
from textual.widget import Widget

#: A run of text and the role that its colour comes from; see :data:`ROLES`.
Span = tuple[str, str]
Line = list[Span]

#: What a colour is for. The theme decides which colour that is.
ROLES = (
    "dim",
    "good",
    "warn",
    "bad",
    "accent",
    "second",
    "bold",
    "border",
    "key",
    "cursor",
    "trace",
    "empty",
    "trained",
)


class Lines(Widget):
    """A widget made of lines; subclasses override :meth:`draw`, and :attr:`TITLED` to get a box with a title."""

    TITLED = False

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id, classes=classes)
        self._lines: list[Line] = []
        self._drawn_for = Size(0, 0)
        self._role_styles: dict[str, Style] = {}

    # --- for subclasses

    def draw(self, width: int, height: int) -> list[Line]:
        """The lines for a content area of ``width`` x ``height`` cells; more or longer ones are cut."""
        raise NotImplementedError

    def title(self, width: int) -> Line:
        """What stands in the top border, at most ``width`` cells."""
        return []

    def lines_needed(self, width: int) -> int:
        """Height of the content for ``height: auto``."""
        return len(self.draw(width, 10_000))

    # --- painting

    def redraw(self) -> None:
        """Ask :meth:`draw` again and repaint the lines that differ."""
        old = self._lines
        if not self._draw_for(self.size):
            return
        new, (width, height) = self._lines, self.size
        changed = [y for y in range(max(len(new), len(old))) if y >= len(new) or y >= len(old) or new[y] != old[y]]
        if changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed if y < height))

    def _draw_for(self, size: Size) -> bool:
        """Hold the lines for a size; False where there is no room for any."""
        width, height = size
        if width <= 0 or height <= 0:
            return False
        self._lines = boxed(self, width, height) if self.TITLED else self.draw(width, height)[:height]
        self._drawn_for = size
        return True

    def on_resize(self, _: Resize) -> None:
        """Draw for the new size."""
        self._lines = []
        self.redraw()
        self.refresh()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """See :class:`textual.widget.Widget`."""
        return self.lines_needed(width - 4) + 2 if self.TITLED else self.lines_needed(width)

    def get_content_width(self, container: Size, viewport: Size) -> int:
        """See :class:`textual.widget.Widget`."""
        return container.width

    def render_line(self, y: int) -> Strip:
        """One line as the compositor wants it."""
        width, base = self.size.width, self.visual_style.rich_style
        # Textual gives a widget its new size always, but tells it so only where its map has not been read since.
        if self.size != self._drawn_for:
            self._draw_for(self.size)
        if y >= len(self._lines):
            return Strip.blank(width, base)
        segments = [Segment(text, self._style(role, base)) for text, role in self._lines[y] if text]
        return Strip(segments).adjust_cell_length(width, base)

    def _style(self, role: str, base: Style) -> Style:
        if not role:
            return base
        if role not in self._role_styles:
            # The app holds the roles' rules for all: each widget with its own would be styled fourteen times over.
            rules = self.app.get_component_styles(f"lines--{role}")
            text = rules.text_style
            style = VisualStyle(
                rules.background if rules.has_rule("background") else None,
                rules.color if rules.has_rule("color") else None,
                bold=text.bold,
                dim=text.dim,
                italic=text.italic,
                reverse=text.reverse,
                underline=text.underline,
            )
            self._role_styles[role] = (self.visual_style + style).rich_style
        return self._role_styles[role]

    def notify_style_update(self) -> None:
        """The theme, or something above this widget, has changed."""
        self._role_styles.clear()
        super().notify_style_update()

    @property
    def text(self) -> str:
        """What is drawn, without its colours."""
        return "\n".join("".join(text for text, _ in line).rstrip() for line in self._lines)


def length(line: Line) -> int:
    """Cells that a line takes."""
    return sum(cell_len(text) for text, _ in line)


def fitted(line: Line, width: int) -> Line:
    """A line cut or padded to exactly ``width`` cells; a cut is marked with ``…``."""
    have = length(line)
    if have <= width:
        return [*line, (" " * (width - have), "")] if have < width else line
    result: Line = []
    room = max(width - 1, 0)
    for text, role in line:
        cells = cell_len(text)
        if cells > room:
            result.append((set_cell_size(text, room) + "…"[:width], role))
            return result
        result.append((text, role))
        room -= cells
    return result


def spread(left: Line, right: Line, width: int) -> Line:
    """``left`` and ``right`` at the two ends of a line; the left one gives way."""
    gap = width - length(right)
    return [*fitted(left, gap - 1), (" ", ""), *right] if gap > 1 else fitted(left, width)


def wrapped(text: str, width: int, role: str = "", indent: str = "") -> list[Line]:
    """Text broken into lines of at most ``width`` cells; later lines start with ``indent``."""
    if width <= 0:
        return []
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        words = paragraph.lstrip(" ")
        current = paragraph[: len(paragraph) - len(words)]
        for word in words.split(" "):
            candidate = f"{current} {word}" if current.strip() else current + word
            if cell_len(candidate) <= width or not current.strip():
                current = candidate
            else:
                lines.append(current)
                current = indent + word
            while cell_len(current) > width:  # a path or a number longer than the line
                head = set_cell_size(current, width)
                lines.append(head)
                current = indent + current[len(head) :] if len(indent) < width // 2 else current[len(head) :]
        lines.append(current)
    return [[(line, role)] for line in lines]


def boxed(widget: Lines, width: int, height: int) -> list[Line]:
    """The widget's lines in a round box whose title is repainted line by line like the rest."""
    if width < 4 or height < 2:
        return []
    title = widget.title(width - 6)
    edge = "cursor" if widget.has_focus else "border"
    if title:
        title = fitted(title, min(length(title), width - 6))
        rule = "─" * (width - length(title) - 5)
        top: Line = [("╭─ ", edge), *title, (f" {rule}╮", edge)]
    else:
        top = [(f"╭{'─' * (width - 2)}╮", edge)]
    body = widget.draw(width - 4, height - 2)[: height - 2]
    body += [[] for _ in range(height - 2 - len(body))]
    sides: list[Line] = [[("│ ", edge), *fitted(line, width - 4), (" │", edge)] for line in body]
    return [top, *sides, [(f"╰{'─' * (width - 2)}╯", edge)]]
