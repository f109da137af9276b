"""BaseScreen: what the four screens share: where one is, what one can press, and a line for tiny terminals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import DescendantFocus
from textual.geometry import Region
from textual.screen import Screen
from textual.widget import Widget

from ...planner.errors import UserError
from ...planner.inside import local_path
from ..keys import Key, keys_of, rebound
from ..widgets.bars import KeyBar, TopBar
from ..widgets.lines import Line, Lines, fitted

if TYPE_CHECKING:
    from ..app import FinetuiApp


#: Seconds after which a picture that a batch has put off is tried again.
_BATCH_S = 0.02


class StatusLine(Lines):
    """All there is room for below 60 x 18."""

    def __init__(self, screen: BaseScreen) -> None:
        super().__init__(id="status-line")
        self._owner = screen

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        return [fitted(self._owner.status_line(), width)]


class BaseScreen(Screen[None]):
    """A screen of the app. Subclasses give :attr:`SCOPE`, :meth:`body` and :meth:`status_line`."""

    SCOPE: ClassVar[str]
    AUTO_FOCUS = ""
    HORIZONTAL_BREAKPOINTS = [(0, "-slim"), (60, "-narrow"), (96, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-flat"), (18, "-short"), (28, "-tall")]  # noqa: RUF012

    _focused_last: Widget | None = None
    _pictured: dict[Widget, tuple[Region, Region]] | None = None

    @property
    def owner(self) -> FinetuiApp:
        """The app, by its own type."""
        return cast("FinetuiApp", self.app)

    def path_of(self, text: str) -> Path | None:
        """What a user typed as a path; None, and a notice, if it can't be one."""
        try:
            return local_path(text)
        except UserError as error:
            self.notify(str(error), title="no path", severity="error", timeout=12)
            return None

    def compose(self) -> ComposeResult:
        """The bar at the top, the body, the bar at the foot."""
        yield TopBar(self.SCOPE)
        yield StatusLine(self)
        with Vertical(id="body"):
            yield from self.body()
        yield KeyBar()

    def body(self) -> ComposeResult:
        """What is between the bars."""
        raise NotImplementedError

    def status_line(self) -> Line:
        """The screen in one line."""
        raise NotImplementedError

    def keys_shown(self) -> list[Key]:
        """The keys for the bar at the foot, the most useful ones first."""
        return [*keys_of(self.SCOPE), *keys_of("app")]

    def refresh_bars(self) -> None:
        """Bring the bars up to date."""
        self.query_one(TopBar).show(self.owner.machine, self.owner.own_keys)
        self.query_one(KeyBar).show(rebound(self.keys_shown(), self.owner.own_keys))
        self.query_one(StatusLine).redraw()

    def on_screen_resume(self) -> None:
        """Show the bars as they are now."""
        self.refresh_bars()

    # Textual 8.2.8 draws while a batch is open, as it is for 50 ms after each change of screens, throws that picture
    # away and holds it for shown. After it came what had changed since, amid what another screen had left, and then all
    # of it. Here nothing is drawn in a batch, and where all is due it comes at once, and once.

    def _compositor_refresh(self) -> None:
        if self.app._batch_count:
            self.set_timer(_BATCH_S, self._compositor_refresh)
            return
        everything, due = self._compositor.size.region, self._compositor._dirty_regions
        if self is self.app.screen and (self._repaint_required or everything in due):
            due.add(everything)
            self._repaint_required = False
        # What became due while a batch was open is drawn with the rest: behind this, nothing counts as due.
        self._compositor.update_widgets(self._dirty_widgets)
        due |= self._displaced()
        super()._compositor_refresh()

    # Whoever asks Textual where a widget is, after one was added, gets a new map of all widgets, and has put it in the
    # place of the old one. The layout that comes next finds nothing in another place than before: what has moved stays
    # on the screen where it was, under what is drawn over it.

    def _displaced(self) -> set[Region]:
        """Where widgets are now, and where they were in the last picture, if those differ."""
        compositor, before = self._compositor, self._pictured or {}
        now = self._pictured = dict(compositor.visible_widgets)
        moved = {clip.intersection(region) for _, (region, clip) in now.items() ^ before.items()}
        if moved:
            compositor._cuts = compositor._layers = compositor._layers_visible = None
        return {region for region in moved if region}

    # A terminal that is tiny for a moment hides what has the focus, which loses it then.

    def on_descendant_focus(self, event: DescendantFocus) -> None:
        """Remember what had the focus last."""
        self._focused_last = event.widget

    def on_resize(self) -> None:
        """Give the focus back to what lost it for want of room."""
        if self.focused is None and self._focused_last is not None:
            self.call_after_refresh(self._focus_again)

    def _focus_again(self) -> None:
        last = self._focused_last
        if self.focused is None and last is not None and last.is_attached and last.focusable:
            self.set_focus(last, scroll_visible=False)
