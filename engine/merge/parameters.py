"""The numbers of a merge: one for all tensors, or by the depth of a layer, or by what a tensor's name holds.

A setting is a number, a *gradient* or a list of *conditions*::

    weight: 0.5                     # everywhere
    weight: [0, 0.5, 1]             # at the first, the middle and the last layer, and between them in proportion;
                                    # outside of the layers the first
    weight:
      - {filter: mlp, value: 0.8}   # tensors with "mlp" in their name; the first condition that fits counts
      - {value: [0, 1]}             # all others

mergekit reads the same three (its README, "Parameter Specification"), so its files mean the same here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ...planner.section import Section

Number = Annotated[float, Field(allow_inf_nan=False)]
Gradient = Annotated[list[Number], Field(min_length=1)]


class Condition(Section):
    """A value for the tensors whose name holds ``filter``; for all of them if that is empty."""

    filter: str = ""
    value: Number | Gradient


def _sound(value: Any) -> Any:
    """Tell in one sentence what pydantic would tell for each of the three forms."""

    def plain(part: Any) -> bool:
        return isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part)

    def several(part: Any) -> bool:
        return isinstance(part, list) and bool(part) and all(map(plain, part))

    def condition(part: Any) -> bool:
        if not isinstance(part, dict) or not {"value"} <= set(part) <= {"filter", "value"}:
            return isinstance(part, Condition)
        return plain(part["value"]) or several(part["value"])

    if plain(value) or several(value) or (isinstance(value, list) and value and all(map(condition, value))):
        return value
    do = "Write 0.5, [0, 0.5, 1] from the first layer to the last, or [{filter: mlp, value: 0.5}, {value: 1}]."
    raise ValueError(f"{str(value)[:80]} is no number, no list of numbers and no list of conditions||{do}")


Setting = Annotated[Number | Gradient | list[Condition], BeforeValidator(_sound)]
Per = Literal["tensor", "row", "column"]


class Each(Section):
    """What can be set for each model."""

    weight: Setting | None = None
    """Share of the model, or of its task vector."""
    density: Setting | None = None
    """Share of a task vector's numbers that is kept, above 0 and at most 1."""
    epsilon: Setting | None = None
    """della: how far the chance of being kept is from ``density`` for the smallest and the largest number of a row."""
    gamma: Setting | None = None
    """breadcrumbs: share of the largest numbers of a task vector that is dropped."""


class Whole(Each):
    """What can be set for a whole merge or one of its slices; what belongs to each model is set for all of them."""

    t: Setting | None = None
    """slerp: 0 is the first model, 1 the second. nearswap: how close two numbers must be."""
    scale: Setting | None = None
    """What the sum of task vectors is multiplied by: lambda of the papers."""
    normalize: bool | None = None
    """Divide by the sum of the weights that took part."""
    rescale: bool | None = None
    """dare: multiply what is kept by 1 / density."""
    per: Per | None = None
    """Whether angles are taken between whole tensors, rows or columns."""


EACH = tuple(Each.model_fields)
WHOLE = tuple(name for name in Whole.model_fields if name not in EACH)


def at(setting: Setting, name: str, position: float) -> float | None:
    """The value of a setting for one tensor.

    Args:
        name: the tensor's name in the result.
        position: where its layer stands, from 0 for the first to 1 for the last; 0 for what is in no layer.

    Returns:
        None if no condition fits the name.
    """
    if isinstance(setting, int | float):
        return float(setting)
    first = setting[0]
    if isinstance(first, Condition):
        found = next((c.value for c in setting if isinstance(c, Condition) and c.filter in name), None)
        return None if found is None else at(found, name, position)
    values = [value for value in setting if not isinstance(value, Condition)]
    place = position * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def first_of(settings: Iterable[Setting | None], name: str, position: float) -> float | None:
    """The value of the first setting that has one for this tensor, the most particular setting first."""
    for setting in settings:
        if setting is not None and (value := at(setting, name, position)) is not None:
            return value
    return None


def numbers(setting: Setting | None) -> list[float]:
    """All numbers that stand in a setting."""
    if setting is None:
        return []
    if isinstance(setting, int | float):
        return [float(setting)]
    return [value for item in setting for value in numbers(item.value if isinstance(item, Condition) else item)]


def is_gradient(setting: Setting | None) -> bool:
    """Whether a setting has other values at other layers."""
    if not isinstance(setting, list):
        return False
    return (
        any(is_gradient(item.value) if isinstance(item, Condition) else True for item in setting)
        and len(set(numbers(setting))) > 1
    )
