"""The host beside the device: how long Python takes to start a micro-batch's kernels, and what the GPU waits of that.

A launch returns before its kernel has run, so host and device work at the same time and the slower one decides. Two
things do not overlap: a device that has nothing left to do waits until the next forward is under way, which happens
after every micro-batch where the loop looks at each loss; and a backward pass cannot begin before the forward pass has
been started to its end. So a micro-batch whose forward and backward keep the device busy for F and B seconds, and the
host for f and b, takes max(F + B, f + B, f + b), or max(F + B, f + b) where the host runs ahead from one to the next.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .architecture import Architecture
from .hardware import Gpu
from .settings import Settings
from .shares import shares_base
from .stacks import Stack
from .traffic import Launches, launches

#: Seconds from one kernel to the next under PyTorch eager where Python starts it: 25.5 tokens/s of a 7B model on an
#: A100, whose 32 layers of 38 operations each waited for the host
#: (pytorch.org/blog/accelerating-generative-ai-2); and where autograd does, from C++.
LAUNCH_S, _LAUNCH_BACKWARD_S = 32e-6, 12e-6
#: The same of a layer that runs as one function, whose kernels Python starts one by one: 76 ms for the 912 launches of
#: a micro-batch on an H200's host (``tests/bench/packed_runs.py``, rows of 200 tokens).
_LAUNCH_WHOLE_S = 8.3e-5
#: From one eager kernel to the next on that host (``finetui bench``: 17 to 31 µs).
_THERE_S = 2.1e-5
#: The same on a CPU, where each operation also starts and joins its threads.
LAUNCH_CPU_S = 20e-6
#: Seconds of ZeRO-3's own Python around each module of each pass, which fetches and releases its weights: full
#: fine-tuning of a 1.8B model took 260 to 275 ms a micro-batch on an A100 for 256 to 1,024 tokens alike (QwenLM/Qwen).
_HOOK_S = 3.5e-4
#: FSDP2's Python around each layer of each pass, which gathers, frees and puts in place each of its tensors: 8B LoRA
#: and 4B full on two H200 at 2,736 tokens each took 224 and 225 ms beside the optimiser's step and what the loop idles,
#: where the host starts all else in 151 and 110, and the device has work for 161 and 140: over 64 and 72 passes of
#: layers that is 1.1 and 1.6 ms.
_UNIT_S = 1.4e-3
#: The same where a frozen base comes into buffers that stay: one collective and its events.
_BUFFER_S = 1e-4


def launched_s(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu) -> tuple[float, float]:
    """Seconds in which the host starts one micro-batch: its forwards, of a reference and a teacher too; its backward,
    with what is computed again."""
    forward_s, backward_s = _trained_s(architecture, settings, stack, gpu)
    forward_s *= 1.0 + settings.beside.forwards
    if settings.beside.teacher is not None:
        forward_s += settings.beside.teacher.launched_s(gpu)
    return forward_s, backward_s


def loop_s(settings: Settings, stack: Stack, gpu: Gpu) -> float:
    """Seconds of each step in which the device waits for the loop's own Python."""
    if gpu.kind != "cuda":
        return 0.0
    return stack.waits_together_s if agrees(settings, stack) else stack.waits_s


def agrees(settings: Settings, stack: Stack) -> bool:
    """Whether several devices agree after each step on what comes next, so that none runs ahead."""
    return settings.world_size > 1 and stack.waits_together_s > 0


def _trained_s(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu) -> tuple[float, float]:
    counted = launches(architecture, settings, stack)
    if gpu.kind == "cpu":
        return counted.forward * LAUNCH_CPU_S, (counted.again + counted.backward) * LAUNCH_CPU_S
    forward_s = backward_s = 0.0
    if not settings.graphs:  # replayed, they are one
        forward_s, backward_s = _python_s(counted, stack, gpu)
    if settings.sharing.gathers == "live":
        hooks_s = _HOOK_S * (sum(layer.count * (len(layer.linears) + 2) for layer in architecture.layers) + 3)
        forward_s += hooks_s
        backward_s += hooks_s * (1.0 + settings.recomputed(architecture.num_layers))
    if settings.sharing.gathers == "layers" and settings.world_size > 1:
        unit_s = _BUFFER_S if shares_base(settings, stack) else _UNIT_S
        layers_s = unit_s * architecture.num_layers * (gpu.launch_s or _THERE_S) / _THERE_S
        forward_s, backward_s = forward_s + layers_s, backward_s + layers_s
    return forward_s, backward_s


def _python_s(counted: Launches, stack: Stack, gpu: Gpu) -> tuple[float, float]:
    if stack.whole_layers:  # Python starts backward's too
        each = _LAUNCH_WHOLE_S * (gpu.launch_s or _THERE_S) / _THERE_S
        return counted.forward * each, (counted.again + counted.backward) * each
    each = gpu.launch_s or LAUNCH_S
    behind = each * _LAUNCH_BACKWARD_S / LAUNCH_S
    return counted.forward * each, counted.again * each + counted.backward * behind


@lru_cache(maxsize=32)
def uncompiled(stack: Stack) -> Stack:
    """The same framework with its layers run operation by operation."""
    return replace(stack, compiled=False)


def waited_s(device: tuple[float, float], host: tuple[float, float], *, ahead: bool) -> float:
    """Seconds of one micro-batch that the device waits for the host, both given as (forward, backward).

    Args:
        ahead: the host starts the next micro-batch while the device is at work on this one.
    """
    longest = max(sum(device), sum(host))
    if not ahead:
        longest = max(longest, host[0] + device[1])
    return longest - sum(device)
