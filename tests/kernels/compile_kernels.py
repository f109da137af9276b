"""Compile every kernel for GPUs that are not here; run by test_compile.py in a process of its own.

The interpreter accepts what the compiler refuses. Triton needs a GPU to launch, not to compile: in place of a launch,
each kernel is compiled, with the types and sizes of the launch, for Ampere, Ada and Hopper. Prints one JSON line per
kernel and target: name, target, whether its global accesses are 16 bytes wide, whether it spills registers, and how
many bytes of shared memory it takes.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = (80, 89, 90)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
BF16 = torch.bfloat16
seen: set[str] = set()


def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    del grid, warmup
    values = dict(zip(self.arg_names, args, strict=False)) | {n: options.pop(n) for n in self.arg_names if n in options}
    constant = {p.name for p in self.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(self.arg_names):
        value = values[name]
        if name in constant or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    key = f"{self.fn.__module__}.{self.fn.__name__} {signature} {constants} {options}"
    if key in seen:
        return
    seen.add(key)
    for target in TARGETS:
        if target < 89 and "*fp8e4nv" in signature.values():  # Ampere has no such type, and is never asked
            continue
        source = ASTSource(self, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
        name = f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}"
        spills = bool(re.search(r"\.local\b", ptx))
        line = {"kernel": name, "target": target, "wide": "v4.b32" in ptx, "spills": spills, "shared": shared}
        print(json.dumps(line), flush=True)


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def main() -> None:
    from finetui.kernels import (
        adamw,
        fp8,
        glu,
        linear_cross_entropy,
        lora_add,
        lora_glu,
        nf4,
        residual,
        rms_norm,
        rope,
    )

    for form in rms_norm.FORMS:
        how = residual.Join(residual.Norm(torch.empty(4096, dtype=BF16), 1e-6, form))
        for x in (torch.empty(8, 4096), torch.empty(8, 4096, dtype=BF16)):
            residual.join_again(x, torch.empty(8, 4096, dtype=BF16), how)
        rms_norm.rms_norm(empty(8, 4096), empty(4096), 1e-5, form).backward(torch.empty(8, 4096, dtype=BF16))
    rms_norm.rms_norm(empty(64, 128), empty(128).detach(), 1e-5).backward(torch.empty(64, 128, dtype=BF16))
    torch.autograd.backward(
        rms_norm.add_rms_norm(empty(8, 4096), empty(8, 4096), empty(4096), 1e-5), [torch.empty(8, 4096, dtype=BF16)] * 2
    )
    for columns in (128, 5120, 16384):  # tiles on the way take shared memory
        x, dy = torch.empty(64, columns), torch.empty(64, columns)
        for t in (torch.float32, BF16):
            for more in (None, dy.to(t)):
                weight, rstd = torch.empty(columns, dtype=t), torch.empty(64)
                rms_norm.backward(dy.to(t), more, x.to(t), weight, rstd, "cast-first", weight_grad=True)
    for activation in glu.ACTIVATIONS:
        glu.glu(empty(8, 14336), empty(8, 14336), activation).backward(torch.empty(8, 14336, dtype=BF16))
    g, u, d = (torch.empty(128, 14336, dtype=BF16) for _ in range(3))
    glu.backward(d, g, u, "silu", dgate=g, dup=u, h=d)
    for rank, dtype in itertools.product((16, 32, 64), (BF16, torch.float32)):
        g, u, d = (torch.empty(128, 14336, dtype=dtype) for _ in range(3))
        xa, b = torch.empty(128, 2 * rank, dtype=dtype).split(rank, dim=1), [torch.empty(14336, rank, dtype=dtype)] * 2
        # With masks, and without.
        for rows in (slice(0, 8), slice(None)) if dtype == BF16 and rank != 32 else (slice(None),):
            lora_glu.forward(g[rows], u[rows], (xa[0][rows], xa[1][rows]), (b[0], b[1]), (2.0, 2.0), "silu")
            dha = torch.empty(128, rank, dtype=dtype)[rows]
            small = (xa[0][rows], xa[1][rows])
            lora_glu.backward(d[rows], g[rows], u[rows], small, (b[0], b[1]), (2.0, 2.0), "silu", dha)
    for layout in rope.LAYOUTS:
        for rotary in (64, 128):
            table = torch.empty(1, 8, rotary, dtype=BF16)
            out = rope.rope(empty(2, 32, 8, 128), empty(2, 1, 8, 128), table, table, layout)
            torch.autograd.backward(out, [torch.empty_like(t) for t in out])
    hidden, weight, labels = empty(8, 512), empty(4096, 512), torch.zeros(8, dtype=torch.int64)
    linear_cross_entropy.linear_cross_entropy(hidden, weight, labels)
    linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, softcap=30.0, z_loss=0.1)
    linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, weighting="dft")
    linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, weighting="eaft")
    linear_cross_entropy.linear_cross_entropy(hidden.half(), weight.half(), labels)
    fp8.multiplies = lambda device: True
    weight = fp8.FP8(torch.empty(4096, 4096, dtype=torch.uint8), torch.empty(4096), BF16)
    fp8.dequantise(weight)
    fp8.transposed(weight.data)
    for columns in (4096, 28672):
        fp8.quantise(torch.empty(8, columns, dtype=BF16))
        fp8.quantise(torch.empty(8, columns, dtype=BF16), torch.empty(columns))
    fp8._WHOLE = 0
    fp8.quantise(torch.empty(8, 28672, dtype=BF16), torch.empty(28672))
    y, xa, b = torch.empty(64, 4096, dtype=BF16), torch.empty(64, 16, dtype=BF16), torch.empty(4096, 16, dtype=BF16)
    for add, bias, share in ((None, None, xa), (y, None, xa), (y, y[0], None)):
        for keep in {True, add is None}:
            lora_add.add_to(y, add, bias, share, b, 2.0, keep=keep)
    adamw.unavailable = lambda device: ""
    for dtype in (BF16, torch.float32):
        for states in adamw.STATES:
            p = torch.empty(16384, dtype=dtype, requires_grad=True)
            p.grad = torch.empty_like(p)
            adamw.AdamW([p], states=states).step()
    scales = torch.empty(1024), torch.empty(1024, dtype=torch.uint8)
    nested = torch.empty(16), torch.empty(256), 256, torch.empty(())
    for absmax, inner in ((scales[0], None), (scales[1], nested)):
        packed = torch.empty(32768, dtype=torch.uint8)
        state = nf4.NF4(packed, absmax, torch.empty(16), 64, (1024, 64), BF16, inner)
        nf4.dequantise(state)
        nf4.dequantise(state, torch.empty(1024, 128, dtype=BF16)[:, :64])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    JITFunction.run = compile_instead
    main()
