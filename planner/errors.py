"""The exceptions of finetui: one tree, and each message says what, where and what to do.

FinetuiError                 a failure: exit code 1
├── UserError                something the user can put right: exit code 2
│   ├── RecipeError          a recipe's key, type or combination
│   ├── ModelError           a config.json, a checkpoint folder, a tokenizer
│   ├── HubError             the model hub: unreachable, gated, not found
│   ├── HardwareError        a GPU that is not there, a plan that does not fit
│   ├── DataError            a dataset: file, line and field
│   ├── RunError             a run directory: missing, busy, in the wrong state
│   ├── SettingsError        a setting of the user: unknown, or of a value that it can't have
│   └── MissingExtraError    a part of finetui that is not installed
└── TrainingError            a run that ended badly; ``cause`` names why
"""

from __future__ import annotations


class FinetuiError(Exception):
    """A failure told in three parts.

    Args:
        what: what happened, one sentence without a full stop at its end.
        where: the file and line, or the field (``tuning.type``), if there is one.
        do: what the user can do about it, one sentence.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", do: str = "") -> None:
        self.what, self.where, self.do = what.rstrip("."), where, do
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The three parts in one paragraph: ``where: what. do``."""
        ended = self.what if self.what.endswith("?") else f"{self.what}."
        head = f"{self.where}: {ended}" if self.where else ended
        return f"{head} {self.do}".rstrip()

    def __str__(self) -> str:
        return self.message


class UserError(FinetuiError):
    """Something that the user can put right."""

    exit_code = 2


class RecipeError(UserError):
    """A key, a type or a combination in a recipe."""


class ModelError(UserError):
    """A model that can't be read: its config, its weights or its tokenizer."""


class HubError(UserError):
    """The model hub did not give what was asked: unreachable, gated, not found."""


class HardwareError(UserError):
    """A GPU that is not there, or a plan that does not fit on the one that is."""


class DataError(UserError):
    """A dataset that can't be trained on; ``where`` is file and line."""


class RunError(UserError):
    """A run directory that is missing, busy, or in a state that forbids what was asked."""


class SettingsError(UserError):
    """A setting that does not exist, a value that it can't have, or a file of settings that can't be used."""


class MissingExtraError(UserError):
    """A verb that needs an extra of finetui which is not installed."""

    def __init__(self, verb: str, extra: str) -> None:
        super().__init__(
            f"'{verb}' needs packages that are not installed",
            do=f"Install them with: pip install 'finetui[{extra}]'",
        )


class TrainingError(FinetuiError):
    """A run that ended badly.

    Args:
        cause: one of ``oom nan data crash disk preempted cost``, as run.json names it.
    """

    def __init__(self, what: str, *, cause: str, where: str = "", do: str = "") -> None:
        self.cause = cause
        super().__init__(what, where=where, do=do)


def first_line(error: object, most: int = 300) -> str:
    """What an error says first, or of which kind it is where it says nothing: libraries put pages below that."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
