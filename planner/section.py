"""Section: the base of every part of a recipe. Strict: an unknown key is an error, and nothing changes once read."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

Auto = Literal["auto"]
#: Numbers up to here are exact in JSON and in floating point. Nothing that a run does is counted beyond.
MOST = 2**53


def _short(number: float) -> str:
    digits = str(number)
    return digits if len(digits) < 20 else f"{digits[:12]}… ({len(digits)} digits)"


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _countable(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, int | float) and abs(one) > MOST:
                    raise ValueError(f"{name} is {_short(one)}, larger than any such number||Give a smaller one.")
        return self
