"""The reading thread: everything once and in order, patient with a busy screen, gone when told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from finetui.engine.events import EventLog, LogLine, Step, read_events
from finetui.engine.run import Run
from finetui.tests.bench.long_run import LongRun, lines
from finetui.tui.follower import BATCH, Follower, Update
from finetui.tui.history import History


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_everything_once_and_in_order(make_run: Callable[..., Run]) -> None:
    run = make_run("long", [(0.0, LogLine(0, str(n))) for n in range(2 * BATCH + 7)])
    got: list[Update] = []
    follower = Follower(run, got.append, poll_s=0.01)
    follower.start()
    wait_for(lambda: bool(got) and got[-1].caught_up)
    with EventLog(run.events_path) as log:
        log.append(LogLine(0, "last"))
    wait_for(lambda: got[-1].events[-1].data["line"] == "last")
    follower.stop()
    assert [event.seq for update in got for event in update.events] == list(range(1, 2 * BATCH + 9))
    assert max(len(update.events) for update in got) == BATCH


def test_waits_while_the_screen_is_busy_and_ends_when_told(make_run: Callable[..., Run]) -> None:
    busy = threading.Event()
    got: list[Update] = []
    busy.set()
    follower = Follower(make_run("r"), got.append, busy=busy.is_set, poll_s=0.01)
    follower.start()
    time.sleep(0.1)
    assert got == []
    busy.clear()
    wait_for(lambda: bool(got))
    follower.stop()
    wait_for(lambda: not follower._thread.is_alive())


def long_run(make_run: Callable[..., Run]) -> tuple[Run, LongRun]:
    run = make_run("long", [])
    made, about = lines(14_000, 1, 1000.0)
    run.events_path.write_text("\n".join(made) + "\n", encoding="utf-8")
    return run, about


def test_a_long_run_has_a_picture_at_once_and_the_exact_one_in_the_end(make_run: Callable[..., Run]) -> None:
    run, about = long_run(make_run)
    got: list[Update[History]] = []
    follower = Follower(run, got.append, begin=History, poll_s=0.01)
    follower.start()
    wait_for(lambda: any(update.fold for update in got))
    with EventLog(run.events_path) as log:  # while the past is still being read
        log.append(Step(about.steps + 1, 1.0, 0.125, 1e-4, 0.5, 1, 1.0, 1.0))

    def all_there() -> bool:
        folds = [update for update in got if update.fold]
        after = got[got.index(folds[2]) :] if len(folds) == 3 else []
        newest = [event.data["step"] for update in after for event in update.events if event.type == "step"]
        return bool(after) and about.steps + 1 in [getattr(folds[2].fold, "step"), *newest]  # noqa: B009

    wait_for(all_there)
    follower.stop()

    first, second, exact = (update for update in got if update.fold is not None)
    assert first.fold is not None
    assert second.fold is not None
    assert exact.fold is not None
    assert (first.fold.step, first.share) == (about.steps, 0.0)
    assert (first.fold.attempt, second.fold.attempt) == (1, 2)  # what is told seldom came with the second
    whole = History()
    for event in read_events(run.events_path):
        whole.apply(event)
    shown = exact.fold
    for event in [event for update in got[got.index(exact) :] for event in update.events]:
        shown.apply(event)
    assert repr(shown.loss.buckets) == repr(whole.loss.buckets)
    assert shown.average.latest == whole.average.latest
    assert (shown.step, shown.not_finite, shown.marks) == (about.steps + 1, 1, whole.marks)
    assert (shown.best_evaluation(), shown.gpus, shown.peak_gib) == (
        whole.best_evaluation(),
        whole.gpus,
        whole.peak_gib,
    )
    spike = max(bucket.high for bucket in shown.loss.buckets if bucket.count)
    assert spike == 40.0


def test_what_is_new_is_handed_over_while_the_past_is_read(make_run: Callable[..., Run]) -> None:
    run, about = long_run(make_run)
    got: list[Update[History]] = []
    follower = Follower(run, got.append, begin=History, poll_s=0.01)
    past = follower._read_past
    held = threading.Event()
    follower._read_past = lambda one: past(one) if held.is_set() else time.sleep(0.01)  # type: ignore[method-assign]
    follower.start()
    wait_for(lambda: len([update for update in got if update.fold]) == 2)
    with EventLog(run.events_path) as log:
        log.append(Step(about.steps + 1, 1.0, 0.125, 1e-4, 0.5, 1, 1.0, 1.0))
    wait_for(lambda: bool(got[-1].events))
    assert got[-1].events[-1].data["loss"] == 0.125
    assert got[-1].share < 1
    held.set()
    wait_for(lambda: got[-1].share == 1.0)
    follower.stop()
