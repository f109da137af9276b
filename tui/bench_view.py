"""What ``finetui bench`` measured, as plain tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .console import Console

if TYPE_CHECKING:
    from ..engine.bench.ceilings import Figure
    from ..planner.ceilings import Ceilings


def table(*columns: str) -> Table:
    """A table without lines; a heading that begins with ``>`` is right-aligned."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return made


def wide_console() -> Console:
    """A file or a pipe takes whole lines; a terminal has its own width."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=180)


def print_ceilings(ceilings: Ceilings, figures: Sequence[Figure]) -> None:
    """One line per figure: the median, the range of the middle 80%, and the share of the datasheet's figure."""
    console = wide_console()
    driver = f", driver {ceilings.driver}" if ceilings.driver else ""
    console.print(f"{ceilings.gpu}{driver}, {ceilings.date}: medians of repeated calls on random numbers")
    rows = table("", ">measured", "", ">from", ">to", ">of datasheet")
    for figure in figures:
        share = f"{figure.value / figure.nominal:.0%}" if figure.nominal else "–"
        rows.add_row(figure.what, _number(figure.value), figure.unit, _number(figure.low), _number(figure.high), share)
    console.print(rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def print_kernels(report: dict[str, Any]) -> None:
    """Verdicts first, then times beside stock's and Liger's."""
    console = wide_console()
    console.print(
        f"{report['gpu']}, torch {report['versions'].get('torch')}, triton {report['versions'].get('triton')}, "
        f"{report['tokens']} tokens, bf16; copy {report['copy_gb_per_s']:,.0f} GB/s, "
        f"product {report['gemm_tflop_per_s']:,.0f} TFLOP/s"
    )
    for label, verdict in report["verdicts"].items():
        told = f"ok, at worst {verdict['worst']:.2f} x stock's error" if verdict["ok"] else f"WRONG: {verdict['why']}"
        console.print(f"{label:<44} {told}")
    rows = table(
        "", ">ours ms", ">spread", ">on device", ">a copy", ">stock", ">Liger", ">rate", "", ">share of ceiling"
    )
    for timing in report["timings"]:
        low, high = timing["ours_range_ms"]
        rows.add_row(
            timing["name"], f"{timing['ours_ms']:.3f}", f"±{(high - low) / 2 / timing['ours_ms']:.1%}",
            f"{timing['device_ms']:.3f}",
            *(f"{ms:.3f}" if ms else "–" for ms in (timing.get("copy_ms"), timing["stock_ms"], timing["liger_ms"])),
            f"{timing['rate']:,.0f}", timing["unit"], f"{timing['share']:.0%}",
        )  # fmt: skip
    if report["timings"]:
        console.print()
        console.print(rows)


def kernels_chart(report: dict[str, Any]) -> str:
    """Times of each kernel, the slowest version of each filling the width."""
    from ..engine.bench.chart import Bar, Group, draw

    names = {"ours_ms": "finetui", "liger_ms": "Liger", "stock_ms": "PyTorch"}
    groups = [
        Group(
            timing["name"].replace(", forward + backward", " fwd+bwd"),
            [Bar(series, timing[key], f"{timing[key]:.2f} ms") for key, series in names.items() if timing[key]],
        )
        for timing in report["timings"]
    ]
    return draw("Time of each kernel, less is better", _note(report), groups, by_group=True)


def print_engine(report: dict[str, Any]) -> None:
    """Tokens per second, memory and the first step of each program."""
    console = wide_console()
    task = report["task"]
    console.print(
        f"{report['gpu']}, {task['model']}, {task['tuning']}, {task['micro_batch']} x {task['sequence_length']} tokens"
    )
    rows = table(
        "",
        "checkpointing",
        ">tok/s",
        ">spread",
        ">allocated GiB",
        ">reserved",
        ">to first step s",
        ">loss",
        ">|gradient|",
    )
    for result in report["results"]:
        if "failed" in result:
            rows.add_row(result["arm"], result["checkpointing"], "failed", result["failed"][:60])
            continue
        start = result.get("to_first_step_s")
        rows.add_row(
            result["arm"], result["checkpointing"], f"{result['tokens_per_s']:,}",
            f"±{result['spread_ms'] / 2 / result['step_ms']:.1%}", f"{result['allocated_gib']:.2f}",
            f"{result['reserved_gib']:.2f}", "–" if start is None else f"{start:.1f}", f"{result['loss']:.4f}",
            f"{result['grad_norm'][-1]:.4f}",
        )  # fmt: skip
    console.print(rows)


def engine_chart(report: dict[str, Any]) -> str:
    """Tokens per second by checkpointing."""
    from ..engine.bench.chart import Bar, Group, draw

    done = [result for result in report["results"] if "failed" not in result]
    modes = list(dict.fromkeys(result["checkpointing"] for result in done))
    groups = [
        Group(
            f"checkpointing: {mode}",
            [
                Bar(r["arm"], r["tokens_per_s"], f"{r['tokens_per_s']:,} tok/s, {r['allocated_gib']:.1f} GiB")
                for r in done
                if r["checkpointing"] == mode
            ],
        )
        for mode in modes
    ]
    task = report["task"]
    shape = f"{task['tuning']}, {task['micro_batch']} x {task['sequence_length']} tokens a step"
    return draw(f"Training speed of {task['model'].rpartition('/')[2]}: {shape}", _note(report), groups)


def _note(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['gpu']}, {report['date']}: {report['command']}\n{versions}"
