"""Holds the planner against runs of this machine's GPU: ours through recipe, plan and worker, and other programs'.

    python -P -m finetui.tests.bench.sweep run OUT.jsonl --models DIR [--seconds 480] [--peers FILE] [--only NAME ...]
    python -P -m finetui.tests.bench.sweep score FILE.jsonl [...] [--json SUMMARY.json]

``run`` writes checkpoints of real shapes with random weights into DIR, the small ones first, and measures each
configuration in a process of its own for a few steps, several at once where their predicted memory fits beside each
other: peaks don't mind company. Then, while time is left, it measures speed, one run at a time. Rows of some
configurations are planned for a smaller card, with everything left to the planner, and may allocate no more than that
card has: these say whether what was said to fit does. Each result is appended as one line the moment it is known.

``score`` predicts each run anew and prints, per program, how far memory and speed are off, and how many runs were said
to fit and ran out of memory. Peaks are those of steps after the second; ``--peers`` is a script that trains with
another program and prints ``RESULT`` and a line of JSON, called as
``peers.py ENGINE METHOD MODEL --seq --mbs --steps --ckpt --optim``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetui.planner.errors import UserError
from finetui.planner.hardware import find_gpu

from .sweep_cases import MODELS, SETTLE, STEPS, TIMED_STEPS, Case, cases
from .sweep_plan import architecture_of, config_of, figures, plan_of, predicted
from .sweep_score import facts, read, score, table

_SELF = [sys.executable, "-P", "-m", "finetui.tests.bench.sweep"]
GIB = 2**30
#: GiB of the GPU that runs at work together may be predicted to take, and how many run at once.
ROOM, MOST = 0.88, 10
#: Seconds after which a run is ended, and below which none is started any more.
LONGEST, SHORTEST = 150.0, 25.0


# --- one run, in a process of its own


def _rows(case: Case, folder: Path) -> Path:
    """Rows of text of exactly the length that is asked for, under a tokenizer of bytes."""
    path, draw = folder / "rows.jsonl", random.Random(0)
    count = max(case.micro_batch * case.accumulation, 16) * (TIMED_STEPS + 1 if case.timed else STEPS)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=case.length - 2))  # and its two ends
            file.write(json.dumps({"text": letters}) + "\n")
    return path


class _Enough(Exception):
    """Every step is measured."""


def measure(case: Case, models: Path) -> dict[str, Any]:
    """Carry one of our configurations out here."""
    folder = Path(tempfile.mkdtemp(prefix="finetui-sweep-"))
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    recipe, plan = plan_of(case, str(models / case.model), _rows(case, folder))
    import torch
    import transformers

    from finetui.engine import worker
    from finetui.engine.run import Run

    gpu = torch.cuda.is_available()
    if case.card and gpu:
        # The context is not torch's to count: what is left of such a card after it is.
        room = plan.hardware.memory_gib - plan.memory.terms["context"]
        torch.cuda.set_per_process_memory_fraction(room * GIB / torch.cuda.get_device_properties(0).total_memory)
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)
            if gpu and state.global_step == 2 and not case.card:
                torch.cuda.reset_peak_memory_stats()
            # What is saved is made in host memory and costs minutes: dozens of fully trained models fill a machine.
            control.should_save = control.should_evaluate = False
            if state.global_step == state.max_steps:
                raise _Enough

    stock = transformers.Trainer.__init__

    def listened(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.add_callback(Clock())

    transformers.Trainer.__init__ = listened  # type: ignore[method-assign]
    run = Run.create(recipe, plan, root=folder / "runs")
    failed = worker.attempt(run) and len(seconds) < (TIMED_STEPS if case.timed else STEPS)
    told = [json.loads(line) for line in run.events_path.read_text(encoding="utf-8").splitlines()]
    fallbacks = sorted({f"{event['what']}: {event['why']}" for event in told if event["type"] == "fallback"})
    shutil.rmtree(folder, ignore_errors=True)  # a fully trained model fills a disk
    resolved, tokens = plan.resolved, plan.resolved.batch_size * case.length
    answer: dict[str, Any] = {
        "predicted": figures(plan.memory, plan.speed),
        "fits": plan.fits,
        "resolved": {
            "micro_batch": resolved.micro_batch, "checkpointing": resolved.checkpointing,
            "kept_layers": resolved.kept_layers, "optimizer": resolved.optimizer, "precision": resolved.precision,
        },
        "fallbacks": fallbacks,
    }  # fmt: skip
    if failed:
        why = next((event for event in reversed(told) if event["type"] == "failure"), {})
        return {**answer, "failed": f"{why.get('cause', 'failed')}: {str(why.get('message', ''))[:300]}"}
    steady = seconds[SETTLE:] if case.timed else []
    answer["measured"] = {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB if gpu else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if gpu else 0.0,
        "tokens_per_s": tokens / statistics.median(steady) if steady else 0.0,
        "spread": (max(steady) - min(steady)) / statistics.median(steady) if steady else 0.0,
        "first_step_s": seconds[0],
    }
    return answer


def read_peer(case: Case, text: str) -> dict[str, Any]:
    """What another program's run printed, beside what was predicted of it."""
    line = next((line for line in text.splitlines() if line.startswith("RESULT ")), "")
    answer: dict[str, Any] = {"predicted": predicted(case), "fits": True}
    if not line:
        return {**answer, "failed": (text.strip().splitlines() or ["no output"])[-1][:300]}
    told = json.loads(line.removeprefix("RESULT "))
    measured = {
        "allocated_gib": told["peak_alloc_gib"],
        "reserved_gib": told["peak_reserved_gib"],
        "tokens_per_s": told["tok_s"] if case.timed else 0.0,
    }
    return {**answer, "measured": measured}


# --- the whole sweep


@dataclass
class Job:
    """A run at work."""

    case: Case
    process: subprocess.Popen[str]
    output: Path
    gib: float
    began: float = field(default_factory=time.monotonic)


def sweep(out: Path, models: Path, *, seconds: float, peers: Path | None, only: list[str], memory_gib: float) -> None:
    """Measure as much as there is time for."""
    end, logs = time.monotonic() + seconds, Path(tempfile.mkdtemp(prefix="finetui-sweep-logs-"))
    waiting = [case for case in cases() if not only or any(word in case.name for word in only)]
    waiting = [case for case in waiting if case.stack == "finetui" or peers]
    used = [name for name in MODELS if any(case.model == name for case in waiting)]
    for name in used:
        _config_folder(models, name)
    maker = _start([*_SELF, "make", *used, "--models", str(models)], logs / "make.log")
    jobs: list[Job] = []
    need = {}
    for case in list(waiting):
        try:
            need[case] = expected_gib(case)
        except UserError as error:
            waiting.remove(case)
            _append(out, case, {"failed": f"not planned: {error}"}, 0.0)
    while (waiting or jobs) and time.monotonic() < end:
        for job in list(jobs):
            if _ended(job, end):
                jobs.remove(job)
                _write(out, job)
        left = end - time.monotonic()
        making = 17.0 if maker.poll() is None else 0.0
        for name in used:
            if not any(case.model == name for case in (*waiting, *(job.case for job in jobs))):
                shutil.rmtree(models / name, ignore_errors=True)
        for case in list(waiting):
            if left < SHORTEST or not (models / case.model / "READY").exists():
                continue
            busy = sum(job.gib for job in jobs) + making
            alone = case.timed
            if alone and (jobs or making or any(not other.timed for other in waiting)):
                continue
            if not alone and (len(jobs) >= MOST or (jobs and busy + need[case] > ROOM * memory_gib)):
                continue
            if any(job.case.timed for job in jobs):
                continue
            waiting.remove(case)
            jobs.append(_launch(case, models, peers, logs, need[case]))
        if left < SHORTEST and not jobs:
            break
        if maker.poll() not in (None, 0):
            print((logs / "make.log").read_text(encoding="utf-8")[-2000:], file=sys.stderr)
            raise SystemExit("the checkpoints could not be made")
        time.sleep(0.1)
    for job in jobs:
        job.process.kill()
        _write(out, job)
    if maker.poll() is None:
        maker.kill()
    for case in waiting:
        print(f"not reached: {case.name}", file=sys.stderr)


def expected_gib(case: Case) -> float:
    """GiB that a run is predicted to take, for those beside it."""
    if case.card:
        return find_gpu(case.card).memory_gib
    return 1.1 * float(predicted(case)["high_gib"]) + 0.5


def _launch(case: Case, models: Path, peers: Path | None, logs: Path, gib: float) -> Job:
    output = logs / f"{len(list(logs.iterdir()))}.log"
    if case.stack == "finetui":
        command = [*_SELF, "one", json.dumps(asdict(case)), "--models", str(models)]
    else:
        engine = {"trl": "hf", "trl-liger": "liger", "unsloth": "unsloth"}[case.stack]
        command = [sys.executable, str(peers), engine, case.tuning, str(models / case.model)]
        command += ["--seq", str(case.length), "--mbs", str(case.micro_batch), "--r", str(case.rank)]
        command += ["--steps", str(TIMED_STEPS if case.timed else STEPS + 1), "--optim", "adamw_8bit"]
        command += ["--ckpt", str(int(case.checkpointing == "full"))]
    return Job(case, _start(command, output), output, gib)


def _start(command: list[str], output: Path) -> subprocess.Popen[str]:
    environment = {"OMP_NUM_THREADS": "2", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    with output.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment | dict(os.environ),
            cwd=tempfile.mkdtemp(prefix="finetui-sweep-"),
        )  # fmt: skip


def _ended(job: Job, end: float) -> bool:
    if job.process.poll() is None and time.monotonic() - job.began > LONGEST:
        job.process.kill()
        job.process.wait()
    return job.process.poll() is not None


def _write(out: Path, job: Job) -> None:
    job.process.wait()
    text = job.output.read_text(encoding="utf-8", errors="replace")
    if job.case.stack != "finetui":
        answer = read_peer(job.case, text)
    else:
        line = next((line for line in text.splitlines() if line.startswith("RESULT ")), "")
        last = (text.strip().splitlines() or ["no output"])[-1]
        answer = json.loads(line.removeprefix("RESULT ")) if line else {"failed": f"no result: {last[:300]}"}
    _append(out, job.case, answer, time.monotonic() - job.began)
    if "failed" in answer and not str(answer["failed"]).startswith("oom"):
        print(text[-1500:], file=sys.stderr, flush=True)


def _append(out: Path, case: Case, answer: dict[str, Any], took: float) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"case": asdict(case), **answer, "took_s": round(took, 1)}) + "\n")
    shown = answer.get("measured", {}).get("allocated_gib", answer.get("failed"))
    print(f"{took:6.1f} s  {case.name}: {shown}", flush=True)


def _config_folder(models: Path, name: str) -> Path:
    """A folder with the model's config.json alone."""
    folder = models / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(config_of(name), indent=1), encoding="utf-8")
    return folder


def _wait_for_room(folder: Path, size: int) -> None:
    """Until runs of earlier models are over and their checkpoints gone."""
    while shutil.disk_usage(folder).free < size:
        time.sleep(1.0)


def make(names: Iterable[str], models: Path) -> None:
    """Checkpoints with random weights and a tokenizer of bytes; ``READY`` says that one is whole."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2}
    words |= {letter: 3 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for name in names:
        folder = _config_folder(models, name)
        if (folder / "READY").exists():
            continue
        _wait_for_room(folder, 3 * architecture_of(name).parameters)
        config = AutoConfig.from_pretrained(str(folder))
        config.bos_token_id, config.eos_token_id, config.pad_token_id, config.dtype = 0, 1, 2, torch.bfloat16
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(str(folder), max_shard_size="4GB")
        del model
        tokenizer = Tokenizer(kinds.BPE(vocab=words, merges=[]))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=131072
        ).save_pretrained(str(folder))
        (folder / "READY").touch()
        print(f"made {name}", flush=True)


def main() -> int:
    """Run, measure one, make checkpoints, or score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("--seconds", type=float, default=480)
    run.add_argument("--peers", type=Path)
    run.add_argument("--only", nargs="+", default=[], help="words of which a configuration's name has one")
    run.add_argument("--memory-gib", type=float, default=139.0)
    one = verbs.add_parser("one")
    one.add_argument("case", type=json.loads)
    making = verbs.add_parser("make")
    making.add_argument("names", nargs="+", choices=MODELS)
    for verb in (run, one, making):
        verb.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "finetui-sweep-models")
    scoring = verbs.add_parser("score")
    scoring.add_argument("files", nargs="+", type=Path)
    scoring.add_argument("--json", type=Path)
    listing = verbs.add_parser("list")
    listing.set_defaults(verb="list")
    a = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if a.verb == "list":
        print("\n".join(case.name for case in cases()))
    elif a.verb == "run":
        peers = a.peers.resolve() if a.peers else None
        sweep(a.out, a.models.resolve(), seconds=a.seconds, peers=peers, only=a.only, memory_gib=a.memory_gib)
    elif a.verb == "one":
        print("RESULT " + json.dumps(measure(Case(**a.case), a.models.resolve())), flush=True)
    elif a.verb == "make":
        make(a.names, a.models.resolve())
    else:
        rows = [row for path in a.files for row in read(path)]
        print(table(rows))
        summary = score(rows)
        print(json.dumps(summary, indent=1))
        if a.json:
            a.json.write_text(json.dumps(facts(rows), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
