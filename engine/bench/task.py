"""What a comparison of whole training runs measures: one model, one tuning, some programs taking turns."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

#: Programs, and the package that each needs.
ARMS = {"finetui": "finetui", "unsloth": "unsloth", "trl-liger": "liger_kernel", "trl": "trl"}
#: What every program knows of checkpointing; ours has more.
COMMON = ("full", "none")
MODES = (*COMMON, "selective", "offload", "auto", "none+graphs", "full+graphs")
TUNINGS = ("lora", "qlora", "lora-fp8", "full")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Steps in which a program may still be compiling.
SETTLE = 6
GIB = 2**30


@dataclass(frozen=True)
class Task:
    """What one arm is to do. All arms train on rows of full length, so that every token counts.

    Args:
        arm: of :data:`ARMS`.
        mode: checkpointing, of :data:`MODES`; ``+graphs`` replays steps as CUDA graphs.
        tuning: of :data:`TUNINGS`; other programs train plain LoRA where ours has its weights in e4m3.
        turn: timed steps of one round.
        turns: the folder through which this arm is given its turns; empty if it runs alone.
        profile: one more step is profiled.
    """

    model: str
    arm: str = "finetui"
    mode: str = "none"
    tuning: str = "lora"
    sequence_length: int = 2048
    micro_batch: int = 4
    rounds: int = 2
    turn: int = 8
    kernels: str = "auto"
    turns: str = ""
    profile: bool = False

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return SETTLE + self.rounds * self.turn + self.profile

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.micro_batch * self.sequence_length

    def turn_of(self, step: int) -> int | None:
        """Which turn begins with this step, counted from 0, the one in which everything settles."""
        if step == 0:
            return 0
        turn, rest = divmod(step - SETTLE, self.turn)
        return turn + 1 if step >= SETTLE and not rest else None

    @property
    def folder(self) -> Path | None:
        """Where the turns are given."""
        return Path(self.turns) if self.turns else None

    def to_json(self) -> str:
        """As one argument of a process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The other way round."""
        return cls(**json.loads(text))
