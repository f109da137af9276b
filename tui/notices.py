"""Notices: which of them give way where there are too many for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from textual.notifications import Notification

#: Lines of a terminal below which two notices are enough; above, four.
_TALL = 28
#: What gives way first.
_GRAVITY = {"information": 0, "warning": 1, "error": 2}


def spare(notices: Sequence[Notification], height: int) -> list[Notification]:
    """The notices to take away from a terminal of ``height`` lines: the mildest first, of these the oldest.

    The newest one stays, and says what the last key did.
    """
    most = 4 if height >= _TALL else 2
    if len(notices) <= most:
        return []
    *older, _ = sorted(notices, key=lambda notice: notice.raised_at)
    older.sort(key=lambda notice: (_GRAVITY[notice.severity], notice.raised_at))
    return older[: len(notices) - most]
