"""Candidate: one way to run that the solver looked at."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Memory, Speed
from .settings import Settings


@dataclass(frozen=True)
class Candidate:
    """One way to run, with what it needs and takes."""

    settings: Settings
    memory: Memory
    speed: Speed

    def fits(self, memory_gib: float, *, safely: bool = False) -> bool:
        return (self.memory.high_gib if safely else self.memory.device_gib) <= memory_gib
