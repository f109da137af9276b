"""The host beside the device: what overlaps, what does not, and how many kernels there are to start."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import find_gpu
from finetui.planner.hub import find_config
from finetui.planner.launching import launched_s, waited_s
from finetui.planner.settings import Settings
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS
from finetui.planner.traffic import launches
from finetui.planner.work import as_run

SECONDS = st.floats(0.0, 10.0)


@cache
def architecture(name: str = "meta-llama/Llama-3.2-1B") -> Architecture:
    return Architecture.from_config(find_config(name)[1], name)


@given(SECONDS, SECONDS, SECONDS, SECONDS, st.booleans())
def test_a_step_takes_as_long_as_the_slower_of_host_and_device_and_never_as_both(f, b, host_f, host_b, ahead):
    took = f + b + waited_s((f, b), (host_f, host_b), ahead=ahead)
    assert took >= max(f + b, host_f + host_b) - 1e-9
    assert took <= f + b + host_f + host_b + 1e-9
    assert waited_s((f, b), (host_f, host_b), ahead=True) <= waited_s((f, b), (host_f, host_b), ahead=False) + 1e-9


def test_a_backward_pass_waits_for_the_forward_to_be_started_where_the_loop_waited_before():
    """The device has 1 + 5 s of work; the host needs 3 s for the forward and is fast in backward."""
    assert waited_s((1.0, 5.0), (3.0, 1.0), ahead=False) == pytest.approx(2.0)
    assert waited_s((1.0, 5.0), (3.0, 1.0), ahead=True) == 0.0


@pytest.mark.parametrize(
    ("tuning", "checkpointing", "rows", "forward", "again", "backward"),
    [
        ("lora", "none", 1, 22, 0, 35),
        ("lora", "full", 1, 22, 12, 35),
        ("full", "none", 1, 14, 0, 23),
        ("full", "full", 1, 14, 9, 23),
        ("lora", "none", 2, 22, 0, 35),
        ("lora", "full", 2, 32, 35, 35),
        ("full", "full", 2, 19, 9, 23),
    ],
)
def test_whole_layers_launch_as_many_kernels_as_were_counted(tuning, checkpointing, rows, forward, again, backward):
    """``tests/bench/host_time.py`` counts them of one layer; where layers compute again, 4,096 rows are a piece."""
    asked = Settings(tuning, 4096, micro_batch=rows, checkpointing=checkpointing)
    settings, stack = as_run(architecture(), asked, STACKS["finetui"], find_gpu("H200"))
    counted = launches(architecture(), settings, stack)
    layers = architecture().num_layers
    assert [n / layers for n in (counted.forward, counted.again, counted.backward)] == pytest.approx(
        [forward, again, backward]
    )


def test_a_replayed_step_starts_nothing_and_a_measured_host_is_believed():
    gpu = find_gpu("H200")
    settings = Settings("lora", 2048, graphs=True)
    assert launched_s(architecture(), settings, STACKS["finetui"], gpu) == (0.0, 0.0)
    slow = type(gpu)(**{**gpu.__dict__, "launch_s": 64e-6})
    usual = sum(launched_s(architecture(), Settings("lora", 2048), STACKS["trl"], gpu))
    assert sum(launched_s(architecture(), Settings("lora", 2048), STACKS["trl"], slow)) == pytest.approx(2 * usual)


def test_an_unknown_host_makes_a_small_models_interval_wide_and_a_large_ones_not():
    gpu, settings = find_gpu("H200"), Settings("lora", 2048, micro_batch=4, checkpointing="none")

    def width(name: str, settings: Settings = settings) -> tuple[float, float]:
        speed = step_speed(architecture(name), settings, STACKS["finetui"], gpu)
        assert speed.low_tokens_per_s < speed.tokens_per_s < speed.high_tokens_per_s
        return 1 - speed.low_tokens_per_s / speed.tokens_per_s, speed.high_tokens_per_s / speed.tokens_per_s - 1

    small, large = width("meta-llama/Llama-3.2-1B"), width("meta-llama/Llama-3.1-8B")
    assert small[0] > 3 * large[0]  # it may be much slower than said, not much faster
    assert small[1] < 0.1
    replayed = width(
        "meta-llama/Llama-3.2-1B", Settings("lora", 2048, micro_batch=4, checkpointing="none", graphs=True)
    )
    assert replayed[0] < 0.1


def test_where_launches_were_not_counted_there_may_be_as_many_as_uncompiled():
    """Unsloth's step of a 1B took 154 ms beside one host and 195 ms beside another."""
    settings = Settings("lora", 2048, micro_batch=4, optimizer="adamw-8bit")
    speed = step_speed(architecture(), settings, STACKS["unsloth"], find_gpu("H200"))
    assert speed.low_tokens_per_s < 8192 / 0.195 < 8192 / 0.154 < speed.high_tokens_per_s
    assert speed.low_tokens_per_s < 0.8 * speed.tokens_per_s
