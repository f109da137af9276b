"""Learning from better and worse answers: DPO and its kin, KTO, and the methods that need no reference.

DPO, IPO and KTO are TRL's trainers with its losses; ORPO, CPO and SimPO are losses of our own over the same batches and
the same tiled output head, so that the logits of both halves of a pair are never in memory at once (TRL's experimental
trainers hold them). The reference of an adapter run is the base with its adapters off; full fine-tuning needs no second
model either where the reference's log-probabilities were computed before the first step (``reference.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from ...planner.objective import Objective, objective
from ..evaluate import reduce_sum
from ..events import Fallback, LogLine
from . import cpu_head
from .example_mean import ExampleMeanTrainer
from .job import Job
from .reference import Absent, copy_of_base, starts_as_its_base, without_padding_mask
from .shared_prompt import Shares, saved, share_prompts

#: The share of tokens from which on it pays to compute prompts once.
_PAYS = 0.1


class PreferenceTrainer(ExampleMeanTrainer):
    """What the trainers of this file share: whose word the reference is.

    Args:
        objective: what is optimised.
        reference: a second model, or None.
    """

    objective: Objective
    ref_model: Any
    precompute_ref_logps: bool
    aux_loss_enabled: bool

    def __init__(self, *, objective: Objective, reference: Any = None, **rest: Any) -> None:
        self.objective = objective
        model, context = rest["model"], rest["numerics"].context(rest["args"].device)
        absent = reference is None and (objective.reference != "adapter-off" or starts_as_its_base(model, context))
        if absent:
            # Without a reference model TRL would load a second copy, or add one of the adapters.
            reference = Absent(model.config)
        super().__init__(ref_model=reference, **rest)
        if absent:
            self.ref_model = None
        if cpu_head.needed(self.args.device):
            for scored in filter(None, (self.model, self.ref_model)):
                cpu_head.give_word_scores(scored)
        self.precompute_ref_logps = objective.reference == "precomputed"
        if not self.aux_loss_enabled:  # which counts real tokens by the mask
            without_padding_mask(self.model)


class PairTrainer(PreferenceTrainer, DPOTrainer):
    """DPO with any loss of TRL's, and IPO, which is one of them."""

    def share_prompts(self, job: Job) -> str:
        """Compute each prompt once for both of its answers, or say why not."""
        if self.aux_loss_enabled:
            return "the load of experts is balanced over every token of every answer"
        for scored in filter(None, (self.model, self.ref_model)):
            if why := share_prompts(scored, job.resolved.sequence_length, self.numerics.context(job.device)):
                return why
        self.collate = _Sharing(self.collate, job.multiple_of)
        return ""


class JudgedTrainer(PreferenceTrainer, KTOTrainer):
    """KTO: answers that are good or bad, each by itself."""


class ReferenceFreeTrainer(PairTrainer):
    """ORPO (arXiv:2403.07691), CPO (arXiv:2401.08417) and SimPO (arXiv:2405.14734).

    With l the mean log-probability of an answer's tokens (in CPO: their sum) and w the better, r the worse answer::

        orpo   nll(prompt, w) - beta log sigmoid(log odds(l_w) - log odds(l_r)),  log odds(l) = l - log(1 - e^l)
        cpo    -log sigmoid(beta (l_w - l_r)) + nll_weight nll(w)
        simpo  -log sigmoid(beta (l_w - l_r) - margin) + nll_weight nll(w)

    Likelihoods are means over the tokens of the whole batch of a step, however that is cut into micro-batches.
    """

    def __init__(self, *, method: str, **rest: Any) -> None:
        self.method = method
        super().__init__(**rest)

    def _nll_labels(self, inputs: dict[str, Any]) -> torch.Tensor:
        """``[pairs, length]``: whether a token of the better answers counts for their likelihood."""
        mask = inputs["attention_mask"] if self.method == "orpo" else inputs["completion_mask"]
        half: torch.Tensor = mask[: len(mask) // 2].clone()
        half[:, 0] = 0  # nothing predicts the first token
        return half

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        counts = [self._nll_labels(batch).sum() for batch in batch_samples]
        return reduce_sum(torch.stack(counts).sum(), device)

    def loss_of(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """Pairwise loss and likelihood, and the figures of both."""
        ids, answers = inputs["input_ids"], inputs["completion_mask"]
        pairs = len(ids) // 2
        likely = self._nll_labels(inputs)
        scored = answers.clone()
        scored[:pairs] |= likely
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        out = model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            labels=ids.masked_fill(scored == 0, -100),
            use_cache=False,
            fused_lm_head=True,
            **extra,
            **{name: inputs[name] for name in ("shares",) if name in inputs},
        )
        logps, answers = out.log_probs, answers[:, 1:]
        per_answer = (logps * answers).sum(1)
        averaged = self.method in ("orpo", "simpo") or "ipo" in self.objective.losses
        if averaged:
            per_answer = per_answer / answers.sum(1).clamp(min=1)
        better, worse = per_answer.float().chunk(2)
        nll_sum = -(logps[:pairs] * likely[:, 1:]).sum()
        losses, figures = self._pairwise(better, worse)
        loss = losses.mean()
        if self.objective.nll_weight:
            tokens, share = likely.sum().clamp(min=1), 1.0
            if num_items is not None:
                # The trainer divides by micro-batches, and DDP by ranks; this sum is over all of them.
                tokens, share = num_items, self.args.gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss + self.objective.nll_weight * nll_sum / tokens * share
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * out.aux_loss
        reward = self.objective.beta * per_answer.detach().float()
        chosen, rejected = reward.chunk(2)
        self._tell(
            {
                "rewards/chosen": chosen.mean(),
                "rewards/rejected": rejected.mean(),
                "rewards/margins": (chosen - rejected).mean(),
                "rewards/accuracies": (chosen > rejected).float().mean(),
                "logps/chosen": better.detach().mean(),
                "logps/rejected": worse.detach().mean(),
                "nll_loss": nll_sum.detach() / likely.sum().clamp(min=1),
                **figures,
            }
        )
        return loss

    def _pairwise(self, better: torch.Tensor, worse: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        beta, smoothing = self.objective.beta, self.objective.label_smoothing
        difference = better - worse
        if self.method == "orpo":
            log_odds = difference - (_log1mexp(better) - _log1mexp(worse))
            ratio = logsigmoid(log_odds)
            return -beta * ratio, {"log_odds_ratio": ratio.detach().mean(), "log_odds": log_odds.detach().mean()}
        if "hinge" in self.objective.losses:
            return torch.relu(1 - beta * difference), {}
        if "ipo" in self.objective.losses:
            return (difference - 1 / (2 * beta)) ** 2, {}
        logits = beta * difference - self.objective.margin
        return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits), {}

    def _tell(self, figures: dict[str, torch.Tensor]) -> None:
        """Means over ranks, in one exchange."""
        values = self.accelerator.gather(torch.stack([v.float() for v in figures.values()])[None]).mean(0).tolist()
        model: Any = self.model
        gathered: Any = self._metrics["train" if model.training else "eval"]
        for name, value in zip(figures, values, strict=True):
            gathered[name].append(value)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, by whichever of two forms loses fewer digits (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453
    # Both branches are computed and both have a gradient: each gets an argument that it can take.
    log_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, log_expm1, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


class _Mismatched:
    """A KTO batch, in which each prompt also meets the next row's answer: the estimate of KL needs that."""

    def __init__(self, collate: DataCollatorForUnpairedPreference) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        answers = [row["completion_ids"] for row in rows]
        rotated = [answers[-1], *answers[:-1]]
        mixed = [{**row, "KL_completion_ids": answer} for row, answer in zip(rows, rotated, strict=True)]
        batch: dict[str, Any] = self.collate(mixed)
        return batch


class _Sharing:
    """A batch of pairs with the lengths of their parts."""

    def __init__(self, collate: Any, multiple_of: int) -> None:
        self.collate, self.multiple_of = collate, multiple_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        return {**batch, "shares": Shares.of(rows, self.multiple_of)}


def _share(trainer: PairTrainer, job: Job) -> PairTrainer:
    """As the recipe says, or where it pays and has been measured to."""
    asked, part = job.recipe.preference.share_prompt, saved(job.rows.train)
    # Of a model in shards the backbone can't be tried by itself.
    pays = job.split is None and job.device.type != "cuda" and part >= _PAYS
    if asked is False or (asked == "auto" and not pays):
        return trainer
    if why := trainer.share_prompts(job):
        job.emit(Fallback("each prompt is computed for both of its answers", why))
    else:
        job.emit(LogLine(0, f"each prompt is computed once for both of its answers: {part:.0%} fewer tokens"))
    return trainer


def preference_trainer(job: Job) -> PreferenceTrainer:
    """The trainer of a preference method.

    Raises:
        RecipeError: a reference model is needed and can't be had.
    """
    wanted, method = objective(job.recipe), job.resolved.method
    common = {**job.common(), "objective": wanted}
    if wanted.reference == "copy":
        common["reference"] = copy_of_base(job)
    pad, multiple = job.tokenizer.pad_token_id, job.multiple_of
    base = {**job.arguments(), "max_length": None, "beta": wanted.beta}
    if method == "kto":
        loss = next(iter(wanted.losses))
        args: Any = KTOConfig(
            **base,
            loss_type="apo_zero_unpaired" if loss == "bco" else loss,  # which asks for no mismatched answers either
            desirable_weight=wanted.desirable_weight,
            undesirable_weight=wanted.undesirable_weight,
            train_sampling_strategy="sequential",
        )
        collate: Any = DataCollatorForUnpairedPreference(pad_token_id=pad, pad_to_multiple_of=multiple)
        if loss == "kto":
            collate = _Mismatched(collate)
        if loss == "bco":
            from .bco import BinaryTrainer

            return BinaryTrainer(args=args, data_collator=collate, **common)
        return JudgedTrainer(args=args, data_collator=collate, **common)
    collate = DataCollatorForPreference(pad_token_id=pad, pad_to_multiple_of=multiple)
    if method in ("orpo", "cpo", "simpo"):
        args = DPOConfig(**base)
        return _share(ReferenceFreeTrainer(method=method, args=args, data_collator=collate, **common), job)
    args = DPOConfig(
        **base,
        loss_type=list(wanted.losses),
        loss_weights=list(wanted.losses.values()),
        label_smoothing=wanted.label_smoothing,
        ld_alpha=wanted.length_desensitization,
    )
    return _share(PairTrainer(args=args, data_collator=collate, **common), job)
