"""Two ranks with one model between them, whose layers are functions of ours: run by ``test_sharding.py``.

    python -P split_ranks.py FOLDER MEETING RANK

For each case the gradients of two micro-batches, one from each rank, have to be those of the whole model. Prints how
far they are apart as JSON, on rank 0.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from finetui.engine.models.adapt import adapt, decoder_layers
from finetui.engine.models.landing import Landing
from finetui.engine.models.load import Numerics
from finetui.engine.models.nf4_tensors import lay_open
from finetui.engine.models.sharding import Split, gathered, load_whole, lowered_to, split, twin_of
from finetui.engine.models.stand_in import stood_in
from finetui.engine.trainers.head import Wanted, give_token_loss
from finetui.kernels.decoder_layer import Keeping, Policy
from finetui.kernels.patch import fallbacks, patch_model
from finetui.planner.plan import Resolved

CPU = torch.device("cpu")
RESOLVED = Resolved(
    method="sft", tuning="lora", rank=3, alpha=6.0, dropout=0.0, targets="all-linear", quantization="none",
    sequence_length=16, micro_batch=2, accumulation=1, packing=False, train_on="all", epochs=1.0, steps=1,
    warmup_steps=0, optimizer="adamw", learning_rate=1e-3, schedule="linear", weight_decay=0.0, max_grad_norm=1.0,
    precision="fp32", checkpointing="none", attention="sdpa", kernels="on", strategy="fsdp", device="cpu",
    gpus=[0, 1], checkpoint_every=1, eval_every=1, seed=0,
)  # fmt: skip


CASES: list[tuple[str, Any, Policy]] = [
    ("lora", "fp32", "inputs"),
    ("qlora", "fp32", "inputs+attention"),
    ("qlora", "bf16-mixed", "inputs"),
    ("full", "fp32", "inputs+attention"),
    ("full", "bf16-mixed", "all-but-elementwise"),
]


def batch(number: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 320, (1, 8), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids.clone()}


def backward(model: Any, resolved: Resolved, number: int) -> float:
    wanted = Wanted(torch.tensor(7.0), 7)
    with Numerics.of(resolved).context(CPU):
        loss = model(**batch(number), use_cache=False, token_loss=wanted).loss
    loss.backward()
    return float(loss.detach())


def of_the_whole(folder: Path, resolved: Resolved, policy: Any) -> dict[str, torch.Tensor]:
    """The mean of the gradients of both ranks' micro-batches."""
    model = changed(load_whole(folder, resolved, print), resolved)
    if dist.get_rank():
        return {}
    lowered = lowered_to(resolved)
    if lowered is not None:
        model.to(lowered)
    model.train()
    report = patch_model(model, dtype=lowered or torch.float32, keeping=Keeping(policy))
    whole = [item for item in report.items if item.kernel == "decoder_layer" and item.replaced]
    assert len(whole) == 4, [str(item) for item in report.left]
    assert give_token_loss(model, Numerics.of(resolved).context(CPU)) == ""
    for number in (0, 1):
        backward(model, resolved, number)
    return {name: p.grad.float() / 2 for name, p in model.named_parameters() if p.grad is not None}


def changed(model: Any, resolved: Resolved, *, shards: bool = False) -> Any:
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        model = adapt(model, resolved, "base")
    if shards and resolved.quantization == "nf4":
        lay_open(model)
    with torch.no_grad():  # an adapter whose B is zero has no gradient in A
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not parameter.is_meta:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def of_the_shards(folder: Path, resolved: Resolved, policy: Any) -> tuple[Split, dict[str, torch.Tensor]]:
    model = changed(load_whole(folder, resolved, print), resolved, shards=True)
    twin = twin_of(model) if dist.get_rank() == 0 else None
    lowered = lowered_to(resolved)
    with stood_in(model, CPU, lowered):
        report = patch_model(model, dtype=lowered or torch.float32, keeping=Keeping(policy))
    whole = [item for item in report.items if item.kernel == "decoder_layer" and item.replaced]
    assert len(whole) == 4, [str(item) for item in report.left]
    made = split(model, resolved, CPU, twin)
    model.train()
    assert give_token_loss(model, Numerics.of(resolved).context(CPU)) == ""
    causal = model.get_base_model() if made.adapters else model
    seen: list[torch.Tensor] = []
    layer = decoder_layers(causal)[0]
    kept = layer.register_forward_pre_hook(lambda module, _inputs: seen.extend(module.parameters()))
    with Numerics.of(resolved).context(CPU):
        out = model(**batch(0), use_cache=False, token_loss=Wanted(torch.tensor(7.0), 7))
    assert seen
    if made.adapters is None:
        held = [p for p in seen if p.untyped_storage().size()]
        assert not held, "a layer's weights are held on to after its forward"
    del out
    kept.remove()
    made.begin_micro_batch()
    backward(model, resolved, dist.get_rank())
    gradients = {}
    for name, rows in made.take_gradients().items():
        whole = gathered(rows, made.parameters[name].shape, Landing(CPU))
        if whole is not None:
            gradients[name] = whole.float()
    assert not fallbacks(model), [str(item) for item in fallbacks(model)]
    return made, gradients


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, each: bool) -> float:
    """How far gradients lie from others, of their own size; ``each``: of the tensor that does worst.

    In 16 bits some have less to tell than their rounding, so that only all together say something.
    """
    differences = torch.stack([(found[name] - g).norm() for name, g in expected.items()])
    sizes = torch.stack([g.norm() for g in expected.values()])
    return float((differences / sizes).max() if each else differences.norm() / sizes.norm())


def main(folder: Path, meeting: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    told: dict[str, float] = {}
    for tuning, precision, policy in CASES:
        quantization: Any = "nf4" if tuning == "qlora" else "none"
        resolved = dataclasses.replace(RESOLVED, tuning=tuning, precision=precision, quantization=quantization)
        expected = of_the_whole(folder, resolved, policy)
        _, found = of_the_shards(folder, resolved, policy)
        if rank == 0:
            assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
            assert all(g.norm() > 0 for g in expected.values()), "what has no gradient tells nothing"
            told[f"{tuning} {precision}"] = apart(found, expected, each=precision == "fp32")
    if rank == 0:
        print(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
