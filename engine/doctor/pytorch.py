"""The part of the doctor that needs PyTorch, as a process of its own: prints one check a line, as JSON.

python -P -m finetui.engine.doctor.pytorch
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from ...planner.errors import first_line
from ..check import Check
from .checks import GIB, guarded


def main() -> int:
    """Print all checks."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    every: list[tuple[str, Callable[[], list[Check]]]] = [
        ("torch", _torch),
        ("triton", _triton),
        ("bitsandbytes", _bitsandbytes),
        ("nccl", _several),
        ("bench", _measured),
    ]
    for name, check in every:
        for found in guarded(name, check):
            print(json.dumps(dataclasses.asdict(found)), flush=True)
    return 0


def _torch() -> list[Check]:
    import torch

    told = f"torch {torch.__version__}"
    if not torch.cuda.is_available():
        if _driver_answers():
            if torch.version.cuda is None:
                do = "Install a CUDA build, see https://pytorch.org/get-started/locally."
                return [Check("torch", "fail", f"{told} is a build for the CPU alone, and there is a GPU", do)]
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            hidden = f" (CUDA_VISIBLE_DEVICES={given!r})" if given is not None else ""
            do = "Unset CUDA_VISIBLE_DEVICES, or see what nvidia-smi says; after a driver update restart the machine."
            return [Check("torch", "fail", f"{told} sees no GPU, and the driver does{hidden}", do)]
        return [Check("torch", "ok", f"{told}, on the CPU")]
    return [_product(index, told) for index in range(torch.cuda.device_count())]


def _product(index: int, told: str) -> Check:
    """One matrix product, as a model computes it, held against float64."""
    import torch

    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{told} on {torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    architectures = torch.cuda.get_arch_list()
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    dtype = torch.bfloat16 if major >= 8 else torch.float16
    try:
        found = (a.to(device, dtype) @ b.to(device, dtype)).double().cpu()
    except RuntimeError as error:
        do = f"This build has code for {', '.join(architectures)}: install one that supports this GPU."
        return Check("torch", "fail", f"{name} can't compute ({first_line(error)})", do)
    truth = a.to(dtype).double() @ b.to(dtype).double()
    apart = float((found - truth).norm() / truth.norm())
    if not apart < 1e-2:
        do = "The GPU is faulty, or overclocked: look at dmesg for Xid errors."
        return Check("torch", "fail", f"{name} computes wrong products ({apart:.1e} from float64)", do)
    total = torch.cuda.get_device_properties(device).total_memory
    return Check("torch", "ok", f"{name}, {total / GIB:.1f} GiB: a product is right to {apart:.0e}")


def _triton() -> list[Check]:
    """Triton builds its launchers with the C compiler, so that its absence shows at the first kernel."""
    import torch

    if not torch.cuda.is_available():
        return []
    from ...kernels import selfcheck

    os.environ["FINETUI_CACHE"] = os.devnull  # a verdict of another day would prove nothing today
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return [Check("triton", "warn", "finetui's kernels need compute capability 8.0: stock operations are used")]
    verdict = selfcheck.prove_rms_norm(device, torch.bfloat16, torch.bfloat16, 512, 1e-5, "cast-first")
    if not verdict.ok:
        do = "Triton needs a C compiler and Python's headers: apt-get install gcc python3-dev"
        return [Check("triton", "fail", f"a kernel does not run: {verdict.why}", do)]
    return [Check("triton", "ok", f"a kernel compiles, with {verdict.worst:.2f} of stock's error at worst")]


def _bitsandbytes() -> list[Check]:
    import torch

    try:
        import bitsandbytes
    except ImportError as error:
        do = "QLoRA and 8-bit optimisers need it: pip install bitsandbytes"
        return [Check("bitsandbytes", "warn", f"it can't be imported ({error})", do)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    back = bitsandbytes.functional.dequantize_4bit(packed, state)
    apart = float((back - weight).norm() / weight.norm())
    if not 0.02 < apart < 0.2:  # NF4 is about 9% off on normal values
        do = "Reinstall it for this CUDA version: pip install --force-reinstall bitsandbytes"
        return [Check("bitsandbytes", "fail", f"NF4 weights come back {apart:.1e} apart", do)]
    return [Check("bitsandbytes", "ok", f"{bitsandbytes.__version__} packs and unpacks NF4 on {device.type}")]


def _several() -> list[Check]:
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return []
    version = ".".join(map(str, torch.cuda.nccl.version()))
    pairs = list(itertools.permutations(range(count), 2))
    cut = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if cut:
        told = f"NCCL {version}; {len(cut)} of {len(pairs)} pairs of GPUs reach each other through the host alone"
        return [Check("nccl", "warn", told, "Gradients travel slower: usual for consumer cards.")]
    return [Check("nccl", "ok", f"NCCL {version}; all {count} GPUs reach each other's memory")]


def _measured() -> list[Check]:
    from ...planner.ceilings import for_gpu
    from ...planner.hardware import this_machine

    ceilings = for_gpu(this_machine().gpu.name)
    if ceilings is None:
        do = "Measure it, so that plans rest on it: finetui bench"
        return [Check("bench", "ok", "this machine's speed was not measured: plans use the catalog's", do)]
    told = f"{ceilings.bf16_tflops:.4g} TFLOP/s, {ceilings.copy_gb_s:,.0f} GB/s, measured on {ceilings.date}"
    return [Check("bench", "ok", told)]


def _driver_answers() -> bool:
    import pynvml

    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        nvml.nvmlShutdown()
    except nvml.NVMLError:
        return False
    return bool(count)


if __name__ == "__main__":
    sys.exit(main())
