"""The configurations that ``tests/bench/sweep.py`` measures."""

from __future__ import annotations

from dataclasses import dataclass

#: Steps of a run whose memory is measured, of one whose speed is, and how many of the first are left out.
STEPS, TIMED_STEPS, SETTLE = 4, 14, 6
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Checkpoints in the order in which they are made.
MODELS = {
    "qwen2.5-0.5b": "Qwen--Qwen2.5-0.5B",
    "qwen3-0.6b": "Qwen--Qwen3-0.6B",
    "llama-1b": "meta-llama--Llama-3.2-1B",
    "gemma-1b": "google--gemma-3-1b-pt",
    "qwen2.5-1.5b": "Qwen--Qwen2.5-1.5B",
    "qwen3-4b": "Qwen--Qwen3-4B",
    "llama-8b": "meta-llama--Llama-3.1-8B",
    "mistral-7b": "mistralai--Mistral-7B-v0.3",
}


@dataclass(frozen=True)
class Case:
    """One configuration. ``card`` names a smaller GPU that the plan is made for, with what is empty left to it."""

    model: str
    tuning: str = "lora"
    length: int = 2048
    micro_batch: int = 4
    checkpointing: str = "full"
    optimizer: str = "adamw-8bit"
    precision: str = "bf16"
    stack: str = "finetui"
    kept_layers: int = 0
    accumulation: int = 1
    rank: int = 16
    card: str = ""
    timed: bool = False

    @property
    def name(self) -> str:
        where = f"@{self.card}" if self.card else ""
        return (
            f"{self.stack}/{self.model}/{self.tuning}/{self.micro_batch}x{self.length}"
            f"/{self.checkpointing}{self.kept_layers or ''}/{self.optimizer}/{self.precision}/a{self.accumulation}"
            f"/r{self.rank}{where}{'/timed' if self.timed else ''}"
        )


def cases() -> list[Case]:
    """What is measured, in order: memory first, smallest models first; then speed."""
    rows = [
        Case("qwen2.5-0.5b", "full", 1024, 4, "none", "adamw"),
        Case("qwen2.5-0.5b", "full", 512, 16, "full", "adamw-8bit"),
        Case("qwen2.5-0.5b", "full", 2048, 4, "none", "adamw", "bf16-mixed"),
        Case("qwen2.5-0.5b", "full", 2048, 4, "full", "adamw", "bf16-mixed"),
        Case("qwen2.5-0.5b", "lora", 4096, 4, "none"),
        Case("qwen2.5-0.5b", "qlora", 8192, 2, "full"),
        Case("qwen3-0.6b", "full", 2048, 2, "none", "adamw-8bit"),
        Case("qwen3-0.6b", "lora", 2048, 8, "offload"),
        Case("qwen3-0.6b", "lora", 512, 16, "none", "adamw"),
        Case("qwen3-0.6b", "qlora", 4096, 4, "selective", kept_layers=14),
        Case("llama-1b", "lora", 2048, 4, "full"),
        Case("llama-1b", "lora", 2048, 4, "none", "adamw", rank=64),
        Case("llama-1b", "lora", 8192, 1, "none"),
        Case("llama-1b", "qlora", 2048, 4, "full"),
        Case("llama-1b", "qlora", 2048, 8, "none", "paged-adamw-8bit"),
        Case("llama-1b", "full", 2048, 4, "full", "adamw"),
        Case("llama-1b", "full", 1024, 8, "none", "adamw-8bit"),
        Case("llama-1b", "full", 2048, 2, "full", "paged-adamw-8bit", accumulation=2),
        Case("llama-1b", "lora", 4096, 4, "selective", kept_layers=8),
        Case("gemma-1b", "lora", 2048, 2, "full"),
        Case("gemma-1b", "lora", 1024, 4, "none"),
        Case("gemma-1b", "full", 1024, 2, "full", "adamw-8bit"),
        Case("qwen2.5-1.5b", "lora", 2048, 4, "none"),
        Case("qwen2.5-1.5b", "lora", 2048, 4, "offload", "adamw"),
        Case("qwen2.5-1.5b", "full", 2048, 2, "full", "adamw-8bit"),
        Case("qwen2.5-1.5b", "qlora", 1024, 16, "full"),
        Case("qwen3-4b", "lora", 2048, 4, "none"),
        Case("qwen3-4b", "lora", 8192, 1, "full"),
        Case("qwen3-4b", "lora", 2048, 4, "selective", kept_layers=18),
        Case("qwen3-4b", "qlora", 2048, 4, "offload"),
        Case("qwen3-4b", "full", 2048, 4, "full", "adamw-8bit"),
        Case("qwen3-4b", "full", 2048, 1, "none", "paged-adamw-8bit"),
        Case("llama-8b", "lora", 2048, 4, "none"),
        Case("llama-8b", "lora", 2048, 4, "full"),
        Case("llama-8b", "lora", 2048, 4, "offload"),
        Case("llama-8b", "lora", 2048, 4, "selective", kept_layers=16),
        Case("llama-8b", "lora", 8192, 2, "offload", rank=64),
        Case("llama-8b", "lora", 512, 16, "full", "adamw"),
        Case("llama-8b", "qlora", 2048, 4, "full"),
        Case("llama-8b", "qlora", 2048, 4, "none"),
        Case("llama-8b", "qlora", 2048, 1, "offload", "paged-adamw-8bit"),
        Case("llama-8b", "qlora", 2048, 2, "full", accumulation=2),
        Case("llama-8b", "full", 2048, 2, "full", "adamw-8bit"),
        Case("mistral-7b", "lora", 4096, 2, "full"),
        Case("mistral-7b", "lora", 2048, 2, "none"),
        Case("mistral-7b", "qlora", 4096, 2, "selective", kept_layers=20),
        # Said to fit on smaller cards, with everything left to the planner.
        *(
            Case(model, tuning, length, 0, "auto", "auto", "auto", card=card)
            for model, tuning, length, card in (
                ("llama-1b", "full", 2048, "RTX-3060-12GB"), ("qwen2.5-1.5b", "lora", 4096, "RTX-3060-12GB"),
                ("qwen3-4b", "lora", 2048, "RTX-4090"), ("llama-8b", "qlora", 4096, "RTX-4090"),
                ("llama-8b", "lora", 2048, "RTX-4090"), ("mistral-7b", "qlora", 2048, "RTX-3060-12GB"),
            )
        ),
        # Other programs.
        Case("llama-1b", "lora", 2048, 4, "full", stack="trl"),
        Case("llama-1b", "qlora", 2048, 4, "full", stack="trl"),
        Case("llama-1b", "full", 2048, 2, "full", stack="trl"),
        Case("llama-1b", "lora", 2048, 4, "none", stack="trl-liger"),
        Case("qwen3-0.6b", "lora", 2048, 8, "full", stack="trl-liger"),
        Case("qwen2.5-1.5b", "qlora", 2048, 4, "full", stack="trl-liger"),
        Case("qwen3-4b", "lora", 2048, 4, "full", stack="trl"),
        Case("llama-8b", "lora", 2048, 4, "full", stack="trl-liger"),
        Case("llama-8b", "qlora", 2048, 4, "full", stack="trl"),
        Case("llama-1b", "lora", 2048, 4, "full", stack="unsloth"),
        Case("llama-1b", "qlora", 4096, 2, "full", stack="unsloth"),
        Case("llama-8b", "qlora", 2048, 4, "full", stack="unsloth"),
        Case("llama-8b", "lora", 2048, 2, "none", stack="unsloth"),
        Case("llama-8b", "lora", 4096, 2, "full", stack="unsloth"),
    ]  # fmt: skip
    timed = [
        Case("llama-8b", "lora", 2048, 4, "none", timed=True),
        Case("llama-8b", "lora", 2048, 4, "full", timed=True),
        Case("llama-1b", "lora", 2048, 4, "none", timed=True),
        Case("llama-8b", "lora", 2048, 4, "offload", timed=True),
        Case("llama-8b", "qlora", 2048, 4, "full", timed=True),
        Case("qwen3-4b", "full", 2048, 4, "full", "adamw-8bit", timed=True),
        Case("qwen2.5-0.5b", "full", 1024, 4, "none", "adamw", timed=True),
        Case("mistral-7b", "lora", 4096, 2, "full", timed=True),
    ]
    return rows + timed
