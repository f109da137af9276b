"""The model of a plan as shapes: transformers' own class, quantised, adapted and patched as the engine would, with no
weight anywhere.

The class is built on the meta device from the config alone and its parameters are then made anew as fake tensors,
which are what a :class:`~.ledger.Ledger` counts. What the kernels recognise by running modules is recognised on a
small model of the same class and settings with real numbers (:func:`twin`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...planner.errors import ModelError, first_line
from ..models.load import Numerics, nf4_config
from .ledger import Ledger
from .pretend import swapped

#: Sizes of a twin: the least that attention, rotary embedding and a gated MLP can have.
_TWIN = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 1, "vocab_size": 128,
}  # fmt: skip

_PLAINLY = "Plan without --exact, which reads it by its shapes."
#: What a model's class may raise on a config that does not fit it.
_REFUSALS = (
    ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError, RuntimeError, ArithmeticError,
)  # fmt: skip


def text_config(config: Mapping[str, Any], name: str, attention: str = "sdpa") -> Any:
    """The config of the language model in a config.json, as transformers' class.

    Raises:
        ModelError: transformers does not know its ``model_type``, can't read it, or it holds no language model. Code
            that a checkpoint brings along is never run.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(config.get("model_type", ""))
    where = f"{name}: config.json"
    if kind not in CONFIG_MAPPING:
        import transformers

        what = f"transformers {transformers.__version__} has no model_type {kind!r}"
        own = " Code that a checkpoint brings along is not run here." if config.get("auto_map") else ""
        do = f"Use a newer transformers, or plan without --exact, which reads it by its shapes.{own}"
        raise ModelError(what, where=where, do=do)
    try:
        read = AutoConfig.for_model(**{"model_type": kind, **config})
        text = read.get_text_config()
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"transformers can't read it ({first_line(error)})", where=where, do=_PLAINLY) from error
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = f"transformers has no causal language model for {text.model_type}"
        raise ModelError(what, where=where, do="Give a decoder-only language model.")
    text.use_cache = False
    text.quantization_config = None
    text._attn_implementation = attention
    return text


def on_meta(config: Any, dtype: torch.dtype, name: str) -> Any:
    """transformers' model of a config, without memory.

    Raises:
        ModelError: the class refuses the config.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config._attn_implementation}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            try:
                return AutoModelForCausalLM.from_config(config, **options)
            except ValueError as error:
                if "attention" not in str(error) or options["attn_implementation"] == "eager":
                    raise
                return AutoModelForCausalLM.from_config(config, **(options | {"attn_implementation": "eager"}))
    except _REFUSALS as error:
        what = f"the model can't be built ({first_line(error)})"
        raise ModelError(what, where=f"{name}: config.json", do=_PLAINLY) from error


def make_fake(model: Any, ledger: Ledger, *, adapted: bool) -> None:
    """Parameters and buffers as fake tensors of their shapes and dtypes, entered once where they are shared.

    Args:
        adapted: what is trained is an adapter, else it is weights.
    """
    known: dict[int, nn.Parameter] = {}
    with ledger.during("setup", "weights"):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in known:
                        made = known[id(parameter)] = _fake_parameter(module, parameter)
                        ledger.enter(made.data, "adapter" if adapted and made.requires_grad else "weights")
                    module._parameters[name] = known[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _fake_parameter(module: Any, parameter: nn.Parameter) -> nn.Parameter:
    if type(parameter).__name__ == "Params4bit" and parameter is module._parameters.get("weight"):
        return _packed(module, parameter)
    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def quantise(model: Any, kind: str, numerics: Numerics) -> None:
    """Turn the linear layers of a model on meta into those of ``nf4`` or ``fp8``: all that the quantiser would take."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(model) + list(model._keep_in_fp32_modules or ())
    if kind == "nf4":
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        replace_with_bnb_linear(model, kept, nf4_config(numerics))
        model.is_loaded_in_4bit = True
        return
    from ...kernels.fp8 import FP8Linear

    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(path == name or path.startswith(f"{name}.") for name in kept):
            sizes = (module.in_features, module.out_features, module.bias is not None)
            model.set_submodule(path, FP8Linear(*sizes, module.weight.dtype, "meta"))


def _packed(module: Any, parameter: Any) -> Any:
    """A 4-bit parameter as bitsandbytes stores it: packed weights, 8-bit scales per 64, fp32 scales per 256 of them."""
    from bitsandbytes.functional import QuantState

    shape = torch.Size((module.out_features, module.in_features))
    blocks = -(-math.prod(shape) // 64)
    inner = QuantState(torch.empty(-(-blocks // 256)), blocksize=256, code=torch.empty(256), dtype=torch.float32)
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8), shape=shape, code=torch.empty(16), blocksize=64, quant_type="nf4",
        dtype=module.compute_dtype, offset=torch.empty(()), state2=inner,
    )  # fmt: skip
    packed = torch.empty(-(-math.prod(shape) // 2), 1, dtype=torch.uint8)
    made: Any = nn.Parameter(packed, requires_grad=False)
    made.quant_state, made.quant_type, made.blocksize, made.bnb_quantized = state, "nf4", 64, True
    module.quant_state = state
    return made


def twin(config: Any) -> Any:
    """A small model of the same class and settings with real, random weights; None where it can't be so small."""
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    small.update({key: value for key, value in _TWIN.items() if getattr(small, key, None) is not None})
    small.update(dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")))
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    except _REFUSALS:
        return None


@contextlib.contextmanager
def recognised(twin: Any, dtype: torch.dtype) -> Iterator[None]:
    """Kernels take a module for what its like in the twin was recognised as, and hold themselves proven.

    Triton must be there; what the proofs on a real GPU would refuse is not known here.
    """
    from ...kernels import adapters, attention, launch, layerproof, nf4, offload, recognise, rotary, selfcheck

    norms = {type(m): recognise.norm(m) for m in twin.modules() if recognise.looks_like_norm(m)}
    mlps = {type(m): recognise.gated_mlp(m, dtype) for m in twin.modules() if recognise.looks_like_gated_mlp(m)}
    turns = {type(m).forward: rotary.layout(type(m).forward) for m in twin.modules() if rotary.looks_rotary(m)}
    sound = selfcheck.Verdict(True)
    unknown = "there is none like it in the small model"
    with contextlib.ExitStack() as stack:

        def patch(module: Any, name: str, to: Any) -> None:
            stack.enter_context(swapped(module, name, to))

        patch(recognise, "norm", lambda m: norms.get(type(m), unknown))
        patch(recognise, "gated_mlp", lambda m, _: mlps.get(type(m), unknown))
        patch(nf4, "_scratch", {})
        patch(rotary, "layout", lambda forward: turns.get(forward, unknown))
        patch(launch, "INTERPRETED", True)  # so they run on any device
        patch(offload, "_lane", functools.cache(offload._Lane))
        patch(attention, "_address", _place)
        patch(adapters, "disagreement", lambda *_: "")
        patch(layerproof, "prove", lambda *_, **__: sound)
        for name in [*vars(selfcheck)]:
            if name.startswith("prove_"):
                patch(selfcheck, name, lambda *_, **__: sound)
        yield


def _place(tensor: torch.Tensor) -> Any:
    """Where a tensor lies: fake ones have no address."""
    return id(tensor.untyped_storage()), tensor.storage_offset()
