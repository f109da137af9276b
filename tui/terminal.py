"""What this terminal can show, and whether it is still there.

Measured on Textual 8.2.8: after a hang-up whose signal is not delivered its input thread spins at 130% of a core.
"""

from __future__ import annotations

import locale
import os
import select
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

#: Terminals with eight or sixteen colours and, on a console, a font without braille.
_PLAIN_TERMS = frozenset({"linux", "vt100", "vt102", "vt220", "ansi", "cons25"})
#: Exit status of a process that ended because its terminal hung up: 128 + SIGHUP.
HUNG_UP = 129


def refusal(environ: Mapping[str, str], *, tty: bool) -> str:
    """Why the app can't be drawn here, or an empty string."""
    if not tty:
        return "the app needs a terminal, and one of standard input, output and error is none"
    if environ.get("TERM", "") in ("", "dumb"):
        return "the app needs a terminal that can move the cursor, and TERM is unset or 'dumb'"
    return ""


def surroundings() -> dict[str, str]:
    """The environment as this process was given it: where the locale is C, Python sets LC_CTYPE (PEP 538)."""
    environ = dict(os.environ)
    try:
        given = Path("/proc/self/environ").read_bytes()
    except OSError:
        return environ
    if environ.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8") and b"\0LC_CTYPE=" not in b"\0" + given:
        del environ["LC_CTYPE"]
    return environ


def wants_ascii(environ: Mapping[str, str]) -> bool:
    """Whether to draw in ASCII: the locale is not UTF-8, the console has no such font, or the user says so.

    tmux replaces every other character by ``_`` when the locale is not UTF-8, which is common in rented containers.
    """
    asked = environ.get("FINETUI_CHARSET", "").lower()
    if asked in ("ascii", "unicode"):
        return asked == "ascii"
    if environ.get("TERM") in _PLAIN_TERMS:
        return True
    named = next((environ[key] for key in ("LC_ALL", "LC_CTYPE", "LANG") if environ.get(key)), None)
    if named is None:
        # A container sets no locale at all; Python then assumes UTF-8 for C and POSIX, but tmux and mosh do not.
        return bool(environ.get("TMUX")) or "utf" not in locale.getpreferredencoding(False).lower()
    return "utf" not in named.lower()


def theme_for(environ: Mapping[str, str]) -> str:
    """A theme that this terminal can show.

    OpenSSH hands over TERM but not COLORTERM, so without it the sixteen colours that the user's own terminal defines
    are the ones that are sure to be readable. Without any colour (``NO_COLOR``) that theme still shows the cursor.
    """
    if environ.get("TEXTUAL_THEME"):
        return environ["TEXTUAL_THEME"]
    if "NO_COLOR" in environ:
        return "ansi-dark"
    return "finetui" if environ.get("COLORTERM") in ("truecolor", "24bit") else "ansi-dark"


def watch_for_hangup(fileno: int | None = None, *, on_hangup: Callable[[], None] | None = None) -> threading.Thread:
    """End this process when its terminal is gone, even if no SIGHUP ever comes (``nohup``, a dropped SSH session).

    Nothing has to be put in order first: whatever trains is another process, in a session of its own.
    """
    descriptor = sys.__stdin__.fileno() if fileno is None and sys.__stdin__ is not None else fileno or 0

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # hang-up and error are always reported; input stays with the driver
        while True:
            for _, event in poll.poll(5000):
                if event & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                    (on_hangup or partial(os._exit, HUNG_UP))()
                    return

    thread = threading.Thread(target=watch, name="hangup", daemon=True)
    thread.start()
    return thread
