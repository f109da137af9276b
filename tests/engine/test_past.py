"""The past of a long event file: what a glimpse and the essentials hold, and that their cost does not grow with it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine import past
from finetui.engine.events import EventReader, read_events
from finetui.tests.bench.long_run import LongRun, lines


def written(path: Path, count: int) -> LongRun:
    made, about = lines(count, 2, 1000.0)
    path.write_text("\n".join(made) + "\n", encoding="utf-8")
    return about


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LongRun]:
    """A file several times as long as what is read whole of it."""
    path = tmp_path_factory.mktemp("past") / "events.jsonl"
    about = written(path, 40_000)
    assert path.stat().st_size > 3 * past.SHORT_BYTES
    return path, about


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the lines that are parsed."""
    count, real = [0], past.parse_line

    def parse(raw: bytes) -> Any:
        count[0] += 1
        return real(raw)

    monkeypatch.setattr(past, "parse_line", parse)
    return count


def test_a_short_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    written(path, 3000)
    for look in (past.glimpse, past.essentials):
        seen = look(path)
        assert seen.events == read_events(path)
        assert (seen.exact_from, seen.offset) == (0, path.stat().st_size)


@pytest.mark.parametrize("look", [past.glimpse, past.essentials])
def test_what_is_seen_is_true_in_order_and_whole_at_the_end(
    long: tuple[Path, LongRun], look: Callable[[Path], past.Past]
) -> None:
    path, about = long
    everything, seen = read_events(path), look(path)
    assert seen.offset == path.stat().st_size
    by_seq = {event.seq: event for event in everything}
    assert all(repr(by_seq[event.seq]) == repr(event) for event in seen.events)  # a NaN is not equal to itself
    assert [event.seq for event in seen.events] == sorted({event.seq for event in seen.events})
    assert [event.seq for event in seen.events if event.seq >= seen.exact_from] == [
        event.seq for event in everything if event.seq >= seen.exact_from
    ]
    assert 0 < seen.exact_from < about.events


def test_a_glimpse_has_steps_from_everywhere(long: tuple[Path, LongRun]) -> None:
    path, about = long
    steps = [event.data["step"] for event in past.glimpse(path).events if event.type == "step"]
    for tenth in range(10):
        low, high = about.steps * tenth // 10, about.steps * (tenth + 1) // 10
        assert sum(low < step <= high for step in steps) >= 10, tenth


def test_the_essentials_hold_all_that_is_told_seldom(long: tuple[Path, LongRun]) -> None:
    path, _ = long
    seldom = {"state", "eval", "checkpoint", "warning", "fallback", "failure"}
    wanted = [event for event in read_events(path) if event.type in seldom]
    assert len(wanted) > 40
    assert [event for event in past.essentials(path).events if event.type in seldom] == wanted


def test_words_inside_a_text_are_not_taken_for_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    trap = '{"seq":%d,"time":1.0,"type":"log","rank":0,"line":"' + "x" * 90 + ' \\"type\\":\\"eval\\" "type":"eval"}\n'
    path.write_text("".join(trap % seq for seq in range(1, 20_000)), encoding="utf-8")
    assert past.essentials(path).events == []  # every line is damaged, which only shows when it is parsed


def test_the_cost_does_not_grow_with_the_file(tmp_path: Path, parsed: list[int]) -> None:
    costs = []
    for count in (30_000, 120_000):
        path = tmp_path / f"{count}.jsonl"
        written(path, count)
        parsed[0] = 0
        past.glimpse(path)
        costs.append(parsed[0])
    assert costs[0] < 8000
    assert costs[1] < 1.1 * costs[0]


def test_lines_can_be_skipped_unread_and_reading_can_begin_anywhere(long: tuple[Path, LongRun], tmp_path: Path) -> None:
    path = Path(shutil.copy(long[0], tmp_path))
    everything = read_events(path)
    kept = [event for event in everything if event.type not in ("gpu", "host")]
    reader = EventReader(path)
    found = []
    while batch := reader.read(1000, skip=past.SAMPLED_TYPES):
        found += batch
    assert [event.seq for event in found] == [event.seq for event in kept]
    seen = past.glimpse(path)
    with path.open("ab") as file:
        file.write(b'{"seq":99999999,"time":1.0,"type":"step","step":1,"loss":"nan"}\n')
    (new,) = EventReader(path, after=seen.events[-1].seq, offset=seen.offset).read()
    assert math.isnan(new.data["loss"])
