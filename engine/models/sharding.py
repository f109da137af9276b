"""A model split over the ranks of a run: each decoder layer by itself, all else as the root (FSDP2, arXiv:2304.11277).

Every rank keeps 1/N of each tensor, by rows. A layer is gathered when its forward begins, freed when that ends, and
gathered once more for its backward, after which its gradients are averaged and split like the weights. The root
(embedding, head, last norm) stays gathered from forward to the end of backward, so a loss that reads the head's weight
by itself finds it whole; a frozen embedding that is not the head too is gathered for its look-up alone.

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
        raise ModelError(f"the model can't be built ({first_line(error)})", where=str(folder)) from error
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
        model: each of its layers, and itself, is an ``FSDPModule``.
        twin: the model as it was before, without memory; on rank 0 alone.
        parameters: this rank's shards by name: DTensors whose rows are split.
        adapted: adapters alone are trained.
    """

    model: Any
    twin: Any
    parameters: dict[str, nn.Parameter]
    adapted: bool
    _averages: bool = True

    def begin_micro_batch(self, *, last: bool) -> None:
        """Settle whether gradients are averaged and split behind the next micro-batch.

        Those of adapters add up where they are until the ``last`` of a step, so that a step sends them once. They are
        whole until then; those of all weights would take as much as the weights did before they were split.
        """
        wanted = last or not self.adapted
        if wanted is not self._averages:
            self._averages = wanted
            self.model.set_requires_gradient_sync(wanted)

    def release(self) -> None:
        """Let go of the root, which stays gathered after a forward pass without a backward.

        What was gathered would be used again although the shards have changed since.
        """
        self.model.reshard()

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """The twin with all that a checkpoint holds of it, in rank 0's host memory; every rank has to come here.

        Of adapters' models that is the adapters alone; the base keeps no memory. Other ranks get None.
        """
        self.release()
        slots = _slots(self.twin) if self.twin is not None else {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.adapted and not parameter.requires_grad:
                    continue
                tensor = gathered(local(parameter), parameter.shape)
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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    _require_alike(model)
    lowered = lowered_to(resolved)
    # Sums over ranks are made in the format that gradients have in one process.
    policy = MixedPrecisionPolicy(
        param_dtype=lowered, reduce_dtype=torch.float32 if lowered else None, cast_forward_inputs=False
    )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    adapted, inside = hasattr(model, "peft_config"), set[Any]()
    layers = list(decoder_layers(model.get_base_model() if adapted else model))
    require_one_format(model, layers)
    with torch.no_grad():
        for layer in layers:
            _place(layer, device)
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            _bind(layer, laid_open(layer))
            inside.update(laid_open(layer))
        table = _table_alone(model)
        if table is not None:
            _place(table, device)
            fully_shard(table, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        _place(model, device)
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        _bind(model, [part for part in laid_open(model) if part not in inside])
    # A layer of ours gives a view of what it made, which nothing writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if adapted:  # whose own generate() calls the model inside without calling the root
        register_fsdp_forward_method(model, "generate")
    return Split(model, twin, dict(model.named_parameters()), adapted)


def _table_alone(model: Any) -> nn.Embedding | None:
    """The embedding, where nothing but its own forward reads it: it is neither the head nor trained."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    table, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if type(table) is not nn.Embedding or table.weight.requires_grad:
        return None
    return None if head is not None and getattr(head, "weight", None) is table.weight else table


def _bind(unit: Any, packed: list[Any]) -> None:
    """Gather a unit once, so that its packed weights get the state that they have whenever they are whole again."""
    if not packed:
        return
    unit.unshard()
    for layer in packed:
        bind(layer)
    unit.reshard()


def lowered_to(resolved: Resolved) -> torch.dtype | None:
    """The format that layers are gathered in, if it is narrower than that of the shards: fp32 weights under 16-bit
    arithmetic are sent, and held whole, as what they are multiplied as."""
    numerics = Numerics.of(resolved)
    return numerics.autocast if numerics.autocast is not None and numerics.weights == torch.float32 else None


def local(parameter: Tensor) -> Tensor:
    """The rows that this rank has, in their own memory."""
    shard: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
    return shard


def rows_of(rows: int, rank: int, world: int) -> slice:
    """Which of a tensor's rows a rank has: as even as ``torch.chunk`` cuts, the last ranks with fewer or none."""
    each = -(-rows // world)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))


def gathered(mine: Tensor, shape: Sequence[int], cut: Cut = rows_of) -> Tensor | None:
    """A tensor of ``shape`` from the rows of all ranks, in rank 0's host memory; None on the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    flat = mine.detach().contiguous().reshape(-1)
    if rank:
        for start in range(0, flat.numel(), PIECE):
            dist.send(flat[start : start + PIECE], dst=0)
        return None
    whole = torch.empty(shape, dtype=mine.dtype)
    places = [whole[cut(shape[0], other, world)].reshape(-1) for other in range(world)]
    places[0].copy_(flat)
    for other in range(1, world):
        for start in range(0, places[other].numel(), PIECE):
            target = places[other][start : start + PIECE]
            piece = torch.empty_like(target, device=mine.device)
            dist.recv(piece, src=other)
            target.copy_(piece)
    return whole


def _place(module: Any, device: torch.device) -> None:
    """Give all of a module that is not split yet the values of rank 0, whole and on the device."""
    from torch.distributed.tensor import DTensor

    known: dict[int, tuple[Tensor, Tensor]] = {}

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:  # a tied weight is one tensor in two places
            made: Tensor = _from_first(tensor, device)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            known[id(tensor)] = tensor, made
        return known[id(tensor)][1]

    for part in module.modules():
        # Some classes keep constants beside their buffers.
        for held in (part._parameters, part._buffers, vars(part)):
            for name, tensor in held.items():
                if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
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
