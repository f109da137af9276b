"""What a preference method optimises: the ``preference`` section of a recipe.

Every method here learns from a better and a worse answer (kto: from answers marked good or bad). Which option acts on
which method and loss is one table, so that an option without effect is an error and never a surprise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from .options import VIRTUAL_TOKENS
from .section import Auto, Section

if TYPE_CHECKING:
    from .recipe import Recipe

PREFERENCE_METHODS: frozenset[str] = frozenset({"dpo", "ipo", "orpo", "kto", "cpo", "simpo"})
#: Methods that hold the policy near a frozen reference.
WITH_REFERENCE: frozenset[str] = frozenset({"dpo", "ipo", "kto"})

DpoLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip
Loss = DpoLoss | Literal["kto", "apo_zero_unpaired", "bco"]

#: The losses of each method, its own first; orpo, ipo and simpo have but one.
LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": (
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
    ),
    "ipo": ("ipo",),
    "kto": ("kto", "apo_zero_unpaired", "bco"),
    "orpo": ("orpo",),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "simpo": ("simpo",),
}  # fmt: skip
#: Losses that label_smoothing acts on.
_SMOOTHED = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})
#: beta where the recipe leaves it open: that of the papers, and of TRL.
_BETA = {"simpo": 2.0}
_ACTS_ON: dict[str, frozenset[str]] = {
    "loss": frozenset({"dpo", "kto", "cpo"}),
    "label_smoothing": frozenset({"dpo", "cpo", "simpo"}),
    "margin": frozenset({"simpo"}),
    "nll_weight": frozenset({"cpo", "simpo"}),
    "desirable_weight": frozenset({"kto"}),
    "undesirable_weight": frozenset({"kto"}),
    "length_desensitization": frozenset({"dpo"}),
    "reference": WITH_REFERENCE,
    "share_prompt": PREFERENCE_METHODS - {"kto"},
}


class Preference(Section):
    """What a preference method optimises."""

    loss: Auto | Loss | dict[str, float] = "auto"
    """Form of the loss; ``auto`` is the method's own. For dpo also several by weight: ``{sigmoid: 1, sft: 0.5}``. For
    kto also ``bco``, a classifier of good and bad answers (arXiv:2404.04656), and ``apo_zero_unpaired``."""
    beta: Auto | float = "auto"
    """How strongly the policy is held to its reference, or the scale of the rewards where there is none."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of the pairs that are taken to be labelled the wrong way round."""
    margin: float = Field(1.0, ge=0.0)
    """Reward margin that simpo asks of every pair (its gamma)."""
    nll_weight: Auto | float = "auto"
    """Weight of plain likelihood of the better answer; ``auto`` is 1 for cpo, 0 for simpo."""
    desirable_weight: float = Field(1.0, ge=0.0)
    """Weight of good answers in kto."""
    undesirable_weight: float = Field(1.0, ge=0.0)
    """Weight of bad answers in kto."""
    length_desensitization: Auto | float = "auto"
    """Weight of what a longer answer has beyond the shorter's length (LD-DPO's alpha); ``auto`` is 1: all of it."""
    reference: Literal["auto", "live", "precomputed"] = "auto"
    """Log-probabilities of the reference: in every step, or once before the first. ``auto`` precomputes them where
    the data is seen more than once, and in full fine-tuning, where a copy of the model would be needed otherwise."""
    share_prompt: Auto | bool = "auto"
    """Compute the prompt of a pair once for both of its answers; the same to rounding. ``auto`` does so on the CPU
    where it spares a tenth of the tokens; on GPUs its speed has not been measured yet, so it has to be asked for."""


@dataclass(frozen=True)
class Objective:
    """A preference section with no ``auto`` left.

    ``losses`` maps names to weights. ``reference`` is ``none``, ``precomputed``, ``adapter-off`` (the base below the
    adapters, in every step) or ``copy`` (a second model).
    """

    losses: dict[str, float]
    beta: float
    label_smoothing: float = 0.0
    margin: float = 0.0
    nll_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    length_desensitization: float | None = None
    reference: Literal["none", "precomputed", "adapter-off", "copy"] = "none"


def objective(recipe: Recipe) -> Objective:
    """What a recipe of a preference method optimises; it has been checked by :func:`check_objective`."""
    asked, method = recipe.preference, recipe.method
    if isinstance(asked.loss, dict):
        losses = {str(name): weight for name, weight in asked.loss.items()}
    else:
        losses = {LOSSES[method][0] if asked.loss == "auto" else asked.loss: 1.0}
    nll = {"cpo": 1.0, "orpo": 1.0}.get(method, 0.0)
    smoothing = asked.label_smoothing
    if "exo_pair" in losses and not smoothing:
        smoothing = 1e-3  # the paper's (arXiv:2402.00856); at 0 its logarithm is infinite
    tail = asked.length_desensitization
    return Objective(
        losses=losses,
        beta=_BETA.get(method, 0.1) if asked.beta == "auto" else asked.beta,
        label_smoothing=smoothing,
        margin=asked.margin if method == "simpo" else 0.0,
        nll_weight=nll if asked.nll_weight == "auto" else asked.nll_weight,
        desirable_weight=asked.desirable_weight,
        undesirable_weight=asked.undesirable_weight,
        length_desensitization=None if tail == "auto" else tail,
        reference=_reference(recipe),
    )


def _reference(recipe: Recipe) -> Literal["none", "precomputed", "adapter-off", "copy"]:
    if recipe.method not in WITH_REFERENCE:
        return "none"
    full = recipe.tuning.type == "full"
    asked = recipe.preference.reference
    # The estimate of KL in kto pairs each prompt with another row's answer, chosen batch by batch.
    if recipe.method == "kto":
        return "copy" if full else "adapter-off"
    if asked == "precomputed" or (asked == "auto" and (full or recipe.epochs > 1)):
        return "precomputed"
    return "copy" if full else "adapter-off"


def check_objective(recipe: Recipe) -> None:
    """Refuse options without effect and losses that a method does not have.

    Raises:
        ValueError: ``what||do``, as validators of a recipe raise it.
    """
    asked, method = recipe.preference, recipe.method
    given = asked.model_fields_set
    if given and method not in PREFERENCE_METHODS:
        methods = ", ".join(sorted(PREFERENCE_METHODS))
        raise ValueError(f"preference has no effect when method is {method}||Remove it, or use one of {methods}.")
    useless = sorted(name for name in given if name in _ACTS_ON and method not in _ACTS_ON[name])
    if useless:
        raise ValueError(f"preference.{useless[0]} has no effect when method is {method}||Remove it.")
    names = set(asked.loss) if isinstance(asked.loss, dict) else {asked.loss} - {"auto"}
    wrong = sorted(names - set(LOSSES.get(method, ())))
    if wrong:
        raise ValueError(f"method {method} has no loss {wrong[0]}||Use one of {', '.join(LOSSES[method])}.")
    if isinstance(asked.loss, dict) and (not asked.loss or method != "dpo"):
        raise ValueError("several losses need method dpo and at least one name||Write loss: sigmoid.")
    if asked.beta != "auto" and asked.beta <= 0:
        raise ValueError("preference.beta must be above 0||Try 0.1; for simpo 2.0.")
    if method == "dpo" and "label_smoothing" in given and not names & _SMOOTHED:
        losses = ", ".join(sorted(_SMOOTHED))
        raise ValueError(
            f"preference.label_smoothing acts on the losses {losses} alone||Set loss: robust, or remove it."
        )
    if asked.share_prompt is True and recipe.tuning.type in VIRTUAL_TOKENS:
        what = f"prompts can't be shared with tuning {recipe.tuning.type}, which puts virtual tokens before them"
        raise ValueError(f"{what}||Remove preference.share_prompt.")
    if method == "kto":
        if asked.reference == "precomputed":
            raise ValueError(
                "kto can't precompute its reference: each batch pairs prompts with other answers||Remove reference."
            )
        if recipe.micro_batch == 1 and asked.loss in ("auto", "kto"):
            raise ValueError(
                "kto needs a micro_batch of 2 or more: it measures KL on another row's answer||Set micro_batch: 2."
            )
