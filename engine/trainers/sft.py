"""Supervised fine-tuning and continued pre-training: a plan carried out by TRL's ``SFTTrainer``.

The loss of an optimiser step is the sum over all trained tokens of the global batch (every micro-batch of every rank)
divided by their number, so it does not depend on how the batch is cut up. Data order is a function of the seed
(``order.py``), checkpoints are written whole or not at all (``../checkpoint.py``).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from ...kernels.attention import Documents
from ...planner.plan import Resolved
from ...planner.recipe import Recipe
from .. import checkpoint
from ..evaluate import IGNORED, Collate, HeldOut, held_out_loss, reduce_sum, score
from ..events import CheckpointSaved, Fallback
from ..model import Emit, Numerics
from .flat import flatten, shorten_walks
from .head import Wanted, give_token_loss
from .order import Order
from .save import save_weights

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "sgd": "sgd",
    "adafactor": "adafactor",
}
PROGRESS = "progress.json"
"""What a checkpoint notes down beside the trainer's own state."""


@dataclass(frozen=True)
class Length:
    """How long a run is in optimiser steps, once its rows have been counted."""

    steps: int
    warmup: int
    checkpoint_every: int
    eval_every: int


def length(recipe: Recipe, resolved: Resolved, rows: int, emit: Emit) -> Length:
    """The steps that the recipe's epochs come to for the rows there really are, at most its ``max_steps``.

    A plan is made before anything is tokenised, so its number of steps rests on an estimate. What the user asked for
    is a number of epochs; where the two differ the epochs win, and an event says so.
    """
    steps = max(1, math.ceil(resolved.epochs * rows / resolved.batch_size))
    steps = min(steps, recipe.max_steps or steps)
    if steps != resolved.steps:
        why = (
            f"{resolved.epochs:g} epochs of {rows} rows, {resolved.batch_size} per step; the plan had only an estimate"
        )
        emit(Fallback(f"{steps} steps instead of {resolved.steps}", why))
    share = steps / max(resolved.steps, 1)
    every = recipe.checkpoint.every if recipe.checkpoint.every != "auto" else round(resolved.checkpoint_every * share)
    measure = recipe.evaluation.every if recipe.evaluation.every != "auto" else round(resolved.eval_every * share)
    return Length(steps, min(steps, round(resolved.warmup_steps * share)), max(1, every), max(1, measure))


def arguments(
    resolved: Resolved,
    run_length: Length,
    folder: Path,
    *,
    resumed: bool,
    evaluates: bool,
    checkpointed: bool | None = None,
) -> SFTConfig:
    """TRL's settings for a plan; everything that TRL would decide by itself is decided here.

    Args:
        checkpointed: whether layers are recomputed from outside; by default as the plan says.
    """
    checkpointed = resolved.checkpointing == "full" if checkpointed is None else checkpointed
    numerics = Numerics.of(resolved)
    schedule = resolved.schedule if resolved.schedule != "constant" else "constant_with_warmup"
    cuda = resolved.device == "cuda"
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=resolved.micro_batch,
        per_device_eval_batch_size=resolved.micro_batch,
        gradient_accumulation_steps=resolved.accumulation,
        max_steps=run_length.steps,
        learning_rate=resolved.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=run_length.warmup,
        optim=OPTIMIZERS[resolved.optimizer],
        weight_decay=resolved.weight_decay,
        max_grad_norm=resolved.max_grad_norm,
        bf16=numerics.autocast is torch.bfloat16,
        fp16=numerics.autocast is torch.float16,
        tf32=None,
        gradient_checkpointing=checkpointed,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointed else None,
        seed=resolved.seed,
        data_seed=resolved.seed,
        use_cpu=not cuda,
        ddp_backend=("nccl" if cuda else "gloo") if torch.distributed.is_initialized() else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        padding_free=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        eval_on_start=evaluates and not resumed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="warning",
        dataloader_num_workers=0,
        push_to_hub=False,
    )


class TokenMeanTrainer(SFTTrainer):
    """``SFTTrainer`` whose loss, data order, evaluation and checkpoints are the ones described above.

    Args:
        order: rows of this rank, micro-batch by micro-batch.
        held_out: rows that are never trained on, or None.
        keep: checkpoints that stay on disk.
        emit: receives events (of rank 0).
        rest: what :class:`SFTTrainer` takes.
    """

    def __init__(
        self, *, order: Order, held_out: Any, collate: Collate, keep: int, emit: Emit, numerics: Numerics, **rest: Any
    ) -> None:
        self.order, self.held_out, self.collate = order, held_out, collate
        self.keep, self.emit, self.numerics = keep, emit, numerics
        self.tokens = 0
        """Non-padding tokens processed so far, over all ranks and attempts."""
        self.fuses_loss = False
        """The loss comes from labelled positions alone, in one operation with the output head."""
        self.grad_norm: torch.Tensor | float = math.nan
        """Norm of the gradient of the step in progress, before clipping."""
        self._counts: torch.Tensor | None = None
        self._trained: list[tuple[str, torch.nn.Parameter]] = []
        model = rest["model"]
        with _adapters_kept_in_their_format(model):
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
        if why:
            self.emit(Fallback("loss: by the trainer's own output head", why))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The recipe's optimiser; over many small tensors it takes its steps as over one."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        adam = self.args.optim in ("adamw_torch_fused", "adamw_bnb_8bit")
        # The scaler of fp16 looks for each tensor's gradient in the optimiser.
        on_gpu = self.args.device.type == "cuda" and self.numerics.autocast is not torch.float16
        # Adapters are small: one more copy of a whole model, for a moment, would not be.
        if new and adam and on_gpu and hasattr(self.model, "peft_config"):
            flatten(optimizer)
        if new:
            shorten_walks(self.model, [parameter for _, parameter in self.trained_parameters()])
        return optimizer

    def trained_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What is updated, by name; found once, since a walk over a large model takes as long as a layer."""
        model: Any = self.model
        if not self._trained:
            self._trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return self._trained

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

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro-batches; not prepared by accelerate, which would deal out rows in its own order."""
        rows: Any = self.train_dataset
        return DataLoader(
            rows,
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        return reduce_sum(torch.tensor(sum(batch["num_labelled"] for batch in batch_samples)), device)

    # --- loss

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
        scored = score(model, inputs, fused=self._fused, routed=self.aux_loss_enabled)
        # DDP averages gradients over ranks, so each rank's share is scaled up by their number.
        loss = scored.loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        if scored.auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * scored.auxiliary / self.args.gradient_accumulation_steps
        self._count(tokens, labelled, scored.right)
        return loss

    def _fused_loss(
        self, model: Any, inputs: dict[str, Any], num_items: torch.Tensor, tokens: int, labelled: int
    ) -> torch.Tensor:
        # Rows are padded on the right, where no labelled position of a causal model looks: without the mask attention
        # runs at its full speed, and nobody has to ask the device whether the mask is all ones.
        inputs.pop("attention_mask", None)
        wanted = Wanted(num_items.clamp(min=1).float() / self.accelerator.num_processes, labelled)
        out = model(**inputs, use_cache=False, token_loss=wanted)
        self._count(tokens, labelled, out.right)
        loss: torch.Tensor = out.loss
        return loss

    def _count(self, tokens: int, labelled: int, right: torch.Tensor) -> None:
        right = right.to(torch.int64)
        # Filled, not copied from the host, which would wait for the device.
        counts = torch.stack([torch.full_like(right, tokens), torch.full_like(right, labelled), right])
        self._counts = counts if self._counts is None else self._counts + counts

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.grad_norm

    @property
    def _fused(self) -> bool:
        return bool(self.args.device.type == "cuda")

    def take_counts(self) -> torch.Tensor:
        """Tokens, trained tokens and rightly predicted ones of this rank since the last call; stays on the device."""
        assert self._counts is not None, "no micro-batch has been computed"
        counts, self._counts = self._counts, None
        return counts

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted here: the planner knows the model's arithmetic better than a parameter count does."""
        return 0

    # --- evaluation and logging

    def measure(self) -> HeldOut:
        """Held-out loss now."""
        return held_out_loss(
            self.model,
            self.held_out,
            self.collate,
            batch_size=self.args.per_device_eval_batch_size,
            device=self.args.device,
            fused=self._fused,
            rank=self.args.process_index,
            world=self.args.world_size,
            context=self.numerics.context(self.args.device),
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out loss as the trainer's callbacks expect it."""
        if self.held_out is None:
            return {}
        measured = self.measure()
        metrics = {"eval_loss": measured.loss, "eval_accuracy": measured.accuracy}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand figures to the callbacks; no history is kept, since events.jsonl is that history."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *rest: Any, **more: Any) -> None:
        """The trainer takes the loss that it has told off its sum; what remains of a nan would be nan for good."""
        super()._maybe_log_save_evaluate(tr_loss, *rest, **more)
        tr_loss.zero_()

    # --- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All ranks write their part into a hidden folder; rank 0 gives it its name when every part is there."""
        began = time.perf_counter()
        step = self.state.global_step
        directory = Path(str(self.args.output_dir))
        partial = directory / f"{checkpoint.PARTIAL_PREFIX}{checkpoint.folder_name(step)}"
        with self._all_or_none(partial):
            if self.args.should_save:
                checkpoint.begin(directory, step)
        facts = {"tokens": self.tokens, "rows": self.order.rows, "batch_size": self.order.batch_size}
        with self._all_or_none(partial):
            if self.args.should_save:
                save_weights(self.model, self.processing_class, partial)
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            if self.args.should_save:
                self.state.save_to_json(str(partial / "trainer_state.json"))
                (partial / PROGRESS).write_text(json.dumps(facts), encoding="utf-8")
        with self._all_or_none(partial):
            if self.args.should_save:
                saved = checkpoint.commit(partial, step, keep=self.keep, facts=facts)
                seconds = round(time.perf_counter() - began, 3)
                self.emit(CheckpointSaved(step, f"checkpoints/{saved.path.name}", saved.bytes, seconds))

    @contextlib.contextmanager
    def _all_or_none(self, partial: Path) -> Iterator[None]:
        """If a rank fails in the block, every rank fails after it, none waits for ever, and nothing partial stays."""
        failure: Exception | None = None
        try:
            with checkpoint.reported_as_disk_error("the checkpoint can't be written", partial.parent):
                yield
        except Exception as error:
            failure = error
        failed = reduce_sum(torch.tensor(int(failure is not None)), self.args.device).item()
        if failed and self.args.should_save:
            checkpoint.discard(partial)
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError("another rank could not write its part of the checkpoint")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Adapters are read back in place; a full model was loaded from the checkpoint in the first place."""
        folder = Path(resume_from_checkpoint)
        self.tokens = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["tokens"]
        if (folder / "adapter_model.safetensors").is_file():
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            result: Any = set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
            assert not result.unexpected_keys, f"adapter of another shape: {result.unexpected_keys[:3]}"


def _documents(lengths: tuple[int, ...], device: torch.device) -> Documents:
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if device.type == "cuda":
        starts = starts.pin_memory()
    return Documents(lengths, starts.to(device, non_blocking=True))


@contextlib.contextmanager
def _adapters_kept_in_their_format(model: Any) -> Iterator[None]:
    """Undo TRL's cast of a quantised model's adapters to bf16, in which small updates are rounded away."""
    before = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name].to(parameter.device)
