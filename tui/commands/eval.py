"""``finetui eval``: whether a model got better at its task, and worse at anything else."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...planner.datasource import DataFormat
from ...planner.errors import FinetuiError, MissingExtraError, RunError
from ..quiet import hush_libraries
from .options import JsonFlag, local_path

if TYPE_CHECKING:
    from ...engine.evaluation.evaluation import Evaluation

TargetsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN|MODEL", help="Runs by name or folder; models and adapters by folder or id.")
]
CheckpointFlag = Annotated[
    list[str] | None, typer.Option("--checkpoint", help="Of each run: step-000200, 200 or result; may be repeated.")
]
DataFlag = Annotated[str | None, typer.Option("--data", help="Rows to use instead of those that were held out.")]
FormatFlag = Annotated[DataFormat, typer.Option("--format", metavar="NAME", help="With --data: how its rows are read.")]
LimitFlag = Annotated[int | None, typer.Option("--limit", min=1, max=2**40, help="At most so many rows, the first.")]
AnswersFlag = Annotated[int, typer.Option("--answers", min=0, help="At most so many prompts are answered; 0 is none.")]
LengthFlag = Annotated[int, typer.Option("--max-new-tokens", min=1, max=2**20, help="Longest answer in tokens.")]
TemperatureFlag = Annotated[
    float,
    typer.Option(
        "--temperature", min=0.0, max=100.0, help="0 always takes the likeliest token; above it, --seed counts."
    ),
]
SeedFlag = Annotated[int, typer.Option("--seed", min=0, help="With --temperature: of the draws.")]
ScoreFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--score", help="Marks answers: exact-answer, numeric, path.py:function, or {function: regex, pattern: …}."
    ),
]
BaseFlag = Annotated[bool, typer.Option("--base/--no-base", help="Compare with what each model began as.")]
AlsoFlag = Annotated[
    list[str] | None, typer.Option("--also", help="Another file whose likelihood is measured; may be repeated.")
]
TasksFlag = Annotated[
    str | None, typer.Option("--tasks", help="Of lm-eval, with commas: mmlu,gsm8k; or a task's YAML file.")
]
FewshotFlag = Annotated[int | None, typer.Option("--fewshot", min=0, help="With --tasks: examples in each prompt.")]
AsChatFlag = Annotated[bool, typer.Option("--as-chat", help="With --tasks: prompts go through the chat template.")]
BatchFlag = Annotated[
    int | None, typer.Option("--batch", min=1, max=2**20, help="Rows at once; the plan's micro batch.")
]
DeviceFlag = Annotated[Literal["cuda", "cpu"] | None, typer.Option("--device", help="What is there, by default.")]
ShowFlag = Annotated[int, typer.Option("--show", min=0, help="Print so many answers beside what was expected.")]
NameFlag = Annotated[str | None, typer.Option("--name", help="What the evaluation is called in the run's folder.")]
OutFlag = Annotated[Path | None, typer.Option("--out", "-o", help="Write the figures to this JSON file too.")]


def eval(  # noqa: A001 - the verb's name
    targets: TargetsArgument, checkpoint: CheckpointFlag = None, data: DataFlag = None, form: FormatFlag = "auto",
    limit: LimitFlag = None, answers: AnswersFlag = 64, max_new_tokens: LengthFlag = 256,
    temperature: TemperatureFlag = 0.0, seed: SeedFlag = 0, score: ScoreFlag = None, base: BaseFlag = True,
    also: AlsoFlag = None, tasks: TasksFlag = None, fewshot: FewshotFlag = None, as_chat: AsChatFlag = False,
    batch: BatchFlag = None, device: DeviceFlag = None, show: ShowFlag = 0, name: NameFlag = None, out: OutFlag = None,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """What got better by the training, and what got worse."""
    _refuse_idle({"--format": form != "auto"}, "--data", data is not None)
    _refuse_idle({"--fewshot": fewshot is not None, "--as-chat": as_chat}, "--tasks", tasks is not None)
    _refuse_idle(
        {"--score": bool(score), "--show": show > 0, "--temperature": temperature > 0}, "--answers", answers > 0
    )
    _refuse_idle({"--seed": seed > 0}, "--temperature", temperature > 0)
    if tasks is not None and not tasks.strip(", "):
        raise RunError("no task is named", where="--tasks", do="Name some, as in --tasks mmlu,gsm8k.")
    if out is not None:
        _check_place(out)
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise MissingExtraError("eval", "train")
    hush_libraries()
    from ...engine.evaluation.answers import Generation
    from ...engine.evaluation.evaluation import Wanted, evaluate
    from ...engine.evaluation.scores import rewards_of
    from ...engine.evaluation.subjects import RESULT, subjects
    from ...engine.evaluation.tasks import Tasks

    wanted = Wanted(
        data=local_path(data) if data else None, form=form, limit=limit, answers=answers,
        generation=Generation(max_new_tokens, temperature, seed), rewards=tuple(rewards_of(score)) if score else None,
        base=base, also=tuple(local_path(path) for path in also or ()),
        tasks=Tasks(tuple(filter(None, tasks.split(","))), fewshot, limit, as_chat) if tasks else None, batch=batch,
    )  # fmt: skip
    named = subjects(targets, checkpoint or [], device)
    with Progress() as progress:
        for subject in named:
            if subject.run is not None and not checkpoint and subject.checkpoint != RESULT:
                progress.warn(f"{subject.run.name} has no result yet: its {subject.checkpoint} is evaluated")
        evaluation = evaluate(named, wanted, progress, progress.warn)
    _tell(evaluation, name or _subject_matter(wanted.data, tasks), show=show, out=out, as_json=as_json)


def _refuse_idle(given: dict[str, bool], needed: str, there: bool) -> None:
    """An option without effect is an error."""
    for flag, is_given in given.items():
        if is_given and not there:
            raise RunError(f"{flag} has no effect without {needed}", do=f"Remove it, or add {needed}.")


def _subject_matter(data: str | None, tasks: str | None) -> str:
    """What an evaluation is called unless it is given a name."""
    return Path(data).stem if data else "held-out" if not tasks else "tasks"


def _tell(evaluation: Evaluation, name: str, *, show: int, out: Path | None, as_json: bool) -> None:
    from ...engine.durable import write_atomically
    from ...engine.evaluation.records import as_tree, save

    tree: dict[str, Any] = as_tree(evaluation)
    # Every run that was evaluated keeps what came out; figures of several are in each.
    runs = {entry.subject.run.path: entry.subject.run for entry in evaluation.entries if entry.subject.run}
    paths: list[Path] = []
    unwritten: list[str] = []
    for run in runs.values():
        try:
            paths.append(save(evaluation, run, name))
        except FinetuiError as error:
            unwritten.append(str(error))
    written = []
    if out is not None:
        try:
            write_atomically(out, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
            written.append(out)
        except OSError as error:
            unwritten.append(f"{out}: the figures can't be written ({error.strerror}).")
    _show(evaluation, tree, paths, show=show, as_json=as_json)
    for path in [] if as_json else [*paths, *written]:
        print(f"wrote {path}", file=sys.stderr)
    for sentence in unwritten:
        print(f"! {sentence}", file=sys.stderr)
    if unwritten:  # what took hours is shown all the same
        raise SystemExit(1)


def _check_place(out: Path) -> None:
    """Refuse a file that could not be written when all is done."""
    folder = out.absolute().parent
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "this is a folder" if out.is_dir() else "there is no such folder that you may write to"
        raise RunError(what, where=str(out if out.is_dir() else folder), do="Give the path of a file that can be made.")


def _show(evaluation: Evaluation, tree: dict[str, Any], paths: list[Path], *, show: int, as_json: bool) -> None:
    from ...engine.evaluation.records import samples

    if as_json:
        shown = {"samples": samples(evaluation)[:show]} if show else {}
        print(json.dumps({**tree, "files": [str(path) for path in paths], **shown}, indent=2, ensure_ascii=False))
        return
    from ..console import Console
    from ..evaluation_view import samples_of, summary_of, table_of
    from ..fit_view import print_table

    console = Console(highlight=False)
    answered = f", {len(evaluation.questions):,} answered" if evaluation.questions else ""
    if evaluation.rows:
        console.print(f"{evaluation.source}: {evaluation.rows:,} rows{answered}\n", markup=False, soft_wrap=True)
    print_table(*table_of(tree), console)
    for line in (*([""] if tree["differences"] else []), *summary_of(tree), *samples_of(samples(evaluation), show)):
        console.print(line, markup=False, soft_wrap=True)


class Progress:
    """What is being done, on standard error: a bar on a terminal, gone at the end; else a line for each thing."""

    def __init__(self) -> None:
        from rich import progress

        from ..console import Console

        self.console = Console(stderr=True, highlight=False)
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
            progress.MofNCompleteColumn(), progress.TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.begun: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.begun:
            for one in self.begun.values():
                self.bars.update(one, visible=False)
            self.begun[what] = self.bars.add_task(what, total=total)
            if not self.console.is_terminal:
                self.console.print(f"{what} …", markup=False)
        self.bars.update(self.begun[what], completed=done, total=total, visible=True)

    def warn(self, sentence: str) -> None:
        """Say something that stays."""
        self.console.print(f"! {sentence}", markup=False, soft_wrap=True)
