"""Tables of what fits, what is for rent and what the catalog holds, as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..planner.fit import TUNINGS, Fit
from ..planner.hardware import Gpu
from .columns import Column, fitting, table
from .console import Console
from .format import bare_gib, count, duration, gib, memory_unit, rate, usd
from .model_list import ModelList, ModelRow, glyph


def print_table(
    columns: Sequence[Column], rows: Sequence[Mapping[str, str]], console: Console | None = None, gap: int = 2
) -> None:
    """A table as wide as the terminal; whole where there is none, because a pipe has no edge."""
    console = console or Console(highlight=False)
    room = console.width if console.is_terminal else 1000
    for line in table(columns, rows, room, gap):
        console.print(line, markup=False, soft_wrap=True)


def print_fit(name: str, parameters: int, rows: Sequence[Fit], *, everything: bool) -> None:
    """What fits for one model: on a terminal a line per GPU where that has room, else a line per combination.

    Args:
        everything: show what does not fit, too.
    """
    console = Console(highlight=False)
    shown = [row for row in rows if everything or row.fits]
    said = f"{name}: {count(parameters)} parameters, micro batch 1, one GPU"
    columns, lines = _matrix(rows, everything=everything)
    gap = next((gap for gap in (2, 1) if _whole(columns, lines, console.width, gap)), 0)
    if console.is_terminal and gap:
        console.print(f"{said}; tokens/s, – does not fit", markup=False)
        print_table(columns, lines, console, gap)
    else:
        console.print(said, markup=False)
        print_table(*_combinations(shown), console)
        if not console.is_terminal and any(row.usd_per_h is not None for row in shown):  # there it may have no column
            console.print("$/M tok: per million tokens, at the cheapest offer (where).")
    if len(shown) < len(rows):
        more = "; --all shows them" if not everything else ""
        console.print(f"{len(rows) - len(shown)} of {len(rows)} combinations do not fit{more}.", style="dim")


def print_models(found: ModelList, rows: Sequence[ModelRow]) -> None:
    """What can be tuned on one GPU: a line per model, with the memory of each tuning that fits and a speed."""
    console = Console(highlight=False)
    place = f"{found.gpu} of {gib(found.memory_gib)}"
    console.print(f"{place}: {memory_unit()} at micro batch 1, rows of {found.length:,} tokens", markup=False)
    columns = [
        Column("model", least=20), Column("size", right=True), *(Column(tuning, right=True) for tuning in TUNINGS),
        Column("tok/s", right=True), Column("with"), Column("rows to", right=True, rank=1),
    ]  # fmt: skip
    lines = []
    for row in rows:
        best = row.best()
        line = {"model": row.name, "size": count(row.parameters), "rows to": f"{row.longest:,}" if row.longest else "–"}
        line |= {"tok/s": rate(best.tokens_per_s) if best else "–", "with": best.tuning if best else "–"}
        for tuning in TUNINGS:
            fit = row.fits.get(tuning)
            line[tuning] = bare_gib(fit.device_gib) + "!" * (glyph(fit) == "!") if fit and fit.fits else "–"
        lines.append(line)
    print_table(columns, lines, console)
    if any("!" in line[tuning] for line in lines for tuning in TUNINGS):
        console.print("! after a figure: tightly; the run may need more than there is.", style="dim")
    if len(rows) < len(found.rows):
        console.print(
            f"{len(found.rows) - len(rows)} of {len(found.rows)} models do not fit; --all shows them.", style="dim"
        )


def _whole(columns: Sequence[Column], lines: Sequence[Mapping[str, str]], room: int, gap: int) -> bool:
    """Whether a table fits with all that it is about: nothing is lost but where the price is from."""
    widths = fitting(columns, lines, room, gap)
    return sum(width + gap for width in widths.values()) - gap <= room and len(widths) >= len(columns) - 1


def _matrix(rows: Sequence[Fit], *, everything: bool) -> tuple[list[Column], list[dict[str, str]]]:
    """A line per GPU, a column per tuning and length."""
    combinations = list(dict.fromkeys((row.tuning, row.sequence_length) for row in rows))
    columns = [Column("GPU"), Column(memory_unit(), right=True)]
    columns += [Column(_combination(*one), right=True) for one in combinations]
    columns += [Column("$/h", right=True), Column("where", rank=1)]
    lines = []
    for gpu in dict.fromkeys(row.gpu for row in rows):
        own = [row for row in rows if row.gpu == gpu]
        if not everything and not any(row.fits for row in own):
            continue
        price = own[0].usd_per_h
        line = {"GPU": gpu, memory_unit(): bare_gib(own[0].memory_gib, 0), "where": own[0].provider or "–"}
        line["$/h"] = "–" if price is None else usd(price)
        for row in own:
            line[_combination(row.tuning, row.sequence_length)] = rate(row.tokens_per_s) if row.fits else "–"
        lines.append(line)
    return columns, lines


def _combination(tuning: str, length: int) -> str:
    return f"{tuning} {length // 1024}k" if length % 1024 == 0 else f"{tuning} {length}"


def _combinations(rows: Iterable[Fit]) -> tuple[list[Column], list[dict[str, str]]]:
    """A line per GPU, tuning and length."""
    columns = [
        Column(" "), Column("GPU", least=12), Column("tuning"), Column("tokens", right=True),
        Column(memory_unit(), right=True), Column("of", right=True, rank=2), Column("tok/s", right=True),
        Column("checkpointing", rank=3), Column("$/M tok", right=True, rank=1), Column("where", rank=4, least=8),
    ]  # fmt: skip
    lines = []
    for row in rows:
        price = row.usd_per_million_tokens
        lines.append({
            " ": "✔" if row.fits else "✘",
            "GPU": row.gpu,
            "tuning": row.tuning,
            "tokens": str(row.sequence_length),
            memory_unit(): bare_gib(row.device_gib),
            "of": bare_gib(row.memory_gib, 0),
            "tok/s": rate(row.tokens_per_s),
            "checkpointing": row.checkpointing,
            "$/M tok": "–" if price is None else f"{price:.3f}",
            "where": row.provider or "–",
        })  # fmt: skip
    return columns, lines


_OFFERS = (
    Column("provider", least=10), Column("#", right=True), Column("GPU", least=13),
    Column("memory", right=True, rank=1), Column("of", right=True, rank=3), Column("tok/s", right=True),
    Column("time", right=True), Column("$/h", right=True), Column("$ run", right=True), Column("price of", rank=2),
)  # fmt: skip


def print_offers(name: str, rows: Sequence[dict[str, Any]], *, total: int) -> None:
    """Offers, cheapest run first."""
    console = Console(highlight=False)
    if not rows:
        console.print(f"No offer fits {name} like this. Try --tuning qlora or a shorter --seq-len.", markup=False)
        return
    lines = [
        {
            "provider": row["provider"],
            "#": str(row["count"]),
            "GPU": row["gpu"],
            "memory": bare_gib(row["device_gib"]),
            "of": bare_gib(row["memory_gib"], 0),
            "tok/s": rate(row["tokens_per_s"]),
            "time": duration(row["time_s"]),
            "$/h": "free" if row["quota"] else usd(row["usd_per_h"]),
            "$ run": ("free" if row["quota"] else usd(row["usd"])) + "!" * bool(row["over"]),
            "price of": _as_of(row),
        }
        for row in rows
    ]
    print_table(_OFFERS, lines, console)
    for provider, quota in dict.fromkeys((row["provider"], row["quota"]) for row in rows if row["quota"]):
        console.print(f"{provider} is free: {quota}.", style="dim", markup=False)
    if any(row["over"] for row in rows):
        console.print("! after $ run: over a limit of the recipe, or longer than a free session.", style="dim")
    if any(row["stale"] for row in rows):
        console.print("! after a date: look at the price again before you rent.", style="dim")
    if total > len(rows):
        console.print(f"{total - len(rows)} more offers fit; --top shows more.", style="dim")


def _as_of(row: Mapping[str, Any]) -> str:
    """The day of a price, with a mark if it is old."""
    return ("undated" if row["as_of"] == "unknown" else row["as_of"]) + "!" * bool(row["stale"])


def print_managed(rows: Sequence[dict[str, Any]]) -> None:
    """Services that train for you, on the same data, cheapest first."""
    if not rows:
        return
    console = Console(highlight=False)
    console.print(f"\nServices that train for you, {count(rows[0]['tokens'])} tokens:")
    columns = [
        Column("provider"), Column("model", least=10), Column("$/M tok", right=True), Column("$ run", right=True),
        Column("price of"),
    ]  # fmt: skip
    lines = [
        {
            "provider": row["provider"],
            "model": row["model"] or "by size",
            "$/M tok": f"{row['usd_per_million_tokens']:g}",
            "$ run": usd(row["usd"]),
            "price of": _as_of(row),
        }
        for row in rows
    ]
    print_table(columns, lines, console)


def print_catalog(gpus: Sequence[Gpu]) -> None:
    """The GPUs that can be planned for."""
    columns = [
        Column("GPU", least=12), Column(memory_unit(), right=True), Column("GB/s", right=True),
        Column("16-bit TFLOP/s", right=True), Column("bf16"), Column("compute", right=True, rank=2),
        Column("link GB/s", right=True, rank=1),
    ]  # fmt: skip
    lines = [
        {
            "GPU": gpu.name,
            memory_unit(): bare_gib(gpu.memory_gib),
            "GB/s": rate(gpu.bandwidth_gb_s),
            "16-bit TFLOP/s": rate(gpu.bf16_tflops),
            "bf16": "yes" if gpu.bf16 else "no",
            "compute": gpu.compute_capability,
            "link GB/s": rate(gpu.link_gb_s) if gpu.link_gb_s else "–",
        }
        for gpu in gpus
    ]
    print_table(columns, lines)
