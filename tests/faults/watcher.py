"""A process that looks at every checkpoint of a folder of runs, again and again, and writes down what is not whole.

    python -P tests/faults/watcher.py FOLDER REPORT

Each folder that bears the name of a checkpoint must be complete at every moment: its manifest and all files as they
were written. Once a run has had a checkpoint there must always be one. REPORT gets a line for each violation, and at
the end (SIGTERM) one with how much was looked at.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

from finetui.engine.checkpoints.store import MANIFEST, damage

NAME = re.compile(r"step-\d{6,}")


def names(folder: Path) -> list[str]:
    """What bears the name of a checkpoint now."""
    try:
        return [name for name in os.listdir(folder) if NAME.fullmatch(name)]
    except FileNotFoundError:
        return []


def still_there(path: Path, inode: int) -> bool:
    """Whether it is still the same folder: one that was pruned meanwhile could not be read to its end by rights."""
    try:
        return path.stat().st_ino == inode
    except FileNotFoundError:
        return False


def main(root: Path, report: Path) -> None:
    """Look until told to stop."""
    running = [True]
    signal.signal(signal.SIGTERM, lambda *_: running.clear())
    verified: set[tuple[str, int]] = set()
    harmed: set[str] = set()
    looks, had = 0, set[Path]()
    with report.open("a", encoding="utf-8") as out:

        def tell(line: str) -> None:
            out.write(line + "\n")
            out.flush()

        while running:
            for folder in root.glob("*/checkpoints"):
                if (folder.parent / "harmed").exists():  # a test has damaged one on purpose
                    harmed.add(folder.parent.name)
                    continue
                found = names(folder)
                looks += len(found)
                for name in found:
                    path = folder / name
                    try:
                        inode = path.stat().st_ino
                    except FileNotFoundError:
                        continue
                    key = (str(path), inode)
                    if key in verified:
                        if not (path / MANIFEST).exists() and still_there(path, inode):
                            tell(f"{path}: its manifest is gone")
                        continue
                    wrong = damage(path)
                    if wrong is None:
                        verified.add(key)
                        had.add(folder)
                    elif (folder.parent / "harmed").exists():  # since the look above
                        break
                    elif still_there(path, inode) and damage(path) is not None and still_there(path, inode):
                        tell(f"{path}: {wrong}")
                if folder in had and not found and not any(names(folder) for _ in range(5)) and folder.exists():
                    tell(f"{folder}: no checkpoint is left")
            time.sleep(0.002)
        tell(f"looked {looks} times at {len(verified)} checkpoints")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
