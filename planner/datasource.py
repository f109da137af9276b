"""The ``data`` section of a recipe: what is trained on, source by source."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import Section

DataFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"]


class DataSource(Section):
    """One dataset: a file, a folder or a hub dataset."""

    path: str
    """File (.jsonl .json .csv .parquet .txt), folder, or hub dataset id."""
    format: DataFormat = "auto"
    """How a row is read. ``auto`` looks at the first rows and says what it found."""
    split: Literal["train", "eval"] = "train"
    """``eval`` rows are never trained on."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    limit: int | None = Field(None, ge=1)
    """Take only the first N rows."""
