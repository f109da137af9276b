"""Which models can be tuned on one GPU: each shipped shape with the tunings that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..planner.errors import ModelError
from ..planner.fit import TUNINGS, Fit
from ..planner.hardware import Gpu
from .form import Tree, get, put

#: Tokens of a row where nothing else is said.
LENGTH = 2048


@dataclass(frozen=True)
class ModelRow:
    """One model on one GPU, at micro batch 1. ``fits`` has a tuning only if the model's weights can be trained so."""

    name: str
    parameters: int
    active: int
    """Parameters that one token passes through: fewer than ``parameters`` for a mixture of experts."""
    longest: int
    """Positions that the model was made for; 0 where it sets no limit."""
    fits: dict[str, Fit]

    def best(self, wanted: str = "") -> Fit | None:
        """The wanted tuning if it fits, else the one that fits and comes nearest to training all weights; or None."""
        found = [fit for fit in self.fits.values() if fit.fits]
        order = [wanted, *TUNINGS]
        return min(found, key=lambda fit: order.index(fit.tuning), default=None)


@dataclass(frozen=True)
class ModelList:
    """The models there are, for one GPU and one length of rows."""

    gpu: str
    memory_gib: float
    length: int
    rows: tuple[ModelRow, ...]


#: What the list can be sorted by, each with the figure that is smaller for what comes first; None is no tuning.
SORTS: dict[str, Callable[[ModelRow, Fit | None], float | str]] = {
    "size": lambda row, fit: -row.parameters,
    "speed": lambda row, fit: -fit.tokens_per_s if fit else 0.0,
    "memory": lambda row, fit: fit.device_gib if fit else min((f.device_gib for f in row.fits.values()), default=0.0),
    "name": lambda row, fit: row.name.lower(),
}


def models_on(
    gpu: Gpu, length: int = LENGTH, names: Iterable[str] | None = None, tunings: Sequence[str] = TUNINGS
) -> ModelList:
    """Every shipped model on this GPU; those that can't be read or trained at all are left out.

    Args:
        names: hub ids or folders in their place.
    """
    from ..planner.architecture import Architecture
    from ..planner.fit import fit_table
    from ..planner.hub import find_config
    from ..planner.hub_search import shipped

    rows = []
    for model in shipped() if names is None else names:
        try:
            name, config, _ = find_config(model)
            architecture = Architecture.from_config(config, name)
            fits = fit_table(architecture, [gpu], tunings=tunings, sequence_lengths=[length])
        except ModelError:
            continue
        by_tuning = {fit.tuning: fit for fit in fits}
        active, longest = architecture.active_parameters, architecture.max_positions or 0
        rows.append(ModelRow(name, architecture.parameters, active, longest, by_tuning))
    return ModelList(gpu.name, gpu.memory_gib, length, tuple(rows))


def listed(
    rows: Iterable[ModelRow], *, sort: str = "size", everything: bool = False, words: str = "", tuning: str = ""
) -> list[ModelRow]:
    """The rows to show: those that fit first, then by ``sort``; the others only with ``everything``.

    Args:
        words: every one of them has to be in the name.
        tuning: what is wanted where it fits.
    """
    wanted = words.lower().split()
    found = [(row, row.best(tuning)) for row in rows if all(word in row.name.lower() for word in wanted)]
    shown = [(row, fit) for row, fit in found if fit is not None or everything]
    shown.sort(key=lambda pair: (pair[1] is None, SORTS[sort](*pair), pair[0].name.lower()))
    return [row for row, _ in shown]


def on_model(draft: Tree, row: ModelRow) -> Tree:
    """The draft with this model, and with a tuning that fits where its own is known not to."""
    wanted = get(draft, "tuning.type")
    fit = row.best(wanted)
    draft = put(draft, "model", row.name)
    return (
        draft if fit is None or wanted not in TUNINGS or fit.tuning == wanted else put(draft, "tuning.type", fit.tuning)
    )


def length_of(draft: Tree) -> int:
    """Tokens of a row as the draft sets them, else :data:`LENGTH`."""
    text = get(draft, "sequence_length")
    return int(text) if text.isdigit() and int(text) >= 8 else LENGTH


def glyph(fit: Fit) -> str:
    """``✔`` fits, ``!`` fits but tightly, ``✘`` does not, as of a plan."""
    return "✘" if not fit.fits else "!" if fit.high_gib > fit.memory_gib else "✔"


def count_fitting(rows: Sequence[ModelRow]) -> int:
    """How many of the models fit in one way or another."""
    return sum(row.best() is not None for row in rows)
