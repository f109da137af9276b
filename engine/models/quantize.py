"""Weights quantised to e4m3 one by one as they are read, so that the model is never on the device in 16 bits.

transformers offers its readers a place for that: a quantiser that says which parameters it takes and what becomes of
them. Nothing of it stays with the model, which afterwards is one with :class:`~finetui.kernels.fp8.FP8Linear` layers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

_NAME = "finetui-fp8"
#: Layers of these names beside each other have one input, so their weights are laid side by side: one product each way.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@functools.cache
def fp8_config() -> Any:
    """What ``from_pretrained`` takes as ``quantization_config``: all linear layers but the output head in e4m3."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from ...kernels.fp8 import FP8Linear, quantise_weight

    @register_quantization_config(_NAME)
    class Config(QuantizationConfigMixin):
        def __init__(self, **_: Any) -> None:
            method: Any = _NAME
            self.quant_method = method

    class Quantise(ConversionOps):
        def convert(self, input_dict: Any, *_: Any, full_layer_name: str = "", **__: Any) -> Any:
            (value,) = input_dict.values()
            made = quantise_weight(value[0] if isinstance(value, list) else value)
            return {full_layer_name: made.data, f"{full_layer_name}_scale": made.scale}

    @register_quantizer(_NAME)
    class Quantizer(HfQuantizer):
        requires_calibration = False

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            path, _dot, name = param_name.rpartition(".")
            return name == "weight" and isinstance(model.get_submodule(path), FP8Linear)

        def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
            return 1.0 if self.param_needs_quantization(model, param_name) else float(param.element_size())

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
            for path, module in list(model.named_modules()):
                if type(module) is nn.Linear and not any(path == name or path.startswith(f"{name}.") for name in kept):
                    layer = FP8Linear(
                        module.in_features, module.out_features, module.bias is not None, module.weight.dtype, "meta"
                    )
                    # What is read is cast to the format of its place first, and only then quantised.
                    layer.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
                    model.set_submodule(path, layer)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            layers = [module for module in model.modules() if isinstance(module, FP8Linear)]
            assert all(layer.weight.dtype is torch.uint8 for layer in layers), "a weight was not quantised"
            join_siblings(model)
            self.remove_quantization_config(model)

        def get_quantize_ops(self) -> Any:
            return Quantise()

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Config()


def join_siblings(model: nn.Module) -> None:
    """Lay quantised layers that share an input side by side in memory."""
    from ...kernels.fp8 import FP8Linear, join

    for module in model.modules():
        for names in _SIBLINGS:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, FP8Linear) for layer in layers):
                join(layers)


def not_in_8_bits(model: nn.Module, dtype: torch.dtype) -> str:
    """Why products of quantised layers with inputs of ``dtype`` run in 16 or 32 bits after all; empty if they don't."""
    from ...kernels import fp8

    layers = [m for m in model.modules() if isinstance(m, fp8.FP8Linear)]
    left = [layer for layer in layers if not fp8.serves(layer.state, dtype)]
    if not left:
        return "" if layers else "the model has no linear layers"
    device = left[0].weight.device
    if not fp8.multiplies(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{name} does not multiply e4m3"
    if dtype != torch.bfloat16:
        return f"they are made for bf16, and this run computes in {str(dtype).removeprefix('torch.')}"
    if not fp8.proven(device):
        return fp8.prove(device).why
    return f"{len(left)} of {len(layers)} layers have a side that is no multiple of 16"
