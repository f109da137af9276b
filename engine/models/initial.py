"""How LoRA pairs begin where they are not random: from the weights, from the data, or from what quantisation lost.

PiSSA and OLoRA take W = W_rest + s B A apart, train A and B and freeze W_rest. What such a run makes would only fit
that W_rest, so it is written as a pair of twice the rank that fits W, the first half trained, the second half taking
back what the first began as (arXiv:2404.02948, appendix)::

    W_rest + s B A  =  W + s (B A - B0 A0)  =  W + s [B, -B0] [A; A0]
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...planner.errors import ModelError, RecipeError
from ...planner.inside import inside
from ...planner.options import CHANGES_BASE
from ...planner.plan import Resolved
from .ground import Ground

if TYPE_CHECKING:
    from .load import Numerics

#: Where a model keeps what PiSSA or OLoRA took out of its weights: module path to (A0, B0).
TAKEN_OUT = "_finetui_taken_out"
#: Power iterations of the randomised SVD: enough for pairs as good as an exact one's at a fraction of its time.
_ITERATIONS = 16
#: Batches that EVA looks at, and how often: each time the directions get nearer to the main ones.
_EVA_BATCHES, _EVA_PASSES = 16, 3
_WEIGHTS = "adapter_model.safetensors"


@torch.no_grad()
def begin(adapted: Any, resolved: Resolved, ground: Ground) -> None:
    """Give the fresh pairs of ``adapted`` the beginning that the plan names.

    Raises:
        ModelError: loftq can't find the weights as they were.
        RecipeError: there is nothing that eva could look at.
    """
    init = resolved.options.init
    if init in CHANGES_BASE:
        before = _read_beginning(ground.resumed) if ground.resumed is not None else {}
        taken: dict[str, tuple[Tensor, Tensor]] = {}
        for path, layer in lora_layers(adapted):
            taken[path] = _take_out(layer, init, before.get(path))
        setattr(adapted, TAKEN_OUT, taken)
    elif init == "loftq" and ground.resumed is None:
        _make_up(adapted, ground.folder)
    elif init == "eva" and ground.resumed is None:
        from .load import Numerics

        _look_at_data(adapted, ground, Numerics.of(resolved))


def lora_layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    """Linear layers with a pair, and their paths."""
    for path, module in adapted.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A and hasattr(module.lora_A["default"], "weight"):
            yield path, module


def _weight(layer: Any) -> Tensor:
    """The frozen weight as [out, in], in fp32."""
    weight = layer.get_base_layer().weight
    return weight.detach().float().T if getattr(layer, "fan_in_fan_out", False) else weight.detach().float()


def _take_out(layer: Any, init: str, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Move a pair's worth out of the frozen weight; ``before`` is the pair to use again when a run is resumed."""
    base = layer.get_base_layer().weight
    if base.is_meta:
        empty = torch.empty(0, device="meta")
        return empty, empty
    pair_a, pair_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale, weight = layer.scaling["default"], _weight(layer)
    if before is not None:
        a, b = (t.to(weight.device, torch.float32) for t in before)
    elif init == "pissa":
        u, s, v = torch.svd_lowrank(weight, q=pair_a.shape[0], niter=_ITERATIONS)
        root = (s / scale).sqrt()
        a, b = root[:, None] * v.T, u * root
    else:  # OLoRA: the first rows and columns of a QR decomposition
        q, r = torch.linalg.qr(weight)
        a, b = r[: pair_a.shape[0]], q[:, : pair_a.shape[0]]
    rest = weight - scale * (b @ a)
    base.copy_(rest.T if getattr(layer, "fan_in_fan_out", False) else rest)
    pair_a.copy_(a)
    pair_b.copy_(b)
    return a.to("cpu", copy=True), b.to("cpu", copy=True)


@contextlib.contextmanager
def as_on_disk(adapted: Any) -> Iterator[dict[str, Tensor] | None]:
    """The state to save, with the adapter's description to go with it for as long; None: as the model has it."""
    taken: dict[str, tuple[Tensor, Tensor]] = getattr(adapted, TAKEN_OUT, {})
    if not taken:
        yield None
        return
    state = dict(adapted.state_dict())
    for path, (a0, b0) in taken.items():
        a, b = f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight"
        state[a] = torch.cat([state[a].cpu(), a0.to(state[a].dtype)])
        state[b] = torch.cat([state[b].cpu(), -b0.to(state[b].dtype)], dim=1)
    config = adapted.peft_config["default"]
    rank, alpha = config.r, config.lora_alpha
    # The scale stays what it is: alpha / r, or alpha / sqrt(r).
    config.r, config.lora_alpha = 2 * rank, alpha * (2**0.5 if config.use_rslora else 2)
    try:
        yield state
    finally:
        config.r, config.lora_alpha = rank, alpha


def as_trained(state: dict[str, Tensor], adapted: Any) -> dict[str, Tensor]:
    """The other way: the trained half of what was written, by PEFT's names."""
    taken = getattr(adapted, TAKEN_OUT, None)
    if not taken:
        return state
    trained = dict(state)
    for path in taken:
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        rank = state[a].shape[0] // 2
        trained[a], trained[b] = state[a][:rank].contiguous(), state[b][:, :rank].contiguous()
    return trained


def _read_beginning(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    from safetensors.torch import load_file

    state = load_file(folder / _WEIGHTS)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, a in state.items():
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            rank = a.shape[0] // 2
            pairs[path] = a[rank:], -state[f"{path}.lora_B.weight"][:, rank:]
    return pairs


# --- LoftQ: what four bits lost


def _make_up(adapted: Any, folder: Path | None) -> None:
    """The best pair for W - Q(W), with the weights that quantisation began from (LoftQ, one step).

    Q stays what bitsandbytes made of the checkpoint, so that the adapter fits any NF4 copy of the same base.
    """
    if folder is None or adapted.device.type == "meta":
        return
    import bitsandbytes as bnb

    whole = _Checkpoint(folder)
    for path, layer in lora_layers(adapted):
        base = layer.get_base_layer().weight
        if getattr(base, "quant_state", None) is None:
            continue
        stored = bnb.functional.dequantize_4bit(base.data, base.quant_state).float()
        lost = whole.tensor(path.removeprefix("base_model.model.") + ".weight").to(stored) - stored
        pair_a, pair_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        u, s, v = torch.svd_lowrank(lost, q=pair_a.shape[0], niter=_ITERATIONS)
        root = (s / layer.scaling["default"]).sqrt()
        pair_a.copy_(root[:, None] * v.T)
        pair_b.copy_(u * root)


class _Checkpoint:
    """Tensors of a checkpoint by name, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        self.files: dict[str, str] = {}
        if index.is_file():
            self.files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for name in set(self.files.values()):
                inside(folder, name, error=ModelError, where=str(index))

    def tensor(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        for candidate in (name, name.removeprefix("model.")):
            path = self.folder / self.files.get(candidate, "model.safetensors")
            try:
                with safe_open(path, framework="pt") as file:
                    found: Tensor = file.get_tensor(candidate)
                    return found
            except (OSError, SafetensorError):
                continue
        do = "loftq needs the weights before quantisation as safetensors. Use another init."
        raise ModelError(f"the checkpoint has no tensor {name}", where=str(self.folder), do=do)


# --- EVA: what flows through


def _look_at_data(adapted: Any, ground: Ground, numerics: Numerics) -> None:
    """A becomes the main directions of each module's inputs (arXiv:2410.07170): subspace iteration on their second
    moment, which never has to be in memory: C Q is the sum of x (x Q) over the tokens of the first batches."""
    layers = dict(lora_layers(adapted))
    if ground.rows is None or any(layer.get_base_layer().weight.is_meta for layer in layers.values()):
        return
    batches = [batch for batch, _ in zip(ground.rows(), range(_EVA_BATCHES), strict=False)]
    if not batches:
        raise RecipeError("eva has no data to look at", where="tuning.init", do="Give training data, or another init.")
    bases: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for path, layer in layers.items():
        rank, width = layer.lora_A["default"].weight.shape
        # More directions than are wanted come nearer to those that are (arXiv:0909.4061, section 4).
        start = torch.randn(width, min(2 * rank + 8, width), generator=generator)
        bases[path] = torch.linalg.qr(start).Q.to(layer.lora_A["default"].weight.device)
    for _ in range(_EVA_PASSES):
        moved = _moments(adapted, layers, bases, batches, numerics)
        bases = {path: torch.linalg.qr(along).Q for path, along in moved.items()}
    moved = _moments(adapted, layers, bases, batches, numerics)
    for path, layer in layers.items():
        strength, turn = torch.linalg.eigh(bases[path].T @ moved[path])
        main = bases[path] @ turn[:, strength.argsort(descending=True)]
        pair_a = layer.lora_A["default"].weight
        pair_a[: main.shape[1]].copy_(main.T[: pair_a.shape[0]])


def _moments(
    adapted: Any, layers: dict[str, Any], bases: dict[str, Tensor], batches: list[dict[str, Tensor]],
    numerics: Numerics,
) -> dict[str, Tensor]:  # fmt: skip
    """C Q of each module over the batches, in fp32."""
    sums = {path: torch.zeros_like(basis) for path, basis in bases.items()}
    mask: list[Tensor] = []

    def listen(path: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])[mask[0]].float()
            with torch.autocast(x.device.type, enabled=False):
                sums[path] += x.T @ (x @ bases[path])

        return hook

    hooks = [layer.register_forward_pre_hook(listen(path)) for path, layer in layers.items()]
    training = adapted.training
    adapted.eval()
    try:
        for batch in batches:
            given = {name: t.to(adapted.device) for name, t in batch.items() if name != "labels"}
            real = batch.get("attention_mask")
            whole = torch.ones_like(batch["input_ids"], dtype=torch.bool)
            mask[:] = [(whole if real is None or real.dim() != 2 else real.bool()).reshape(-1).to(adapted.device)]
            with numerics.context(adapted.device):  # fp32 adapters and a 16-bit base meet there alone
                adapted(**given, use_cache=False)
    finally:
        adapted.train(training)
        for hook in hooks:
            hook.remove()
    return sums
