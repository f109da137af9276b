"""The data section of a recipe: what is trained on, source by source."""

from __future__ import annotations

import difflib
from typing import Literal, Self

from pydantic import Field, model_validator

from .section import Auto, Section

DataFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "question-answer", "prompt-completion", "text", "preference",
    "unpaired-preference", "prompt-only", "stepwise",
]  # fmt: skip

#: What a column can be to a format, and a key of a message: the keys of ``columns``.
COLUMN_PARTS = (
    "messages", "role", "content", "tools", "system", "history", "instruction", "input", "output", "question",
    "answer", "context", "prompt", "completion", "text", "chosen", "rejected", "margin", "label",
    "completions", "labels",
)  # fmt: skip


class DataSource(Section):
    """One dataset: a file, a folder, an address or a hub dataset."""

    path: str
    """File (.jsonl .json .csv .tsv .parquet .arrow .txt), folder, address (s3:// gs:// https://) or hub dataset id."""
    format: DataFormat = "auto"
    """How a row is read. ``auto`` looks at the first rows and says what it found."""
    columns: dict[str, str] = Field({})
    """Names of columns that are not the usual ones, e.g. ``{prompt: q, completion: a}``."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field({})
    """Who speaks under a name that is not a usual one, e.g. ``{customer: user, agent: assistant}``."""
    chat: bool | Auto = "auto"
    """Whether prompts and answers that are plain strings become turns of a chat. ``auto``: questions and instructions
    do, ``prompt`` columns do not."""
    split: Literal["train", "eval"] = "train"
    """``eval`` rows are never trained on."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    hub_split: str | None = None
    """Split of a hub dataset under its own name; by default its train split, or the first for evaluation."""
    limit: int | None = Field(None, ge=1)
    """Take only the first N rows."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often each example is seen per epoch: 2 is twice, 0.5 leaves out a random half."""
    streaming: bool = False
    """Read a hub dataset row by row and never store it whole; what is stored is its tokens. With max_steps it is read
    only as far as the run can train on it, and with limit so far."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """``skip`` leaves out rows that can't be used, counts them and names the first."""
    too_long: Literal["cut", "drop"] = "cut"
    """A row longer than sequence_length loses its end, or with ``drop`` is left out and counted: no answer is then
    learned without its end. A long text of ``pretrain`` is split, unless it is dropped."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for part in self.columns:
            if part not in COLUMN_PARTS:
                near = difflib.get_close_matches(part, COLUMN_PARTS, n=1)
                do = f"Did you mean {near[0]}?" if near else f"Use {', '.join(COLUMN_PARTS)}."
                raise ValueError(f"columns: no format has a {part!r}||{do}")
        if self.split == "eval" and self.weight != 1.0:
            raise ValueError("weight says how often a row is trained on, and eval rows never are||Leave it out.")
        return self
