"""The frozen reference that a preference method compares its policy with: whose word it is, and computed once.

An adapter run's reference is the base below its adapters. Log-probabilities of the reference never change, so they can
be computed before the first step, while a full model still is what it was: then no second model is needed. They go to
one file per rank as they are made, so that a process that is killed loses seconds, and a resumed run reads them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..evaluate import reduce_sum
from ..events import Fallback, Phase

if TYPE_CHECKING:
    from .job import Job

#: Seconds between what is told of the progress.
_TOLD_EVERY_S = 1.0
#: Rows whose reference was computed, by their number: log-probability of the better and of the worse answer.
Scores = dict[int, tuple[float, float]]


class Absent(torch.nn.Module):
    """Stands in for a reference model while TRL's constructor runs, which would load or copy one otherwise."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *_: Any, **__: Any) -> Any:
        """Never called."""
        raise AssertionError("there is no reference model")


def starts_as_its_base(model: Any, context: contextlib.AbstractContextManager[Any]) -> bool:
    """Whether fresh adapters change nothing, so that the base without them is the policy's start.

    True of LoRA, whose B is 0; not of PiSSA, which moves a part of the base into its adapters, nor of adapters that
    were trained before.

    Args:
        context: in which the model computes: fp32 adapters and a 16-bit base meet in autocast alone.
    """
    if not hasattr(model, "peft_config"):
        return False
    words = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), context:
            adapted = model(input_ids=words, use_cache=False).logits.float()
            with model.disable_adapter():
                plain = model(input_ids=words, use_cache=False).logits.float()
    finally:
        model.train(training)
    return bool(torch.allclose(adapted, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())))


def without_padding_mask(model: Any) -> None:
    """Let the output head's tiled call go without attention mask.

    Rows are padded on the right, where no scored position of a causal model looks. Without a mask attention runs at its
    full speed, whole layers run as one function, and nobody asks the device whether the mask is all ones.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    stock = causal.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            kwargs.pop("attention_mask", None)
        return stock(*args, **kwargs)

    causal.forward = forward


def copy_of_base(job: Job) -> Any:
    """A second, frozen model on the same device, in the format of the trained one."""
    from ..models.load import load_base

    why = "full fine-tuning changes the model itself; preference.reference: precomputed needs no second one"
    job.emit(Fallback("a copy of the model is held as reference", why))
    model = load_base(job.folder, job.resolved, job.device, job.emit)
    return model.requires_grad_(False).eval()


class ReferenceScores:
    """Log-probabilities of the reference for rows of a dataset, on disk as they are made.

    Args:
        folder: of this dataset and this objective; made if need be.
        rank, world: of this process; each writes a file of its own, and reads all.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world

    def read(self) -> Scores:
        """What all ranks have written so far; a half-written last line is passed over."""
        found: Scores = {}
        for path in sorted(self.folder.glob("rank*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row, better, worse = json.loads(line)
                except ValueError:
                    continue
                found[row] = (better, worse)
        return found

    def complete(
        self,
        wanted: list[int],
        score: Callable[[list[int]], list[tuple[float, float]]],
        *,
        size: int,
        device: torch.device,
        stopped: Callable[[], bool],
        told: Callable[[int, int], object],
        together: bool = False,
    ) -> Scores | None:
        """Compute what is missing of ``wanted``; None if the run was asked to stop meanwhile.

        Args:
            score: rows to what :data:`Scores` holds of each.
            size: rows per call.
            stopped: asked on rank 0.
            told: receives rows done and in all.
            together: every rank scores in every round, one without rows of its own any row: the model is split.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        have = self.read()
        missing = [row for row in wanted if row not in have]
        reduce_sum(torch.zeros(1), device)  # nobody writes before all have read
        last = time.monotonic()
        with open(self.folder / f"rank{self.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write("\n")  # ends a line that a killed process left half-written
            for done, mine in _rounds(missing, size, self.rank, self.world):
                # `[row, better, worse]`; JSON of a float reads back as the same float.
                scored = score(mine) if mine else score(missing[:1])[:0] if together else []
                for row, (better, worse) in zip(mine, scored, strict=True):
                    file.write(json.dumps([row, better, worse]) + "\n")
                file.flush()
                if time.monotonic() - last > _TOLD_EVERY_S:
                    last = time.monotonic()
                    told(len(wanted) - len(missing) + done, len(wanted))
                asked = torch.tensor(int(self.rank == 0 and stopped()))
                if reduce_sum(asked, device).item():
                    return None
        reduce_sum(torch.zeros(1), device)  # all have written
        return self.read()


def _rounds(rows: list[int], size: int, rank: int, world: int) -> Iterator[tuple[int, list[int]]]:
    """As many rounds on every rank: rows done after each, and this rank's part of it, which may be empty."""
    for number in range(math.ceil(len(rows) / (size * world))):
        start = (number * world + rank) * size
        yield min((number + 1) * size * world, len(rows)), rows[start : start + size]


def precompute(trainer: Any, job: Job) -> bool:
    """Give a trainer's rows the reference's log-probabilities, and its held-out rows too; False if asked to stop."""
    tail = trainer.objective.length_desensitization
    root = job.run.path / "data" / f"reference-{job.rows.path.name}{'' if tail is None else f'-{tail:g}'}"
    visited = trainer.order.visited()
    parts = [("train", trainer.train_dataset, visited)]
    if trainer.held_out is not None:
        parts.append(("eval", trainer.held_out, list(range(len(trainer.held_out)))))
    model: Any = trainer.model
    for name, rows, wanted in parts:

        def score(chosen: list[int], rows: Any = rows) -> list[tuple[float, float]]:
            inputs = trainer._prepare_inputs(trainer.collate([rows[i] for i in chosen]))
            better, worse = trainer.compute_ref_log_probs(model, inputs)
            return list(zip(better.float().tolist(), worse.float().tolist(), strict=True))

        def told(done: int, total: int) -> None:
            job.emit(Phase("scoring answers with the reference", done=done, total=total))

        # Rows of like length share a batch.
        lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) + len(row["prompt_ids"]) for row in rows]
        wanted = sorted(wanted, key=lambda row: (lengths[row], row))
        told(0, len(wanted))
        model.eval()
        found = ReferenceScores(root / name, job.order.rank, job.order.world).complete(
            wanted,
            score,
            size=2 * job.resolved.micro_batch,
            device=job.device,
            stopped=lambda: job.run.requested("stop"),
            told=told,
            together=trainer.shards is not None,
        )
        model.train()
        if found is None:
            return False
        columns = [found.get(row, (math.nan, math.nan)) for row in range(len(rows))]
        scored = rows.add_column("ref_chosen_logps", [better for better, _ in columns])
        scored = scored.add_column("ref_rejected_logps", [worse for _, worse in columns])
        if name == "train":
            trainer.train_dataset = scored
        else:
            trainer.held_out = scored
    return True
