"""Tables of what fits, what is for rent and what the catalog holds, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ..planner.fit import Fit
from ..planner.hardware import Gpu
from .console import Console
from .format import count, duration, rate, usd


def _table(*columns: str) -> Table:
    """A table without lines; a heading that begins with ``>`` is right-aligned."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def print_fit(name: str, parameters: int, rows: Sequence[Fit], *, everything: bool) -> None:
    """What fits for one model; ``everything`` shows what does not, too."""
    console = Console(highlight=False)
    shown = [row for row in rows if everything or row.fits]
    console.print(f"{name}: {count(parameters)} parameters, micro batch 1, one GPU")
    table = _table("", "GPU", "tuning", ">tokens", ">GiB", ">of", ">tok/s", "checkpointing", ">$/M tok", "where")
    for row in shown:
        price = row.usd_per_million_tokens
        table.add_row(
            "✔" if row.fits else "✘",
            row.gpu,
            row.tuning,
            str(row.sequence_length),
            f"{row.device_gib:.1f}",
            f"{row.memory_gib:.0f}",
            rate(row.tokens_per_s),
            row.checkpointing,
            "–" if price is None else f"{price:.3f}",
            row.provider or "–",
        )
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} of {len(rows)} do not fit; --all shows them.", style="dim")


def print_offers(name: str, rows: Sequence[dict[str, Any]], *, total: int) -> None:
    """Offers, cheapest run first."""
    console = Console(highlight=False)
    if not rows:
        console.print(f"No offer fits {name} like this. Try --tuning qlora or a shorter --seq-len.")
        return
    table = _table("provider", ">#", "GPU", ">GiB", ">of", ">tok/s", ">time", ">$/h", ">$ run", "price of")
    for row in rows:
        table.add_row(
            row["provider"],
            str(row["count"]),
            row["gpu"],
            f"{row['device_gib']:.1f}",
            f"{row['memory_gib']:.0f}",
            rate(row["tokens_per_s"]),
            duration(row["time_s"]),
            usd(row["usd_per_h"]),
            usd(row["usd"]),
            ("undated" if row["as_of"] == "unknown" else row["as_of"] + " (old)" * row["stale"]),
        )
    console.print(table)
    if total > len(rows):
        console.print(f"{total - len(rows)} more offers fit; --top shows more.", style="dim")


def print_managed(rows: Sequence[dict[str, Any]]) -> None:
    """Services that train for you, on the same data, cheapest first."""
    if not rows:
        return
    console = Console(highlight=False)
    console.print(f"\nServices that train for you, {count(rows[0]['tokens'])} tokens:")
    table = _table("provider", "model", ">$/M tok", ">$ run", "price of")
    for row in rows:
        as_of = "undated" if row["as_of"] == "unknown" else row["as_of"] + " (old)" * row["stale"]
        table.add_row(
            row["provider"], row["model"] or "by size", f"{row['usd_per_million_tokens']:g}", usd(row["usd"]), as_of
        )
    console.print(table)


def print_catalog(gpus: Sequence[Gpu]) -> None:
    """The GPUs that can be planned for."""
    table = _table("GPU", ">GiB", ">GB/s", ">16-bit TFLOP/s", "bf16", ">compute", ">link GB/s")
    for gpu in gpus:
        table.add_row(
            gpu.name,
            f"{gpu.memory_gib:.1f}",
            rate(gpu.bandwidth_gb_s),
            rate(gpu.bf16_tflops),
            "yes" if gpu.bf16 else "no",
            gpu.compute_capability,
            rate(gpu.link_gb_s) if gpu.link_gb_s else "–",
        )
    Console(highlight=False).print(table)
