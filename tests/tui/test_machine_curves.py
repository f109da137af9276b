"""What GPUs and host did, as curves over the steps of a run."""

from __future__ import annotations

import math

import pytest

from finetui.tui.machine_curves import FIGURES, OF_HOST, MachineCurves

HOST = {"cpu_percent": 40.0, "memory_used_gib": 41.5}


def gpu(load: float, **changes: object) -> dict[str, object]:
    return {"sm_percent": load, "power_w": 300.0, "temperature_c": 60.0, "memory_used_gib": 20.0, **changes}


def test_several_gpus_come_to_one_figure_each() -> None:
    machine = MachineCurves()
    machine.read([gpu(100.0), gpu(50.0, temperature_c=84.0, memory_used_gib=70.0)], HOST)
    machine.step(1)
    latest = {name: machine.curves[name].latest for name in machine.names()}
    assert latest == {"GPU load": 75.0, "GPU power": 600.0, "hottest GPU": 84.0, "fullest GPU": 70.0,
                      "host load": 40.0, "host memory": 41.5}  # fmt: skip
    assert list(latest) == list(FIGURES)


def test_a_point_is_the_mean_since_the_step_before() -> None:
    machine = MachineCurves()
    for load in (10.0, 20.0, 60.0):
        machine.read([gpu(load)], HOST)
    machine.step(5)
    machine.step(6)  # nothing was read meanwhile
    machine.read([gpu(90.0)], HOST)
    machine.step(7)
    buckets = machine.curves["GPU load"].buckets
    assert [(bucket.last, bucket.end) for bucket in buckets] == [(5, 30.0), (7, 90.0)]


def test_what_is_not_told_makes_no_curve() -> None:
    machine = MachineCurves()
    machine.read([gpu(80.0, power_w=None, temperature_c=math.nan), {"index": 1}], {})
    machine.step(1)
    assert machine.names() == ["GPU load", "fullest GPU"]
    assert machine.curves["GPU load"].latest == 80.0  # the lost one counts for nothing
    without = MachineCurves()
    without.read([], HOST)
    without.step(1)
    assert without.names() == list(OF_HOST)


@pytest.mark.parametrize(
    ("name", "said"), [("GPU power", "5,108 W"), ("hottest GPU", "5108 °C"), ("host load", "5108 %")]
)
def test_figures_carry_their_units(name: str, said: str) -> None:
    assert FIGURES[name].shown(5108.0) == said
