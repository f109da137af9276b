"""Columns: figures are never cut, and a table is never wider than its room while there is something to give up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from finetui.tui.columns import Column, cut, fitting, table

COLUMNS = (
    Column("name", least=6), Column("GiB", right=True, rank=2), Column("tok/s", right=True),
    Column("from", rank=1, least=4), Column("age", right=True, rank=3),
)  # fmt: skip
ROWS = [
    {"name": "RTX-PRO-6000-Server", "GiB": "13.8", "tok/s": "12,356", "from": "huggingface-jobs", "age": "366 d"},
    {"name": "T4", "GiB": "9.1", "tok/s": "667", "from": "gcp", "age": "?"},
]


def test_what_is_given_up_goes_by_rank_and_names_are_cut_before() -> None:
    assert list(fitting(COLUMNS, ROWS, 100)) == ["name", "GiB", "tok/s", "from", "age"]
    assert fitting(COLUMNS, ROWS, 46) == {"name": 19, "GiB": 4, "tok/s": 6, "from": 8, "age": 5}  # the last name first
    assert fitting(COLUMNS, ROWS, 40) == {"name": 17, "GiB": 4, "tok/s": 6, "from": 4, "age": 5}
    assert list(fitting(COLUMNS, ROWS, 25)) == ["name", "GiB", "tok/s", "from"]
    assert list(fitting(COLUMNS, ROWS, 20)) == ["name", "tok/s", "from"]
    assert list(fitting(COLUMNS, ROWS, 13)) == ["name", "tok/s"]


@given(room=st.integers(13, 90), gap=st.integers(1, 2))
def test_no_line_is_too_wide_and_no_figure_cut(room: int, gap: int) -> None:
    lines = table(COLUMNS, ROWS, room, gap)
    assert all(cell_len(line) <= max(room, 12 + gap) for line in lines)
    assert "12,356" in lines[1]
    assert "…" not in lines[2]


def test_wide_characters_are_counted_in_cells() -> None:
    rows = [{"name": "微调模型的运行", "n": "1"}, {"name": "plain", "n": "22"}]
    lines = table([Column("name", least=6), Column("n", right=True)], rows, 12)
    assert lines == ["name       n", "微调模…    1", "plain     22"]
    assert cut("微调模型", 4) == "微…"
    assert cut("same", 4) == "same"
