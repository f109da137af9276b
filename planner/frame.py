"""The frame of a plan: what is settled before memory comes in: rows and their length, devices, and their batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .architecture import Architecture
from .errors import DataError, HardwareError, RecipeError
from .hardware import Node
from .options import VIRTUAL_TOKENS
from .plan import Reason, Workload

if TYPE_CHECKING:
    from .recipe import Recipe

#: Sequences per optimiser step where the recipe leaves them open.
_DEFAULT_BATCH = 16
_DEFAULT_LENGTH = 2048
#: How full packed rows get: best-fit decreasing leaves a few percent.
PACKED_FILL = 0.97
#: Estimates take a token as four characters. It is at least one, so that many times the estimate is never exceeded.
_CHARACTERS = 4
#: Estimates come from the first rows: below this length a later, longer row would be cut to save next to nothing.
_SHORTEST_ESTIMATE = 512
#: How much longer than estimated the longest row is taken to be where memory is predicted.
_ESTIMATE_MARGIN = 2
#: Strategies of several devices.
_SEVERAL = ("ddp", "fsdp")


class Frame:
    """Sequence length, workload, packing, devices and batch of one plan, with the reasons for each.

    Raises:
        RecipeError: devices and batch that don't go together.
        HardwareError: more devices than there are.
        DataError: the workload is empty.
    """

    def __init__(self, recipe: Recipe, architecture: Architecture, node: Node, workload: Workload | None) -> None:
        if workload is not None and workload.examples < 1:
            raise DataError("there is no example to train on", where="data", do="Name a source with at least one row.")
        self.recipe, self.architecture, self.node = recipe, architecture, node
        self.reasons: list[Reason] = []
        self.warnings: list[str] = []
        self.cpu = node.gpu.kind == "cpu"
        self.given = workload
        self.length = self._sequence_length()
        self.workload = workload or self._assumed_workload()
        self.packing = self._packing()
        self.gpus = self._devices()
        self.batch = self._batch()

    def because(self, setting: str, value: Any, why: str) -> None:
        self.reasons.append(Reason(setting, value, why))

    def _sequence_length(self) -> int:
        asked, limit = self.recipe.sequence_length, self.architecture.max_positions
        if asked != "auto":
            if limit and asked > limit:
                name = self.architecture.name
                self.warnings.append(
                    f"sequence_length {asked} is beyond the {limit} positions that {name} was made for."
                )
            return asked
        length = min(_DEFAULT_LENGTH, limit or _DEFAULT_LENGTH)
        why = f"{_DEFAULT_LENGTH} tokens unless the model or the data is shorter"
        if limit and limit < _DEFAULT_LENGTH:
            why = f"the model was made for {limit} positions"
        longest = self.given.longest if self.given and self.recipe.method in ("sft", "distill") else 0
        estimated = self.given is not None and self.given.basis == "estimated"
        bound = 64 * math.ceil(longest * (_CHARACTERS if estimated else 1) / 64)
        if estimated:
            bound = max(bound, _SHORTEST_ESTIMATE)
        about = "about " if estimated else ""
        if longest and bound < length:
            length = bound
            why = f"the longest example has {about}{longest} tokens: a longer row would be padding"
            if estimated:
                why = f"well above the longest example, about {longest} tokens by its characters: nothing is cut"
        elif longest > length:
            why += f"; examples up to {about}{longest} tokens are cut"
        self.because("sequence_length", length, why)
        return length

    def _assumed_workload(self) -> Workload:
        examples = 1000
        why = f"no data was read: 1,000 rows of {self.length} tokens stand for it, and time scales with yours"
        self.because("workload", examples, why)
        return Workload(examples=examples, tokens=examples * self.length, longest=self.length, basis="assumed")

    def mean(self) -> float:
        """Tokens per example after cutting."""
        return max(min(self.workload.mean_tokens, float(self.length)), 1.0)

    def row_tokens(self) -> int:
        """Tokens of the longest row that memory must hold: a packed row is full, a padded one as long as its data."""
        longest = self.workload.longest
        if self.packing or not longest or self.workload.basis == "assumed":
            return self.length
        margin = _ESTIMATE_MARGIN if self.workload.basis == "estimated" else 1
        return min(self.length, max(margin * longest, 8))

    def _packing(self) -> bool:
        if self.recipe.packing != "auto":
            return self.recipe.packing
        if self.recipe.tuning.type in VIRTUAL_TOKENS:
            self.because("packing", False, "the virtual tokens stand before a row, not before each example in it")
            return False
        if self.recipe.method not in ("sft", "pretrain", "distill"):
            return False  # a pair, a judged answer and a rollout are rows of their own
        mean = self.mean()
        if self.recipe.method == "pretrain":
            self.because("packing", True, "plain text has no rows of its own: every row is filled")
            return True
        short = self.workload.basis != "assumed" and mean < self.length / 2
        share = f"{mean:.0f} of {self.length} tokens on average"
        if short and self.cpu:
            # Rows of like length share a micro-batch, and a CPU has no attention that skips what documents hide.
            self.because("packing", False, "a CPU's attention pays for all of a packed row, however it is divided")
            return False
        if short:
            self.because("packing", True, f"examples are short ({share}): without packing most of each row is padding")
        elif self.workload.basis == "assumed":
            self.because("packing", False, "the lengths of the examples are not known yet")
        else:
            self.because("packing", False, f"examples nearly fill a row ({share}): packing would gain little")
        return short

    def rows(self) -> int:
        """Rows of one epoch."""
        if not self.packing:
            from .rollout import sequences_per_row  # like the recipe itself, it needs pydantic

            return max(self.workload.examples * sequences_per_row(self.recipe), 1)
        tokens = self.mean() * self.workload.examples
        return max(math.ceil(tokens / (self.length * PACKED_FILL)), 1)

    def _devices(self) -> list[int]:
        """The devices that train; on the CPU, one number for each process."""
        request, have = self.recipe.hardware, list(self.node.devices)
        if self.cpu:
            count = (
                request.gpus if isinstance(request.gpus, int) else 1 if request.gpus == "auto" else len(request.gpus)
            )
            have = list(range(count))
        if request.gpus == "auto":
            chosen = have[:1] if request.strategy == "single" else have
            if len(have) > 1:
                self.because("gpus", chosen, f"{'one' if len(chosen) == 1 else 'all'} of the {len(have)} GPUs here")
        elif isinstance(request.gpus, int):
            chosen = have[: request.gpus]
        elif self.cpu:
            chosen = have
        else:
            chosen = [index for index in request.gpus if index in have]
        here = f"{len(have)} {'GPU' if len(have) == 1 else 'GPUs'}"
        if isinstance(request.gpus, int) and request.gpus > len(chosen):
            what, do = f"{request.gpus} GPUs asked for, {here} here", f"Use hardware.gpus: {len(have)}."
            raise HardwareError(what, where="hardware.gpus", do=do)
        if not isinstance(request.gpus, int | str) and (gone := sorted(set(request.gpus) - set(chosen))):
            what = f"no GPU {', '.join(map(str, gone))} here: {here}, with {'index' if len(have) == 1 else 'indices'}"
            do = f"Use indices of these in hardware.gpus, or hardware.gpus: {len(have)}."
            raise HardwareError(f"{what} {', '.join(map(str, have))}", where="hardware.gpus", do=do)
        if request.strategy == "single" and len(chosen) > 1:
            do = "Set hardware.gpus: 1, or strategy: ddp."
            raise RecipeError(f"strategy single can't use {len(chosen)} devices", where="hardware.strategy", do=do)
        if request.strategy in _SEVERAL and len(chosen) < 2:
            do = "Set hardware.gpus to 2 or more on a machine that has them, or strategy: single."
            what = f"strategy {request.strategy} needs at least two devices"
            raise HardwareError(what, where="hardware.strategy", do=do)
        return chosen

    def _batch(self) -> int:
        """Sequences per optimiser step over all ranks; ranks are given up before the batch gets larger."""
        recipe, rows = self.recipe, self.rows()
        if recipe.batch_size != "auto":
            self._give_up_devices(recipe.batch_size)
            self._share(recipe.batch_size, "batch_size")
            return recipe.batch_size
        if recipe.batch_tokens != "auto":
            batch = max(recipe.batch_tokens // self.length, 1)
            why = f"{recipe.batch_tokens} tokens are {batch} rows of {self.length}"
        else:
            batch, why = self._default_batch(rows)
        free = self.recipe.hardware.gpus == "auto" and recipe.micro_batch == "auto"
        while free and len(self.gpus) > 1 and len(self.gpus) > batch:
            self.gpus = self.gpus[:-1]
        least = 2 if recipe.method == "kto" else 1  # its KL needs another row's answer
        micro = recipe.micro_batch if recipe.micro_batch != "auto" else least
        from .rollout import group_size

        unit = math.lcm(len(self.gpus) * micro, group_size(recipe))
        rounded = max(batch // unit, 1) * unit
        if rounded != batch:
            why += f", rounded so that {len(self.gpus)} device(s) share it evenly"
        self.because("batch_size", rounded, why)
        return rounded

    def _default_batch(self, rows: int) -> tuple[int, str]:
        """Sixteen examples. Packing changes the shape of a step, not how many examples an update averages over."""
        batch, why = _DEFAULT_BATCH, f"{_DEFAULT_BATCH} sequences per step are a common start"
        if self.packing and self.recipe.method in ("sft", "distill"):
            per_row = self.length * PACKED_FILL / self.mean()
            batch = max(math.ceil(_DEFAULT_BATCH / per_row), len(self.gpus))
            why = f"about {batch * per_row:.0f} examples per step, {per_row:.0f} to a packed row"
        return (batch, why) if batch <= rows else (rows, f"the data is only {rows} rows long")

    def _give_up_devices(self, batch: int) -> None:
        """Leave devices idle that were not asked for, until the rest share the batch evenly."""
        micro = self.recipe.micro_batch if self.recipe.micro_batch != "auto" else 1
        fewest = 2 if self.recipe.hardware.strategy in _SEVERAL else 1
        if self.recipe.hardware.gpus != "auto":
            return
        even = [n for n in range(len(self.gpus), fewest - 1, -1) if batch % (n * micro) == 0]
        if even and even[0] < len(self.gpus):
            self.gpus = self.gpus[: even[0]]
            self.because("gpus", self.gpus, f"a batch of {batch} can be shared evenly by no more than {even[0]}")

    def _share(self, batch: int, field: str) -> None:
        world = len(self.gpus)
        micro = self.recipe.micro_batch if self.recipe.micro_batch != "auto" else 1
        unit = world * micro
        if batch % unit:
            low, high = batch // unit * unit, (batch // unit + 1) * unit
            near = f"{low} or {high}" if low else f"{high}"
            what = f"{field} {batch} can't be split over {world} device(s) with micro_batch {micro}"
            raise RecipeError(what, where=field, do=f"Use {field}: {near}.")

    def padding_share(self, micro: int) -> float:
        """Useful tokens in a padded micro-batch: its width is the longest of ``micro`` examples.

        Lengths are taken as evenly spread around the mean up to the longest; the expected maximum of n draws from
        0 to m is m n / (n + 1).
        """
        mean, longest = self.mean(), min(self.workload.longest or self.length, self.length)
        if micro == 1 or longest <= mean:
            return 1.0
        low = max(2 * mean - longest, 1.0)
        width = min(low + (longest - low) * micro / (micro + 1), self.length)
        return min(mean / max(width, mean), 1.0)
