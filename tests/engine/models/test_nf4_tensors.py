"""NF4 weights laid open: the same tensors on every rank, and the same weights once they are whole again."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402
from torch import nn  # noqa: E402

from finetui.engine.models.nf4_tensors import (  # noqa: E402
    bind,
    laid_open,
    lay_open,
    packed_layers,
    packed_on,
    without_memory,
)
from finetui.engine.models.stand_in import stood_in  # noqa: E402
from finetui.kernels.nf4 import NF4, nf4_state  # noqa: E402
from finetui.planner.errors import ModelError  # noqa: E402

CPU = torch.device("cpu")


def packed(rows: int, columns: int, *, nested: bool = True, kind: str = "nf4") -> nn.Module:
    layer = Linear4bit(columns, rows, bias=True, compress_statistics=nested, quant_type=kind)
    with torch.no_grad():
        layer.weight = Params4bit(
            torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16(), requires_grad=False,
            compress_statistics=nested, quant_type=kind, module=layer,
        )  # fmt: skip
    layer.bias = nn.Parameter(layer.bias.detach().bfloat16(), requires_grad=False)
    return nn.Sequential(layer.to("cpu"), nn.Linear(4, 4))


def tensors(model: nn.Module) -> list[Any]:
    return [(n, t.shape, t.dtype, t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())]


@pytest.mark.parametrize("shape", [(64, 64), (50, 96), (7, 9), (300, 256)])
def test_bytes_and_scales_are_parameters_and_still_the_same_weight(shape: tuple[int, int]) -> None:
    model = packed(*shape)
    weight: Any = model[0].weight
    expected = dequantize_4bit(weight.data, weight.quant_state)
    assert lay_open(model)
    assert laid_open(model) == [model[0]]
    assert {n for n, p in model[0].named_parameters() if p.dtype == torch.uint8} == {"weight", "weight_scales"}
    assert not hasattr(model[0].weight, "quant_state")
    bind(model[0])
    opened: Any = model[0].weight
    assert torch.equal(dequantize_4bit(opened.data, opened.quant_state), expected)
    assert isinstance(nf4_state(opened), NF4)


@pytest.mark.parametrize("shape", [(64, 64), (50, 96), (7, 9), (300, 256)])
def test_a_rank_without_memory_has_tensors_of_the_same_names_and_shapes(shape: tuple[int, int]) -> None:
    first = packed(*shape)
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=torch.bfloat16), nn.Linear(4, 4))
    without_memory(other, packed_layers(first), torch.bfloat16)
    lay_open(first)
    lay_open(other)
    assert tensors(first) == tensors(other)
    assert all(p.is_meta for p in other.parameters())
    assert vars(first[0])["_nf4_form"] == vars(other[0])["_nf4_form"]


@pytest.mark.parametrize(("nested", "kind"), [(False, "nf4"), (True, "fp4")])
def test_weights_packed_otherwise_are_refused(nested: bool, kind: str) -> None:
    with pytest.raises(ModelError, match="not packed as NF4") as caught:
        lay_open(packed(64, 64, nested=nested, kind=kind))
    assert caught.value.where == "0"


def test_a_model_without_packed_layers_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = dict(model.named_parameters())
    assert not lay_open(model)
    assert dict(model.named_parameters()) == before


def test_what_is_not_whole_is_not_bound() -> None:
    model = packed(64, 64)
    lay_open(model)
    model[0].weight = nn.Parameter(model[0].weight[: 64 * 16], requires_grad=False)
    with pytest.raises(AssertionError, match="not whole"):
        bind(model[0])


def test_what_stands_in_is_a_weight_of_the_usual_size_and_leaves_no_trace() -> None:
    model = packed(256, 128)
    lay_open(model)
    before = dict((*model.named_parameters(), *model.named_buffers()))
    with stood_in(model, CPU, torch.bfloat16):
        stand: Any = model[0].weight
        assert stand.dtype == torch.uint8
        drawn = dequantize_4bit(stand.data, stand.quant_state).float()
        assert 0.3 < drawn.std() * 128**0.5 < 3
    assert all(before[name] is t for name, t in (*model.named_parameters(), *model.named_buffers()))
    assert not hasattr(model[0].weight, "quant_state")


def test_weights_are_packed_on_the_device_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    seen: list[str] = []

    def convert(self: Any, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        seen.extend(value.device.type for value in input_dict.values())
        return {name: torch.ones(2) for name in input_dict}

    monkeypatch.setattr(Bnb4bitQuantize, "convert", convert)
    with packed_on(torch.device("meta")):
        made = Bnb4bitQuantize.convert(None, {"a": [torch.ones(2)]})
    assert seen == ["meta"]
    assert made["a"].device == CPU
    assert Bnb4bitQuantize.convert is convert
    with packed_on(CPU):
        assert Bnb4bitQuantize.convert is convert
