"""The warm-up leaves nothing behind but what is loaded, and what goes wrong in it harms nobody."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine import warmup


def test_there_is_nothing_to_warm_without_a_gpu():
    started = warmup.Warmup(torch.device("cpu"), torch.bfloat16, 64)
    started.wait()
    assert started._threads == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants to fail for lack of a GPU")
def test_what_fails_is_told_and_not_raised(capsys):
    warmup._try(warmup._on_gpu(torch.device("cuda", 0), torch.bfloat16, 64, packed=False))
    assert capsys.readouterr().out.count("warming up: ") == 3  # the device, a product, attention


@pytest.mark.parametrize("head", [8, 64])
def test_attention_is_run_forward_and_backward_without_chance(head):
    state = torch.get_rng_state()
    warmup._attend(torch.device("cpu"), torch.float32, head)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("packed", "dtype", "head", "within"),
    [
        (True, torch.bfloat16, 64, True),
        (False, torch.bfloat16, 64, False),
        (True, torch.float32, 64, False),
        (True, torch.float16, 36, False),
    ],
)
def test_the_attention_that_is_run_is_that_of_the_rows(packed, dtype, head, within, monkeypatch):
    ran = []
    monkeypatch.setattr(warmup, "_attend_within", lambda *_: ran.append(True))
    monkeypatch.setattr(warmup, "_attend", lambda *_: ran.append(False))
    warmup._on_gpu(torch.device("cuda", 0), dtype, head, packed)[-1]()
    assert ran == [within]


def test_triton_has_its_name_afterwards():
    cache = pytest.importorskip("triton.runtime.cache")
    cache.triton_key.cache_clear()
    warmup.name_triton()
    assert cache.triton_key.cache_info().misses == 1
    cache.triton_key()
    assert cache.triton_key.cache_info().hits == 1


WARM = """
import torch
from finetui.engine.warmup import Warmup
device = torch.device("cuda", 0)
state = torch.cuda.get_rng_state(device)
Warmup(device, torch.bfloat16, 128, packed=PACKED).wait()
assert torch.equal(torch.cuda.get_rng_state(device), state)
held = torch.cuda.memory_allocated(device)
torch.mm(torch.ones(8, 8, device=device), torch.ones(8, 8, device=device))
print(torch.cuda.memory_allocated(device) - held)
"""


@pytest.mark.cuda
@pytest.mark.parametrize("packed", [True, False])
def test_chance_and_memory_stay_as_they_were(packed):
    """In a process of its own: who multiplies first has the workspace of cuBLAS, and the next thread takes it over."""
    code = WARM.replace("PACKED", str(packed))
    told = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["0"], "the first product of the step has to find what the warm-up took"
