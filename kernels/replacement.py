"""Replacement: what became of a module that a kernel could have replaced."""

from __future__ import annotations

from dataclasses import dataclass, field

#: The attribute under which a replaced module keeps what its new forward needs to know.
STATE = "_finetui_patch"


@dataclass(frozen=True)
class Replacement:
    """What became of one module: ``replaced`` or left, and why."""

    path: str
    kernel: str
    replaced: bool
    why: str


@dataclass
class PatchReport:
    """What became of each module that a kernel could have replaced."""

    items: list[Replacement] = field(default_factory=list)

    @property
    def replaced(self) -> list[Replacement]:
        return [item for item in self.items if item.replaced]

    @property
    def left(self) -> list[Replacement]:
        return [item for item in self.items if not item.replaced]

    def summary(self) -> list[str]:
        """One line per kernel and reason, as in ``rms_norm: 65 replaced (cast-first)``."""
        counts: dict[tuple[str, bool, str], list[str]] = {}
        for item in self.items:
            counts.setdefault((item.kernel, item.replaced, item.why), []).append(item.path)
        return [
            f"{kernel}: {len(paths)} {'replaced' if done else 'left'} ({why}; {paths[0]}{' …' if paths[1:] else ''})"
            for (kernel, done, why), paths in counts.items()
        ]
