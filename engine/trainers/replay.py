"""Micro-batches of supervised fine-tuning as CUDA graphs: what of a batch a graph may have built in, and what not.

A graph knows a batch by its shape alone, so what differs from batch to batch within a shape has to come in through
tensors, or be rounded up to one of few values: labelled positions to whole chunks of the output head, documents of a
packed row to a multiple of 64 (the rest are empty), the longest of them to a power of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...kernels.attention import Documents
from ...kernels.linear_cross_entropy import CHUNK_ROWS
from ...kernels.nf4 import scratch_in_use
from ...planner.plan import Resolved
from ..events import Fallback
from .graphs import Graphs, Outputs, Recorder, Tensors

if TYPE_CHECKING:
    from .sft import TokenMeanTrainer

_DOCUMENTS = 64


def obstacle(trainer: TokenMeanTrainer, resolved: Resolved, *, whole_layers: bool) -> str:
    """Why this trainer's micro-batches can't be replayed; empty if they can."""
    config = trainer.model.config.get_text_config()  # type: ignore[union-attr, operator]
    if not whole_layers or not trainer.fuses_loss:
        return "not every layer, or not the loss, is a kernel that never waits for the device"
    if trainer.weighting == "eaft":
        return "the search for the likeliest words of each position has not been proven in a graph"
    if trainer.args.world_size > 1:
        return "gradients are averaged over ranks while they are made"
    if trainer.numerics.autocast is torch.float16:
        return "the loss scaler of fp16 reads gradients on the host"
    if resolved.checkpointing == "offload":
        return "what waits in host memory is copied under the control of the host"
    if resolved.dropout or resolved.neftune_alpha or getattr(config, "attention_dropout", 0.0):
        return "dropout and noise are drawn anew in every step"
    return ""


class Replays:
    """The micro-batches of one trainer.

    Args:
        recorder: see :mod:`..graphs`.
    """

    def __init__(self, trainer: TokenMeanTrainer, recorder: Recorder) -> None:
        self.trainer = trainer
        self.graphs = Graphs(
            self._forward_backward, [p for _, p in trainer.trained_parameters()], recorder,
            hold=scratch_in_use, tell=self._tell,
        )  # fmt: skip

    def step(self, inputs: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its share of the loss."""
        tokens, labelled = inputs["num_tokens"], inputs["num_labelled"]
        names = ("input_ids", "labels", "position_ids")
        tensors: dict[str, torch.Tensor] = {name: inputs[name] for name in names if name in inputs}
        positions = tensors["input_ids"].numel()
        bound = min(-(-labelled // CHUNK_ROWS) * CHUNK_ROWS, positions)
        lengths = inputs.get("documents")
        if lengths is not None:
            count = -(-len(lengths) // _DOCUMENTS) * _DOCUMENTS
            tensors["starts"] = _starts(lengths, count, pinned=self.graphs.device.type == "cuda")
            longest = min(1 << (max(lengths) - 1).bit_length(), tensors["input_ids"].shape[1])
        else:
            longest = 0
        self.trainer.model.train()  # type: ignore[union-attr]
        tensors["num_items"] = num_items
        loss, right = self.graphs(tensors, (bound, longest))
        self.trainer.count_tokens(tokens, labelled, right)
        return loss

    def _forward_backward(self, tensors: Tensors, constants: tuple[int, int]) -> Outputs:
        trainer, (bound, longest) = self.trainer, constants
        inputs: dict[str, Any] = {name: tensors[name] for name in ("input_ids", "labels")}
        if longest:
            full, rest = divmod(inputs["input_ids"].numel(), longest)
            lengths = (longest,) * full + ((rest,) if rest else ())
            inputs |= {"position_ids": tensors["position_ids"], "documents": Documents(lengths, tensors["starts"])}
        with trainer.compute_loss_context_manager():
            out = trainer.token_loss(trainer.model_wrapped, inputs, tensors["num_items"], bound)
        trainer.accelerator.backward(out.loss)
        return out.loss.detach(), out.right

    def _tell(self, why: str) -> None:
        self.trainer.emit(Fallback("graphs: steps are launched kernel by kernel", why))


def _starts(lengths: tuple[int, ...], count: int, *, pinned: bool) -> torch.Tensor:
    """Where documents begin, int32 ``[count + 1]``; those beyond the last are empty."""
    lengths = (*lengths, *[0] * (count - len(lengths)))
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return starts.pin_memory() if pinned else starts
