"""Fills every ``auto`` of a recipe: the fastest plan that fits, with the reason for each choice.

The search runs over storage (precision and optimiser, best first), then over micro batch and checkpointing, fastest
first; what the user set is taken as it is and only checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Self, get_args

from . import replay
from .architecture import Architecture
from .candidate import Candidate
from .cost import Overhead, checkpoint_bytes, cost_of, duration, overhead
from .disk import disk_of
from .errors import HardwareError, RecipeError
from .frame import PACKED_FILL, Frame
from .fused import stack_on
from .hardware import Node, Offer
from .memory import peak_memory
from .methods import METHODS
from .options import NOT_RECOMPUTED, TUNING_KEYS
from .packed import check_packed
from .passes import passes_of
from .plan import Checkpointing, Cost, HardwareSummary, ModelSummary, Plan, Resolved, Workload
from .policies import ways_to_checkpoint
from .reasons import EQUALLY_FAST, explain_choice, explain_experts, in_order
from .settings import Settings
from .space import Space
from .speed import step_speed
from .stacks import Stack, find_stack
from .trained import trained_parameters
from .vllm import set_aside_gib
from .work import LAYER_SHARE

if TYPE_CHECKING:
    from .calibration import Correction, Finished
    from .recipe import Recipe


def make_plan(
    recipe: Recipe,
    architecture: Architecture,
    node: Node,
    workload: Workload | None = None,
    *,
    framework: str = "finetui",
    offers: Iterable[Offer] | None = None,
    finished: Iterable[Finished] = (),
) -> Plan:
    """Plan a recipe for one machine.

    Args:
        workload: how much there is to train on; without it a thousand full rows.
        framework: whose run is predicted, a name in :data:`.stacks.STACKS`.
        offers: where to look for prices; ``None``: the shipped ones.
        finished: runs that were measured before (:func:`.calibration.history`); those of the same GPU, family and
            tuning correct the prediction.

    Returns:
        The plan. One that does not fit has ``fits`` false, and what would make it fit in ``warnings``.

    Raises:
        RecipeError: the method is not supported yet, or a combination can't work.
        HardwareError: more devices than there are, or a batch that they can't share.
        ModelError: the checkpoint's weights are packed in a way that this can't be trained on.
    """
    if framework == "finetui":
        check_packed(recipe, architecture.packed, architecture.name)
    return Solver.of(recipe, architecture, node, workload, framework, finished).plan(offers)


class Solver:
    """One planning: what is settled so far, and why."""

    def __init__(
        self, recipe: Recipe, architecture: Architecture, node: Node, workload: Workload | None, stack: Stack,
        finished: Iterable[Finished] = (),
    ) -> None:  # fmt: skip
        if recipe.hardware.kernels == "on" and node.gpu.kind == "cpu":
            do = "Use kernels: auto, or off."
            raise HardwareError("fused kernels need a CUDA GPU", where="hardware.kernels", do=do)
        if recipe.hardware.graphs is True and (node.gpu.kind == "cpu" or recipe.method not in ("sft", "pretrain")):
            what = "steps are replayed on a CUDA GPU, under sft and pretrain"
            raise HardwareError(what, where="hardware.graphs", do="Remove it.")
        if recipe.method == "distill" and stack.name != "finetui":
            do = "Leave --framework out, or set method: sft."
            raise RecipeError(f"what distill takes in {stack.name} is not known", where="method", do=do)
        if recipe.limits.cost_usd is not None and node.local and recipe.hardware.usd_per_h is None:
            do = "Set hardware.usd_per_h to what this machine costs per hour, or use limits.hours."
            raise RecipeError("a limit on cost has no effect without a price", where="limits.cost_usd", do=do)
        self.recipe, self.architecture, self.stack = recipe, architecture, stack
        self.node, self.measured = _as_measured(node)
        self.frame = Frame(recipe, architecture, self.node, workload)
        if recipe.hardware.graphs is True and len(self.frame.gpus) > 1 and recipe.hardware.strategy != "fsdp":
            do = "Remove it, or use one GPU with hardware.gpus: 1."
            raise HardwareError("steps are replayed on one GPU alone", where="hardware.graphs", do=do)
        self._finished = list(finished)
        self._corrections: dict[tuple[str, bool], Correction | None] = {}
        self.because, self.warnings = self.frame.because, self.frame.warnings
        passes = passes_of(recipe, self.frame.row_tokens(), architecture) if stack.name == "finetui" else None
        self.space = Space(recipe, architecture, self.node, stack, self.frame, passes)
        aside = set_aside_gib(recipe, architecture, node.gpu)
        if aside:
            self.because("rollout", "vllm", f"{aside:.1f} GiB of the GPU are left to vLLM's copy of the model")
        # Processes share the host's memory.
        self.limit = (node.gpu.memory_gib - aside) / (len(self.frame.gpus) if self.frame.cpu else 1)

    @classmethod
    def of(
        cls, recipe: Recipe, architecture: Architecture, node: Node, workload: Workload | None, framework: str,
        finished: Iterable[Finished],
    ) -> Self:  # fmt: skip
        """A solver for a framework by its name; arguments as of :func:`make_plan`."""
        return cls(recipe, architecture, node, workload, find_stack(framework), finished)

    def rows_of(self, settings: Settings) -> tuple[Settings, float, float | None]:
        """Settings as an average step sees them, the useful share of its tokens, and what attention spans."""
        mean = self.frame.mean()
        if self.frame.packing:
            return settings, PACKED_FILL, mean
        # A row is padded to the longest of its micro-batch, not to the sequence length.
        useful = self.frame.padding_share(settings.micro_batch)
        return replace(settings, sequence_length=max(round(mean / useful), 8)), useful, None

    def _evaluate(self, settings: Settings) -> Candidate:
        memory = peak_memory(self.architecture, settings, self.stack, self.node.gpu)
        now, useful, span = self.rows_of(settings)
        speed = step_speed(self.architecture, now, self.stack, self.node.gpu, useful=useful, mean_length=span)
        correction = self.correction(settings)
        if correction:
            from .calibration import corrected_memory, corrected_speed

            memory, speed = corrected_memory(memory, correction), corrected_speed(speed, correction)
        return Candidate(settings, memory, speed)

    def correction(self, settings: Settings) -> Correction | None:
        """What finished runs like this one teach, split over devices and replayed as it would be."""
        if not self._finished:
            return None
        spread = (self._strategy(settings), settings.graphs)
        if spread not in self._corrections:
            from .calibration import Kind, correction, size_of

            of, size = self.architecture, size_of(self.architecture.parameters)
            kind = Kind(self.node.gpu.name, of.family, self.recipe.tuning.type, size, self.stack.name, *spread)
            self._corrections[spread] = correction(self._finished, kind)
        return self._corrections[spread]

    def _strategy(self, settings: Settings) -> str:
        return settings.strategy if len(self.frame.gpus) > 1 else "single"

    def search(self) -> tuple[Candidate, list[Candidate]]:
        limit = self.limit
        hardware = self.recipe.hardware
        policy: Checkpointing | None = None if hardware.checkpointing == "auto" else hardware.checkpointing
        if policy is None and self.recipe.tuning.type in NOT_RECOMPUTED:
            policy = "none"
        kept = None if hardware.kept_layers == "auto" else hardware.kept_layers
        tried: list[Candidate] = []
        unsure: Candidate | None = None  # fits, but not at the high end of its interval
        for strategy, storage in self.space.ways():
            found = [
                self._evaluate(settings)
                for micro in self.space.micro_batches()
                for settings in ways_to_checkpoint(
                    self.architecture,
                    self.space.settings(micro, storage, strategy),
                    self.stack,
                    self.node,
                    limit,
                    policy,
                    kept,
                )
            ]
            tried += found
            safe = _fastest([candidate for candidate in found if candidate.fits(limit, safely=True)])
            if safe:
                return safe, tried
            unsure = unsure or _fastest([candidate for candidate in found if candidate.fits(limit)])
        return unsure or min(tried, key=lambda candidate: candidate.memory.device_gib), tried

    def beside(self, best: Candidate, resolved: Resolved) -> Overhead:
        """What stands around the steps of a run."""
        trainable = trained_parameters(self.architecture, best.settings)
        return overhead(
            self.architecture,
            self.node,
            teacher=best.settings.beside.teacher,
            step_s=best.speed.step_s,
            steps=resolved.steps,
            batch_size=resolved.batch_size,
            eval_examples=self.frame.workload.eval_examples,
            reference_examples=self.frame.workload.examples if best.settings.beside.once else 0,
            eval_every=resolved.eval_every,
            checkpoint_every=resolved.checkpoint_every,
            checkpoint_bytes=checkpoint_bytes(best.settings, trainable),
        )

    def plan(self, offers: Iterable[Offer] | None) -> Plan:
        best, tried = self.search()
        limit = self.limit
        fits = best.fits(limit)
        self._explain(best, tried, limit)
        best = self._replayed(best)
        correction = self.correction(best.settings)
        if correction:
            runs = f"{correction.runs} finished runs of this GPU, family, size and tuning"
            factors = f"memory x {correction.memory:.2f}, speed x {correction.speed:.2f}"
            self.because("basis", "calibrated", f"{runs}: {factors} against the formula")
        if self.measured:
            why = f"matrix products and copies of this machine were measured by finetui bench on {self.measured}"
            self.because("basis", "measured", why)
        resolved = self._resolve(best)
        trainable = trained_parameters(self.architecture, best.settings)
        extra = self.beside(best, resolved)
        teacher = best.settings.beside.teacher
        if teacher is not None:
            self.because("teacher", *teacher.told(best.settings.compute_bytes, self.stack))
        time_s = resolved.steps * best.speed.step_s + extra.total_s
        node = replace(self.node, count=len(self.frame.gpus)) if not self.frame.cpu else self.node
        cost = cost_of(time_s, node, offers, usd_per_h=self.recipe.hardware.usd_per_h)
        if cost.stale:
            since = f"is of {cost.as_of}" if cost.as_of != "unknown" else "is undated"
            self.because("price", cost.usd_per_h, f"{cost.provider}'s {since}: look at it again before you rent")
        self._hold_against_limits(time_s, cost)
        if not self.architecture.exact:
            self.warnings.append(f"{self.architecture.note}. Figures are less certain.")
        if self.node.gpu.compute_capability.startswith("gfx"):
            own = "finetui finds GPUs through NVIDIA's driver and has not been run on AMD's"
            self.warnings.append(f"{own}: these figures are a formula's alone.")
        if self.architecture.packed is not None and self.architecture.packed.opened:
            stored = f"the checkpoint's {self.architecture.packed.title} is opened as it is read, to be trained on"
            self.because("weights", "16 bits", stored)
        if not fits:
            self.warnings += self._ways_out(best, limit, resolved)
        gpu = self.node.gpu
        return Plan(
            model=ModelSummary(
                self.architecture.name,
                self.architecture.parameters,
                trainable,
                self.architecture.family,
                self.architecture.breakdown,
            ),
            hardware=HardwareSummary(gpu.name, len(self.frame.gpus), gpu.memory_gib, gpu.kind, self.node.local),
            fits=fits,
            memory=best.memory,
            speed=best.speed,
            time_s=time_s,
            cost=cost,
            resolved=resolved,
            workload=self.frame.workload,
            reasons=in_order(self.frame.reasons),
            warnings=self.warnings,
            basis="calibrated" if correction else "measured" if self.measured else "formula",
            correction={"memory": correction.memory, "speed": correction.speed} if correction else {},
            disk=disk_of(self.recipe, self.architecture, best.settings, trainable),
            teacher=None if teacher is None else teacher.summary(best.settings.compute_bytes, self.stack),
        )

    def _replayed(self, best: Candidate) -> Candidate:
        """The same with steps replayed as CUDA graphs, where that was left open and pays."""
        if self.recipe.hardware.graphs != "auto" or self.stack.name != "finetui" or self.node.gpu.kind != "cuda":
            return best
        ours = stack_on(self.architecture, best.settings, self.stack, self.node.gpu).whole_layers
        if replay.obstacle(self.recipe, best, whole_layers=ours, packing=self.frame.packing, steps=self._steps()):
            return best
        replayed = self._evaluate(replace(best.settings, graphs=True))
        why = replay.pays(best, replayed, self.limit)
        if not why:
            return best
        self.because("graphs", True, why)
        return replayed

    def _steps(self) -> int:
        """Of the optimiser, over the whole run."""
        per_epoch = math.ceil(self.frame.rows() / self.frame.batch)
        steps = max(math.ceil(per_epoch * self.recipe.epochs), 1)
        return steps if self.recipe.max_steps is None else min(steps, self.recipe.max_steps)

    def _hold_against_limits(self, time_s: float, cost: Cost) -> None:
        limits, elsewhere = self.recipe.limits, "finetui gpus ranks the machines that keep to it."
        if limits.hours is not None and time_s > 3600 * limits.hours:
            takes = f"The run takes about {duration(time_s)}"
            self.warnings.append(f"{takes}: limits.hours ends it after {duration(3600 * limits.hours)}. {elsewhere}")
        if limits.cost_usd is not None and cost.usd > limits.cost_usd:
            price = f"The run costs about {cost.usd:.2f} USD"
            self.warnings.append(f"{price}: limits.cost_usd ends it at {limits.cost_usd:.2f}. {elsewhere}")

    def _ways_out(self, best: Candidate, limit: float, resolved: Resolved) -> list[str]:
        from .remedies import nearest_changes, said_in

        tokens = self.frame.workload.tokens * self.recipe.epochs
        if self.recipe.max_steps:
            tokens = min(tokens, self.recipe.max_steps * resolved.batch_size * self.frame.mean())
        ways = nearest_changes(
            self.architecture, best.settings, self.stack, self.node, limit, tokens, said_in(self.recipe),
            partial(set_aside_gib, self.recipe, self.architecture),
            splits=self.stack.name == "finetui" and self.space.obstacle is None and not self.frame.cpu,
        )  # fmt: skip
        return [str(way) for way in ways] or ["No single change makes it fit: use a smaller model."]

    def _explain(self, best: Candidate, tried: list[Candidate], limit: float) -> None:
        row, length = self.frame.row_tokens(), self.frame.length
        if row < 0.75 * length:
            twice = "twice the longest estimate" if self.frame.workload.basis == "estimated" else "the longest example"
            self.because("row_tokens", row, f"memory is for padded rows of {twice}; the limit of {length} cuts later")
        self.frame.reasons += explain_experts(self.architecture, best.settings, self.stack)
        own = self.stack.name == "finetui"
        obstacle = self.space.obstacle if own else None
        self.frame.reasons += explain_choice(self.recipe, best, tried, self.node.gpu, limit, obstacle)

    def _resolve(self, best: Candidate) -> Resolved:
        recipe, settings, full = self.recipe, best.settings, self.recipe.tuning.family == "full"
        steps = self._steps()
        warmup = math.ceil(recipe.optimizer.warmup_ratio * steps)
        rate = recipe.optimizer.learning_rate
        if rate == "auto":
            rate = METHODS[recipe.method].rate[0 if full else 1]
            kind = "all weights" if full else "adapters"
            self.because("learning_rate", rate, f"the usual start for {METHODS[recipe.method].title} of {kind}")
        train_on = recipe.train_on
        if train_on == "auto":
            train_on = "all" if recipe.method == "pretrain" else "answers"
            self.because(
                "train_on",
                train_on,
                "the model should learn to answer, not to ask"
                if train_on == "answers"
                else "every token is text to learn",
            )
        used = TUNING_KEYS[recipe.tuning.type]
        rank = recipe.tuning.rank if "rank" in used else 0
        alpha = recipe.tuning.alpha if recipe.tuning.alpha != "auto" else 2.0 * recipe.tuning.rank
        return Resolved(
            method=recipe.method,
            tuning=recipe.tuning.type,
            rank=rank,
            alpha=float(alpha) if "alpha" in used else 0.0,
            dropout=recipe.tuning.dropout,
            targets=recipe.tuning.targets,
            quantization=recipe.tuning.stored,
            sequence_length=self.frame.length,
            micro_batch=settings.micro_batch,
            accumulation=settings.accumulation,
            packing=self.frame.packing,
            train_on=train_on,
            epochs=recipe.epochs,
            steps=steps,
            warmup_steps=min(warmup, max(steps - 1, 0)),
            optimizer=settings.optimizer,
            learning_rate=float(rate),
            schedule=recipe.optimizer.schedule,
            weight_decay=recipe.optimizer.weight_decay,
            max_grad_norm=recipe.optimizer.max_grad_norm,
            precision=settings.precision,
            checkpointing=settings.checkpointing,
            kept_layers=settings.kept_layers,
            graphs=settings.graphs,
            attention="sdpa",
            kernels="off" if self.frame.cpu and recipe.hardware.kernels == "auto" else recipe.hardware.kernels,
            strategy=self._strategy(settings),  # type: ignore[arg-type]
            device="cpu" if self.frame.cpu else "cuda",
            gpus=self.frame.gpus,
            checkpoint_every=self._checkpoint_every(steps, best.speed.step_s),
            eval_every=self._eval_every(steps),
            seed=recipe.seed,
            tuning_options=recipe.tuning.options.to_dict(),
            optimizer_options=recipe.optimizer.options.to_dict(),
            neftune_alpha=recipe.neftune_alpha,
        )

    def _checkpoint_every(self, steps: int, step_s: float) -> int:
        if self.recipe.checkpoint.every != "auto":
            return self.recipe.checkpoint.every
        # A quarter of an hour of work is the most that a crash may cost; and at least a few per run.
        every = max(1, min(math.ceil(900 / max(step_s, 1e-6)), math.ceil(steps / 4)))
        self.because("checkpoint_every", every, f"a crash costs at most {duration(every * step_s)} of work")
        return every

    def _eval_every(self, steps: int) -> int:
        if self.recipe.evaluation.every != "auto":
            return self.recipe.evaluation.every
        every = max(1, math.ceil(steps / 10))
        if self.frame.workload.eval_examples:
            self.because("eval_every", every, "about ten evaluations over the run")
        return every


def _as_measured(node: Node) -> tuple[Node, str]:
    """This machine with the speeds that ``finetui bench`` found, and when that was; other machines as they are."""
    if not node.local:
        return node, ""
    from .ceilings import for_gpu

    found = for_gpu(node.gpu.name)
    if found is None:
        return node, ""
    gpu = found.on(node.gpu)
    if found.bf16_tflops and gpu.kind == "cuda":
        # The catalog's share is of the best product there is; bench measures those of real layers.
        gpu = replace(gpu, achievable=min(1.0, gpu.achievable / LAYER_SHARE))
    return replace(node, gpu=gpu), found.date


def _fastest(candidates: list[Candidate]) -> Candidate | None:
    """The fastest; of those as fast, the one that computes least again, and then the largest micro-batch: it launches
    fewest kernels, which on small models counts for more than is predicted."""
    best = max((candidate.speed.tokens_per_s for candidate in candidates), default=0.0)
    like = [c for c in candidates if c.speed.tokens_per_s >= (1 - EQUALLY_FAST) * best]
    order = get_args(Checkpointing)
    return min(like, key=lambda c: (order.index(c.settings.checkpointing), -c.settings.micro_batch), default=None)
