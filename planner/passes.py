"""What a method holds and computes beside the passes that it trains on: references, teachers, old figures, answers.

finetui computes the reference of a pair once, before the first step, where a copy of the model would be needed
otherwise (:func:`.objective.objective`), and those of answers once for all updates on them; TRL holds the copy unless
it is told to (``precompute_ref_log_probs``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .methods import COMPLETION_TOKENS, METHODS

if TYPE_CHECKING:
    from .architecture import Architecture
    from .recipe import Recipe
    from .teacher import Teacher


@dataclass(frozen=True)
class Passes:
    """Beside the trained passes of one optimiser step."""

    copy: bool = False
    """A second model is held, frozen."""
    forwards: float = 0.0
    """Forward passes without gradients for each trained one."""
    completion: int = 0
    """Tokens that are generated for each sequence at most."""
    updates: int = 1
    """Steps that learn from the same answers."""
    once: bool = False
    """Each row goes through the model once more, before the first step."""
    teacher: Teacher | None = None
    """Another model is held, frozen, and reads each row before the trained one does."""


def usual(method: str, *, full: bool, sequence_length: int) -> Passes:
    """What TRL's trainers do unless told otherwise."""
    terms = METHODS[method]
    completion = min(COMPLETION_TOKENS, sequence_length // 2) if terms.rollouts else 0
    return Passes(terms.reference and full, float(terms.forwards), completion)


def passes_of(recipe: Recipe, sequence_length: int, architecture: Architecture | None = None) -> Passes:
    """What finetui's engine does for this recipe, whose plan has this length of rows.

    Args:
        architecture: of the model that is trained; a student's is held against its teacher's.

    Raises:
        UserError: the recipe's teacher is not to be had, or no teacher for this model.
    """
    terms, full = METHODS[recipe.method], recipe.tuning.type == "full"
    if recipe.method == "distill":
        from .teacher import teacher_of

        assert architecture is not None, "whether a teacher fits depends on its student"
        return Passes(teacher=teacher_of(recipe, architecture))
    if terms.rollouts:
        from .rollout import rollouts

        settled = rollouts(recipe, sequence_length)
        held = settled.beta > 0
        # Probabilities before the first of several updates; PPO's come with the values, which it always needs.
        before = recipe.method == "ppo" or settled.num_iterations > 1
        forwards = (held + before) / settled.num_iterations
        return Passes(full and held, forwards, settled.max_completion_length, settled.num_iterations)
    if not terms.reference:
        return Passes(forwards=float(terms.forwards))
    from .objective import objective

    wanted = objective(recipe)
    once = wanted.reference == "precomputed"
    forwards = float(terms.forwards)
    if recipe.method == "kto" and "kto" not in wanted.losses:  # nothing is paired with other prompts' answers
        forwards = 1.0
    return Passes(wanted.reference == "copy", 0.0 if once else forwards, once=once)
