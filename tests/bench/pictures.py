"""Draws every picture of the README anew, from the real app.

    python -m tests.bench.pictures [--out docs] [--only plan gpus monitor session]

``plan.svg`` and ``gpus.svg`` are what the planner says of Qwen3-8B with the shipped prices; ``monitor.svg`` is the
recorded quickstart run. ``session.cast`` (asciicast v2) is the app on a pty while keys are pressed and while that run,
told again at twice its speed, comes to its end; ``session.svg`` plays the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from codecs import getincrementaldecoder
from pathlib import Path

from finetui.engine.run import Run
from finetui.tests.bench.film import as_svg, film, from_the_first_picture
from finetui.tests.bench.live import own_it
from finetui.tests.bench.screenshot import RECORDED
from finetui.tests.bench.terminal import Terminal, environment
from finetui.tui.keys import key_of

SIZE = (100, 30)
PLANNED = "model: Qwen/Qwen3-8B\ntuning: {type: qlora, rank: 16}\nhardware: {gpu: RTX-4090}\n"
SCREENSHOT = [sys.executable, "-P", "-m", "finetui.tests.bench.screenshot"]
#: Steps of the recorded run that are told before the session begins, and how many times faster the rest comes.
TOLD, FASTER = 90, 2.0
#: The session: words that are waited for, seconds that one looks at them, then keys.
SCENES = [
    ("fits", 2.0, "b"), ("fit on one", 2.0, "jj"), ("fit on one", 1.5, "q"), ("rank", 0.7, "jjj"),
    ("rank", 0.7, "l"), ("rank", 0.7, "l"), ("rank", 1.0, "l"), ("rank", 1.5, key_of("gpus")),
    ("RTX-A5000", 2.5, "jj"), ("RTX-A5000", 1.5, key_of("monitor")), ("held-out", 6.0, "h[[h"), ("at step", 2.5, "v"),
    ("before", 3.0, "v"),
    ("predicted", 3.0, key_of("runs")), ("finished", 3.0, "q"),
]  # fmt: skip
#: A word without which a picture is none.
SHOWN = {"plan": "fits", "gpus": "RTX-A5000", "monitor": "held-out 0.0204"}


def screenshots(out: Path, only: list[str], folder: Path) -> None:
    """The three screens."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(PLANNED, encoding="utf-8")
    for name, more in (
        ("plan", ["--screen", "plan", "--recipe", str(recipe)]),
        ("gpus", ["--screen", "gpus", "--recipe", str(recipe)]),
        ("monitor", []),
    ):
        if name in only:
            drawn = folder / f"{name}.svg"
            subprocess.run([*SCREENSHOT, str(drawn), *more], check=True, env=environment(folder))
            if SHOWN[name] not in drawn.read_text(encoding="utf-8").replace("&#160;", " "):
                raise RuntimeError(f"{SHOWN[name]!r} is not on the picture of {name}")
            shutil.copy(drawn, out)


def session(home: Path) -> list[tuple[float, str]]:
    """A session with the app: what it wrote, ``(seconds, text)`` each."""
    run = Run(home / "runs" / "quickstart")
    shutil.copytree(RECORDED, run.path)
    lines = run.events_path.read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if f'"step":{TOLD},' in line.replace(" ", ""))
    past = json.loads(lines[first])["time"]
    shift = time.time() - past
    run.events_path.write_text("".join(_shifted(line, shift) for line in lines[:first]), encoding="utf-8")
    own_it(run, json.loads(lines[0])["time"] + shift)
    heard: list[tuple[float, str]] = []
    ended = threading.Event()

    def tell() -> None:
        for line in lines[first:]:
            event = json.loads(line)
            while (due := past + (event["time"] - past) / FASTER) > time.time() - shift:
                if ended.wait(min(due - (time.time() - shift), 0.2)):
                    return
            with open(run.events_path, "a", encoding="utf-8") as file:
                file.write(_shifted(line, shift))
        (run.path / "run.json").write_text((RECORDED / "run.json").read_text(encoding="utf-8"), encoding="utf-8")

    with Terminal([sys.executable, "-P", "-m", "finetui"], environment(home), size=SIZE) as terminal:
        decode = getincrementaldecoder("utf-8")().decode
        terminal.on_bytes = lambda data: heard.append((time.perf_counter() - terminal.started, decode(data)))
        terminal.wait_for("fits")
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        for words, pause, keys in SCENES:
            terminal.wait_for(words)
            terminal.read(pause)
            for key in keys:
                terminal.send(key)
                terminal.read(0.15)
        terminal.wait()
        ended.set()
        teller.join()
    return heard


def _shifted(line: str, shift: float) -> str:
    event = json.loads(line)
    return json.dumps({**event, "time": round(event["time"] + shift, 3)}, ensure_ascii=False) + "\n"


def write_session(out: Path, heard: list[tuple[float, str]]) -> None:
    """The session as asciicast v2 and as an SVG that plays."""
    heard = from_the_first_picture(heard)
    head = {"version": 2, "width": SIZE[0], "height": SIZE[1], "title": "finetui", "env": {"TERM": "xterm-256color"}}
    lines = [json.dumps(head), *(json.dumps([round(when, 3), "o", text]) for when, text in heard)]
    (out / "session.cast").write_text("\n".join(lines) + "\n", encoding="utf-8")
    last = max(n for n, (_, text) in enumerate(heard) if "\x1b[?1049l" not in text)
    (out / "session.svg").write_text(as_svg(film(heard[: last + 1], SIZE), "finetui"), encoding="utf-8")


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ["plan", "gpus", "monitor", "session"]
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="finetui-pictures-") as folder:
        os.environ["XDG_STATE_HOME"] = folder
        screenshots(arguments.out, arguments.only, Path(folder))
        if "session" in arguments.only:
            write_session(arguments.out, session(Path(folder)))


if __name__ == "__main__":
    main()
