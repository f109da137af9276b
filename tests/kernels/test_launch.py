"""A launch from memory is the launch that Triton would have made."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from finetui.kernels import launch

MEMORY = torch.zeros(64, dtype=torch.float32)
assert MEMORY.data_ptr() % 64 == 0


class Kernel:
    """Stands in for Triton's: what it is asked to compile, and what is launched."""

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def run(*values, **options):
            self.asked.append((grid, values, options))
            return Compiled(self, len(self.asked))

        return run


class Compiled:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *values: self.kernel.launched.append((self.number, grid, values))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_REMEMBERS", True)
    launch.forget()
    yield Kernel()
    launch.forget()


def test_the_same_launch_again_asks_triton_nothing(kernel):
    other = torch.zeros(64)
    launch.launch(kernel, (3,), (MEMORY,), (5, 0.5), (True, 16), num_warps=4)
    launch.launch(kernel, (7, 2), (other,), (5, 0.5), (True, 16), num_warps=4)
    assert kernel.asked == [((3,), (MEMORY, 5, 0.5, True, 16), {"num_warps": 4})]
    assert kernel.launched == [(1, (7, 2, 1, 1), (other, 5, 0.5, True, 16))]


@pytest.mark.parametrize(
    ("tensors", "numbers", "constants", "options"),
    [
        ((MEMORY.half(), MEMORY), (5, 16), (True, 16), {"num_warps": 4}),
        ((MEMORY, MEMORY.half()), (5, 16), (True, 16), {"num_warps": 4}),
        ((MEMORY, MEMORY), (1, 16), (True, 16), {"num_warps": 4}),
        ((MEMORY, MEMORY), (5, 17), (True, 16), {"num_warps": 4}),
        ((MEMORY, MEMORY), (2**40, 16), (True, 16), {"num_warps": 4}),
        ((MEMORY, MEMORY), (5, 16), (False, 16), {"num_warps": 4}),
        ((MEMORY, MEMORY), (5, 16), (True, 32), {"num_warps": 4}),
        ((MEMORY, MEMORY), (5, 16), (True, 16), {"num_warps": 8}),
        ((MEMORY, MEMORY), (5, 16), (True, 16), {"num_stages": 4}),
        ((MEMORY, MEMORY[1:]), (5, 16), (True, 16), {"num_warps": 4}),
    ],
)
def test_whatever_decides_over_a_kernel_is_asked_for(kernel, tensors, numbers, constants, options):
    launch.launch(kernel, (1,), (MEMORY, MEMORY), (5, 16), (True, 16), num_warps=4)
    launch.launch(kernel, (1,), tensors, numbers, constants, **options)
    assert len(kernel.asked) == 2
    assert kernel.launched == []


def test_tensors_that_do_not_begin_at_16_bytes_are_never_remembered(kernel):
    for _ in range(2):
        launch.launch(kernel, (1,), (MEMORY[1:],), (), (), num_warps=4)
    launch.launch(kernel, (1,), (MEMORY,), (), (), num_warps=4)
    launch.launch(kernel, (1,), (MEMORY[1:],), (), (), num_warps=4)
    assert len(kernel.asked) == 4


def test_memory_does_not_grow_without_end(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 3)
    for number in range(20):
        launch.launch(kernel, (1,), (MEMORY,), (number,), (), num_warps=4)
    assert len(launch._compiled) <= 3


@pytest.mark.slow
def test_layers_launch_from_memory_what_they_launch_without(tmp_path):
    """With Triton's own compiler, by what its launcher is handed: kernel, grid, and all that is no tensor."""
    code = """
import json
import torch
from finetui.kernels import launch
from finetui.kernels.linear_cross_entropy import linear_cross_entropy
from finetui.tests.bench import host_time
from finetui.tests.bench.host_time import HIDDEN, TOKENS
from triton.runtime.jit import JITFunction
assert launch._REMEMBERS

def launcher(src, metadata):
    def launched(*values):
        plain = [v for v in values[9:] if not isinstance(v, torch.Tensor)]
        seen.append([metadata.name, metadata.hash, list(values[:3]), plain])
    return launched

seen, asked, stock = [], 0, JITFunction.run
def run(self, *args, **kwargs):
    global asked
    asked += 1
    return stock(self, *args, **kwargs)
JITFunction.run = run
def head():
    hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(96, 64)
    return lambda: linear_cross_entropy(hidden, weight, torch.arange(8), labelled=8).expand(1, TOKENS, HIDDEN)
def layer(name):
    return lambda: host_time.layer(host_time.ARMS[name])[0]
for make in (layer("llama-lora-inputs"), layer("qwen3-lora"), head):
    with host_time.pretended(), host_time.taken():
        host_time.driver().launcher_cls = launcher
        forward = make()
        found = []
        for remembers in (False, True, True):
            launch._REMEMBERS = remembers
            seen, asked = [], 0
            forward().backward(torch.ones(1, TOKENS, HIDDEN))
            found.append([asked, seen])
    print(json.dumps(found))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    for line, least in zip(result.stdout.splitlines(), (11, 11, 3), strict=True):
        (_, plain), (_, first), (asked, again) = json.loads(line)
        assert plain == first == again
        assert len(plain) >= least
        assert asked == 0
