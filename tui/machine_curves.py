"""MachineCurves: what GPUs and host did while a run was at work, as curves over its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import format  # noqa: A004
from .series import Series

#: Buckets of each curve: they are drawn small.
_BUCKETS = 512
_NUMBER = (int, float)


@dataclass(frozen=True)
class Figure:
    """One curve: the field of an event it is made of, what several GPUs come to, and how a value is written."""

    key: str
    together: Callable[[list[float]], float]
    shown: Callable[[float], str]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


#: The curves, by the name that is shown. Of several GPUs the load is the mean, power the sum, and heat and memory those
#: of the one that has most.
OF_GPUS = {
    "GPU load": Figure("sm_percent", _mean, lambda value: f"{value:.0f} %"),
    "GPU power": Figure("power_w", sum, lambda value: f"{value:,.0f} W"),
    "hottest GPU": Figure("temperature_c", max, lambda value: f"{value:.0f} °C"),
    "fullest GPU": Figure("memory_used_gib", max, format.gib),
}
OF_HOST = {
    "host load": Figure("cpu_percent", max, lambda value: f"{value:.0f} %"),
    "host memory": Figure("memory_used_gib", max, format.gib),
}
FIGURES = {**OF_GPUS, **OF_HOST}


@dataclass
class MachineCurves:
    """A point per step: the mean of what was read since the step before."""

    curves: dict[str, Series] = field(default_factory=dict)
    _read: dict[str, list[float]] = field(default_factory=dict)

    def read(self, gpus: Iterable[Mapping[str, Any]], host: Mapping[str, Any]) -> None:
        """Take in one reading of the machine; what it does not tell is left out."""
        gpus = list(gpus)
        for name, figure in FIGURES.items():
            readings = gpus if name in OF_GPUS else [host]
            values = [reading.get(figure.key) for reading in readings]
            told = [float(value) for value in values if isinstance(value, _NUMBER)]
            if told and math.isfinite(together := figure.together(told)):
                self._read.setdefault(name, []).append(together)

    def step(self, step: int) -> None:
        """A step has ended: what was read meanwhile belongs to it."""
        for name, values in self._read.items():
            curve = self.curves.get(name)
            if curve is None:
                curve = self.curves[name] = Series(_BUCKETS)
            curve.append(step, _mean(values))
        self._read.clear()

    def names(self) -> list[str]:
        """The curves there are, in their order."""
        return [name for name in FIGURES if name in self.curves]
