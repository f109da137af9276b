"""Settings and variants of the kernels that fall short of their ceilings, each checked and timed, in one short run.

    python -P -m finetui.tests.bench.tune [--only adamw …] [--tokens 8192] [--seconds 240] [--warm 8] [--json FILE]

What a kernel is built from stands in constants of its module: widths of tiles, warps, and which of two ways it goes.
Each combination below is tried in their place; what it computes is held against what the constants as they are
compute, and it is timed on a warm GPU. The first line of each kernel is that of its constants as they are; choosing
others is then an edit of that module. The narrow products of adapters are cuBLAS's: there, the ways to ask for the same
product are tried. Compiling takes longer than all else, so ``--warm`` processes do it side by side first. The table of
the best comes last. Without a GPU, ``--check`` runs the smallest shapes in Triton's interpreter
(``TRITON_INTERPRET=1``) and times nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetui.engine.bench.clock import stopwatch
from finetui.engine.bench.kernels import device_ms
from finetui.tests.bench.trials import Made, Trial, trials


@contextlib.contextmanager
def constants(module: Any, values: dict[str, Any]) -> Iterator[None]:
    """A module with other constants."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def measure(
    trial: Trial, tokens: int, device: torch.device, until: float, *, timed: bool, part: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per setting: what was set, whether it is right, and how fast it is. ``part``: every so manieth alone."""
    expected: Made | None = None
    for values in itertools.islice(trial.settings(), part[0], None, part[1]):
        row: dict[str, Any] = {"kernel": trial.name, "settings": values}
        if time.monotonic() > until:
            yield row | {"left_out": "the time is up"}
            return
        try:
            with constants(trial.module, values):
                run = trial.make(tokens, device)
                made = [one.detach().float().clone() for one in run()]
                expected = expected or made
                row["apart"] = max(_apart(a, b) for a, b in zip(made, expected, strict=True))
                row["right"] = row["apart"] <= trial.near
                if timed:
                    if trial.short:
                        seconds = device_ms(run, 10) / 1e3
                    else:
                        seconds = stopwatch(run, device, budget_s=0.06, least=5).median
                    row |= _timed(trial, tokens, seconds)
        except Exception as error:  # a setting that does not compile or launch is a finding, not an end
            row["failed"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        yield row


def _apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def _timed(trial: Trial, tokens: int, seconds: float) -> dict[str, float]:
    rate = {}
    if trial.bytes(tokens):
        rate["gb_per_s"] = round(trial.bytes(tokens) / seconds / 1e9, 1)
    if trial.flops(tokens):
        rate["tflop_per_s"] = round(trial.flops(tokens) / seconds / 1e12, 1)
    return {"ms": round(seconds * 1e3, 4), **rate}


def best_of(rows: list[dict[str, Any]]) -> list[str]:
    """The table of what was found, a line for each kernel: as it is, and its fastest right setting."""
    lines = [f"{'kernel':52}{'as it is':>10}{'best':>10}{'gain':>7}{'rate':>14}   what differs"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        right = [row for row in rows if row["kernel"] == kernel and row.get("right") and "ms" in row]
        wrong = sum(row.get("right") is False or "failed" in row for row in rows if row["kernel"] == kernel)
        more = f"; {wrong} wrong or failed" if wrong else ""
        if not right:
            lines.append(f"{kernel:52}{'':41}   nothing measured{more}")
            continue
        now, best = right[0], min(right, key=lambda row: row["ms"])
        differs = {knob: value for knob, value in best["settings"].items() if value != now["settings"][knob]}
        gain = f"{now['ms'] / best['ms'] - 1:.1%}"
        rate = f"{best['tflop_per_s']} TFLOP/s" if "tflop_per_s" in best else f"{best.get('gb_per_s', '')} GB/s"
        lines.append(f"{kernel:52}{now['ms']:>10}{best['ms']:>10}{gain:>7}{rate:>14}   {_plain(differs)}{more}")
    return lines


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda one: getattr(one, "__name__", str(one)))


def warm(options: argparse.Namespace, seconds: float) -> None:
    """Compile all settings in several processes, into the cache on disk that they share with this one."""
    command = [sys.executable, "-P", "-m", "finetui.tests.bench.tune", "--tokens", str(options.tokens)]
    command += ["--only", *options.only]
    children = [
        subprocess.Popen([*command, "--part", str(place), str(options.warm)], stdout=subprocess.DEVNULL)
        for place in range(options.warm)
    ]
    until = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def main() -> int:
    """Try them, write each row the moment it is known, and say which was the fastest right one of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of which a kernel's name has one")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--check", action="store_true", help="smallest shapes, no times")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="processes that compile beforehand")
    parser.add_argument("--part", type=int, nargs=2, metavar=("PLACE", "OF"), help="one of those")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if not a.check and not torch.cuda.is_available():
        print("timing needs a CUDA GPU; --check runs in the interpreter", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [trial for trial in trials() if any(word in trial.name for word in a.only)]
    began = time.monotonic()
    if a.warm and not a.check:
        warm(a, a.seconds / 3)
    rows: list[dict[str, Any]] = []
    for place, trial in enumerate(chosen):
        # No kernel may use up the time of those after it.
        now = time.monotonic()
        share = now + (began + a.seconds - now) / min(4, len(chosen) - place)
        timed = not a.check and a.part is None
        for row in measure(trial, 8 if a.check else a.tokens, device, share, timed=timed, part=a.part or (0, 1)):
            rows.append(row)
            print(_plain(row), flush=True)
            if a.json:
                a.json.write_text(_plain(rows) + "\n", encoding="utf-8")
    if a.part is None:
        print("\n".join(best_of(rows)), file=sys.stderr)
    return int(any(row.get("right") is False or "failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
