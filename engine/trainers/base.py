"""What the trainers of all methods have in common, over whichever class of TRL they stand on.

Rows come in the order of ``order.py``, a function of the seed; figures go to callbacks and from there to
``events.jsonl``; the optimiser is the recipe's; what is saved and gone on from is :mod:`.resumable`'s.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from ...planner.plan import Resolved
from ..models.adapt import adapters_kept_in_their_format
from ..models.load import Emit, Numerics
from ..models.sharding import Split
from .adalora import TakesRanks, add_penalty, allocates
from .best import KeepsBest
from .fused_adamw import clipped_on_the_way, fused_adamw
from .optimizers import averaged, optimizer_for
from .order import Order
from .resumable import Resumable
from .saving import Saver
from .shards import Shards
from .unread import Unread
from .walks import shorten_walks


class RunTrainer(Resumable):
    """A mixin before a trainer of TRL: data order, optimiser, figures and checkpoints as a run wants them.

    Args:
        order: rows of this rank, micro-batch by micro-batch.
        held_out: rows that are never trained on, or None.
        keep: checkpoints that stay on disk.
        emit: receives events (of rank 0).
        resolved: the plan, for an optimiser that the trainer does not have.
        identity: what a checkpoint notes down so that a resume can tell whether it goes on with the same run.
        split: the model where it is split over the ranks; an adapter to go on from has been read then.
        rest: what the trainer of TRL takes.
    """

    may_rest = False
    """A step without any gradient is no mistake: all completions scored alike."""
    tells_late = False
    """All figures of a step are tensors on the device, so that they can be told once it is done with them."""
    pool_bytes = 0
    """Device memory of steps that are replayed; see :mod:`..graphs`."""

    def __init__(
        self,
        *,
        order: Order,
        held_out: Any,
        keep: int,
        emit: Emit,
        numerics: Numerics,
        resolved: Resolved | None = None,
        identity: dict[str, Any] | None = None,
        split: Split | None = None,
        **rest: Any,
    ) -> None:
        self.shards = Shards(split) if split is not None else None
        self.order, self.held_out = order, held_out
        self.emit, self.numerics, self.resolved = emit, numerics, resolved
        self.tokens = 0
        self.grad_norm: torch.Tensor | float = math.nan
        """Norm of the gradient of the step in progress, before clipping."""
        self.guarded = False
        """The optimiser leaves the step in progress out by itself if its gradient is no number."""
        self.besides: dict[str, torch.Tensor] = {}
        """Further figures of the step in progress, told with the others if it is told late."""
        self.unread = Unread(rest["args"].device)
        self.saver = Saver(Path(str(rest["args"].output_dir)), keep, emit)
        self.identity = identity or {}
        self._counts: torch.Tensor | None = None
        self._trained: list[tuple[str, torch.nn.Parameter]] = []
        with adapters_kept_in_their_format(rest["model"]):
            super().__init__(**rest)
        if allocates(self.model):
            self.add_callback(TakesRanks(self.model))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, KeepsBest):
                callback.whole_model = self.whole_model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The recipe's optimiser."""
        new = self.optimizer is None
        if new and self.optimizer_cls_and_kwargs is None:
            self.optimizer_cls_and_kwargs = self._asked_for()
        optimizer = super().create_optimizer(*args, **kwargs)
        if new:
            shorten_walks(self.model, [parameter for _, parameter in self.trained_parameters()])
        return optimizer

    def _asked_for(self) -> Any:
        """The plan's optimiser where it is none of the trainer's own, or has groups of its own."""
        model: Any = self.model
        named = self.trained_parameters()
        shards = None if self.shards is None else [p for _, p in named]
        kernels = self.resolved is None or self.resolved.kernels != "off"
        ours = partial(fused_adamw, model, self.args, self.emit, shards, kernels=kernels)
        if self.resolved is None:
            return ours()
        decayed = set(self.get_decay_parameter_names(model))
        groups = [
            {"params": [p for n, p in named if (n in decayed) is decays], "weight_decay": decay}
            for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
        ]
        stock = partial(self.get_optimizer_cls_and_kwargs, self.args, model)
        asked = optimizer_for(model, self.resolved, groups, lambda: ours() or stock(), named)
        if self.shards is None:
            return asked or ours()
        kind, given = asked or ours() or stock()
        return kind, {"params": groups, **self.shards.settled(given)}

    def trained_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What is updated, by name; found once, since a walk over a large model takes as long as a layer."""
        model: Any = self.model
        if self.shards is not None:
            return self.shards.named
        if not self._trained:
            self._trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return self._trained

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, with what an adapter adds to its loss."""
        self.tell_steps(but=math.inf)
        if self.shards is not None:
            self.shards.split.begin_micro_batch()
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if allocates(self.model):
            scaler = self.accelerator.scaler
            add_penalty(self.model, (scaler.get_scale() if scaler else 1.0) / self.args.gradient_accumulation_steps)
        return loss

    # --- a model in shards, which nobody else may move or wrap

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if self.shards is None:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.shards is None:
            return super()._wrap_model(model, *args, **kwargs)
        model.forward = self.numerics.context(self.args.device)(model.forward)
        model._is_accelerate_prepared = True
        return model

    # --- data

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

    def _prepare_input(self, data: Any) -> Any:
        """To the device; from pinned memory, nobody waits for the copy."""
        if isinstance(data, torch.Tensor) and data.device.type == "cpu" and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # --- figures

    def count(self, counts: torch.Tensor) -> None:
        """Add what one micro-batch counted to what this rank tells at the end of the step."""
        self._counts = counts if self._counts is None else self._counts + counts

    def take_counts(self) -> torch.Tensor:
        """What this rank counted since the last call, tokens first; stays on the device."""
        assert self._counts is not None, "no micro-batch has been computed"
        counts, self._counts = self._counts, None
        return counts

    def figures(self, counts: list[int]) -> dict[str, float]:
        """Further figures of a step, by name, from the counts of all ranks: those that TRL's trainer has gathered."""
        gathered: dict[str, list[float]] = getattr(self, "_metrics", {}).get("train", {})
        told = self.named(gathered)
        gathered.clear()
        return told

    def named(self, gathered: dict[str, list[float]]) -> dict[str, float]:
        """Means of what TRL's trainer gathered, under the names that events have."""
        return {name: sum(values) / len(values) for name, values in gathered.items() if values and name != "num_tokens"}

    def _clip_grad_norm(self, model: Any) -> Any:
        return self._clipped(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = self._clipped(model, 0.0) if grad_norm is None else grad_norm
        self.grad_norm = super()._get_grad_norm(model, grad_norm=norm)
        return self.grad_norm

    def _clipped(self, model: Any, max_norm: float) -> Any:
        """The norm of the gradient, which is shortened to ``max_norm`` (0: it stays); None: let the trainer find it.

        As the trainer does it, but over what has gradients: a walk over all modules takes as long as a layer.
        """
        if self.shards is not None:
            return self.shards.clip(self.optimizer, max_norm)
        if self.accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU):
            return super()._clip_grad_norm(model) if max_norm else None
        trained, limit = [p for _, p in self.trained_parameters()], max_norm or math.inf
        # How adapters share out their ranks goes by gradients as they are after clipping.
        norm = None if allocates(self.model) else clipped_on_the_way(self.optimizer, trained, limit)
        self.guarded = norm is not None
        return norm if norm is not None else self.accelerator.clip_grad_norm_(trained, limit)

    def norms(self, tensors: list[torch.Tensor]) -> list[float]:
        """The norm of each tensor, one for each trained parameter; of shards, over all ranks."""
        found = torch.stack(torch._foreach_norm(tensors))
        return (found if self.shards is None else self.shards.over_ranks(found)).tolist()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted here: the planner knows the model's arithmetic better than a parameter count does."""
        return 0

    def measure(self) -> dict[str, float]:
        """Figures over the held-out rows now, ``loss`` among them."""
        raise NotImplementedError

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out figures as the trainer's callbacks expect them."""
        if self.held_out is None:
            return {}
        with averaged(self.optimizer):
            metrics = {f"eval_{name}": value for name, value in self.measure().items()}
            with self.model_to_save():  # by whoever keeps the best weights
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            if self.shards is not None:
                self.shards.split.release()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand figures to the callbacks; no history is kept, since events.jsonl is that history."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    @property
    def late(self) -> bool:
        """Whether the step in progress is told of while the next one is under way.

        Several ranks agree on what comes next by what each has counted, so they wait for it.
        """
        return self.tells_late and self.guarded and self.args.world_size == 1

    def leave_out_if(self, condition: torch.Tensor) -> None:
        """Of a guarded step: make no update where this holds, a scalar on the device."""
        optimizer: Any = self.optimizer
        getattr(optimizer, "optimizer", optimizer).leave_out_if(condition)

    def tell_steps(self, *, but: float = 0) -> None:
        """Tell of the steps that are done; all ``but`` the latest so many are waited for."""
        for told in self.unread.read(but=but):
            loss, norm = told.figures["loss"][0], told.figures["grad_norm"][0]
            if not math.isfinite(norm) or any(told.figures.get("exploded", ())):
                optimizer: Any = self.optimizer
                getattr(optimizer, "optimizer", optimizer).uncount()
            self.log(vars(told) | {"loss": loss, "grad_norm": norm})

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *rest: Any, **more: Any) -> None:
        """The trainer takes the loss that it has told off its sum; what remains of a nan would be nan for good."""
        if self.control.should_log and self.late:
            self.control.should_log, self._globalstep_last_logged = False, self.state.global_step
            norm = self.grad_norm
            assert isinstance(norm, torch.Tensor)
            figures = {"loss": tr_loss, "grad_norm": norm, "counts": self.take_counts(), **self.besides}
            self.unread.add(self.state.global_step, more["learning_rate"], figures)
            self.besides = {}
        pauses = self.control.should_save or self.control.should_evaluate or self.control.should_training_stop
        self.tell_steps(but=1 if self.late and not pauses else 0)
        super()._maybe_log_save_evaluate(tr_loss, *rest, **more)
        tr_loss.zero_()
