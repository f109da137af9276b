"""What a run has said, folded: pace, resumes, losses that are not finite, events of a later release."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from finetui.engine.events import Event
from finetui.tui.history import SETTLING_STEPS, History


def step(number: int, time: float, **changes: Any) -> Event:
    data = {"step": number, "steps": 100, "loss": 1.0, "grad_norm": 0.5, "learning_rate": 1e-4, "tokens": number * 10,
            "tokens_per_s": 10.0, "epoch": 0.1, "step_s": 1.0}  # fmt: skip
    return Event(number, time, "step", {**data, **changes})


def test_time_left_leaves_out_the_first_steps() -> None:
    history = History()
    for number in range(1, SETTLING_STEPS + 1):
        history.apply(step(number, 100.0 * number))
    assert math.isnan(history.eta_s())
    for number in range(SETTLING_STEPS + 1, 11):
        history.apply(step(number, 1000.0 + 2.0 * number))
    assert history.eta_s() == pytest.approx(180.0)


def test_time_left_is_this_sessions() -> None:
    history = History()
    history.apply(Event(1, 0.0, "state", {"state": "running", "attempt": 1}))
    for number in range(1, 21):
        history.apply(step(number, 100.0 * number))
    history.apply(Event(30, 5000.0, "state", {"state": "preparing", "attempt": 2}))
    assert math.isnan(history.eta_s())
    for number in range(11, 21):
        history.apply(step(number, 6000.0 + number))
    assert history.eta_s() == pytest.approx(80.0)
    assert history.loss.last_x == 20


def test_a_loss_that_is_not_finite_is_counted_and_keeps_the_mean() -> None:
    history = History()
    for number in range(1, 5):
        history.apply(step(number, number, loss=math.nan if number > 2 else 2.0))
    assert history.not_finite == 2
    assert history.average.latest == 2.0
    assert math.isnan(history.loss.latest)
    assert "nan" in history.log[-1].text


def test_events_of_another_release_do_no_harm() -> None:
    history = History()
    history.apply(Event(1, 1.0, "telepathy", {"x": 1}))
    history.apply(Event(2, 2.0, "step", {}))
    history.apply(Event(3, 3.0, "gpu", {}))
    history.apply(Event(4, 4.0, "memory", {"rank": 0}))
    assert history.last_time == 4.0


def test_the_whole_story(training: Callable[..., list], now: float) -> None:
    import dataclasses

    history = History()
    for seq, (when, payload) in enumerate(training(begin=now, gpus=2), 1):
        history.apply(Event(seq, when, payload.type, dataclasses.asdict(payload)))
    assert (history.step, history.steps, history.state) == (240, 412, "running")
    assert history.best_evaluation() == history.evaluation.latest
    assert history.checkpoint_step == 200
    assert sorted(history.gpus) == [0, 1]
    assert history.eta_s() == pytest.approx(172 * 3.2, rel=0.02)
    assert [answer.step for answer in history.answers.values()] == [0]
    assert {"checkpoint", "eval", "fallback", "state"} <= {entry.kind for entry in history.log}


def test_what_a_gpu_tells_seldom_stays_until_it_tells_it_again() -> None:
    history = History()
    history.apply(Event(1, 1.0, "gpu", {"index": 0, "power_w": 300.0, "pcie_in_gb_s": 1.5}))
    history.apply(Event(2, 2.0, "gpu", {"index": 0, "power_w": 310.0}))
    assert (history.gpus[0]["power_w"], history.gpus[0]["pcie_in_gb_s"]) == (310.0, 1.5)
    history.apply(Event(3, 3.0, "gpu", {"index": 0, "power_w": None}))
    assert history.gpus[0]["power_w"] is None


def test_memory_stays_bounded_however_long_the_run_and_whatever_it_tells() -> None:
    history = History()
    for number in range(1, 3001):
        history.apply(step(number, float(number), loss=math.nan if number % 3 == 0 else 1.0))
        history.apply(Event(number, 1.0, "metrics", {"step": number, "values": {"reward": 0.5}}))
        history.apply(Event(number, 1.0, "sample", {"step": number, "prompt": f"p{number}", "answer": "a"}))
        history.apply(Event(number, 1.0, "warning", {"what": "w"}))
        history.apply(Event(number, 1.0, "checkpoint", {"step": number, "bytes": 1, "seconds": 1.0}))
    assert len(history.answers) <= 64
    assert "p3000" in history.answers
    assert all(len(marks) <= 512 for marks in history.marks.values())
    assert history.marks["checkpoint"][-1].step == 3000
    assert history.marks["checkpoint"][0].step == 1
    assert len(history.metrics["reward"].buckets) <= 512
    assert len(history.loss.buckets) <= 2048


def test_a_step_that_does_not_come_is_told_once_it_is_long() -> None:
    history = History()
    assert history.overdue_s(1e9) == 0.0
    history.apply(Event(1, 0.0, "state", {"state": "running", "attempt": 1}))
    for number in range(1, 21):
        history.apply(step(number, 20.0 * number))
    assert history.overdue_s(400.0 + 99.0) == 0.0  # a step takes 20 s here
    assert history.overdue_s(400.0 + 101.0) == pytest.approx(101.0)
    for number in range(21, 321):
        history.apply(step(number, 380.0 + number))
    assert history.overdue_s(700.0 + 29.0) == 0.0  # and now 1 s
    assert history.overdue_s(700.0 + 31.0) == pytest.approx(31.0)
    history.apply(Event(99, 731.0, "state", {"state": "finished"}))
    assert history.overdue_s(9999.0) == 0.0


def test_a_held_out_loss_that_has_risen_names_the_lowest() -> None:
    history = History()
    for at, loss in ((0, 2.5), (100, 1.4)):
        history.apply(Event(at, at, "eval", {"step": at, "loss": loss}))
        assert history.better_evaluation() is None
    history.apply(Event(200, 200.0, "eval", {"step": 200, "loss": 1.6}))
    assert history.better_evaluation() == (100, 1.4)


def test_readings_of_the_machine_belong_to_the_step_that_ends_after_them() -> None:
    history = History()
    history.apply(Event(1, 1.0, "gpu", {"index": 0, "sm_percent": 90.0}))
    history.apply(Event(2, 1.0, "host", {"cpu_percent": 12.0}))
    history.apply(step(1, 2.0))
    history.apply(step(2, 3.0))
    assert {name: curve.last_x for name, curve in history.machine.curves.items()} == {"GPU load": 1, "host load": 1}
