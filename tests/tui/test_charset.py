"""Everything in ASCII, cell for cell."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from finetui.tui.charset import to_ascii


@given(st.text(st.characters(blacklist_categories=["Cc", "Cf", "Mn", "Me", "Mc", "Cs", "Co", "Cn"])))
def test_ascii_of_the_same_width(text: str) -> None:
    assert to_ascii(text).isascii()
    assert len(to_ascii(text)) == cell_len(text)


def test_what_is_drawn_stays_readable() -> None:
    assert to_ascii("╭─ loss ─╮ ✔ fits ██░░ 67 °C") == "+- loss -+ + fits ##.. 67  C"
    assert to_ascii("⠁⣀⣿⠀") == "'.: "
