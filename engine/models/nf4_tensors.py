"""NF4 weights as plain tensors, which can be sent, split and gathered, and as a layer of bitsandbytes needs them.

bitsandbytes keeps the bytes of a weight as a parameter and all that explains them as attributes. A split knows nothing
of these: their 8-bit scales, 1 byte per 64 weights, would stay whole on every device (1 GiB for 70 billion weights),
and gathered bytes come without them. So the bytes and the 8-bit scales become parameters of their layer, and the rest,
one number per 16,384 weights and two tables, one buffer. Where the bytes lie whole, :func:`bind` gives them the state
that bitsandbytes and the kernels read: it is made of views, and holds for as long as the tensors stay where they are,
with or without memory under them.

Layout of NF4 with quantised scales: Dettmers et al., "QLoRA", arXiv:2305.14314.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...planner.errors import ModelError

#: Where the pieces of the buffer begin: 16 values of NF4, 256 of a scale, the mean of all scales, scales of scales.
#: Each at a multiple of 64 bytes, as kernels like their tensors.
_CODE, _SCALES, _MEAN, _NESTED = 0, 16, 272, 288
_BLOCK, _NESTED_BLOCK = 64, 256
#: Names on a layer.
BYTES, SCALES, TABLES, _FORM = "weight", "weight_scales", "weight_tables", "_nf4_form"


@dataclass(frozen=True)
class Form:
    """Shape and dtype of a weight as it was."""

    shape: tuple[int, int]
    dtype: torch.dtype


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of bitsandbytes, by path."""
    from bitsandbytes.nn import Linear4bit

    return {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}


@contextlib.contextmanager
def packed_on(device: torch.device) -> Iterator[None]:
    """In the block, weights that are read into host memory are packed on ``device`` one by one, and come back.

    The values are those that a model which is loaded onto the device gets, and a GPU packs 70 billion weights in
    seconds, for which 16 CPU cores need minutes.
    """
    if device.type == "cpu":
        yield
        return
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    stock = Bnb4bitQuantize.convert

    def convert(self: Any, input_dict: dict[str, Any], *rest: Any, **more: Any) -> dict[str, Any]:
        read = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        made = stock(self, {name: value.to(device) for name, value in read.items()}, *rest, **more)
        return {name: value.to("cpu") for name, value in made.items()}

    Bnb4bitQuantize.convert = convert  # type: ignore[method-assign]
    try:
        yield
    finally:
        Bnb4bitQuantize.convert = stock  # type: ignore[method-assign]


def without_memory(model: nn.Module, paths: Iterable[str], compute: torch.dtype) -> None:
    """Put layers as bitsandbytes would have packed them in the place of linear ones, all on the meta device."""
    from bitsandbytes.nn import Linear4bit

    for path in paths:
        plain: Any = model.get_submodule(path)
        with torch.device("meta"):
            layer = Linear4bit(
                plain.in_features, plain.out_features, plain.bias is not None, compute, True, "nf4", device="meta"
            )
        # The dtype of what is packed is told by the weight, whose bytes come later.
        layer.weight.data = plain.weight.data
        layer.bias = plain.bias
        layer.support_avx512bf16_for_cpu = False  # as load_base has it
        layer.requires_grad_(False)
        model.set_submodule(path, layer)


def lay_open(model: Any) -> bool:
    """Turn the state of every packed layer into parameters and a buffer; whether there was one.

    Layers of :func:`without_memory` get tensors of the same shapes on the meta device.

    Raises:
        ModelError: a weight is packed in another way than ``quantize`` packs.
    """
    layers = packed_layers(model)
    for path, layer in layers.items():
        weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
        if state is None and not weight.is_meta:
            raise ModelError("its weight was not packed", where=path, do="Use hardware.strategy: ddp.")
        if state is not None and not _usual(weight, state):
            do = "Use hardware.strategy: ddp."
            raise ModelError("its weight is not packed as NF4 with quantised scales", where=path, do=do)
        shape = (int(layer.out_features), int(layer.in_features))
        setattr(layer, _FORM, Form(shape, weight.dtype if state is None else state.dtype))
        data, scales, tables = _hollow(shape) if state is None else _tensors(weight, state)
        layer.weight = nn.Parameter(data, requires_grad=False)
        layer.register_parameter(SCALES, nn.Parameter(scales, requires_grad=False))
        layer.register_buffer(TABLES, tables, persistent=False)
        layer.quant_state = None
    if layers:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.is_loaded_in_4bit = False  # or TRL would cast adapters, of which only shards are there by then
    return bool(layers)


def bind(layer: nn.Module) -> None:
    """Give the bytes of a layer laid open, whole as they are now, the state that goes with them."""
    from bitsandbytes.functional import QuantState

    form, tables = getattr(layer, _FORM), layer._buffers[TABLES]
    weight, scales = layer._parameters[BYTES], layer._parameters[SCALES]
    assert tables is not None
    assert weight is not None
    assert scales is not None
    assert weight.numel() == -(-math.prod(form.shape) // 2), "the weight is not whole"
    nested = QuantState(
        absmax=tables[_NESTED:], code=tables[_SCALES:_MEAN], blocksize=_NESTED_BLOCK, dtype=torch.float32
    )
    state = QuantState(
        absmax=scales.detach(), shape=torch.Size(form.shape), code=tables[_CODE:_SCALES], blocksize=_BLOCK,
        quant_type="nf4", dtype=form.dtype, offset=tables[_MEAN], state2=nested,
    )  # fmt: skip
    weight.quant_state = state  # type: ignore[attr-defined]


def laid_open(module: nn.Module) -> list[nn.Module]:
    """The layers inside that :func:`lay_open` changed."""
    return [part for part in module.modules() if hasattr(part, _FORM)]


def stand_in_tables(layer: nn.Module, device: torch.device) -> Tensor:
    """A buffer for random bytes and scales, by which they are weights of about the usual size."""
    from bitsandbytes.functional import get_4bit_type

    shape = getattr(layer, _FORM).shape
    tables = torch.zeros(_NESTED + _nested_blocks(math.prod(shape)))
    # bitsandbytes' own products know the values of NF4 by themselves.
    tables[_CODE:_SCALES], tables[_SCALES:_MEAN] = get_4bit_type("nf4", "cpu"), torch.linspace(-1, 1, 256)
    tables[_MEAN], tables[_NESTED:] = 2 * shape[1] ** -0.5, shape[1] ** -0.5
    return tables.to(device)


def _usual(weight: Any, state: Any) -> bool:
    if weight.dtype is not torch.uint8 or state.quant_type != "nf4" or not state.nested:
        return False
    return int(state.blocksize) == _BLOCK and int(state.state2.blocksize) == _NESTED_BLOCK


def _tensors(weight: Any, state: Any) -> tuple[Tensor, Tensor, Tensor]:
    tables = torch.zeros(_NESTED + state.state2.absmax.numel(), device=weight.device)
    tables[_CODE:_SCALES], tables[_SCALES:_MEAN] = state.code, state.state2.code
    tables[_MEAN], tables[_NESTED:] = state.offset, state.state2.absmax
    return weight.data, state.absmax.data, tables


def _hollow(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    count = math.prod(shape)
    data = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta")
    scales = torch.empty(-(-count // _BLOCK), dtype=torch.uint8, device="meta")
    return data, scales, torch.empty(_NESTED + _nested_blocks(count), device="meta")


def _nested_blocks(count: int) -> int:
    return math.ceil(math.ceil(count / _BLOCK) / _NESTED_BLOCK)
