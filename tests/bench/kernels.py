"""Kernels at the shapes of Llama-3.1-8B: first whether they are right, then how fast, beside stock torch and Liger.

    python -P tests/bench/kernels.py [--tokens 8192] [--only rms_norm glu …] [--json FILE] [--no-timing]

What ``finetui bench kernels`` does (``engine/bench/kernels.py`` says how), with the report in a file. Needs a CUDA GPU;
uses ``liger_kernel`` and ``bitsandbytes`` if they are there. The table comes last; the exit code is 1 if anything was
wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch


def main() -> int:
    # Liger imports transformers, which looks for a module named "kernels" and must not find this file.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    from finetui.engine.bench.kernel_checks import CHECKS
    from finetui.engine.bench.kernels import run
    from finetui.tui.bench_view import print_kernels

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-timing", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU", file=sys.stderr)
        return 2
    report = run(options.only, options.tokens, lambda line: print(line, file=sys.stderr), timing=not options.no_timing)
    report["command"] = " ".join(["python -P tests/bench/kernels.py", *sys.argv[1:]])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_kernels(report)
    return 0 if all(verdict["ok"] for verdict in report["verdicts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
