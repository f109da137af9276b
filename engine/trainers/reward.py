"""Reward modelling: a model with one score for its output head learns to prefer the better answer.

TRL's ``RewardTrainer`` and its loss, -log sigmoid(score of the better answer - score of the worse) (Ouyang et al. 2022,
arXiv:2203.02155). What comes out loads with ``AutoModelForSequenceClassification``.
"""

from __future__ import annotations

from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from .example_mean import ExampleMeanTrainer
from .job import Job

#: TRL's names of the figures, and those that every other method has for the same.
_NAMES = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "mean_reward": "rewards/mean",
    "min_reward": "rewards/min",
    "max_reward": "rewards/max",
}


class ScoreTrainer(ExampleMeanTrainer, RewardTrainer):
    """``RewardTrainer`` with the data order, evaluation and checkpoints of a run."""

    def named(self, gathered: dict[str, list[float]]) -> dict[str, float]:
        """Accuracy, margin and range of the scores."""
        return {_NAMES.get(name, name): value for name, value in super().named(gathered).items()}


def reward_trainer(job: Job) -> ScoreTrainer:
    """The trainer of a reward model."""
    args = RewardConfig(**job.arguments(), max_length=None)
    collate = DataCollatorForPreference(pad_token_id=job.tokenizer.pad_token_id, pad_to_multiple_of=job.multiple_of)
    return ScoreTrainer(args=args, data_collator=collate, **job.common())
