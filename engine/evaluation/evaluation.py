"""One evaluation: every subject and what it began as, asked the same, with how sure each difference is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...planner.errors import FinetuiError, HardwareError, RunError
from ...planner.objective import PREFERENCE_METHODS, objective
from ...planner.recipe import Recipe
from ...planner.rollout import Reward
from ..events import Fallback
from ..models.load import locate
from ..supervision.failure import is_out_of_memory
from .answers import Answer, Generation, answer_all
from .batches import Batches, Told
from .likelihood import Learned, RowLoss, row_losses
from .preferences import answers_of, implied_rewards, likelier, rewarded, scored
from .rows import Question, Rows, file_rows, held_out_rows
from .scores import Marks
from .statistics import Difference, PerRow, difference
from .subjects import Subject, window_of
from .tasks import Tasks, load_tasks, task_figures
from .voices import Voice, tokenizer_of, voices

#: Strength of the reference where a run has none of its own: that of DPO's recipes.
_BETA = 0.1
#: Rows at once, if no more are trained on at once: without gradients there is room for them.
_BATCH = 8
#: The share of answers that were cut from which on it is worth a word.
_OFTEN_CUT = 0.1


@dataclass(frozen=True)
class Wanted:
    """What is asked of every model.

    Args:
        data: a file, folder or dataset instead of the rows that the first run held out.
        form: its format.
        rows_of: the recipe whose held-out rows are meant instead of the first run's own.
        limit: rows at most.
        answers: questions at most that are answered; 0 is none.
        generation: how.
        rewards: who marks the answers besides the plain metrics; None is as the first run's recipe has it.
        base: compare with what each model began as.
        also: further files, of which the likelihood alone is measured.
        tasks: of lm-eval.
        batch: rows at once; None is the micro batch of the plan, at least eight.
    """

    data: str | None = None
    form: str = "auto"
    rows_of: Recipe | None = None
    limit: int | None = None
    answers: int = 64
    generation: Generation = field(default_factory=Generation)
    rewards: tuple[Reward, ...] | None = None
    base: bool = True
    also: tuple[str, ...] = ()
    tasks: Tasks | None = None
    batch: int | None = None


@dataclass
class Entry:
    """One model's figures by name, and its answers in the order of the questions."""

    label: str
    base: bool
    subject: Subject
    figures: dict[str, PerRow] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    marks: dict[str, list[float | None]] = field(default_factory=dict)
    losses: list[RowLoss] = field(default_factory=list)
    """Of answers that were compared."""


@dataclass
class Evaluation:
    """What came out. ``differences`` are of an entry against what it began as, by label, other label and figure."""

    source: str
    wanted: Wanted
    entries: list[Entry]
    rows: int = 0
    questions: list[Question] = field(default_factory=list)
    differences: list[tuple[str, str, str, Difference]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate(subjects: Sequence[Subject], wanted: Wanted, told: Told, warn: Callable[[str], object]) -> Evaluation:
    """Ask every subject, and what it began as, the same.

    Args:
        told: of progress.
        warn: receives sentences that the user should read at once; they become notes of the evaluation too.

    Raises:
        UserError: there are no rows, or a model, reward or task can't be used.
    """
    work = _Work(subjects, wanted, told, warn)
    return work.carry_out()


def _held_out_by(subject: Subject) -> Any:
    """The same for runs that hold out the same rows."""
    recipe = subject.run.recipe if subject.run else None
    return recipe and (recipe.data, recipe.evaluation.holdout, subject.resolved.seed)


@contextlib.contextmanager
def _memory_told(subject: Subject) -> Iterator[None]:
    """The user's error where a model does not even fit into memory by itself."""
    try:
        yield
    except FinetuiError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        do = "End what else uses it (finetui top shows that), or use --device cpu."
        raise HardwareError("out of memory over the model itself", where=subject.label, do=do) from error


class _Work:
    def __init__(self, subjects: Sequence[Subject], wanted: Wanted, told: Told, warn: Callable[[str], object]) -> None:
        self.subjects, self.wanted, self.told = subjects, wanted, told
        self.notes: list[str] = []
        self._warn = warn
        self.first = subjects[0]
        self.batches = Batches(wanted.batch or max(self.first.resolved.micro_batch, _BATCH), self.warn)
        self.entries: list[Entry] = []
        self.chosen: list[int] = []
        self.rows: dict[str, Rows] = {}
        self.tokenizers = {subject.label: tokenizer_of(subject) for subject in subjects}
        self.loaded = load_tasks(wanted.tasks) if wanted.tasks else None
        """Before anything that takes longer."""

    def warn(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            self._warn(sentence)

    def _tell_fallback(self, payload: Any) -> None:
        if isinstance(payload, Fallback):
            self.warn(f"{payload.what}: {payload.why}")

    def carry_out(self) -> Evaluation:
        self._look_for_seen_rows()
        rows = self._rows(self.first)
        for path in self.wanted.also:  # a file that can't be read is told before anything is asked
            self._also(path, self.first)
        self.chosen = self._with_room(rows.questions)
        asked = [rows.questions[i] for i in self.chosen]
        with Marks(self._rewards(asked), sorted({key for one in asked for key in one.columns}), self.warn) as marks:
            for subject in self.subjects:
                with _memory_told(subject):
                    self._ask(subject, marks)
        evaluation = Evaluation(rows.source, self.wanted, self.entries, len(rows), asked, notes=self.notes)
        evaluation.differences = self._differences()
        return evaluation

    # --- what is asked

    def _look_for_seen_rows(self) -> None:
        """Say so where a model may have been trained on the very rows that it is asked about."""
        for subject in self.subjects:
            recipe = subject.run.recipe if subject.run else None
            if recipe is None or self.wanted.rows_of is not None:
                continue
            if self.wanted.data is not None:
                if any(source.path == self.wanted.data and source.split == "train" for source in recipe.data):
                    self.warn(f"{subject.label} was trained on {self.wanted.data}: its figures say nothing of new rows")
            elif self.first.run is not None and _held_out_by(subject) != _held_out_by(self.first):
                self.warn(f"the rows are held out by {self.first.label}: {subject.label} may have been trained on them")

    def _with_room(self, questions: Sequence[Question]) -> list[int]:
        """Which questions are answered: the first whose prompt leaves room for an answer."""
        room = window_of(locate(self.first.model)) - self.wanted.generation.max_new_tokens if questions else 0
        fitting = [i for i, question in enumerate(questions) if 0 < len(question.ids) <= room]
        if (long := len(questions) - len(fitting)) and self.wanted.answers:
            self.warn(f"{long} prompts leave no room for an answer of {self.wanted.generation.max_new_tokens} tokens")
        return fitting[: self.wanted.answers]

    def _rows(self, subject: Subject) -> Rows:
        """The rows in the tokens of one subject; the same rows for all."""
        if (key := subject.label) in self.rows:
            return self.rows[key]
        rows = self._main_rows(self.tokenizers[key])
        if self.first.label in self.rows:
            before = self.rows[self.first.label]
            counts = [(len(one.learned), len(one.questions), len(one.compared)) for one in (before, rows)]
            if counts[0] != counts[1]:
                what = f"{subject.label} reads {len(rows)} rows where {self.first.label} reads {len(before)}"
                do = "Their tokenizers cut rows at different places: evaluate them one by one."
                raise RunError(what, where=rows.source, do=do)
        for note in rows.notes:
            self.warn(note)
        self.rows[key] = rows
        return rows

    def _main_rows(self, tokenizer: Any) -> Rows:
        wanted, settled, run = self.wanted, self.first.resolved, self.first.run
        if wanted.data is not None:
            return file_rows(wanted.data, tokenizer, method=settled.method, length=settled.sequence_length,
                             limit=wanted.limit, form=wanted.form, train_on=settled.train_on)  # fmt: skip
        elsewhere = wanted.tasks or wanted.also
        if run is not None:
            try:
                return held_out_rows(run, tokenizer, wanted.limit, wanted.rows_of)
            except RunError as error:
                if not elsewhere:
                    raise
                self.warn(f"{run.name}: {error.what}")
        if elsewhere:
            return Rows("no rows")
        raise RunError(f"{self.first.label} is no run with held-out rows", do="Name rows with --data FILE.")

    def _also(self, path: str, subject: Subject) -> list[Learned]:
        key = f"{subject.label}\n{path}"
        if key not in self.rows:
            tokenizer, length = self.tokenizers[subject.label], self.first.resolved.sequence_length
            self.rows[key] = file_rows(path, tokenizer, method="sft", length=length, limit=self.wanted.limit)
        if not self.rows[key].learned:
            raise RunError("there is no text to measure in it", where=f"--also {path}", do="Give text or chats.")
        return self.rows[key].learned

    def _rewards(self, asked: Sequence[Question]) -> list[Reward]:
        if not asked:
            if self.wanted.rewards:
                raise RunError("no row asks anything that could be answered", where="--score", do="Leave it out.")
            return []
        if self.wanted.rewards is not None:
            return list(self.wanted.rewards)
        return list(self.first.run.recipe.rewards) if self.first.run else []

    # --- asking

    def _ask(self, subject: Subject, marks: Marks) -> None:
        tokenizer, rows = self.tokenizers[subject.label], self._rows(subject)
        scores = subject.resolved.method == "reward"
        if scores and not rows.compared:
            what = f"{subject.label} is a reward model, and these rows compare no answers"
            raise RunError(what, where=rows.source, do="Give pairs: --data with chosen and rejected.")
        key = self._key(subject)
        before = next((one for one in self.entries if one.base and self._key(one.subject) == key), None)
        made: list[Entry] = []
        for voice in voices(subject, tokenizer, base=self.wanted.base and before is None, emit=self._tell_fallback):
            entry = Entry(self._label(voice, subject), voice.base, subject)
            self._figures(voice, entry, rows, marks)
            made.append(entry)
        base = next((one for one in made if one.base), before)
        tuned = made[0]
        if base is not None and tuned.losses:
            losses = implied_rewards(tuned.losses, base.losses, self._beta(subject))
            tuned.figures |= rewarded(rows.compared, losses)
        # What a model began as stands before it.
        self.entries += [*made[1:], tuned]

    def _key(self, subject: Subject) -> tuple[Any, ...]:
        return subject.base_key, self.tokenizers[subject.label].chat_template

    def _label(self, voice: Voice, subject: Subject) -> str:
        if not voice.base:
            return voice.label
        taken = [entry.label for entry in self.entries]
        return "base" if "base" not in taken else f"base of {subject.label}"

    def _figures(self, voice: Voice, entry: Entry, rows: Rows, marks: Marks) -> None:
        label, wanted = entry.label, self.wanted
        voice.label = label
        if rows.compared:
            answers = answers_of(rows.compared)
            if entry.subject.resolved.method == "reward":
                entry.figures |= rewarded(rows.compared, scored(voice, answers, self.batches, self.told))
            else:
                entry.losses = row_losses(voice, answers, self.batches, f"{label}: comparing", self.told)
                share = likelier(rows.compared, entry.losses)
                entry.figures |= {"likelier": share} if share is not None else {}
        if entry.subject.resolved.method == "reward":
            return
        if rows.learned:
            entry.figures |= self._likelihood(voice, rows.learned, label)
        files = [Path(path).name for path in wanted.also]
        for path, file in zip(wanted.also, files, strict=True):
            named = file if files.count(file) == 1 else path
            measured = self._likelihood(voice, self._also(path, entry.subject), f"{label}: {named}")
            entry.figures |= {f"also/{named}/{name}": figure for name, figure in measured.items()}
        if asked := [rows.questions[i] for i in self.chosen]:
            entry.answers = answer_all(voice, asked, wanted.generation, self.batches, self.told)
            entry.marks = marks.of(asked, entry.answers)
            entry.figures |= {name: PerRow.of(values) for name, values in entry.marks.items()}
            cut = sum(answer.cut for answer in entry.answers) / len(asked)
            if cut >= _OFTEN_CUT and not entry.base:
                longest = wanted.generation.max_new_tokens
                self.warn(f"{label}: {cut:.0%} of the answers did not end within {longest} tokens (--max-new-tokens)")
        if wanted.tasks and self.loaded:
            entry.figures |= task_figures(voice, wanted.tasks, self.loaded, self.batches, self.told)

    def _likelihood(self, voice: Voice, rows: Sequence[Learned], what: str) -> dict[str, PerRow]:
        losses = row_losses(voice, rows, self.batches, f"{what}: loss", self.told)
        tokens = tuple(float(one.tokens) for one in losses)
        nats = tuple(one.loss for one in losses)
        bits = tuple(loss / math.log(2) if row.bytes else 0.0 for loss, row in zip(nats, rows, strict=True))
        return {
            "loss": PerRow(nats, tokens, lower_is_better=True),
            "bits_per_byte": PerRow(bits, tuple(float(row.bytes) for row in rows), lower_is_better=True),
            "accuracy": PerRow(tuple(float(one.right) for one in losses), tokens),
        }

    def _beta(self, subject: Subject) -> float:
        recipe = subject.run.recipe if subject.run else None
        return objective(recipe).beta if recipe and recipe.method in PREFERENCE_METHODS else _BETA

    # --- comparing

    def _differences(self) -> list[tuple[str, str, str, Difference]]:
        """Each entry against what it began as; without that, against the first that is there."""
        found = []
        bases = {self._key(entry.subject): entry for entry in self.entries if entry.base}
        tuned = [entry for entry in self.entries if not entry.base]
        for entry in tuned:
            other = bases.get(self._key(entry.subject)) if bases else None
            if other is None and entry is not tuned[0]:
                other = tuned[0]
            for name, figure in entry.figures.items() if other is not None else ():
                held = other.figures.get(name) if other is not None else None
                if held is None or other is None or len(held.parts) != len(figure.parts):
                    continue
                if name.endswith(("loss", "accuracy")) and held.weights != figure.weights:
                    continue  # per token, and their tokens are not the same
                found.append((entry.label, other.label, name, difference(figure, held)))
        return found
