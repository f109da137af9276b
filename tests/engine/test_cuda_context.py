"""The driver is asked for a context in the order that it wants, no further than it goes, and never by the caller."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

import pytest

from finetui.engine import cuda_context


class Driver:
    """A driver that notes what it is asked, and fails from one function on."""

    def __init__(self, fails: str = "") -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            plain = [one.value for one in arguments if isinstance(one, ctypes.c_int)] or [
                one for one in arguments if isinstance(one, int)
            ]
            self.asked.append((name, *plain, threading.current_thread().name))
            return 100 if name == self.fails else 0

        return function


def made(monkeypatch: pytest.MonkeyPatch, open_library: Any) -> None:
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    cuda_context.begin(2)
    for thread in threading.enumerate():
        if thread.name == "context":
            thread.join(30)


WHOLE = [("cuInit", 0, "context"), ("cuDeviceGet", 2, "context"), ("cuDevicePrimaryCtxRetain", 0, "context")]


@pytest.mark.parametrize(("fails", "asked"), [("", 3), ("cuInit", 1), ("cuDeviceGet", 2)])
def test_a_context_is_made_as_far_as_the_driver_goes(fails: str, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(fails)
    made(monkeypatch, lambda name: driver if name == "libcuda.so.1" else None)
    assert driver.asked == WHOLE[:asked]
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"


def test_a_machine_without_a_driver_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    made(monkeypatch, missing)


@pytest.mark.cuda
def test_pytorch_takes_the_context_that_is_there() -> None:
    import torch

    cuda_context.begin(0)
    for thread in threading.enumerate():
        if thread.name == "context":
            thread.join(60)
    driver = ctypes.CDLL("libcuda.so.1")
    flags, active = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDevicePrimaryCtxGetState(ctypes.c_int(0), ctypes.byref(flags), ctypes.byref(active)) == 0
    assert active.value == 1
    assert torch.ones(3, device="cuda:0").sum().item() == 3.0
