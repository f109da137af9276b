"""One rank of a run: model, data, trainer, result.

    python -P -m finetui.engine.worker RUN_DIR

The environment names the rank as torch elastic sets it (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). What
it prints goes to ``log/rank<R>.log``; what it has to say goes to ``events.jsonl``. It dies with the supervisor, which
alone decides on the final state. Exit codes: 0 (trained, or stopped on request), 1 (a Failure event says why).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ..planner.recipe import Recipe
from ..planner.rollout import ROLLOUT_METHODS
from . import cuda_context, imports, standby
from .checkpoints import continuation
from .events import EventLog, LogLine, Phase, Warn
from .models import remote_code
from .modes import keep_private
from .rank import Rank, barrier, die_with_parent, in_turn, join_group, leave_group, redirect
from .run import Run
from .supervision.failure import classify
from .supervision.hang import hang_limit_s
from .supervision.heartbeat import Pulse, leave_stacks
from .supervision.redacted import redact_streams

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "warning",
    "DO_NOT_TRACK": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "USE_HUB_KERNELS": "NO",  # native code that transformers would download and load
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the process; the run's log takes over stdout and stderr at once."""
    arguments = sys.argv[1:] if argv is None else argv
    said = ""
    if arguments[:1] == [standby.WAITING] and len(arguments) == 2:
        standby.divide(int(arguments[1]))
        if not die_with_parent():
            return 0
        folder, said = standby.wait()
        arguments = [folder]
    if len(arguments) != 1:
        print("usage: python -P -m finetui.engine.worker RUN_DIR", file=sys.stderr)
        return 2
    run, rank = Run(arguments[0]), Rank.from_environment()
    keep_private()
    redirect(run, rank.rank)
    redact_streams()
    leave_stacks()
    if not die_with_parent():
        print("the supervisor is gone already", file=sys.stderr)
        return 1
    gc.disable()  # until all is imported
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ["USE_HUB_KERNELS"] == "NO":
        sys.modules["kernels"] = None  # type: ignore[assignment]  # bitsandbytes would download some by it, unasked
    _outlast_preemption(run)
    print(
        f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank.rank} of {rank.world}, process {os.getpid()}", flush=True
    )
    print(said, end="", flush=True)
    return attempt(run, rank, Pulse(rank.rank))


def _outlast_preemption(run: Run) -> None:
    """A machine that shuts down sends SIGTERM to supervisor and ranks alike: live on for the checkpoint it asks for.

    A SIGTERM without such a request comes from the supervisor itself and ends this rank, as it would anyway.
    """

    def on_sigterm(*_: object) -> None:
        until = time.monotonic() + 1.0
        while not run.requested("stop"):
            if time.monotonic() > until:
                os._exit(128 + signal.SIGTERM)
            time.sleep(0.05)

    signal.signal(signal.SIGTERM, on_sigterm)


def attempt(run: Run, rank: Rank | None = None, pulse: Pulse | None = None) -> int:
    """Carry a run out in this process and say why if that fails; returns the exit code."""
    rank = rank or Rank()
    pulse = pulse or Pulse(rank.rank)
    with EventLog(run.events_path) as log:
        resolved = None
        try:
            resolved = run.plan.resolved
            work(run, rank, log, pulse)
        except Exception as error:
            traceback.print_exc()
            run.append(classify(error, rank.rank, resolved))  # has a reserve for a disk that is full
            return 1
        finally:
            pulse.rest()
            leave_group()
            gc.unfreeze()  # or extensions would report all that is still there at the end as leaked
            sys.stdout.flush()
    return 0


def work(run: Run, rank: Rank, log: EventLog, pulse: Pulse) -> None:
    """Train, from the beginning or from the newest sound checkpoint, and write the result.

    Raises:
        UserError: model, data or settings can't be used.
        TrainingError: training ended badly.
    """
    recipe, plan = run.recipe, run.plan
    resolved = plan.resolved

    def say(payload: Any) -> None:
        """Rank 0 speaks for all."""
        pulse.beat()
        if rank.rank == 0:
            log.append(payload)

    say(Phase("importing", "torch"))
    if resolved.device == "cuda" and "torch" not in sys.modules:
        cuda_context.begin(rank.local_rank)
    import torch

    device = join_group(rank, resolved.device, hang_limit_s(recipe))
    from .models.load import (
        Numerics,
        already_quantised,
        head_size,
        load_tokenizer,
        locate,
        read_ahead,
        tell_fallbacks,
    )
    from .models.sharding import splits
    from .warmup import Warmup

    say(Phase("looking for the model", recipe.model))
    folder = in_turn(rank, lambda: locate(recipe.model))
    remote_code.check(folder, wanted=recipe.trust_remote_code, model=recipe.model)
    teacher = _teacher(recipe, folder, rank, say)
    resume = _newest_checkpoint(run, rank, say)
    source = resume.path if resume is not None and resolved.trains_base else folder
    divided = splits(resolved)
    reading = None if divided else read_ahead(source, resolved, device)
    say(Phase("importing", "transformers, peft and trl"))
    numerics = Numerics.of(resolved)
    head = head_size(folder) if resolved.attention == "sdpa" else None
    warming = Warmup(device, numerics.autocast or numerics.weights, head, packed=resolved.packing)
    plain = not recipe.trust_remote_code and not already_quantised(folder)
    with imports.of_a_run(hide=plain):
        _silence_libraries()
        from .baseline import ask, can_wait
        from .models.ground import Ground, first_batches
        from .samples import answer, held_out_prompts
        from .trainers.beats import Beats
        from .trainers.build import SHOWS_ITSELF, before_training, maker_for, order_for, usable_rows
        from .trainers.callbacks import Reporter
        from .trainers.divergence import Divergence, explosion_of
        from .trainers.job import Job
        from .trainers.optimizers import averaged
        from .trainers.settings import length

        make_trainer = maker_for(resolved.method)
    if rank.world > 1:  # before a collective, whose kernel would keep the driver from loading others
        warming.wait()

    say(Phase("loading the tokenizer", recipe.model))
    tokenizer, notes = load_tokenizer(folder, recipe.chat_template, resolved.options.new_tokens)
    for note in notes:
        say(LogLine(0, note))

    rows = in_turn(rank, lambda: _rows(run, tokenizer, say))
    for warning in rows.facts.warnings:
        say(Warn(warning, "data", "Look at them with 'finetui data'."))
    for path, told in rows.facts.formats.items():
        say(LogLine(0, f"data: {path}: {told}"))
    rows = usable_rows(recipe, resolved, rows, say)

    known = continuation.identity(
        recipe,
        resolved,
        model=continuation.model_mark(folder),
        teacher=continuation.teacher_mark(recipe, teacher),
        data=continuation.rows_mark(rows.train),
        rows=rows.facts.mark,
        device=_device_name(device),
    )
    if resume is not None:
        _require_same_run(run, resume, known, say)
    say(Phase("loading the model", recipe.model))
    run_length = length(recipe, resolved, len(rows.train), say)
    ground = Ground(
        folder=folder,
        tokenizer=tokenizer,
        steps=run_length.steps,
        rows=lambda: first_batches(rows.train, tokenizer),
        resumed=resume.path if resume is not None else None,
    )
    warming.wait()
    if divided:
        split, whole_layers = _split_model(run, rank, source, device, say, ground)
        model = split.model
    else:
        split = None
        model, whole_layers = _trainable_model(run, source, device, say, reading, ground)
    say(Phase("preparing the trainer"))
    order = order_for(recipe, resolved, rows, run_length.steps, rank.rank, rank.world)
    reporter = Reporter(run, log.append, run_length, rank=rank.rank, track="tensorboard" in recipe.track)
    job = Job(
        run=run,
        recipe=recipe,
        resolved=resolved,
        folder=folder,
        tokenizer=tokenizer,
        rows=rows,
        model=model,
        device=device,
        order=order,
        length=run_length,
        reporter=reporter,
        emit=say,
        resumed=resume is not None,
        whole_layers=whole_layers,
        split=split,
        teacher=teacher,
        identity=known,
    )
    trainer = make_trainer(job)
    reporter.trainer = trainer
    trainer.add_callback(beats := Beats(pulse))
    beats.feel(trainer)
    nan_steps, explosion = recipe.limits.nan_steps, explosion_of(recipe)
    reporter.divergence = Divergence(trainer, log.append, explosion=explosion, nan_steps=nan_steps)
    trainer.add_callback(reporter.divergence)
    trainer.on_saved = reporter.saved
    _drop_printer(trainer)
    if not before_training(trainer, job):
        reporter.stopped = True
        return
    asks = (rank.rank == 0 or divided) and resolved.method not in SHOWS_ITSELF
    prompts = held_out_prompts(rows.evaluation) if asks else []

    def sample(step: int) -> None:
        if prompts:
            say(Phase("answering held-out prompts"))
            answer(trainer.model, tokenizer, prompts, step, say, job.numerics.context(device), together=divided)
            if split is not None:
                split.release()

    waits = resume is None and not divided and can_wait(model)

    def after_first_step() -> None:
        tell_fallbacks(model, say)
        if waits:
            ask(trainer, sample)
            say(Phase("training", total=run_length.steps))

    reporter.after_first_step = after_first_step
    if waits:
        trainer.args.eval_on_start = False
    elif resume is None:
        sample(0)
    say(Phase("training", total=run_length.steps))
    # Ranks that answer the same prompt must not draw the same answer.
    torch.manual_seed(resolved.seed + (rank.rank if resolved.method in ROLLOUT_METHODS else 0))
    trainer.train(resume_from_checkpoint=str(resume.path) if resume else None)
    pulse.rest()
    if reporter.stopped:
        return
    trainer.finish()
    with averaged(trainer.optimizer):
        sample(trainer.state.global_step)
        say(Phase("writing the result", "output"))
        with trainer.whole_model() as whole:
            if rank.rank == 0:
                _write_result(run, trainer.state.global_step, whole, tokenizer, folder)
    barrier()


def _rows(run: Run, tokenizer: Any, say: Any) -> Any:
    from .data.prepare import prepare
    from .evaluate import data_cache, data_settings

    recipe, resolved = run.recipe, run.plan.resolved
    total = run.plan.workload.examples
    say(Phase("preparing the data", done=0, total=total))

    last = [0.0]

    def progress(done: int) -> None:
        if time.monotonic() - last[0] > 0.5:
            last[0] = time.monotonic()
            say(Phase("preparing the data", done=done, total=max(total, done)))

    return prepare(recipe, data_settings(resolved), tokenizer, data_cache(run), progress)


def _teacher(recipe: Recipe, student: Path, rank: Rank, say: Any) -> Path | None:
    """Where the teacher of a student lies, once both are known to have the same words."""
    if recipe.method != "distill":
        return None
    from .models.load import locate
    from .models.teacher import find_teacher, require_same_words

    named = recipe.distillation.teacher
    say(Phase("looking for the teacher", named))
    base = find_teacher(named).base
    folder: Path = in_turn(rank, lambda: locate(base))
    remote_code.check(folder, wanted=recipe.trust_remote_code and remote_code.needed(folder), model=base)
    require_same_words(student, folder, named)
    return folder


def _newest_checkpoint(run: Run, rank: Rank, say: Any) -> Any:
    """The checkpoint that rank 0 finds sound, for all ranks."""
    from .checkpoints.store import latest

    found: list[Any] = [None]
    if rank.rank == 0:
        newest = latest(run.path / "checkpoints")
        for line in newest.skipped:
            say(Warn(f"a damaged checkpoint is passed over ({line})", "checkpoints", "An older one is used."))
        found = [newest.checkpoint]
        if newest.checkpoint is not None:
            say(LogLine(0, f"continuing from {newest.checkpoint.path.name}"))
    if rank.world > 1:
        import torch

        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _require_same_run(run: Run, resume: Any, known: dict[str, Any], say: Any) -> None:
    """Tell what has changed since the checkpoint was written, and refuse what would corrupt what comes out."""
    continuation.require_readable(resume.path, resume.facts, run)
    found = continuation.changes(resume.facts, known)
    continuation.require_same_run(found, run, resume.step)
    for change in found:
        say(LogLine(0, f"changed since {resume.path.name}: {change}"))


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _trainable_model(run: Run, source: Any, device: Any, say: Any, reading: Any, ground: Any) -> tuple[Any, bool]:
    """The model with its adapters and kernels, and whether its layers recompute by themselves what they do not keep.

    Args:
        source: the base model, or the checkpoint of a full one; a resumed adapter is read later, by the trainer.
        ground: what some tunings need beside it.
    """
    from .models.adapt import adapt
    from .models.layers import checkpoint_layers
    from .models.load import load_base, patch_kernels

    recipe, resolved = run.recipe, run.plan.resolved
    model = adapt(load_base(source, resolved, device, say, reading=reading), resolved, recipe.model, ground)
    if device.type == "cuda":
        say(Phase("putting kernels on the model"))
    whole = patch_kernels(model, resolved, device, say)
    if not whole:
        checkpoint_layers(model, resolved, say)
    return model, whole


def _split_model(run: Run, rank: Rank, source: Any, device: Any, say: Any, ground: Any) -> tuple[Any, bool]:
    """As :func:`_trainable_model`, for a model that is split over the ranks; a resumed adapter is in it already."""
    import torch

    from .models.adapt import adapt
    from .models.layers import checkpoint_layers
    from .models.load import patch_kernels
    from .models.nf4_tensors import lay_open
    from .models.sharding import load_whole, lowered_to, split, twin_of
    from .models.stand_in import stood_in
    from .trainers.state import read_adapter

    recipe, resolved, first = run.recipe, run.plan.resolved, rank.rank == 0
    model = load_whole(source, resolved, say, device)
    with torch.device("cpu" if first else "meta"):
        model = adapt(model, resolved, recipe.model, ground)
    if first and ground.resumed is not None and not resolved.trains_base:
        read_adapter(model, ground.resumed)
    if resolved.quantization == "nf4":
        lay_open(model)
    twin = twin_of(model) if first else None
    whole = False
    if device.type == "cuda":
        say(Phase("putting kernels on the model"))
        with stood_in(model, device, lowered_to(resolved)):
            whole = patch_kernels(model, resolved, device, say)
    if not whole:
        checkpoint_layers(model, resolved, say)
    say(Phase("splitting the model", f"{rank.world} ranks"))
    return split(model, resolved, device, twin), whole


def _write_result(run: Run, step: int, model: Any, tokenizer: Any, folder: Any) -> None:
    """The best weights where they were kept and did better, else the last ones; with a note which these are."""
    from .trainers.best import note, take_best, told_losses
    from .trainers.save import save_result

    last = told_losses(run).get(step)
    best = take_best(run.best_path, run.output_path, last)
    if best is None:
        save_result(run.output_path, model, tokenizer, folder)
        note(run.output_path, step, last)
    else:
        run.append(LogLine(0, f"the result is of step {best}, which did best on held-out rows"))


def _silence_libraries() -> None:
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _drop_printer(trainer: Any) -> None:
    """The reporter prints one tidy line per step; the trainer's own would print a dictionary."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


if __name__ == "__main__":
    sys.exit(main())
