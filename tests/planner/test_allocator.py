"""What the caching allocator holds in vain where micro-batches differ in length."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import find_gpu
from finetui.planner.hub import find_config
from finetui.planner.memory import VARIED, peak_memory
from finetui.planner.settings import Settings
from finetui.planner.stacks import STACKS

NAME = "meta-llama/Llama-3.1-8B"
ARCHITECTURE = Architecture.from_config(find_config(NAME)[1], NAME)
LORA = Settings(tuning="lora", rank=16, micro_batch=4, sequence_length=2048)


def memory(stack, settings=LORA, **changes):
    return peak_memory(ARCHITECTURE, replace(settings, **changes), stack, find_gpu("A100-80GB"))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_lengths_that_vary_leave_blocks_that_no_later_request_fits(checkpointing):
    stack = STACKS["transformers"]
    same = memory(stack, checkpointing=checkpointing)
    varied = memory(stack, checkpointing=checkpointing, varies=True)
    assert varied.allocated_gib == same.allocated_gib
    assert varied.reserved_gib > same.reserved_gib
    kept = same.terms["activations"] + same.terms["logits"]
    assert varied.reserved_gib - varied.allocated_gib <= VARIED * kept * 1.05
    if checkpointing == "none":  # many blocks of every size serve one another
        assert varied.reserved_gib - varied.allocated_gib < 0.6 * VARIED * kept


def test_segments_that_grow_and_shrink_leave_none():
    stack = replace(STACKS["transformers"], expandable_segments=True)
    assert memory(stack, varies=True).reserved_gib == memory(stack).reserved_gib


def test_more_tokens_never_need_less():
    stack = STACKS["transformers"]
    held = [memory(stack, varies=True, micro_batch=rows).reserved_gib for rows in (1, 2, 3, 4, 6, 8)]
    assert held == sorted(held)
