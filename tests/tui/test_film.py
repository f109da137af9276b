"""The terminal that tests and pictures look at, and the film that is made of a session."""

from __future__ import annotations

import pytest

from finetui.tests.bench.film import as_svg, film, from_the_first_picture
from finetui.tests.bench.screen import ALTERNATE, CURSOR, Screen, Style


def shown(*pieces: bytes, size: tuple[int, int] = (10, 3)) -> Screen:
    screen = Screen(*size)
    for piece in pieces:
        screen.feed(piece)
    return screen


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("ab\r\ncd", "ab\ncd\n"),
        ("\x1b[2;4Hx\x1b[1;1Hy", "y\n   x\n"),
        ("0123456789ab", "0123456789\nab\n"),
        ("\x1b[?7l0123456789ab", "012345678b\n\n"),
        ("a\nb\nc\nd\n", "  c\n   d\n"),
        ("abc\x1b[2D\x1b[K", "a\n\n"),
        ("abc\x1b[2Jd", "   d\n\n"),
        ("界a", "界a\n\n"),
        ("ab\x1b[?1049hcd\x1b[?1049l", "ab\n\n"),
    ],
)
def test_what_is_written_is_where_it_belongs(written: str, text: str) -> None:
    assert shown(written.encode()).text() == text


def test_bytes_may_come_in_any_pieces() -> None:
    written = "\x1b[1;38;2;1;2;3;48;5;7m╭é\x1b[0m\x1b]0;a title\x07".encode()
    whole, apart = shown(written), shown(*(bytes([byte]) for byte in written))
    assert whole.rows == apart.rows
    assert whole.rows[0][1].text == "é"
    assert whole.rows[0][1].style == Style(color="#010203", back="7", bold=True)
    assert whole.style == Style()
    assert apart.title == "a title"


def test_modes_are_kept() -> None:
    screen = shown(b"\x1b[?1049h\x1b[?25l\x1b[>25u")
    assert (screen.modes[ALTERNATE], screen.modes[CURSOR], screen.keyboard) == (True, False, 1)


def test_what_is_not_known_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="unknown control sequence"):
        shown(b"\x1b[5@")


def test_a_film_shows_each_line_while_it_stood() -> None:
    events = [(0.0, "\x1b[31mred\x1b[0m & <still>"), (1.0, "\x1b[2;1Hone"), (3.0, "\x1b[2;1Htwo")]
    made = film(events, (20, 3), rest_s=1.0)
    assert [when for when, _ in made.rows[1]] == [0.0, 1.0, 3.0]
    drawn = as_svg(made, "a title")
    assert "&amp; &lt;still&gt;" in drawn
    assert "25.000%,75.000%{visibility:visible}" in drawn, "the second line says one from 1 s to 3 s of 4 s"
    assert "75.000%{visibility:hidden}" in drawn


def test_a_film_begins_with_its_first_picture() -> None:
    events = [(0.1, "\x1b[?1049h"), (2.3, "╭─ plan ─╮"), (2.35, "\x1b[2;1Hfits"), (3.3, "\x1b[2;1Hgone")]
    begun = from_the_first_picture(events)
    assert [round(when, 2) for when, _ in begun] == [0.0, 0.0, 0.05, 1.0]
    made = film(begun, (20, 3), rest_s=1.0)
    assert [when for when, _ in made.rows[0]] == [0.0, 0.0]
    assert [round(when, 2) for when, _ in made.rows[1]] == [0.0, 0.0, 1.0]
    assert "0.000%{visibility:hidden}" not in as_svg(made, "a title").split("visible")[0]
