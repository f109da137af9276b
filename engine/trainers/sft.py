"""Supervised fine-tuning and continued pre-training: a plan carried out by TRL's ``SFTTrainer``.

The loss of an optimiser step is the sum over all trained tokens of the global batch (every micro-batch of every rank)
divided by their number, so it does not depend on how the batch is cut up.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from ...kernels.attention import Documents
from ...kernels.token_weights import Weighting
from ...planner.errors import RecipeError
from ..evaluate import IGNORED, Collate, held_out_loss, reduce_sum, score
from ..events import Fallback
from .base import RunTrainer
from .graphs import CudaRecorder
from .head import Wanted, give_token_loss
from .job import Job
from .replay import Replays, obstacle
from .unasked import no_masks, told


class TokenMeanTrainer(RunTrainer, SFTTrainer):
    """``SFTTrainer`` whose loss, data order, evaluation and checkpoints are the ones of a run.

    Args:
        collate: rows to a batch of tensors.
        rest: what :class:`.base.RunTrainer` and ``SFTTrainer`` take.
    """

    tells_late = True

    def __init__(self, *, collate: Collate, **rest: Any) -> None:
        self.collate = collate
        self.fuses_loss = False
        """The loss comes from labelled positions alone, in one operation with the output head."""
        self.whole_layers = False
        """Every decoder layer is one function, and knows the documents of its rows."""
        self.weighting: Weighting = "nll"
        """How much each trained token counts; never for held-out rows, whose loss stays comparable."""
        self.replays: Replays | None = None
        self._next: tuple[list[Any], Any] | None = None
        self._read: Callable[[], tuple[list[Any], Any]] | None = None
        super().__init__(data_collator=self._collate_counted, **rest)
        # The loss below is normalised over the whole global batch already: transformers from 5.18 asks the second
        # attribute, before that the first.
        self.model_accepts_loss_kwargs = True
        vars(self)["loss_is_scaled_for_ga"] = True

    def fuse_loss(self) -> None:
        """Take the loss from labelled positions alone, where the output head allows it; else say why not."""
        if self.aux_loss_enabled:
            why = "a mixture of experts adds a loss of its own"
        elif self.numerics.autocast is torch.float16:
            why = "its gradient, made before the loss is scaled up, would vanish in fp16"
        else:
            why = give_token_loss(self.model, self.numerics.context(self.args.device))
        self.fuses_loss = not why
        if why and self.weighting == "eaft":
            what = f"loss eaft needs all logits, and only finetui's own output head need not hold them at once: {why}"
            raise RecipeError(what, where="loss", do="Use loss: dft, or nll.")
        if why:
            self.emit(Fallback("loss: by the trainer's own output head", why))

    @property
    def pool_bytes(self) -> int:  # type: ignore[override]
        """Device memory of steps that are replayed."""
        return self.replays.graphs.pool_bytes if self.replays is not None else 0

    # --- data

    def _collate_counted(self, rows: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        # On the host, where they cost no wait for the device.
        batch["num_tokens"] = sum(len(row["input_ids"]) for row in rows)
        if "seq_lengths" in rows[0]:
            width = batch["labels"].shape[1]
            gaps = [width - sum(row["seq_lengths"]) for row in rows]
            lengths = [n for row, gap in zip(rows, gaps, strict=True) for n in (*row["seq_lengths"], gap) if n]
            batch["documents"] = tuple(lengths)
        batch["num_labelled"] = int(batch["labels"][:, 1:].ne(IGNORED).sum())
        return batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        labelled = sum(batch["num_labelled"] for batch in batch_samples)
        if self.args.world_size == 1:
            return torch.full((), labelled, device=device)  # filled, not copied: nobody waits for the device
        return reduce_sum(torch.tensor(labelled), device)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of a step: made while the device was busy with the step before, if there was one."""
        ready, self._next = self._next, None
        stock = super().get_batch_samples
        self._read = lambda: stock(epoch_iterator, num_batches, device)
        return self._read() if ready is None else ready

    # --- loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch; after the last of a step, the next step's are made ready."""
        if self.replays is not None:
            self.tell_steps(but=math.inf)
            loss = self.replays.step(inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        # From here on the host would only wait for the device. Other ranks add up what they read, so all do as ever.
        if self.accelerator.sync_gradients and self._read is not None and self.args.world_size == 1:
            self._next = self._read()
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the mean over the trained tokens of the global batch."""
        assert not return_outputs, "nothing here asks for the logits"
        tokens, labelled = inputs.pop("num_tokens"), inputs.pop("num_labelled")
        lengths = inputs.pop("documents", None)
        if self.fuses_loss:
            if lengths is not None:
                inputs["documents"] = _documents(lengths, inputs["labels"].device)
            return self._fused_loss(model, inputs, num_items_in_batch, tokens, labelled)
        scored = score(model, inputs, fused=self._fused, routed=self.aux_loss_enabled, weighting=self.weighting)
        # DDP averages gradients over ranks, so each rank's share is scaled up by their number.
        loss = scored.loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        if scored.auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * scored.auxiliary / self.args.gradient_accumulation_steps
        self.count_tokens(tokens, labelled, scored.right)
        return loss

    def _fused_loss(
        self, model: Any, inputs: dict[str, Any], num_items: torch.Tensor, tokens: int, labelled: int
    ) -> torch.Tensor:
        # Rows are padded on the right, where no labelled position of a causal model looks: without the mask attention
        # runs at its full speed, and nobody has to ask the device whether the mask is all ones.
        inputs.pop("attention_mask", None)
        out = self.token_loss(model, inputs, num_items, labelled)
        self.count_tokens(tokens, labelled, out.right)
        loss: torch.Tensor = out.loss
        return loss

    def token_loss(self, model: Any, inputs: dict[str, Any], num_items: torch.Tensor, labelled: int) -> Any:
        """Loss and hits of a micro-batch without a mask (:class:`.head.TokenLoss`); it waits for nothing.

        Args:
            inputs: ``input_ids`` and ``labels``; of packed rows also ``position_ids`` and ``documents``.
            labelled: how many labels there are, or a bound on it.
        """
        share = num_items.clamp(min=1).float() / self.accelerator.num_processes
        wanted = Wanted(share, labelled, alone=self._last_layer_is_ours(), weighting=self.weighting)
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        inputs, spared = told(inputs, config) if self.whole_layers else (inputs, False)
        with no_masks() if spared else contextlib.nullcontext():
            return model(**inputs, use_cache=False, token_loss=wanted)

    def _last_layer_is_ours(self) -> bool:
        if not self.whole_layers:
            return False
        from ...kernels.layers import ends_with_ours
        from ...kernels.replacement import STATE

        model: Any = self.model
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        return ends_with_ours(causal.base_model, STATE)

    def count_tokens(self, tokens: int, labelled: int, right: torch.Tensor) -> None:
        """Count one micro-batch: its tokens, its labels, and how many of these the model would have chosen."""
        right = right.to(torch.int64)
        # Filled, not copied from the host, which would wait for the device.
        self.count(torch.stack([torch.full_like(right, tokens), torch.full_like(right, labelled), right]))

    def figures(self, counts: list[int]) -> dict[str, float]:
        """The share of trained tokens that the model would have chosen itself."""
        _tokens, trained, right = counts
        return {"token_accuracy": round(right / max(trained, 1), 5)}

    @property
    def _fused(self) -> bool:
        return bool(self.args.device.type == "cuda")

    def measure(self) -> dict[str, float]:
        """Held-out loss now, per trained token."""
        measured = held_out_loss(
            self.model,
            self.held_out,
            self.collate,
            batch_size=self.args.per_device_eval_batch_size,
            device=self.args.device,
            fused=self._fused,
            rank=self.args.process_index,
            world=self.args.world_size,
            context=self.numerics.context(self.args.device),
            together=self.shards is not None,
        )
        return {"loss": measured.loss, "accuracy": measured.accuracy}


def _documents(lengths: tuple[int, ...], device: torch.device) -> Documents:
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if device.type == "cuda":
        starts = starts.pin_memory()
    return Documents(lengths, starts.to(device, non_blocking=True))


def finished_rows(job: Job) -> SFTConfig:
    """TRL's settings for rows that are tokenised, packed and cut already."""
    return SFTConfig(
        **job.arguments(),
        average_tokens_across_devices=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=False,
    )


def sft_trainer(job: Job) -> TokenMeanTrainer:
    """The trainer of sft and pretrain."""
    from ..data.packing import Collator

    collate = Collator(job.tokenizer.pad_token_id, multiple_of=job.multiple_of)
    trainer = TokenMeanTrainer(collate=collate, args=finished_rows(job), **job.common())
    trainer.whole_layers, trainer.weighting = job.whole_layers, job.recipe.loss
    if job.device.type == "cuda" and job.resolved.kernels != "off":
        trainer.fuse_loss()
    if job.resolved.graphs:
        why = obstacle(trainer, job.resolved, whole_layers=job.whole_layers)
        if why:
            job.emit(Fallback("graphs: steps are launched kernel by kernel", why))
        else:
            trainer.replays = Replays(trainer, CudaRecorder(job.device))
    return trainer
