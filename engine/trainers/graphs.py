"""Forward and backward of a micro-batch, recorded once per shape as a CUDA graph and replayed from then on.

A small model's step is some thousand launches, each of which costs the host about as long as the GPU works on it;
replayed, they are one. A graph repeats what was recorded on the memory it was recorded with, so everything around it
holds still: a batch is copied into tensors that stay, gradients are added up in tensors that stay, and what comes out
is copied before the next replay writes over it. Whether a graph may be used is found out on the spot: its first replay
has to give what the calls themselves gave, or the calls go on as before.

The first calls of a shape are made as ever, on a stream beside the main one: kernels are compiled, chosen and proven in
them, which must not happen while a graph is recorded.

Graphs share one pool of memory, since no two run at once. It keeps the most that a micro-batch needs, also between
steps: ``torch.cuda.max_memory_allocated`` does not see a replay, :attr:`Graphs.pool_bytes` does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ...planner.errors import first_line

Tensors = Mapping[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]
#: From the tensors of a micro-batch, and what of it is no tensor, to its figures; gradients are left in ``p.grad``.
Function = Callable[[Tensors, Any], Outputs]

#: Calls of a shape before it is recorded.
WARM = 3
#: Shapes that are recorded; any others are called.
MOST = 16
#: How far a replay's loss and gradients may lie from the calls': cuDNN adds up gradients in no fixed order.
_SAME = 1e-2


class Recorder(Protocol):
    """Runs calls, and records them."""

    pool_bytes: int

    def run(self, call: Callable[[], Outputs]) -> Outputs:
        """Make the call, as it will be recorded."""

    def record(self, call: Callable[[], Outputs], like: Outputs) -> tuple[Callable[[], object], Outputs]:
        """What repeats the call, and the tensors that each repetition fills; ``like`` is what it returned before."""

    def forget(self) -> None:
        """Nothing that was recorded is used any more."""


class CudaRecorder:
    """CUDA graphs of one device, in one pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool_bytes = 0
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], Outputs]) -> Outputs:
        """On the stream that is recorded later: autograd and cuBLAS keep streams and workspaces by stream."""
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            made = call()
        here.wait_stream(self._stream)
        # Copies on this stream: the originals' memory is used again on the other one, which waits for this one first.
        return tuple(one.clone() for one in made)

    def record(self, call: Callable[[], Outputs], like: Outputs) -> tuple[Callable[[], object], Outputs]:
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()  # what the calls needed, the pool needs now
        before, graph = torch.cuda.memory_reserved(self.device), torch.cuda.CUDAGraph()
        # Other threads of this process (a board's writer) may do as they like meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = call()
        self.pool_bytes += max(torch.cuda.memory_reserved(self.device) - before, 0)
        return graph.replay, outputs

    def forget(self) -> None:
        self.pool_bytes, self._pool = 0, torch.cuda.graph_pool_handle()  # one that ran empty can't be filled again


class Accumulators:
    """The gradients of some parameters, end to end in one tensor per dtype: at the same place in every step."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = list(parameters)
        by_kind: dict[tuple[torch.dtype, torch.device], list[torch.nn.Parameter]] = {}
        for p in self.parameters:
            by_kind.setdefault((p.dtype, p.device), []).append(p)
        self.flat: list[torch.Tensor] = []
        views: dict[int, torch.Tensor] = {}
        for (dtype, device), members in by_kind.items():
            sizes = [p.numel() for p in members]
            self.flat.append(torch.zeros(sum(sizes), dtype=dtype, device=device))
            for p, part in zip(members, self.flat[-1].split(sizes), strict=True):
                views[id(p)] = part.view(p.shape)
        self._views = [views[id(p)] for p in self.parameters]

    def attach(self) -> None:
        """Before a micro-batch: gradients are added to here, from zero where the last step has been taken."""
        fresh = [p.grad is None for p in self.parameters]
        if all(fresh):
            for flat in self.flat:
                flat.zero_()
        for p, view, new in zip(self.parameters, self._views, fresh, strict=True):
            if p.grad is view:
                continue
            if p.grad is not None:
                view.copy_(p.grad)
            elif new and not all(fresh):
                view.zero_()
            p.grad = view

    def clone(self) -> list[torch.Tensor]:
        return [flat.clone() for flat in self.flat]

    def restore(self, values: Sequence[torch.Tensor]) -> None:
        for flat, value in zip(self.flat, values, strict=True):
            flat.copy_(value)


@dataclass
class _Shape:
    """What is known of one shape of micro-batch."""

    calls: int = 0
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: Outputs = ()
    replay: Callable[[], object] | None = None
    held: object = None


class Graphs:
    """Calls of one function, replayed where their shape is known.

    Args:
        function: forward and backward of a micro-batch. It waits for nothing on the device, draws nothing at random,
            and all that changes from call to call comes in through tensors.
        parameters: what it leaves gradients of.
        hold: asked when a graph is recorded for what else it works on and must not be freed, such as scratch memory.
        tell: is told why recording was given up.
    """

    def __init__(
        self,
        function: Function,
        parameters: Sequence[torch.nn.Parameter],
        recorder: Recorder,
        *,
        hold: Callable[[], object] = lambda: None,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.function, self.recorder = function, recorder
        self.device = parameters[0].device
        self.gradients = Accumulators(parameters)
        self._hold, self._tell = hold, tell
        self._shapes: dict[Hashable, _Shape] = {}
        self._places: list[int] = []
        self.replays = 0
        """Micro-batches that were replayed."""
        self.given_up = ""
        """Why calls are no longer recorded."""

    @property
    def recorded(self) -> int:
        """Shapes that have a graph."""
        return sum(shape.replay is not None for shape in self._shapes.values())

    @property
    def pool_bytes(self) -> int:
        """Device memory that the graphs keep for themselves."""
        return self.recorder.pool_bytes

    def __call__(self, inputs: Tensors, constants: Hashable = None) -> Outputs:
        """What the function returns, in tensors of the caller's own.

        Args:
            inputs: on any device; from pinned memory, nobody waits for the copy.
            constants: what it is given besides, and a graph has built in.
        """
        self.gradients.attach()
        if self.given_up:
            return self._call(inputs, constants)
        self._notice_moved_parameters()
        key = (constants, *((name, t.shape, t.dtype) for name, t in inputs.items()))
        shape = self._shapes.setdefault(key, _Shape())
        if shape.replay is not None:
            self._fill(shape, inputs)
            shape.replay()
            self.replays += 1
            return tuple(out.clone() for out in shape.outputs)
        shape.calls += 1
        if shape.calls <= WARM or self.recorded >= MOST:
            return self._call(inputs, constants)
        return self._record(shape, inputs, constants)

    def _call(self, inputs: Tensors, constants: Hashable) -> Outputs:
        here = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        return self.recorder.run(lambda: self.function(here, constants))

    def _record(self, shape: _Shape, inputs: Tensors, constants: Hashable) -> Outputs:
        """Call once more, record, replay, and keep the graph if both gave the same."""
        before = self.gradients.clone()
        called = self._call(inputs, constants)
        after = self.gradients.clone()
        self.gradients.restore(before)
        try:
            shape.inputs = {name: tensor.to(self.device, copy=True) for name, tensor in inputs.items()}
            shape.replay, shape.outputs = self.recorder.record(
                lambda: self.function(shape.inputs, constants), tuple(one.detach() for one in called)
            )
            shape.held = self._hold()
            shape.replay()
            why = self._difference(called, shape.outputs, after)
        except (RuntimeError, NotImplementedError) as error:  # a call that waits, an allocation that fails, a refusal
            why = first_line(error)
        if why:
            self._forget()
            self.given_up = why
            self._tell(why)
        self.gradients.restore(after)
        return called

    def _difference(self, called: Outputs, replayed: Outputs, gradients: Sequence[torch.Tensor]) -> str:
        """Where a replay differs from the calls; empty if nowhere."""
        pairs = [*zip(called[:1], replayed[:1], strict=True), *zip(gradients, self.gradients.flat, strict=True)]
        for expected, got in pairs:
            apart, scale = float((got - expected).norm()), float(expected.norm())
            if not apart <= _SAME * scale:
                return f"its replay gave another result ({apart:.1e} from one of size {scale:.1e})"
        return ""

    def _fill(self, shape: _Shape, inputs: Tensors) -> None:
        for name, tensor in shape.inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)

    def _notice_moved_parameters(self) -> None:
        """A graph reads weights where they were: if any has moved, as after weights were swapped, it begins anew."""
        places = [p.data_ptr() for p in self.gradients.parameters]
        if self._places and places != self._places:
            self._forget()
        self._places = places

    def _forget(self) -> None:
        self._shapes.clear()
        self.recorder.forget()
