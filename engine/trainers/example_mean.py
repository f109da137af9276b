"""Trainers whose loss is a mean over examples, as that of pairs and of judged answers is."""

from __future__ import annotations

from typing import Any, cast

import torch

from .base import RunTrainer
from .batches import WeightedMeans, even_batches


class ExampleMeanTrainer(RunTrainer):
    """Counts tokens, and evaluates with the loss and the figures that it trains with.

    Every micro-batch has as many examples as every other, so that the mean of their means is the mean over the batch.
    """

    _metrics: Any
    """What TRL's trainer gathers, by ``train`` and ``eval``."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.collate: Any = self.data_collator
        self.data_collator = self._collate_counted

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Rows come tokenised and cut."""
        return dataset

    def _collate_counted(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        batch["num_tokens"] = int(batch["attention_mask"].sum())
        return batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the examples of this micro-batch."""
        tokens = inputs.pop("num_tokens")
        if model.training:
            self.count(torch.tensor([tokens]))
        return self.loss_of(model, inputs, num_items_in_batch)

    def loss_of(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """The loss that TRL computes, which notes down figures on the way.

        Args:
            num_items: what :meth:`_get_num_items_in_batch` counted over the whole batch; None in evaluation.
        """
        loss: Any = super().compute_loss(model, inputs)
        return cast("torch.Tensor", loss)

    def measure(self) -> dict[str, float]:
        """Loss and figures over the held-out examples."""
        model: Any = self.model
        device, means = self.args.device, WeightedMeans()
        gathered = self._metrics["eval"]
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.numerics.context(device):
                size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
                for chosen, weight in even_batches(len(self.held_out), size, world, rank):
                    gathered.clear()
                    inputs = self._prepare_inputs(self.data_collator([self.held_out[i] for i in chosen]))
                    loss = float(self.compute_loss(model, inputs))
                    means.add({"loss": loss, **self.named(gathered)}, weight)
        finally:
            gathered.clear()
            model.train(training)
        return means.told(device)
