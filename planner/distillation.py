"""What a student learns from its teacher: the ``distillation`` section of a recipe.

    loss = weight · D(teacher, student) + (1 − weight) · cross-entropy of the labels       per trained token

forward-kl  KL(teacher ‖ student)          covers all that the teacher says (Hinton et al. 2015, arXiv:1503.02531)
reverse-kl  KL(student ‖ teacher)          keeps to what the teacher says most (MiniLLM, arXiv:2306.08543)
jsd         β·KL(teacher ‖ m) + (1 − β)·KL(student ‖ m), m = β·teacher + (1 − β)·student (GKD, arXiv:2306.13649)

Both are softmaxes of logits over the temperature. As in GKD the divergence is not multiplied by its square, so a higher
temperature also teaches more gently; ``weight`` says by how much it counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .section import Auto, Section

if TYPE_CHECKING:
    from .recipe import Recipe

Divergence = Literal["forward-kl", "reverse-kl", "jsd"]
#: The usual beta of jsd: both sides count alike.
_BETA = 0.5


class Distillation(Section):
    """What a student learns from its teacher."""

    teacher: str = ""
    """The model to learn from: a hub id, a folder, an adapter's folder or that of a run that made one. It has the same
    vocabulary as the student."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4`` holds the teacher in 4 bits: a quarter of the memory, and probabilities that are slightly off."""
    divergence: Divergence = "forward-kl"
    """What is made small. ``forward-kl``: the student covers all that the teacher would say. ``reverse-kl``: it keeps
    to what the teacher would say most. ``jsd``: between the two (arXiv:2306.13649)."""
    beta: Auto | Annotated[float, Field(gt=0.0, lt=1.0)] = "auto"
    """jsd: the teacher's share in the mixture; near 0 it acts like forward-kl, near 1 like reverse-kl. ``auto`` is
    0.5."""
    temperature: float = Field(1.0, gt=0.0)
    """Both sides' logits are divided by it; above 1, unlikely words count for more."""
    weight: float = Field(0.5, gt=0.0, le=1.0)
    """Share of the divergence in the loss; the rest is the cross-entropy of the labels."""

    @property
    def share(self) -> float:
        """The teacher's share in the mixture of jsd."""
        return _BETA if self.beta == "auto" else self.beta


def check_distillation(recipe: Recipe) -> None:
    """Refuse options without effect, and students that their teacher can't follow.

    Raises:
        ValueError: ``what||do``, as validators of a recipe raise it.
    """
    asked, method = recipe.distillation, recipe.method
    if method != "distill":
        if asked.model_fields_set:
            raise ValueError(f"distillation has no effect when method is {method}||Remove it, or set method: distill.")
        return
    if not asked.teacher:
        do = "Write distillation: {teacher: <hub id or folder>}."
        raise ValueError(f"method distill needs a teacher||{do}")
    if asked.beta != "auto" and asked.divergence != "jsd":
        raise ValueError("distillation.beta acts on divergence jsd alone||Set divergence: jsd, or remove it.")
    if recipe.loss != "nll":
        what = f"loss: {recipe.loss} weighs labels by the student alone, and distill has a teacher for that"
        raise ValueError(f"{what}||Remove it.")
    if recipe.tuning.new_tokens:
        raise ValueError("the teacher does not know tuning.new_tokens||Remove them, or train them by sft first.")
