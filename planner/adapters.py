"""What PEFT's adapters that are no plain pairs keep of one forward pass, from their shapes.

Counted with saved-tensor hooks on peft 0.21.2 over modules of four shapes, 16-bit weights under fp32 adapters
(``tuners/<name>/layer.py`` says why): most cast their input to fp32 and keep it; those that make a change of the
weight keep that; those that scale or turn an output keep it. Bytes, per token and per weight::

    kind                       of a module's input    of its output   of its weight
    ia3, road, vera            0                      2, 8, 4         0
    oft, c3a, delora, gralora  4                      0               0
    vblora, lily, unilora      4                      0               0
    loha, lokr, fourierft      4                      0               4
    hira                       4                      0               4
    waveft, peanut             4                      0               8
    deft                       4                      4               0
    osf                        4                      4               6
    boft                       2                      2               6 for each pair of inputs
    hra                        4                      0               4 r for each pair of inputs
    randlora                   0                      4               4
    shira, glora               2                      0               2
    miss, psoft, tinylora      0                      0               0

Virtual tokens, trained tokens and adaption prompts keep next to nothing beside what attention does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .layer import Linear


@dataclass(frozen=True)
class Kept:
    """Bytes that one adapted module keeps: per token, by the widths of its two sides; and whatever the tokens."""

    inputs: float = 0.0
    outputs: float = 0.0
    weight: float = 0.0
    square: float = 0.0
    """Per pair of inputs: the module's input is turned by a matrix of its own."""
    square_by_rank: bool = False

    def per_token(self, modules: Iterable[Linear]) -> float:
        """Bytes per token of all modules of a layer."""
        return sum(self.inputs * module.d_in + self.outputs * module.d_out for module in modules)

    def fixed(self, modules: Iterable[Linear], rank: int) -> float:
        """Bytes of all modules of a layer whatever the tokens."""
        square = self.square * (rank if self.square_by_rank else 1)
        return sum(self.weight * module.weight + square * module.d_in**2 for module in modules)


#: What adapters keep, by the recipe's name for a type where it has one, else by PEFT's.
KEPT: dict[str, Kept] = {
    "ia3": Kept(outputs=2.0),
    "vera": Kept(outputs=4.0),
    "oft": Kept(inputs=4.0),
    "loha": Kept(inputs=4.0, weight=4.0),
    "lokr": Kept(inputs=4.0, weight=4.0),
    "prompt": Kept(),
    "prefix": Kept(),
    # Of other programs alone.
    "p-tuning": Kept(),
    "trainable-tokens": Kept(),
    "adaption-prompt": Kept(),
    "norms": Kept(),
    "adapter-v2": Kept(outputs=2.0),  # each output, which a trained factor scales (arXiv:2304.15010)
    "boft": Kept(inputs=2.0, outputs=2.0, square=6.0),
    "hra": Kept(inputs=4.0, square=4.0, square_by_rank=True),
    "c3a": Kept(inputs=4.0),
    "delora": Kept(inputs=4.0),
    "fourierft": Kept(inputs=4.0, weight=4.0),
    "deft": Kept(inputs=4.0, outputs=4.0),
    "glora": Kept(inputs=2.0, weight=2.0),
    "gralora": Kept(inputs=4.0),
    "hira": Kept(inputs=4.0, weight=4.0),
    "lily": Kept(inputs=4.0),
    "miss": Kept(),
    "osf": Kept(inputs=4.0, outputs=4.0, weight=6.0),
    "peanut": Kept(inputs=4.0, weight=8.0),
    "psoft": Kept(),
    "randlora": Kept(outputs=4.0, weight=4.0),
    "road": Kept(outputs=8.0),
    "shira": Kept(inputs=2.0, weight=2.0),
    "tinylora": Kept(),
    "unilora": Kept(inputs=4.0),
    "vblora": Kept(inputs=4.0),
    "waveft": Kept(inputs=4.0, weight=8.0),
}
#: Kinds that a recipe has no name for: whoever asks counts their parameters (:attr:`.settings.Settings.trained`).
ELSEWHERE = frozenset(KEPT) - {"ia3", "vera", "oft", "loha", "lokr", "prompt", "prefix"}
