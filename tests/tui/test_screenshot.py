"""The script behind the README's picture draws the recorded run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "screenshot.py"


def test_the_recorded_quickstart_is_drawn(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.modules["finetui"].__path__[0]).parent), *filter(None, sys.path)])
    target = tmp_path / "docs" / "monitor.svg"
    subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(target), "--keys", "v"],
        check=True,
        env={**os.environ, "PYTHONPATH": path, "FINETUI_RUNS": str(tmp_path)},
        timeout=60,
    )
    picture = target.read_text(encoding="utf-8").replace("&#160;", " ")
    for words in ("step 257/257", "finished", "held-out 0.0204", "Thermal throttling means"):
        assert words in picture
