"""The small layers that show how fast a host starts kernels have as many as they say."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetui.engine.bench import ceilings
from finetui.engine.bench.clock import Time
from finetui.engine.bench.launches import KERNELS, LAYERS, small_layers

#: Operations that start no kernel.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "split", "detach"}


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_each_layer_starts_as_many_kernels_as_the_figure_is_divided_by():
    forward = small_layers(torch.device("cpu"))
    with Counted() as counted:
        out = forward()
    assert sum(name not in VIEWS for name in counted.names) == KERNELS * LAYERS
    assert out.requires_grad, "a training step records what it does"


def test_the_figure_is_the_time_of_one_kernel(monkeypatch):
    seconds = KERNELS * LAYERS * 40e-6
    monkeypatch.setattr(ceilings, "stopwatch", lambda f, *_, **__: (f(), Time(seconds, seconds / 2, 2 * seconds, 5))[1])
    ((field, figure),) = ceilings._launches(torch.device("cpu"))
    assert field == "launch_us"
    assert (figure.value, figure.low, figure.high, figure.unit) == (pytest.approx(40), 20, 80, "µs")
