"""Which modules of a model run in which of finetui's kernels, and which do not and why.

    python -P -m finetui.engine.doctor.kernel_report CONFIG_JSON [--tuning lora|full]

Built from its config alone, with random weights and its first layers, as many as show each kind of layer. On a GPU in
the model's own sizes, so that each kernel is proven there as it is before a run. Without one the sizes are shrunk and
Triton interprets the kernels, which proves the same for the model's structure. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...planner.errors import ModelError, first_line

#: The most layers that are built.
LAYERS = 8
#: What a config's sizes shrink to for the interpreter; heads keep their grouping.
_SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "head_dim": 8, "vocab_size": 64, "vocab_size_per_layer_input": 64, "max_position_embeddings": 64,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "hidden_size_per_layer_input": 8, "n_group": 1, "topk_group": 1, "query_pre_attn_scalar": 8,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print the report; 2 if the model can't be built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        os.environ.setdefault("FINETUI_CACHE", tempfile.mkdtemp(prefix="finetui-"))  # verdicts of toy sizes
    try:
        print(json.dumps(report(json.loads(options.config.read_text(encoding="utf-8")), options.tuning)))
    except ModelError as error:
        print(json.dumps({"error": {"what": error.what, "where": error.where, "do": error.do}}))
        return 2
    return 0


def report(config: dict[str, Any], tuning: str) -> dict[str, Any]:
    """Build a model from a config.json, patch it, and tell what became of each module.

    Raises:
        ModelError: transformers can't build this architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import set_verbosity_error

    from ...kernels.patch import KERNELS, patch_model

    set_verbosity_error()
    cuda = torch.cuda.is_available()
    told = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        built: Any = AutoConfig.for_model(config["model_type"], **told).get_text_config()
        layers, kept = _fewer_layers(built)
        small = built if cuda else _shrunk(built)
        dtype = torch.bfloat16 if cuda else torch.float32
        torch.manual_seed(0)
        with torch.device("cuda" if cuda else "cpu"):
            model: Any = _built(AutoModelForCausalLM, small, dtype)
    except Exception as error:  # whatever a config's own code may raise
        first = first_line(error)
        do = "finetui doctor --model needs an architecture that transformers knows and can build from its config."
        raise ModelError(f"the model can't be built ({type(error).__name__}: {first})", do=do) from error
    if tuning == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16 if cuda else 4, target_modules="all-linear"))
    wanted = [kernel for kernel in KERNELS if tuning == "lora" or kernel != "lora"]
    patched = patch_model(model, only=wanted, dtype=dtype)
    return {
        "architecture": type(model.get_base_model() if tuning == "lora" else model).__name__,
        "tuning": tuning,
        "device": torch.cuda.get_device_name() if cuda else "Triton's interpreter, on small sizes",
        "layers": layers,
        "built": kept,
        "summary": patched.summary(),
        "modules": [asdict(item) for item in patched.items],
    }


def _built(kind: Any, config: Any, dtype: Any) -> Any:
    try:
        return kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        if "attention" not in str(error):
            raise
        return kind.from_config(config, dtype=dtype, attn_implementation="eager")


def _fewer_layers(config: Any) -> tuple[int, int]:
    """Keep the first layers of a config, as many as show each kind; how many there were and are."""
    layers = int(config.num_hidden_layers)
    kinds = list(getattr(config, "layer_types", None) or ["layer"] * layers)
    first_sparse = int(getattr(config, "first_k_dense_replace", 0) or 0)
    kept = min(layers, LAYERS, max(2, first_sparse + 1, *(kinds.index(kind) + 1 for kind in set(kinds))))
    config.num_hidden_layers = kept
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:kept])
    return layers, kept


def _shrunk(config: Any) -> Any:
    """A config of the same structure in small sizes."""
    small = copy.deepcopy(config)
    for name, size in _SMALL.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, size)
    heads = int(small.num_attention_heads)
    groups = heads // max(1, int(getattr(small, "num_key_value_heads", None) or heads))
    small.num_attention_heads = 4
    if getattr(small, "num_key_value_heads", None):
        small.num_key_value_heads = 4 if groups == 1 else 1 if heads == groups else 2
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, 1)
    return small


if __name__ == "__main__":
    sys.exit(main())
