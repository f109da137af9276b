"""How far LoRA on e4m3 and on NF4 weights lies from LoRA on bf16 ones, for a model that has learned something.

    python -P tests/bench/fp8_closeness.py [--steps 90] [--lora-steps 16] [--seeds 1] [--json FILE] [--small]

Random weights would say little: what a quantiser loses matters by what the weights have learned. So a byte-level Llama
(142 M parameters; ``--small`` for a CPU) first learns Python from the standard library and torch; then LoRA teaches it
the C of torch's headers, from the same batches over three stores of the frozen weights. Told is, against bf16: the
mean loss on held-out text, the mean distance of single tokens' losses, the divergence of the predicted distributions,
and the mean distance of the training losses step by step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

SEQUENCE, HELD_OUT = 512, 0.95
KINDS = ("bf16", "fp8", "nf4")


def text(folders: Sequence[Path], patterns: Sequence[str], limit: int) -> torch.Tensor:
    """The bytes of files, in the order of their names."""
    parts, size = [], 0
    for folder in folders:
        for pattern in patterns:
            for path in sorted(folder.rglob(pattern)):
                if size < limit:
                    parts.append(path.read_bytes())
                    size += len(parts[-1])
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)


def batch(data: torch.Tensor, rows: int, generator: torch.Generator, *, held_out: bool) -> torch.Tensor:
    edge = int(HELD_OUT * data.numel())
    low, high = (edge, data.numel() - SEQUENCE) if held_out else (0, edge - SEQUENCE)
    starts = torch.randint(low, high, (rows,), generator=generator).tolist()
    return torch.stack([data[start : start + SEQUENCE] for start in starts]).long()


def fresh(options: argparse.Namespace, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    if not options.small:
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
                 "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes), dtype=torch.bfloat16)


def pretrain(model: Any, data: torch.Tensor, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(options.steps):
        rate = 1e-3 * min(1.0, step / 50) * (0.52 + 0.5 * math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = batch(data, options.rows, generator, held_out=False).to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"after {options.steps} steps the loss is {loss.item():.3f}", file=sys.stderr)


def stored_as(kind: str, weights: dict[str, torch.Tensor], options: argparse.Namespace, device: torch.device) -> Any:
    from finetui.engine.models.quantize import join_siblings
    from finetui.kernels.fp8 import FP8Linear

    model = fresh(options, device)
    model.load_state_dict(weights)
    for path, module in list(model.model.named_modules()):
        if type(module) is nn.Linear and kind == "fp8":
            model.model.set_submodule(path, FP8Linear.of(module))
        elif type(module) is nn.Linear and kind == "nf4":
            model.model.set_submodule(path, nf4(module, device))
    join_siblings(model)
    return model.requires_grad_(False)


def nf4(module: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                       quant_type="nf4", compress_statistics=True)  # fmt: skip
    data = module.weight.detach().cpu()
    layer.weight = Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(device)


@torch.no_grad()
def distance(model: Any, reference: Any, data: torch.Tensor, rows: int) -> dict[str, float]:
    """Held-out loss of ``model``, and how far it is from ``reference`` token by token."""
    generator, told = torch.Generator().manual_seed(7), {"loss": 0.0, "token_gap": 0.0, "divergence": 0.0}
    for _ in range(6):
        ids = batch(data, rows, generator, held_out=True).to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            mine, theirs = (m(input_ids=ids, use_cache=False).logits[:, :-1].float() for m in (model, reference))
        mine, theirs = mine.log_softmax(-1), theirs.log_softmax(-1)
        losses = [-t.gather(-1, ids[:, 1:, None]) for t in (mine, theirs)]
        told["loss"] += losses[0].mean().item() / 6
        told["token_gap"] += (losses[0] - losses[1]).abs().mean().item() / 6
        told["divergence"] += (theirs.exp() * (theirs - mine)).sum(-1).mean().item() / 6
    return told


def tuned(model: Any, data: torch.Tensor, seed: int, options: argparse.Namespace) -> tuple[Any, list[float]]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, generator = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0), torch.Generator().manual_seed(11)
    losses = []
    for _ in range(options.lora_steps):
        ids = batch(data, options.rows // 2, generator, held_out=False).to(adapted.device)
        with torch.autocast(adapted.device.type, dtype=torch.bfloat16):
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return adapted, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--lora-steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    options.rows = 4 if options.small else 48
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = 200_000 if options.small else 40_000_000
    torch_folder = Path(torch.__file__).parent
    python = text([Path(sysconfig.get_paths()["stdlib"]), torch_folder], ["*.py"], limit).to(device)
    c = text([torch_folder / "include"], ["*.h"], limit).to(device)
    torch.manual_seed(0)
    model = fresh(options, device)
    pretrain(model, python, options)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    report: dict[str, Any] = {"steps": options.steps, "lora_steps": options.lora_steps, "before": {}, "tuned": {}}
    stores = {kind: stored_as(kind, weights, options, device) for kind in KINDS}
    for kind, stored in stores.items():
        report["before"][kind] = distance(stored, stores["bf16"], python, options.rows)
    for seed in range(options.seeds):
        reference, expected = tuned(stored_as("bf16", weights, options, device), c, seed, options)
        for kind in KINDS[1:]:
            adapted, losses = tuned(stored_as(kind, weights, options, device), c, seed, options)
            gap = sum(abs(a - b) for a, b in zip(losses, expected, strict=True)) / len(losses)
            told = {"seed": seed, "step_gap": gap, **distance(adapted, reference, c, options.rows)}
            report["tuned"].setdefault(kind, []).append(told)
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
