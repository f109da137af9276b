"""What one decoder layer costs the host: operations, kernel launches and Python's time, forward and backward.

    python -P tests/bench/host_time.py [--rounds 200] [--arms llama-lora …] [--profile ARM] [--json FILE]

A GPU that is handed work faster than Python makes it waits for Python; below some two milliseconds of work a layer, the
host decides over the speed of a step. Needs no GPU: shapes are tiny, and Triton's kernels are compiled for a Hopper
GPU, bound and launched as ever, up to the driver's own call, which does nothing. Products and copies are made on the
CPU. So of the microseconds, differences between two states of the code mean something on a GPU's host, and the sum does
not; the counts are those of a GPU, and a test holds them (``tests/kernels/test_host_time.py``).

``launches``: what a GPU is handed. ``triton``: those of them that are ours. ``copies``: those that move memory and
compute nothing; a product that adds to another tensor than it writes to copies that first. ``views``: operations that
touch no memory. ``calls``: functions that Python calls, its own and those of C; Triton's launch included.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, HIDDEN, HEAD = 32, 64, 16
_COPIES = {"copy_", "clone", "_to_copy", "cat", "_foreach_copy_", "contiguous", "stack"}
_FREE = ("promote_types", "detach", "alias", "lift", "_unsafe_view", "as_strided", "_reshape_alias")


@dataclass
class Counts:
    """Of one forward and backward of a layer. ``kinds``: how often each operation was launched."""

    triton: int = 0
    copies: int = 0
    views: int = 0
    allocations: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Arm:
    """A kind of layer. ``tuning``: lora, full or none of it beside the norms; ``policy``: what it keeps."""

    model: str
    tuning: str = "lora"
    policy: str = "all-but-elementwise"


ARMS = {
    "llama-lora": Arm("Llama"),
    "llama-lora-inputs": Arm("Llama", policy="inputs"),
    "qwen3-lora": Arm("Qwen3"),
    "llama-full": Arm("Llama", tuning="full"),
}


class _Operations(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, counts = kwargs or {}, func._schema.name.removeprefix("aten::"), self.counts
        if name.startswith("empty") or name == "new_empty":
            counts.allocations += 1
        elif func.is_view or name.startswith(_FREE):
            counts.views += 1
        else:
            counts.kinds[name] += 1
            counts.copies += name in _COPIES
            out = kwargs.get("out")
            adds = name == "addmm" and kwargs.get("beta", 1) != 0 and args[0].dim() == 2
            if adds and (out is None or args[0].data_ptr() != out.data_ptr()):
                counts.kinds["addmm's copy"] += 1
                counts.copies += 1
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what is launched; Triton's kernels are not run."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    counts, stock = Counts(), (GridExecutor.__call__, JITFunction.run)

    def interpreted(self: Any, *args: Any, **kwargs: Any) -> None:
        count(self.fn)

    def jitted(self: Any, *args: Any, **kwargs: Any) -> None:
        count(self.fn)

    def count(kernel: Any) -> None:
        counts.triton += 1
        counts.kinds[f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"] += 1

    GridExecutor.__call__, JITFunction.run = interpreted, jitted
    try:
        with _Operations(counts):
            yield counts
    finally:
        GridExecutor.__call__, JITFunction.run = stock


class _Driver:
    """As much of Triton's driver as launches nothing needs: a Hopper GPU whose kernels do nothing."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132}
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_active_torch_device = lambda: torch.device("cpu")
        self.launcher_cls = lambda src, metadata: lambda *values: None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *args: (object(), 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Kernels are compiled and launched as on a GPU, on tensors of the CPU; the launch itself does nothing."""
    from triton.runtime import driver

    from finetui.kernels import launch

    driver.set_active(_Driver())  # type: ignore[arg-type]
    launch.forget()
    yield
    launch.forget()


def driver() -> Any:
    """Triton's driver of this moment."""
    from triton.runtime import driver

    return driver.active


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Our layers run on any device, unproven, and make LoRA's products in the gated unit where they can."""
    from finetui.kernels import faster, layers, selfcheck

    sound = selfcheck.Verdict(True)
    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (layers, "unavailable", lambda _: ""), (faster, "gated_unit", lambda *_: sound),
            (faster, "sum_first", lambda *_: sound),
            (selfcheck, "prove_rope", lambda *_: sound),
        ):  # fmt: skip
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


def layer(arm: Arm) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """A forward pass of one layer as an engine makes it, and what clears its gradients."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from finetui.kernels import layers

    torch.manual_seed(0)
    config = getattr(transformers, f"{arm.model}Config")(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=1, num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD // 2, head_dim=HEAD, vocab_size=32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if arm.tuning == "lora":
        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    module = next(one for _, one in model.train().named_modules() if layers.looks_like_layer(one))
    what = layers.found(module, torch.float32, arm.policy)  # type: ignore[arg-type]
    assert isinstance(what, layers.Found), what
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    tables = (torch.randn(1, TOKENS, HEAD), torch.randn(1, TOKENS, HEAD))
    trained = [x, *(p for p in module.parameters() if p.requires_grad)]

    def forward() -> torch.Tensor:
        out = layers.forward(module, what, (x,), {"position_embeddings": tables, "attention_mask": None})
        assert isinstance(out, torch.Tensor), out
        return out

    def clear() -> None:
        for tensor in trained:
            tensor.grad = None

    return forward, clear


def counts_of(arm: Arm, micro_batches: int = 1) -> Counts:
    """What the last of some micro-batches of a step launches in one layer."""
    from finetui.kernels import launch

    launch.forget()
    forward, clear = layer(arm)
    dy = torch.randn(1, TOKENS, HIDDEN)
    clear()
    for _ in range(micro_batches):
        with counting() as counts, taken():
            forward().backward(dy)
    return counts


def seconds_of(arm: Arm, rounds: int) -> tuple[float, float]:
    """The least time of this thread for one layer's forward, and for its backward.

    Other work on the machine slows caches and cores, never speeds them up.
    """
    forward, clear = layer(arm)
    dy = torch.randn(1, TOKENS, HIDDEN)
    ahead, back = [], []
    for _ in range(rounds):
        began = time.thread_time()
        y = forward()
        between = time.thread_time()
        y.backward(dy)
        ended = time.thread_time()
        clear()
        ahead.append(between - began)
        back.append(ended - between)
    return min(ahead), min(back)


def calls_of(arm: Arm) -> int:
    """How many functions Python calls in one forward and backward, its own and those of C."""
    forward, clear = layer(arm)
    dy = torch.randn(1, TOKENS, HIDDEN)
    for _ in range(3):
        forward().backward(dy)
        clear()
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    forward().backward(dy)
    sys.setprofile(None)
    return calls


def profile(arm: Arm, rounds: int) -> None:
    """Where Python spends its time."""
    forward, clear = layer(arm)
    dy = torch.randn(1, TOKENS, HIDDEN)

    def run() -> None:
        forward().backward(dy)
        clear()

    for _ in range(20):
        run()
    watch = cProfile.Profile()
    watch.enable()
    for _ in range(rounds):
        run()
    watch.disable()
    pstats.Stats(watch).sort_stats("tottime").print_stats(45)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--profile", choices=list(ARMS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.profile:
        with pretended(), taken():
            profile(ARMS[options.profile], options.rounds)
        return 0
    lines = []
    heads = (("launches", 9), ("triton", 8), ("copies", 8), ("views", 7), ("empty", 7), ("calls", 7))
    print(f"{'layer':20}" + "".join(f"{head:>{width}}" for head, width in heads) + f"{'forward':>11}{'backward':>11}")
    for name in options.arms:
        counts, more = counts_of(ARMS[name]), counts_of(ARMS[name], 2)
        with pretended(), taken():
            forward, backward = seconds_of(ARMS[name], options.rounds)
            calls = calls_of(ARMS[name])
        line = {
            "layer": name, "launches": counts.launches, "triton": counts.triton, "copies": counts.copies,
            "views": counts.views, "allocations": counts.allocations, "calls": calls, "kinds": dict(counts.kinds),
            "accumulating": more.launches, "forward_us": forward * 1e6, "backward_us": backward * 1e6,
        }  # fmt: skip
        lines.append(line)
        print(
            f"{name:20}{counts.launches:9}{counts.triton:8}{counts.copies:8}{counts.views:7}{counts.allocations:7}{calls:7}"
            f"{forward * 1e6:8.0f} us{backward * 1e6:8.0f} us"
        )
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
