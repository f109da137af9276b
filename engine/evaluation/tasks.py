"""Public benchmarks and tasks of one's own through lm-eval, on the model that is in memory already: the same weights,
adapter and number formats as every other figure (https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...planner.errors import HubError, MissingExtraError, RunError, first_line
from ..data.access import why_unreadable
from ..supervision.failure import is_out_of_memory
from .batches import Batches, Told
from .statistics import PerRow
from .voices import Voice


@dataclass(frozen=True)
class Tasks:
    """Which tasks: names that lm-eval knows, or YAML files.

    Args:
        names: of tasks and groups.
        fewshot: examples before each question; None is as each task has it.
        limit: questions of each task.
        as_chat: put prompts into the chat template. Published figures of most tasks are without.
    """

    names: tuple[str, ...]
    fewshot: int | None = None
    limit: int | None = None
    as_chat: bool = False


def load_tasks(wanted: Tasks) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names that it knows the tasks by, their data read once.

    Raises:
        MissingExtraError: lm-eval is not installed.
        RunError: there is no such task, or its file is wrong.
        HubError: a task's data is not to be had.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtraError("eval --tasks", "eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    files = [Path(name).expanduser() for name in wanted.names if name.endswith((".yaml", ".yml"))]
    names = [name for name in wanted.names if not name.endswith((".yaml", ".yml"))]
    if missing := next((file for file in files if not file.is_file()), None):
        raise RunError("there is no such task file", where=str(missing), do="Check its path.")
    manager = TaskManager(include_path=sorted({str(file.resolve().parent) for file in files}) or None)
    names += [_name_in(file) for file in files]
    known = manager.all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or ["arc_easy", "gsm8k", "mmlu"]
            do = f"Such as {', '.join(near)}, or the path of a task's YAML file; all of them: lm-eval ls tasks"
            raise RunError(f"lm-eval knows no task {name!r}", where="--tasks", do=do)
    for name in names:
        try:
            manager.load([name])
        except Exception as error:
            raise _unloadable(name, error) from error
    return manager, names


def _name_in(file: Path) -> str:
    from ...planner.yaml_text import parse, read_text

    tree, _ = parse(read_text(file), str(file))
    if not isinstance(tree, dict) or not isinstance(tree.get("task"), str):
        raise RunError("this is no task: it has no line task: NAME", where=str(file), do="See lm-eval's task guide.")
    return str(tree["task"])


def _unloadable(name: str, error: Exception) -> Exception:
    """The user's error for whatever lm-eval, datasets or the Hub raise while a task is made ready."""
    what, do = why_unreadable("hf://datasets", error)
    told = f"{type(error).__name__}: {first_line(error, 200)}"
    if isinstance(error, ConnectionError) or "offline" in told.lower() or "can't be reached" in what:
        do = "Connect to the network, unset HF_HUB_OFFLINE, or use a task over a local file: --tasks task.yaml"
        return HubError(f"the data of task {name} is not here and the Hub can't be reached ({told})", do=do)
    if isinstance(error, FileNotFoundError) or "refused" in what or "credentials" in what:
        return HubError(f"the data of task {name} can't be read ({told})", do=do)
    return RunError(f"task {name} can't be made ready ({told})", where="--tasks", do="Mend it, or leave it out.")


def arguments(voice: Voice, wanted: Tasks, manager: Any, names: list[str], batch: int) -> dict[str, Any]:
    """What lm-eval's ``simple_evaluate`` is called with. The model is the one in memory: 4-bit weights stay in 4 bits,
    and an adapter is on or off as the voice has it."""
    from lm_eval.models.huggingface import HFLM

    context = voice.context()
    autocast = context.fast_dtype if context._enabled else None
    model = HFLM(
        pretrained=voice.model,
        tokenizer=voice.tokenizer,
        backend="causal",
        batch_size=batch,
        mixed_precision_dtype=autocast,
    )
    return {
        "model": model,
        "tasks": names,
        "task_manager": manager,
        "num_fewshot": wanted.fewshot,
        "limit": wanted.limit,
        "apply_chat_template": wanted.as_chat,
        "log_samples": True,
        "bootstrap_iters": 0,  # intervals are ours, over the same rows as the base's
        "random_seed": 0,
        "numpy_random_seed": 0,
        "torch_random_seed": 0,
        "fewshot_random_seed": 0,
    }


def task_figures(
    voice: Voice, wanted: Tasks, loaded: tuple[Any, list[str]], batches: Batches, told: Told
) -> dict[str, PerRow]:
    """Each metric of each task, as ``tasks/NAME/METRIC``.

    Raises:
        HardwareError: memory runs out with a single row.
    """
    import lm_eval

    side, bars = voice.tokenizer.padding_side, _Bars(f"{voice.label}: ", told, sys.stderr)
    try:
        while True:
            try:
                with contextlib.redirect_stderr(bars):
                    made = lm_eval.simple_evaluate(**arguments(voice, wanted, *loaded, batches.size))
                return figures_of(made)
            except Exception as error:
                if not is_out_of_memory(error) or batches.size == 1:
                    raise
            batches.size //= 2
            batches.warn(f"{voice.label}: out of memory over tasks; going on with {batches.size} rows at once")
    finally:
        voice.tokenizer.padding_side = side  # which lm-eval turns


class _Bars:
    """Takes the place of standard error while lm-eval is at work: its progress bars become progress of ours."""

    _BAR = re.compile(r"(?:(?P<what>[^\r\n|%]*?):?\s+)?\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+) \[")

    def __init__(self, label: str, told: Told, stream: Any) -> None:
        self.label, self.told, self.stream = label, told, stream

    def write(self, text: str) -> int:
        """Bars end here, words go on."""
        bars = list(self._BAR.finditer(text))
        if bars:
            what = (bars[-1]["what"] or "").strip() or "tasks"
            self.told(self.label + what, int(bars[-1]["done"]), int(bars[-1]["total"]))
        elif text.strip():
            self.stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def figures_of(told: dict[str, Any]) -> dict[str, PerRow]:
    """Figures question by question where lm-eval tells them so, else the aggregate of the task without an interval."""
    made: dict[str, PerRow] = {}
    for task, metrics in told["results"].items():
        directions = told.get("higher_is_better", {}).get(task) or {}
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or metric.endswith("_stderr"):
                continue
            if not chosen:  # the length of samples and the like, which have no filter
                continue
            lower = directions.get(metric) is False
            rows = [s for s in told.get("samples", {}).get(task, []) if s.get("filter", "none") == chosen]
            rows.sort(key=lambda sample: sample["doc_id"])
            each = [sample.get(metric) for sample in rows]
            name = f"tasks/{task}/{metric}" + (f",{chosen}" if chosen != "none" else "")
            if each and all(isinstance(one, int | float) for one in each):
                figure = PerRow.of([float(one) for one in each], lower_is_better=lower)
                if abs(figure.value - value) < 1e-6:  # else the task sums up in another way than by the mean
                    made[name] = figure
                    continue
            made[name] = PerRow((float(value),), (1.0,), lower)
    return made
