"""What is saved of a trainer, and how one goes on from it, over whichever class of TRL it stands on.

A checkpoint holds weights, the states of optimiser, schedule and loss scaler, and what each rank has to itself (random
numbers, completions in use); see :mod:`.state`. It is made by all ranks together, written by rank 0 alone
(:mod:`.saving`), and if rank 0 can't write it, all of them end.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...planner.errors import RunError, first_line
from ..checkpoints import store
from ..durable import reported_as_disk_error
from ..evaluate import reduce_sum
from ..events import Fallback
from ..models.load import Emit
from .adalora import PATTERN, allocates, load_state, state_of
from .adalora import STATE as ADALORA
from .order import Order
from .saving import Saver
from .shards import NAMED, Shards, numbered
from .state import (
    OPTIMIZER,
    Part,
    Snapshot,
    as_part,
    as_parts,
    as_stored,
    copied_tree,
    descriptions,
    gathered,
    random_state,
    rank_file,
    read_adapter,
    set_random_state,
    weights_of,
)
from .translated import translated
from .tree import read_tree

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class Resumable(_Trainer):
    """A mixin before a trainer of TRL, which calls the methods whose names begin with ``_save`` and ``_load``."""

    shards: Shards | None
    """The model where it is split over the ranks; an adapter to go on from has been read then."""
    order: Order
    tokens: int
    """Non-padding tokens processed so far, over all ranks and attempts."""
    saver: Saver
    emit: Emit
    identity: dict[str, Any]
    """What a checkpoint notes down so that a resume can tell whether it goes on with the same run."""

    def __init__(self, **rest: Any) -> None:
        self.on_saved: Callable[[int], None] = lambda step: None
        """Called with its step when a checkpoint is complete, perhaps from another thread."""
        self._described: dict[str, bytes] = {}
        self._resumed_state: Any = None
        self._resumed_rank: Any = None
        super().__init__(**rest)

    def trained_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What is updated, by name."""
        raise NotImplementedError

    # --- what a method may add

    def finish(self) -> None:
        """Leave the model as it is to be written out; most have nothing to take off."""

    def model_to_save(self) -> contextlib.AbstractContextManager[Any]:
        """The model as its checkpoint shall have it."""
        return contextlib.nullcontext(self.model)

    def whole_model(self) -> contextlib.AbstractContextManager[Any]:
        """The model as rank 0 can write it; every rank has to come here."""
        return contextlib.nullcontext(self.model) if self.shards is None else self.shards.split.whole()

    def own_state(self) -> Any:
        """What each rank of a method needs beside weights, optimiser and random numbers: a tree; most need nothing."""
        return None

    def load_own_state(self, state: Any) -> None:
        """Take back what :meth:`own_state` gave, all its tensors on the CPU."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Rank 0 gathers what the ranks have to themselves and saves all of it."""
        step, since = self.state.global_step, time.perf_counter()
        mine = {"random": random_state(self.args.device), "own": self.own_state()}
        ranks = gathered(copied_tree(mine), self.args.should_save)
        if self.shards is not None:  # host memory need not hold a second whole beside the one that is being written
            with self._all_or_none():
                self.saver.wait()
        split = None if self.shards is None else (self.shards.state(self.optimizer), self.shards.split.whole())
        with split[1] if split else contextlib.nullcontext() as whole, self._all_or_none():
            if self.args.should_save:
                facts = {"tokens": self.tokens, "world_size": self.args.world_size}
                facts |= {"rows": self.order.rows, "batch_size": self.order.batch_size}
                assert not facts.keys() & self.identity.keys()
                facts |= self.identity
                snapshot = self._snapshot(ranks, (split[0], whole) if split else None)
                self.saver.save(step, snapshot, facts, partial(self.on_saved, step), since)

    def _snapshot(self, ranks: list[Any], put_together: tuple[Any, Any] | None = None) -> Snapshot:
        """What a checkpoint holds; ``put_together``: optimiser states and model of shards."""
        with contextlib.nullcontext(put_together[1]) if put_together else self.model_to_save() as model:
            if not self._described:  # a tokenizer does not change, and may be many megabytes
                self._described = descriptions(model, self.processing_class)
            parts, weights, arrange = weights_of(model)
            files = self._described | (descriptions(model) if hasattr(model, "peft_config") else {})
        scaler = getattr(self.accelerator, "scaler", None)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        updates = put_together[0] if put_together else optimizer.state_dict()
        state = {"optimizer": updates, "scheduler": scheduler.state_dict()}
        state["scaler"] = scaler.state_dict() if scaler is not None else None
        parts |= as_parts(OPTIMIZER, state)
        for rank, own in enumerate(ranks):
            parts[rank_file(rank)] = as_part(own)
        if allocates(self.model):
            tensors, pattern = state_of(self.model)
            parts[ADALORA] = Part(tensors)
            files[PATTERN] = pattern
        files["trainer_state.json"] = json.dumps(as_stored(self.state), indent=1).encode()
        return Snapshot(files, parts, weights, arrange, private=put_together is not None)

    def agree_on_failed_save(self, failed: bool) -> None:
        """After all ranks have learned of it: every rank ends, the one that could not write with the reason."""
        if not failed:
            return
        self.saver.wait()
        raise RuntimeError("rank 0 could not write a checkpoint")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; returns when the last checkpoint is on the disk."""
        try:
            done = super().train(*args, **kwargs)
            with self._all_or_none():
                self.saver.wait()
        finally:
            self.saver.end()
        return done

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """If a rank fails in the block, every rank fails after it, and none waits for ever."""
        failure: Exception | None = None
        try:
            with reported_as_disk_error("the checkpoint can't be written", self.saver.directory):
                yield
        except Exception as error:
            failure = error
        failed = reduce_sum(torch.tensor(int(failure is not None)), self.args.device).item()
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError("rank 0 could not write a checkpoint")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Adapters are read back in place; a full model was loaded from the checkpoint in the first place."""
        folder = Path(resume_from_checkpoint)
        self.tokens = json.loads((folder / store.MANIFEST).read_text(encoding="utf-8"))["facts"]["tokens"]
        if self.shards is None:
            self._resumed_state = read_tree(folder / OPTIMIZER)
        if allocates(self.model):
            load_state(self.model, folder)
        elif self.shards is None:
            read_adapter(self.model, folder)
        mine = folder / rank_file(self.args.process_index)
        if mine.is_file():
            self._resumed_rank = read_tree(mine)
        if self._resumed_rank is not None and self._resumed_rank["own"] is not None:
            self.load_own_state(self._resumed_rank["own"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.shards is not None and checkpoint is not None:
            self._resumed_state = self.shards.read(self.optimizer, Path(checkpoint) / OPTIMIZER)
        elif self._resumed_state is not None and NAMED in self._resumed_state["optimizer"]:
            updates = numbered(self.optimizer, self.trained_parameters(), self._resumed_state["optimizer"])
            self._resumed_state["optimizer"] = updates
        if self._resumed_state is not None:
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            try:
                updates, changed = translated(optimizer, self._resumed_state["optimizer"])
                optimizer.load_state_dict(updates)
            except ValueError as error:  # of other groups, or of another optimiser of the same name
                what = f"the optimiser can't go on from its state in this checkpoint ({first_line(error)})"
                do = "Resume it with the release of finetui, and with the kernels and devices, that wrote it."
                raise RunError(what, where=str(checkpoint), do=do) from error
            if changed:
                why = "this attempt steps with another AdamW than the one that wrote the checkpoint"
                self.emit(Fallback("8-bit optimiser states go on in another format, nearly the same", why))
            scheduler.load_state_dict(self._resumed_state["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if self._resumed_state is not None and scaler is not None and self._resumed_state["scaler"] is not None:
            scaler.load_state_dict(self._resumed_state["scaler"])
        self._resumed_state = None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random numbers go on where they were; a rank that was not there then begins with numbers of its own."""
        if checkpoint is None:
            return
        if self._resumed_rank is not None:
            set_random_state(self._resumed_rank["random"], self.args.device)
        else:
            torch.manual_seed(self.args.seed + 1_000_003 * self.args.process_index + self.state.global_step)
        self._resumed_rank = None
