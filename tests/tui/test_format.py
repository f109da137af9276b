"""Numbers as people read them, in the unit that they ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetui.tui import format  # noqa: A004
from finetui.tui.format import setting


@pytest.fixture
def gb() -> Iterator[None]:
    """Memory in GB, for one test."""
    format.use_memory_unit("GB")
    yield
    format.use_memory_unit("GiB")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the fastest that fits; 4 would need 31.7 of 23.6 GiB", "the fastest that fits; 4 would need 34.0 of 25.3 GB"),
        ("selective would be 1% slower at 19.4 GiB", "selective would be 1% slower at 20.8 GB"),
        ("idle: 75.0 GiB free, 18.2 needed", "idle: 80.5 GB free, 19.5 needed"),
        ("/dev/shm has 24,106 of 24,106 MiB free", "/dev/shm has 25,277 of 25,277 MB free"),
        ("3 of 4 checks at 2 min", "3 of 4 checks at 2 min"),
    ],
)
@pytest.mark.usefixtures("gb")
def test_sentences_of_the_planner_follow_the_unit(text: str, shown: str) -> None:
    assert format.sentence(text) == shown


def test_a_sentence_in_gib_is_left_alone() -> None:
    assert format.sentence("31.7 of 23.6 GiB, 18 MiB") == "31.7 of 23.6 GiB, 18 MiB"


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.0, "±0%"), (0.998, "±0%"), (1.12, "+12%"), (0.97, "-3%"), (1.1, "+10%")]
)
def test_what_is_not_off_has_no_sign(ratio: float, text: str) -> None:
    assert format.off(ratio) == text


@pytest.mark.parametrize(
    ("value", "text"), [(True, "true"), (False, "false"), (2e-4, "0.0002"), (16, "16"), ("none", "none"), (1.0, "1")]
)
def test_settings_as_a_recipe_writes_them(value: object, text: str) -> None:
    assert setting(value) == text
