"""The event file under several writers, half-written lines, damage and full disks."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import finetui
from finetui.engine.events import (
    EventLog,
    EventReader,
    GpuSample,
    LogLine,
    Metrics,
    State,
    Step,
    parse_line,
    read_events,
)

WRITER = """
import sys
from finetui.engine.events import EventLog, LogLine
with EventLog(sys.argv[1]) as log:
    for number in range(2000):
        log.append(LogLine(int(sys.argv[2]), str(number)))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where events go."""
    return tmp_path / "events.jsonl"


def a_step(loss: float) -> Step:
    return Step(1, 0.0, loss, 1e-4, 1.0, 10, 1.0, 1.0)


def test_two_processes_write_without_gaps_while_a_reader_reads(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(finetui.__file__).parent.parent)}
    writers = [
        subprocess.Popen([sys.executable, "-P", "-c", WRITER, str(path), str(rank)], env=environment) for rank in (0, 1)
    ]
    reader, seen = EventReader(path), []
    while any(writer.poll() is None for writer in writers):
        seen += reader.read(limit=500)
    seen += reader.read()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [event.seq for event in seen] == list(range(1, 4001))
    for rank in (0, 1):
        lines = [event.data["line"] for event in seen if event.data["rank"] == rank]
        assert lines == [str(number) for number in range(2000)]


def test_two_threads_with_a_log_each_write_without_gaps(path: Path) -> None:
    def write(rank: int) -> None:
        with EventLog(path) as log:
            for number in range(200):
                log.append(LogLine(rank, str(number)))

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.seq for event in read_events(path)] == list(range(1, 601))


@pytest.mark.parametrize("tail", [b'{"seq":3,"ti', b"{", b"\0" * 5000, b'{"x":"' + b"y" * 200_000])
def test_a_half_written_tail_is_passed_over_and_cut_off(path: Path, tail: bytes) -> None:
    with EventLog(path) as log:
        log.append(LogLine(0, "one"))
        log.append(LogLine(0, "two"))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    reader = EventReader(path)
    assert [event.data["line"] for event in reader.read()] == ["one", "two"]
    with EventLog(path) as log:
        assert log.append(LogLine(0, "three")).seq == 3
    assert path.read_bytes().startswith(whole + b'{"seq":3,"time"')
    assert [event.data["line"] for event in reader.read()] == ["three"]


def test_a_file_that_holds_nothing_but_half_a_line_starts_anew(path: Path) -> None:
    path.write_bytes(b'{"seq":1')
    with EventLog(path) as log:
        assert log.append(LogLine(0, "x")).seq == 1
    assert len(read_events(path)) == 1


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b'{"seq":"x"}\n', b"[1]\n", b"z" * 100_000 + b"\n"])
def test_numbering_goes_on_from_the_last_good_line(path: Path, damage: bytes) -> None:
    with EventLog(path) as log:
        log.append(LogLine(0, "one"))
    path.write_bytes(path.read_bytes() + damage * 2)
    with EventLog(path) as log:
        assert log.append(LogLine(0, "two")).seq == 2
    assert [event.seq for event in read_events(path)] == [1, 2]


def test_numbers_that_are_not_finite_round_trip_and_every_line_is_json(path: Path) -> None:
    with EventLog(path) as log:
        log.append(a_step(math.nan))
        log.append(Metrics(1, {"reward": -math.inf, "margin": math.inf}))
        log.append(LogLine(0, "nan"))

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    step, metrics, line = read_events(path)
    assert math.isnan(step.data["loss"])
    assert metrics.data["values"] == {"reward": -math.inf, "margin": math.inf}
    assert line.data["line"] == "nan"


def test_text_of_any_kind_stays_one_line(path: Path) -> None:
    texts = ["two\nlines\r\n", "\u2028 \x85 \0", "Grüße 漢字 🙂", "half a pair \ud83d"]
    with EventLog(path) as log:
        for text in texts:
            log.append(LogLine(0, text))
    found = [event.data["line"] for event in read_events(path)]
    assert found == [*texts[:3], "half a pair ?"]


def test_absent_figures_are_null_and_a_cause_is_always_there(path: Path) -> None:
    with EventLog(path) as log:
        log.append(GpuSample(0, "x", None, None, None, None, None, None, []))
        log.append(State("running"))
    gpu, state = read_events(path)
    assert gpu.data["power_w"] is None
    assert state.data["cause"] is None


def test_a_full_disk_leaves_no_half_line(path: Path) -> None:
    """A limit on file size stands for the disk: the kernel writes what fits, then refuses, as on a full disk."""
    before_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventLog(path) as log:
        log.append(LogLine(0, "one"))
        size = path.stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
            with pytest.raises(OSError):
                log.append(LogLine(0, "two"))
            assert path.stat().st_size == size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before_action)
        log.append(LogLine(0, "three"))
    assert [(event.seq, event.data["line"]) for event in read_events(path)] == [(1, "one"), (2, "three")]


def test_a_reader_starts_after_a_number_and_reads_a_replaced_file_again(path: Path) -> None:
    with EventLog(path) as log:
        for number in range(5):
            log.append(LogLine(0, str(number)))
    reader = EventReader(path, after=2)
    assert [event.seq for event in reader.read(limit=1)] == [3]
    assert [event.seq for event in reader.read()] == [4, 5]
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)
    with EventLog(path) as log:
        log.append(LogLine(0, "5"))
    assert [event.seq for event in reader.read()] == [6]


def test_a_file_that_is_not_there_yet_holds_nothing(path: Path) -> None:
    assert read_events(path) == []


@pytest.mark.parametrize("when", ["NaN", "Infinity", "-1", "9223372036854775808", "1e300"])
def test_a_time_that_no_calendar_shows_is_damage(when: str) -> None:
    line = '{"seq": 1, "time": %s, "type": "state", "state": "running", "cause": null, "attempt": 1}'
    assert parse_line(line % when) is None
    assert parse_line(line % "1772366400.0") is not None


@pytest.mark.parametrize("raw", [b"", b"null", b"{}", b'{"seq":1}', b"\xff\xfe", b'{"seq":1,"time":"x","type":"y"}'])
def test_a_damaged_line_is_no_event(raw: bytes) -> None:
    assert parse_line(raw) is None
