"""What this machine reaches: matrix products, memory, buses and disk, measured in well under a minute.

On random numbers: a product of zeros ran 13% faster on an H200 than one of random values. Sizes are those of real
layers at training batches, and too large for any cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

from ...planner.ceilings import Ceilings
from ...planner.hardware import Node, cpu_node, this_machine
from ..run import default_root
from .clock import Time, stopwatch
from .launches import KERNELS, LAYERS, small_layers

#: Rows, inputs and outputs of matrix products: attention's output, gate and up in one, and down, of an 8B model; and
#: a small one. On a CPU those of a 0.1B model, which take as long there.
PRODUCTS = ((8192, 4096, 4096), (8192, 4096, 28672), (8192, 14336, 4096), (2048, 4096, 4096))
PRODUCTS_CPU = ((512, 768, 768), (512, 768, 4096))
GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """One line of the table; between ``low`` and ``high`` lies what the slowest and fastest tenth of calls leave."""

    what: str
    value: float
    low: float
    high: float
    unit: str
    nominal: float = 0.0


def measure(tell: Callable[[str], None] = lambda _: None) -> tuple[Ceilings, list[Figure]]:
    """Measure this machine's first GPU of the most common kind, or its CPU.

    Args:
        tell: is told what is being measured.

    Raises:
        HardwareError: the driver is there but does not answer.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML and plans count
    cuda = torch.cuda.is_available()
    node = this_machine() if cuda else cpu_node()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    figures: list[Figure] = []
    found: dict[str, float] = {}
    parts = (
        _products(device, node),
        _memory(device, node),
        *((_launches(device), _bus(device, node), _all_reduce(node)) if cuda else ()),
        _disk(default_root()),
    )
    for part in parts:
        for field, figure in part:
            tell(figure.what)
            figures.append(figure)
            found[field] = max(found.get(field, 0.0), figure.value)
        if cuda:
            torch.cuda.empty_cache()
    known = {key: round(value, 3) for key, value in found.items() if key in Ceilings.__dataclass_fields__}
    driver = driver_version() if cuda else ""
    return Ceilings(node.gpu.name, driver, date.today().isoformat(), **known), figures


Figures = Iterator[tuple[str, Figure]]
"""The field of :class:`Ceilings` that a figure counts for, of which the best is kept; and the figure."""


def _products(device: torch.device, node: Node) -> Figures:
    gpu, cuda = node.gpu, device.type == "cuda"
    for rows, inner, outer in PRODUCTS if cuda else PRODUCTS_CPU:
        flops, shape = 2.0 * rows * inner * outer, f"{rows} x {inner} x {outer}"
        x, w = _random(device, rows, inner), _random(device, outer, inner)
        for dtype, field in ((torch.bfloat16, "bf16_tflops"), (torch.float32, "fp32_tflops")):
            if cuda and dtype == torch.float32 and rows * outer > 2**27:
                continue  # one size tells enough of a format that hardly anybody trains large models in
            took = stopwatch(partial(torch.matmul, x.to(dtype), w.to(dtype).t()), device)
            peak = getattr(gpu, field) if cuda else 0.0
            yield field, _rate(f"product, {str(dtype).removeprefix('torch.')}, {shape}", flops / 1e12, took, peak)
        if cuda and torch.cuda.get_device_capability(device) >= (9, 0):  # scales for each row need Hopper
            took = stopwatch(_scaled_product(x, w), device)
            yield "fp8_tflops", _rate(f"product, fp8 e4m3, {shape}", flops / 1e12, took)


def _scaled_product(x: torch.Tensor, w: torch.Tensor) -> Callable[[], torch.Tensor]:
    def quantised(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = tensor.abs().amax(dim=1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        return (tensor / scale).to(torch.float8_e4m3fn), scale

    (a, a_scale), (b, b_scale) = quantised(x), quantised(w)
    rows, columns = a_scale.contiguous(), b_scale.t().contiguous()
    return lambda: torch._scaled_mm(a, b.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)


def _memory(device: torch.device, node: Node) -> Figures:
    size = GIB if device.type == "cuda" else GIB // 8
    source = _random(device, size // 2).to(torch.bfloat16)
    target = torch.empty_like(source)
    took = stopwatch(lambda: target.copy_(source), device)
    nominal = node.gpu.bandwidth_gb_s if device.type == "cuda" else 0.0
    yield "copy_gb_s", _rate("copy in memory, read plus written", 2 * size / 1e9, took, nominal)


def _launches(device: torch.device) -> Figures:
    took, kernels = stopwatch(small_layers(device), device), KERNELS * LAYERS
    value, low, high = (1e6 * seconds / kernels for seconds in (took.median, took.low, took.high))
    yield "launch_us", Figure("from one kernel to the next, eager", value, low, high, "µs")


def _bus(device: torch.device, node: Node) -> Figures:
    size = GIB // 2
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    for field, what, copy in (
        ("to_device_gb_s", "host to device, pinned", lambda: there.copy_(host, non_blocking=True)),
        ("to_host_gb_s", "device to host, pinned", lambda: host.copy_(there, non_blocking=True)),
    ):
        yield field, _rate(what, size / 1e9, stopwatch(copy, device), node.gpu.pcie_gb_s)


def _all_reduce(node: Node) -> Figures:
    """Over all GPUs that this process sees, in one process: NCCL's bus bandwidth, ``2 (n - 1) / n`` of size over time
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """
    count = torch.cuda.device_count()
    if count < 2:
        return
    size = GIB // 4
    tensors = [torch.zeros(size, dtype=torch.uint8, device=f"cuda:{i}").view(torch.bfloat16) for i in range(count)]

    def reduce() -> None:
        torch.cuda.nccl.all_reduce(tensors)

    took = stopwatch(reduce, torch.device("cuda", 0))
    factor = 2 * (count - 1) / count
    yield "all_reduce_gb_s", _rate(f"all-reduce over {count} GPUs", factor * size / 1e9, took, node.gpu.link_gb_s)


def _disk(folder: Path) -> Figures:
    """Read a file that was just written, after it has been put out of the page cache."""
    size, piece = GIB // 2, 2**24
    while not folder.is_dir():
        folder = folder.parent
    space = os.statvfs(folder)
    if space.f_bavail * space.f_frsize < 4 * size:
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".bench-") as file:
        data = os.urandom(piece)
        for _ in range(size // piece):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())

        def read() -> None:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for begin in range(0, size, piece):
                os.pread(file.fileno(), piece, begin)

        took = stopwatch(read, torch.device("cpu"), budget_s=1.0, least=2)
    yield "disk_gb_s", _rate(f"disk, one reader ({folder})", size / 1e9, took)


def _rate(what: str, amount: float, took: Time, nominal: float = 0.0) -> Figure:
    unit = "TFLOP/s" if what.startswith("product") else "GB/s"
    return Figure(what, amount / took.median, amount / took.high, amount / took.low, unit, nominal)


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    """Normal values in bf16; large ones repeat a smaller draw, for drawing takes longer than measuring on a CPU."""
    count = torch.Size(shape).numel()
    draw = torch.randn(min(count, 2**24), device=device).to(torch.bfloat16)
    return draw.repeat(-(-count // draw.numel()))[:count].view(shape)


def driver_version() -> str:
    """The NVIDIA driver's version, or nothing where NVML does not tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ""
    return version if isinstance(version, str) else version.decode()


def as_json(ceilings: Ceilings, figures: list[Figure]) -> dict[str, object]:
    """What ``finetui bench --json`` prints."""
    return {**asdict(ceilings), "figures": [asdict(_rounded(figure)) for figure in figures]}


def _rounded(figure: Figure) -> Figure:
    return replace(figure, **{key: round(getattr(figure, key), 3) for key in ("value", "low", "high")})
