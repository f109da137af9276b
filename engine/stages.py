"""The stages of a recipe, carried out one after the other: what a staged run starts in place of a rank.

    python -P -m finetui.engine.stages RUN_DIR            carries all stages out
    python -P -m finetui.engine.stages RUN_DIR STAGE      one that merges, evaluates or exports

A staged run is a run like any other: it has a supervisor, outlives the terminal, can be watched, stopped and resumed.
Its one process is this. Each stage that trains is a run of its own beside it (``NAME.1-sft``), with its own supervisor,
checkpoints and output; what its ranks say is repeated in the events of the staged run. ``stages.json`` notes what is
done. After a crash of anything, ``finetui resume NAME`` goes on where it was: a finished stage is passed over, one at
work is waited for, one that was cut short is resumed. What loads a model here is a process of its own, so that its
memory is free again when the next stage trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, get_args

from ..planner.errors import RunError, TrainingError
from ..planner.recipe import Recipe
from ..planner.stages import Step, expand
from .durable import write_atomically
from .events import Event, EventLog, EventReader, LogLine, Payload, Phase
from .launcher import kill, resume, start, stop
from .modes import keep_private
from .rank import die_with_parent, redirect
from .run import Run, trained
from .status import LIVE_STATES
from .supervision.failure import classify
from .supervision.redacted import redact_streams

NOTES = "stages.json"
#: What of a stage's events is repeated: the curves and the words, not the samples of a machine that is sampled anyway.
_REPEATED = frozenset(
    {"step", "eval", "metrics", "memory", "checkpoint", "fallback", "warning", "log", "phase", "sample"}
)
_PAYLOADS: dict[str, Any] = {kind.type: kind for kind in get_args(Payload)}
_POLL_S = 0.25
_MERGE = "--merge"
#: What torch elastic tells a rank about its place: not for the ranks of stages.
_PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def main(argv: list[str] | None = None) -> int:
    """Entry point of the process; the run's log takes over stdout and stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) not in (1, 2):
        print("usage: python -P -m finetui.engine.stages RUN_DIR [STAGE]", file=sys.stderr)
        return 2

    run = Run(arguments[0])
    keep_private()
    redirect(run, 0)
    redact_streams()
    if not die_with_parent():
        print("the supervisor is gone already", file=sys.stderr)
        return 1
    for name in _PLACES:
        os.environ.pop(name, None)
    return attempt(run) if len(arguments) == 1 else act(run, arguments[1])


def attempt(run: Run) -> int:
    """Carry out what is left of a staged run; the exit code is 0 when all is done, or it was stopped on request."""
    with EventLog(run.events_path) as log:
        try:
            signal.signal(signal.SIGTERM, (chain := Chain(run, log)).ended)
            chain.carry_out()
        except _Told:
            return 1
        except Exception as error:
            traceback.print_exc()
            run.append(classify(error, 0, None))
            return 1
    return 0


def act(run: Run, stage: str) -> int:
    """What one stage does with what was trained last."""
    with EventLog(run.events_path) as log:
        try:
            chain = Chain(run, log)
            if stage == _MERGE:
                chain.merge()
            else:
                chain.act(next(step for step in chain.steps if step.name == stage))
        except Exception as error:
            traceback.print_exc()
            run.append(classify(error, 0, None))
            return 1
    return 0


class _Told(Exception):
    """A process of ours failed, and has said why in the events."""


class Chain:
    """One attempt at all stages of a run."""

    def __init__(self, run: Run, log: EventLog) -> None:
        self.run, self.log = run, log
        self.steps = expand(run.recipe)
        self.notes: dict[str, Any] = _read_notes(run)
        self.before = 0
        """Optimiser steps of the stages that are done: curves go on from there."""
        self.total = sum(stage.steps for stage in run.plan.stages)
        self._child: Run | None = None

    def carry_out(self) -> None:
        """Every stage that is not done yet, in order.

        Raises:
            TrainingError: a stage ended badly; the cause is its own.
            UserError: a stage can't be started.
        """
        for number, step in enumerate(self.steps, 1):
            self.log.append(Phase(f"stage {number} of {len(self.steps)}: {step.name}"))
            if step.recipe is not None:
                if not self._train(number, step):
                    return
            elif step.name not in self.notes["done"]:
                self._apart(step.name)
            if self.run.requested("stop"):
                self.run.update(state="stopping")
                return

    # --- stages that train

    def _train(self, number: int, step: Step) -> bool:
        """Carry a training out; False if it was stopped on request."""
        child = self._child = self._child_of(number, step)
        repeated = self.notes["repeated"].get(child.name, 0)
        reader = EventReader(child.events_path, repeated)
        if not child.recorded.attempt:
            start(child)
        elif child.status.state not in LIVE_STATES and child.status.state != "finished":
            resume(child)
        asked = False
        while True:
            over = child.status.state not in LIVE_STATES
            for event in reader.read():
                self._repeat(event)
                self.notes["repeated"][child.name] = event.seq
                if event.type == "checkpoint":
                    self._write_notes()
            if over:
                break
            if self.run.requested("stop") and not asked:
                asked = True
                self.run.update(state="stopping")
                with contextlib.suppress(RunError):  # it has just ended by itself
                    stop(child)
            time.sleep(_POLL_S)
        self._write_notes()
        self._child = None
        status = child.status
        if status.state == "finished":
            self.before += child.plan.resolved.steps
            return True
        if status.state == "stopped" and self.run.requested("stop"):
            return False
        cause = status.cause or "crash"
        what = f"stage {step.name} {status.state}: {status.message or 'it was stopped by itself'}"
        raise TrainingError(what, cause=cause, where=child.name, do=status.do or f"finetui resume {self.run.name}")

    def _child_of(self, number: int, step: Step) -> Run:
        """The run of a stage: the one that is there, or a new one on what the stage before made."""
        from .planning import plan_for

        name = f"{self.run.name}.{number}-{step.name}"
        path = self.run.path.parent / name
        if (path / "run.json").is_file():
            return Run(path)
        assert step.recipe is not None
        recipe = self._on_what_was_made(step)
        return Run.create(recipe, plan_for(recipe), root=self.run.path.parent, name=name)

    def _on_what_was_made(self, step: Step) -> Recipe:
        assert step.recipe is not None
        last = self._last()
        if last is None:
            return step.recipe
        if step.continues:
            changed = {"tuning.start_from": str(last.output_path), "model": last.recipe.model}
        elif last.plan.resolved.trains_base:
            changed = {"model": str(last.output_path)}
        else:
            changed = {"model": str(self._merged(last))}
        return step.recipe.with_overrides(changed)

    def _last(self) -> Run | None:
        """The run of the last stage that trained."""
        last = trained(self.run)
        return last if last.path != self.run.path else None

    def _merged(self, last: Run) -> Path:
        """The model that stands alone; made once."""
        target = last.path / "merged"
        if not target.is_dir():
            self.log.append(Phase("merging the adapter", last.name))
            self._apart(_MERGE)
        return target

    # --- stages that do not

    def _apart(self, what: str) -> None:
        """Act in a process of its own."""
        command = [sys.executable, "-P", "-m", __spec__.name if __spec__ else "finetui.engine.stages"]
        done = subprocess.run([*command, str(self.run.path), what], check=False)
        self.notes = _read_notes(self.run) | {"repeated": self.notes["repeated"]}
        if done.returncode:
            raise _Told

    def merge(self) -> Path:
        """Merge what was trained last into its base."""
        from .export import export_run

        last = self._last()
        assert last is not None, "a stage that trains stands before it"
        if last.plan.resolved.trains_base:
            return last.output_path
        target = last.path / "merged"
        return target if target.is_dir() else export_run(last, "merged", target)

    def act(self, step: Step) -> None:
        """Merge, evaluate or export what was trained last, and note what came of it."""
        last = self._last()
        assert last is not None, "a stage that trains stands before it"
        if step.stage.do == "merge":
            self._note(step.name, {"merged": str(self.merge())})
        elif step.stage.do == "evaluate":
            self.log.append(Phase("evaluating", last.name))
            self._note(step.name, self._evaluated(last, step))
        else:
            from .export import export_run

            target = Path(step.stage.path) if step.stage.path else self.run.path / step.name
            self.log.append(Phase("exporting", str(target)))
            self._note(step.name, {"exported": str(export_run(last, step.stage.to, target))})

    def _evaluated(self, last: Run, step: Step) -> dict[str, Any]:
        """Held-out loss of what was trained last and of what it began as; kept among the run's evaluations too."""
        from .evaluation.evaluation import Wanted, evaluate
        from .evaluation.records import save
        from .evaluation.subjects import RESULT, subjects

        wanted = Wanted(rows_of=step.rows, answers=0)
        made = evaluate(subjects([str(last.path)], [RESULT]), wanted, lambda *_: None, self._say)
        save(made, last, step.name)
        base, tuned = (entry.figures for entry in made.entries)
        difference = next(found for _, _, name, found in made.differences if name == "loss")
        loss, before, accuracy = tuned["loss"], base["loss"], tuned["accuracy"].value
        self._say(f"{step.name}: held-out loss {loss.value:.4f} (before: {before.value:.4f}, {difference.verdict}), "
                  f"accuracy {accuracy:.1%}")  # fmt: skip
        tokens = int(sum(loss.weights))
        return {"loss": loss.value, "accuracy": accuracy, "tokens": tokens, "base_loss": before.value}

    def _say(self, sentence: str) -> None:
        self.log.append(LogLine(0, sentence))

    # --- what is said and noted

    def _repeat(self, event: Event) -> None:
        """Say what a stage said, with steps counted from the first stage's first."""
        if event.type not in _REPEATED:
            return
        kind = _PAYLOADS[event.type]
        known = {field.name for field in dataclasses.fields(kind)}
        data = {key: value for key, value in event.data.items() if key in known}
        if "step" in data:
            data["step"] += self.before
        if event.type == "step":
            data["steps"] = max(self.total, data["step"])
        if event.type == "checkpoint" and self._child is not None:
            data["path"] = f"../{self._child.name}/{data['path']}"
        self.log.append(kind(**data))
        if event.type == "step" and self.run.recorded.state == "preparing":
            self.run.update(state="running")

    def _note(self, name: str, what: dict[str, Any]) -> None:
        self.notes["done"][name] = what
        self._write_notes()

    def _write_notes(self) -> None:
        write_atomically(self.run.path / NOTES, json.dumps(self.notes, indent=2) + "\n")

    def ended(self, *_: object) -> None:
        """End with the supervisor, and the stage at work too; a machine that shuts down asks for a checkpoint first.

        A machine's SIGTERM reaches all processes at once, so its request may come a moment after.
        """
        until = time.monotonic() + 1.0
        while not self.run.requested("stop"):
            if time.monotonic() > until:
                if self._child is not None:
                    with contextlib.suppress(RunError):
                        kill(self._child, grace_s=2.0)
                os._exit(128 + signal.SIGTERM)
            time.sleep(0.05)


def _read_notes(run: Run) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run.path / NOTES).read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {"done": {}, "repeated": {}}


if __name__ == "__main__":
    sys.exit(main())
