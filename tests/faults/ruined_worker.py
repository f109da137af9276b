"""A rank with a fault, as a process of its own: ``python -P tests/faults/ruined_worker.py RUN_DIR``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from finetui.engine import worker
from finetui.engine.run import Run

if __name__ == "__main__":
    run = Run(sys.argv[1])
    runpy.run_path(str(Path(__file__).with_name("ruin.py")))["ruin"](run, (run.path / "fault").read_text())
    sys.exit(worker.main(sys.argv[1:]))
