"""A model split over the ranks of a run, in one of two ways.

Where all weights are trained, each decoder layer is split by itself and all else as the root (FSDP2, arXiv:2304.11277).
Every rank keeps 1/N of each tensor, by rows. A layer is gathered when its forward begins, freed when that ends, and
gathered once more for its backward, after which its gradients are averaged and split like the weights. The root
(embedding, head, last norm) stays gathered from forward to the end of backward, so a loss that reads the head's weight
by itself finds it whole.

Beside adapters, the frozen layers are split as runs of bytes (:mod:`.base_shards`), and so is an embedding that is not
the head too; each rank has the head whole, and adapters too, which it steps over by rows (:mod:`.adapter_rows`).
Weights in 4 bits are split, and gathered, as they are packed (:mod:`.nf4_tensors`).

Rank 0 alone reads the checkpoint, into host memory; the others build the same model without memory. Layer by layer it
goes to all devices, each of which keeps its share before the next layer comes, so that no device ever holds more than
its shares, one layer and, at the end, the root. What is written is put together the other way round, tensor by tensor
in rank 0's host memory, in a twin of the model that was never split: whoever writes it sees an ordinary model.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ...planner.errors import ModelError, first_line
from ...planner.plan import Resolved
from .adapt import decoder_layers
from .adapter_rows import AdapterRows, rows_of
from .base_shards import BaseShards, LoneTable
from .landing import Landing
from .load import Emit, Numerics, load_base
from .misfit import require_one_format
from .nf4_tensors import bind, laid_open, packed_layers, packed_on, without_memory
from .remote_code import trusted

#: Elements that are sent at a time when a tensor is put together: the memory that rank 0's device needs for it.
PIECE = 2**26
_HOST = torch.device("cpu")
#: Rows of a tensor, a rank and how many there are, to the rows of that rank.
Cut = Callable[[int, int, int], slice]


def splits(resolved: Resolved) -> bool:
    """Whether a plan splits its model over the ranks."""
    return resolved.strategy == "fsdp" and resolved.world_size > 1


# --- before it is split


def load_whole(folder: Path, resolved: Resolved, emit: Emit, device: torch.device = _HOST) -> Any:
    """The base model in host memory on rank 0, and without memory on the others.

    Args:
        device: this rank's, where weights that the plan quantises are packed.

    Raises:
        ModelError: the checkpoint can't be read.
    """
    told: list[Any] = [None, None, None]
    model, nf4 = None, resolved.quantization == "nf4"
    if dist.get_rank() == 0:
        with packed_on(device) if nf4 else contextlib.nullcontext():
            model = load_base(folder, resolved, _HOST, emit)
        packed = list(packed_layers(model)) if nf4 else []
        told = [model.config._attn_implementation, model.generation_config, packed]
    dist.broadcast_object_list(told, src=0)
    return model if model is not None else _without_memory(folder, resolved, *told)


def _without_memory(folder: Path, resolved: Resolved, attention: str, generation: Any, packed: list[str]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trusted(folder)}
    numerics = Numerics.of(resolved)
    try:
        config = AutoConfig.from_pretrained(str(folder), **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=numerics.weights, attn_implementation=attention, **options
            )
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        what, do = f"the model can't be built ({first_line(error)})", "Check config.json, or use a newer transformers."
        raise ModelError(what, where=str(folder), do=do) from error
    if packed:
        without_memory(model, packed, numerics.autocast or numerics.weights)
        model.is_loaded_in_4bit = True
    model.eval()  # as from_pretrained gives it
    model.config.use_cache = False
    model.generation_config = generation  # all ranks answer alike, and call the model equally often
    return model


def twin_of(model: Any) -> Any:
    """The same modules over parameters without memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


# --- how it is split


@dataclass
class Split:
    """A model in shards.

    Args:
        model: of all weights, each of its layers, and itself, is an ``FSDPModule``.
        twin: the model as it was before, without memory; on rank 0 alone.
        parameters: by name; this rank's shards, DTensors whose rows are split, or adapters, which are whole.
        adapters: where they alone are trained.
        base: all that is frozen, then.
    """

    model: Any
    twin: Any
    parameters: dict[str, nn.Parameter]
    adapters: AdapterRows | None = None
    base: tuple[BaseShards | LoneTable, ...] = ()

    def rows(self) -> dict[str, Tensor]:
        """This rank's rows of all that is trained, by name: an optimiser steps over their memory."""
        if self.adapters is not None:
            return self.adapters.rows
        return {name: local(p) for name, p in self.parameters.items() if p.requires_grad}

    def take_gradients(self) -> dict[str, Tensor]:
        """Those of a step, of this rank's rows, averaged over the ranks; no name twice, and every rank at once."""
        if self.adapters is not None:
            return self.adapters.take_gradients()
        taken = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                taken[name] = local(parameter.grad)
                parameter.grad = None
        return taken

    def begin_micro_batch(self) -> None:
        """Gradients are on their way: those of all weights are averaged and split at once, since whole they would take
        as much as the weights did, and those of adapters when a step takes them."""
        if self.adapters is not None:
            self.adapters.begin_micro_batch()

    def release(self) -> None:
        """Let go of what stays whole after a forward pass without a backward.

        It would be used again although the shards have changed since.
        """
        if self.adapters is not None:
            self.adapters.let_go()
        else:
            self.model.reshard()

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """The twin with all that a checkpoint holds of it, in rank 0's host memory; every rank has to come here.

        Of adapters' models that is the adapters alone; the base keeps no memory. Other ranks get None.
        """
        self.release()
        slots, trained = (_slots(self.twin) if self.twin is not None else {}), self.rows()
        with torch.no_grad(), contextlib.closing(Landing(next(iter(trained.values())).device)) as landing:
            for name, parameter in self.parameters.items():
                rows = trained[name] if name in trained else local(parameter)
                tensor = gathered(rows, parameter.shape, landing)
                if tensor is not None:
                    _fill(slots[name], nn.Parameter(tensor, requires_grad=parameter.requires_grad))
        try:
            yield self.twin
        finally:
            for places in slots.values():
                held = places[0][0]._parameters[places[0][1]]
                assert held is not None
                if not held.is_meta:
                    _fill(places, nn.Parameter(torch.empty_like(held, device="meta"), held.requires_grad))


def split(model: Any, resolved: Resolved, device: torch.device, twin: Any) -> Split:
    """Split a model, as :func:`load_whole` gave it and whatever was put on it since, over all ranks.

    Raises:
        ModelError: the ranks have built different models, or weights in more formats than one are trained together.
    """
    _require_alike(model)
    with torch.no_grad():
        if hasattr(model, "peft_config"):
            return _split_base(model, resolved, device, twin)
        return _split_all(model, resolved, device, twin)


def _split_base(model: Any, resolved: Resolved, device: torch.device, twin: Any) -> Split:
    """The frozen weights of all layers, and the embedding's; what else there is each rank has whole."""
    layers = list(decoder_layers(model.get_base_model()))
    require_one_format(model, [])
    _require_own(model, layers)
    lowered = lowered_to(resolved)
    shards: list[BaseShards | LoneTable] = [BaseShards(layers, lambda layer: _place(layer, device), device, lowered)]
    _place(model, device, without=layers)
    table = _table_alone(model)
    if table is not None:
        shards.append(LoneTable(table, lowered))
    for part in laid_open(model):
        bind(part)
    if lowered is not None:
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(lowered)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapters = AdapterRows(trained, lowered)
    for first in (model.get_base_model().get_input_embeddings(), layers[0]):
        first.register_forward_pre_hook(lambda *_: adapters.refresh(), prepend=True)
    return Split(model, twin, trained, adapters, tuple(shards))


def _split_all(model: Any, resolved: Resolved, device: torch.device, twin: Any) -> Split:
    """All weights by rows, each layer by itself and all else as the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lowered = lowered_to(resolved)
    # Sums over ranks are made in the format that gradients have in one process.
    policy = MixedPrecisionPolicy(
        param_dtype=lowered, reduce_dtype=torch.float32 if lowered else None, cast_forward_inputs=False
    )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = list(decoder_layers(model))
    require_one_format(model, layers)
    for layer in layers:
        _place(layer, device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    _place(model, device, without=layers)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    # A layer of ours gives a view of what it made, which nothing writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return Split(model, twin, dict(model.named_parameters()))


def _table_alone(model: Any) -> nn.Embedding | None:
    """The embedding, where nothing but its own forward reads it: it is neither the head nor trained."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    table, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if type(table) is not nn.Embedding or table.weight.requires_grad:
        return None
    return None if head is not None and getattr(head, "weight", None) is table.weight else table


def lowered_to(resolved: Resolved) -> torch.dtype | None:
    """The format that layers are gathered in, if it is narrower than that of the shards: fp32 weights under 16-bit
    arithmetic are sent, and held whole, as what they are multiplied as."""
    numerics = Numerics.of(resolved)
    return numerics.autocast if numerics.autocast is not None and numerics.weights == torch.float32 else None


def local(parameter: Tensor) -> Tensor:
    """The rows that this rank has, in their own memory."""
    shard: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
    return shard


def gathered(mine: Tensor, shape: Sequence[int], landing: Landing, cut: Cut = rows_of) -> Tensor | None:
    """A tensor of ``shape`` from the rows of all ranks, in rank 0's host memory; None on the others.

    Args:
        landing: of the same device; the tensor is there when it is closed.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    flat = mine.detach().contiguous().reshape(-1)
    if rank:
        for start in range(0, flat.numel(), PIECE):
            dist.send(flat[start : start + PIECE], dst=0)
        return None
    whole = torch.empty(shape, dtype=mine.dtype)
    places = [whole[cut(shape[0], other, world)].reshape(-1) for other in range(world)]
    landing.put(flat, places[0])
    for other in range(1, world):
        for start in range(0, places[other].numel(), PIECE):
            target = places[other][start : start + PIECE]
            piece = torch.empty_like(target, device=mine.device)
            dist.recv(piece, src=other)
            landing.put(piece, target)
    return whole


def _place(module: Any, device: torch.device, without: Sequence[nn.Module] = ()) -> None:
    """Give all of a module but ``without`` the values of rank 0, whole and on the device."""
    done = {part for other in without for part in other.modules()}
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:  # a tied weight is one tensor in two places
            made: Tensor = _from_first(tensor, device)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            known[id(tensor)] = tensor, made
        return known[id(tensor)][1]

    for part in module.modules():
        if part in done:
            continue
        # Some classes keep constants beside their buffers.
        for held in (part._parameters, part._buffers, vars(part)):
            for name, tensor in held.items():
                if isinstance(tensor, Tensor):
                    held[name] = placed(tensor)


def _from_first(tensor: Tensor, device: torch.device) -> Tensor:
    if dist.get_rank() == 0:
        sent = tensor.detach().to(device).contiguous()
    else:
        sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    dist.broadcast(sent, src=0)
    return sent


def _require_alike(model: Any) -> None:
    told = [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad}" for name, t in _tensors(model)]
    marks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(marks, hashlib.sha256("\n".join(told).encode()).hexdigest())
    if len(set(marks)) > 1:
        do = "Use hardware.strategy: ddp."
        raise ModelError("the ranks can't build it alike without its weights", where=type(model).__name__, do=do)


def _require_own(model: Any, layers: Sequence[nn.Module]) -> None:
    """Refuse layers with weights in common, whose places in one layer's bytes would be overwritten by the other's."""
    held = [id(p) for layer in layers for p in layer.parameters()]
    if len(set(held)) < len(held):
        what = "weights that several layers share can't be split"
        raise ModelError(what, where=type(model).__name__, do="Use hardware.strategy: ddp.")


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


Slot = tuple[nn.Module, str]


def _slots(model: Any) -> dict[str, list[Slot]]:
    """Where each parameter stands, by its first name: a tied one in several places."""
    places: dict[int, list[Slot]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    return {name: places[id(parameter)] for name, parameter in model.named_parameters()}


def _fill(places: list[Slot], parameter: nn.Parameter) -> None:
    for module, leaf in places:
        module._parameters[leaf] = parameter
