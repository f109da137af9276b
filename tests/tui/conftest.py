"""What the app's tests stand on: fixed plans, runs, clock and machine. Nothing asks a driver, a hub or the time."""

from __future__ import annotations

import json
import math
import random
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.preview import Piece, Sample, SourceSurvey, Survey
from finetui.engine.data.report import Bin, Problem, Report
from finetui.engine.events import (
    CheckpointSaved,
    Eval,
    Fallback,
    GpuSample,
    HostSample,
    MemoryUse,
    Payload,
    Phase,
    State,
    Step,
)
from finetui.engine.events import Sample as Answered
from finetui.engine.run import Run
from finetui.engine.status import Status
from finetui.planner.errors import DataError, ModelError
from finetui.planner.fit import Fit
from finetui.planner.plan import (
    Cost,
    HardwareSummary,
    Memory,
    ModelSummary,
    Plan,
    Reason,
    Resolved,
    Speed,
    Workload,
)
from finetui.planner.recipe import Recipe
from finetui.tests.bench.terminal import Terminal, environment
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.data_look import DataLook
from finetui.tui.model_list import ModelList, ModelRow
from finetui.tui.offers import OfferRow, with_frontier

#: 2026-03-01 12:00:00 UTC: when every test takes place.
NOW = 1772366400.0
GIB_PER_GPU = {"RTX 4090": 23.6, "H100 SXM": 79.2, "T4": 14.6}


@dataclass(frozen=True)
class FakeCheck:
    name: str
    status: str
    detail: str = ""
    do: str = ""


def _resolved(recipe: Recipe, rank: int, sequence: int, count: int) -> Resolved:
    return Resolved(
        method=recipe.method,
        tuning=recipe.tuning.type,
        rank=rank,
        alpha=2.0 * rank,
        dropout=0.0,
        targets="all-linear",
        quantization="nf4" if recipe.tuning.type == "qlora" else "none",
        sequence_length=sequence,
        micro_batch=2,
        accumulation=8,
        packing=True,
        train_on="answers",
        epochs=recipe.epochs,
        steps=412,
        warmup_steps=12,
        optimizer="adamw-8bit",
        learning_rate=2e-4,
        schedule="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        precision="bf16",
        checkpointing="full",
        attention="sdpa",
        kernels="auto",
        strategy="ddp" if count > 1 else "single",
        device="cuda",
        gpus=list(range(count)),
        checkpoint_every=100,
        eval_every=100,
        seed=42,
    )


def make_plan(recipe: Recipe) -> Plan:
    """A plan that answers every knob of the form by simple arithmetic."""
    if recipe.model.startswith("missing/"):
        raise ModelError(f"there is no model {recipe.model!r}", do="Did you mean 'Qwen/Qwen3-8B'?")
    if recipe.data and recipe.data[0].path.endswith("broken.jsonl"):
        raise DataError("this line is not JSON", where=f"{recipe.data[0].path}:731", do="Correct the line.")
    gpu = recipe.hardware.gpu or ("CPU" if recipe.hardware.device == "cpu" else "H100 SXM")
    capacity = GIB_PER_GPU.get(gpu, 62.0)
    count = recipe.hardware.gpus if isinstance(recipe.hardware.gpus, int) else 1
    full, rank = recipe.tuning.type == "full", recipe.tuning.rank
    sequence = 2048 if recipe.sequence_length == "auto" else recipe.sequence_length
    terms = {
        "weights": 15.3 if recipe.tuning.type != "qlora" else 5.2,
        "adapter": 0.0 if full else 0.01 * rank,
        "gradients": 15.3 if full else 0.01 * rank,
        "optimizer": 30.5 if full else 0.01 * rank,
        "activations": 2.4 * sequence / 2048,
        "logits": 1.2 * sequence / 2048,
        "buffers": 0.4,
        "context": 0.5,
    }
    device = sum(terms.values())
    per_h = {"RTX 4090": 0.44, "H100 SXM": 2.49, "T4": 0.35}.get(gpu, 0.0) * count
    seconds = 1320.0 * recipe.epochs / count
    return Plan(
        model=ModelSummary(recipe.model, 8_190_735_360, 8_190_735_360 if full else 2_727_936 * rank, "qwen3"),
        hardware=HardwareSummary(gpu, count, capacity, "cpu" if gpu == "CPU" else "cuda", not recipe.hardware.gpu),
        fits=device <= capacity,
        memory=Memory(
            device - 1.0, device - 0.5, device, device - 0.9, device + 1.1, terms, "backward", "Halve the micro batch."
        ),
        speed=Speed(5123.0 * count, 3.2, 0.41),
        time_s=seconds,
        cost=Cost(per_h * seconds / 3600, per_h, "runpod" if per_h else "", "2026-02"),
        resolved=_resolved(recipe, rank, sequence, count),
        workload=Workload(41_208, 6_750_000, 1900, 200, "estimated"),
        reasons=[
            Reason("micro_batch", 2, "Two sequences keep the matrices busy; four would need 3.6 GiB more."),
            Reason("checkpointing", "full", "Without it the activations of 36 layers would need 19.4 GiB."),
            Reason("optimizer", "adamw-8bit", "Saves 0.2 GiB; its steps cost nothing measurable here."),
            Reason("packing", True, "Rows are 164 tokens on average, far below 2,048: packing saves 5 of 6 steps."),
            Reason("precision", "bf16", "This GPU computes in bf16 at full speed."),
        ],
        warnings=[] if device <= capacity else ["rank 8 instead saves 0.3 GiB", "sequence_length 1024 saves 1.8 GiB"],
    )


def make_offers(recipe: Recipe, spot: bool) -> list[OfferRow]:
    """Eight machines; the T4 is too small for LoRA, and one price is old."""
    rows = []
    for provider, gpu, count, per_h, as_of in (
        ("runpod", "RTX 4090", 1, 0.44, "2026-02-20"),
        ("vast-ai", "RTX 4090", 1, 0.31, "2025-06-01"),
        ("lambda", "H100 SXM", 1, 2.49, "2026-02-20"),
        ("lambda", "H100 SXM", 8, 19.92, "2026-02-20"),
        ("runpod", "H100 SXM", 2, 4.98, "2026-02-20"),
        ("aws", "T4", 1, 0.35, "unknown"),
    ):
        plan = make_plan(recipe.with_overrides({"hardware.gpu": gpu, "hardware.gpus": count}))
        price = per_h / 2 if spot else per_h
        stale = as_of in ("2025-06-01", "unknown")
        source = f"https://{provider}.example/pricing"
        rows.append(OfferRow(provider, gpu, count, plan, price, price * plan.time_s / 3600, as_of, stale, source))
    return with_frontier(rows)


def make_models(gpu: str, length: int) -> ModelList:
    """Four models on a GPU, by simple arithmetic: weights in bf16 or four bits, and what trains them."""
    memory = GIB_PER_GPU.get(gpu, 62.0)
    rows = []
    for name, parameters, active, longest in (
        ("Qwen/Qwen3-8B", 8e9, 8e9, 40_960),
        ("Qwen/Qwen3-30B-A3B", 30e9, 3e9, 40_960),
        ("Qwen/Qwen3-0.6B", 6e8, 6e8, 40_960),
        ("meta-llama/Llama-3.1-70B", 70e9, 70e9, 131_072),
    ):
        fits = {}
        for tuning, per_parameter in (("full", 8.0), ("lora", 2.2), ("qlora", 0.7)):
            need = parameters * per_parameter / 2**30 + 1
            fits[tuning] = Fit(gpu, memory, tuning, length, need <= memory, need, need * 1.05, 2e13 / active, "bf16",
                               "adamw", "none", 0.44, "runpod")  # fmt: skip
        rows.append(ModelRow(name, int(parameters), int(active), longest, fits))
    return ModelList(gpu, memory, length, tuple(rows))


def make_look(recipe: Recipe) -> DataLook:
    """Two examples of a source, one of them cut, and one bad row."""
    if recipe.data[0].path.endswith("broken.jsonl"):
        raise DataError("this line is not JSON", where=f"{recipe.data[0].path}:731", do="Correct the line.")
    source = SourceSurvey(
        recipe.data[0].path, "train", "messages", 1.0, "messages holds lists of role and content", 41_208, True, 164.0,
        1900, 0.41,
    )  # fmt: skip
    report = Report(
        "sft", 1024, rows=2000, examples=1999, tokens=327_836, trained_tokens=134_412, trained_share=0.41, mean=164.0,
        median=120, p95=810, longest=1900, histogram=[Bin(0, 512, 1700), Bin(512, 1024, 280), Bin(1024, 2048, 19)],
        truncated=19, cut_tokens=4_210, repeated=12, scripts={"Latin": 0.97, "Hangul": 0.03}, bad_rows=1,
        problems=[Problem(1, "the answer is empty", "support.jsonl:98", "Remove the row.")], planned_tokens=6_750_000,
    )  # fmt: skip
    turn = [("<|im_start|>", False), ("user\n", False), ("What uses my GPU?", False), ("<|im_end|>\n", False)]
    answer = [("Run ", True), ("nvidia-smi.\x1b[2J", True), ("<|im_end|>", True)]
    pieces = tuple(Piece(text, n, trained) for n, (text, trained) in enumerate([*turn, *answer]))
    samples = (Sample("support.jsonl:1", pieces, 0), Sample("support.jsonl:2", pieces[:4], 37, "chosen"))
    return DataLook(Survey((source,), 41_208, 200, 6_750_000, 164.0, 1900, 0.41), report, samples, ("ChatML is used",))


CHECKS = [
    FakeCheck("packages", "ok", "torch 2.13.0, transformers 5.23.0, trl 1.16.0"),
    FakeCheck("driver", "ok", "580.65, 1 GPU"),
    FakeCheck("GPU 0 is idle", "warn", "4.2 GiB are in use by others", "See nvidia-smi; the plan still fits."),
    FakeCheck("memory", "ok", "9.9 GiB needed, 75.0 GiB free"),
    FakeCheck("disk", "ok", "310 GiB free, 18 GiB needed"),
    FakeCheck("data", "ok", "messages, 41,208 rows"),
]


def write_events(path: Path, payloads: list[tuple[float, Payload]]) -> None:
    """An event file with the given times; ``EventLog`` would stamp the present one."""
    import dataclasses

    lines = []
    for seq, (when, payload) in enumerate(payloads, 1):
        tree = {"seq": seq, "time": when, "type": payload.type, **dataclasses.asdict(payload)}
        lines.append(
            json.dumps(tree).replace("NaN", '"nan"').replace("-Infinity", '"-inf"').replace("Infinity", '"inf"')
        )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _gpu_sample(index: int, **changes: Any) -> GpuSample:
    """One healthy H100."""
    sample = GpuSample(index, "NVIDIA H100 80GB HBM3", 61.2 + index / 10, 79.6, 97.0, 642.0 - index, 67.0, 1755.0, [])
    return replace(sample, **changes)


def _training(
    *, begin: float, steps: int = 412, done: int = 240, gpus: int = 1, nan_at: tuple[int, ...] = (), step_s: float = 3.2
) -> list[tuple[float, Payload]]:
    """What a run says while it trains, with a seeded, falling loss."""
    rng = random.Random(7)
    events: list[tuple[float, Payload]] = [
        (begin, State("preparing", attempt=1)),
        (begin + 1, Phase("loading model", "Qwen/Qwen3-8B")),
        (begin + 9, Phase("tokenizing", "", 41_208, 41_208)),
        (begin + 10, Fallback("kernels.rope", "not proven on this GPU; the stock operation is used")),
        (begin + 11, Eval(0, 2.413)),
        (begin + 12, Answered(0, "How do I see what uses my GPU?", "The the GPU of of", "Run nvidia-smi.")),
        (begin + 13, State("running", attempt=1)),
    ]
    for step in range(1, done + 1):
        now = begin + 14 + step * step_s
        loss = math.nan if step in nan_at else 1.2 + 1.25 * math.exp(-step / 60) + rng.gauss(0, 0.05)
        warm = min(step / 12, 1.0)
        rate = 2e-4 * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        norm = math.inf if step in nan_at else abs(0.42 + rng.gauss(0, 0.06)) + (1.5 if step < 5 else 0)
        speed = 5123 + rng.gauss(0, 60) - (2100 if step < 3 else 0)
        events.append((now, Step(step, step / steps, loss, rate, norm, step * 16384, speed, step_s, steps)))
        if step % 100 == 0:
            events.append((now + 1, Eval(step, 1.31 + 1.1 * math.exp(-step / 60))))
            events.append((now + 2, CheckpointSaved(step, f"checkpoints/step-{step:06d}", 187_000_000, 1.4)))
        if step % 80 == 0 or step == done:
            events += [(now, _gpu_sample(index)) for index in range(gpus)]
            events.append((now, HostSample(38.0, 41.5, 310.0, 251.5)))
    events += [(now, MemoryUse(rank, 9.1, 9.8, 9.4)) for rank in range(gpus)]
    return events


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes run directories in ``tmp_path/runs``; a live one belongs to this very process."""
    import os

    import psutil

    def make(
        name: str,
        payloads: list[tuple[float, Payload]] | None = None,
        *,
        state: str = "running",
        recipe: Recipe | None = None,
        **status: Any,
    ) -> Run:
        recipe = recipe or Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "qlora", "data": "/data/support.jsonl"})
        run = Run.create(recipe, make_plan(recipe), root=tmp_path / "runs", name=name)
        begin: float = NOW - 14 - 240 * 3.2 - 1
        write_events(run.events_path, _training(begin=begin) if payloads is None else payloads)
        pid, started = (os.getpid(), psutil.Process().create_time()) if state in ("running", "stopping") else (0, 0.0)
        ended = 0.0 if state in ("running", "stopping", "preparing") else status.get("created", NOW - 7200) + 1400
        fields = {"state": state, "attempt": 1, "pid": pid, "pid_started": started, "ended": ended}
        begin = status.setdefault("created", begin)
        tree = {**Status(host=socket.gethostname()).__dict__, **fields, "started": begin + 1, **status}
        (run.path / "run.json").write_text(json.dumps(tree), encoding="utf-8")
        return run

    return make


@pytest.fixture
def fleet(make_run: MakeRun) -> list[Run]:
    """Five runs in five states, the live one newest."""
    begin = NOW - 14 - 240 * 3.2 - 1
    bad = [(NOW - 7200 + 20, State("failed", "oom", "CUDA out of memory at step 3", "Use micro_batch: 1", 1))]
    runs = [
        make_run("old-run", _training(begin=NOW - 300_000, done=200), state="lost", created=NOW - 300_000,
                 message="the process ended without a word: killed, or the machine went down",
                 do="Continue from the last checkpoint with: finetui resume old-run"),
        make_run("qwen3-8b-lr1e3", _training(begin=NOW - 90_000, done=160, nan_at=(158, 159, 160)), state="failed",
                 cause="nan", message="the loss was not finite in 3 steps in a row", created=NOW - 90_000,
                 do="Lower optimizer.learning_rate, then resume."),
        make_run("qwen3-8b-full", _training(begin=NOW - 7200, done=3) + bad, state="failed", cause="oom",
                 message="CUDA out of memory at step 3, in the optimizer step", created=NOW - 7200,
                 do="Use hardware.checkpointing: full, or optimizer.name: adamw-8bit."),
        make_run("qwen3-8b-lora-0411", [*_training(begin=NOW - 5000, done=412), (NOW - 3600, State("finished"))],
                 state="finished", created=NOW - 5000),
        make_run("qwen3-8b-qlora-0412", state="running", created=begin),
    ]  # fmt: skip
    return runs[::-1]


@pytest.fixture
def offers() -> list[OfferRow]:
    """What is for rent for a LoRA run."""
    return make_offers(Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "lora"}), False)


@pytest.fixture
def calls() -> list[tuple[Any, ...]]:
    """What the app asked the backend to do, in order."""
    return []


@pytest.fixture
def backend(tmp_path: Path, calls: list[tuple[Any, ...]], make_run: MakeRun) -> Backend:
    """A backend of fixed answers. ``runs`` lists what is in ``tmp_path/runs``."""
    from finetui.engine.run import list_runs

    def start(recipe: Recipe, plan: Plan, root: Path, name: str | None) -> Run:
        calls.append(("start", recipe.model, name))
        return make_run(name or "new-run", recipe=recipe)

    def said(word: str) -> Callable[[Run], None]:
        return lambda run: calls.append((word, run.name))

    return Backend(
        plan=make_plan,
        check=lambda recipe, plan, root: iter(CHECKS),
        start=start,
        stop=said("stop"),
        checkpoint=said("checkpoint"),
        kill=said("kill"),
        resume=said("resume"),
        runs=lambda: list_runs(tmp_path / "runs"),
        models=lambda: ["Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3"],
        models_on=lambda recipe, length: make_models(recipe.hardware.gpu or "H100 SXM", length),
        gpus=lambda: ["T4", "RTX 4090", "H100 SXM"],
        offers=make_offers,
        machine=lambda: "1 × H100 SXM",
        data=lambda recipe: ["messages, 41,208 rows"],
        look=make_look,
        root=lambda: Path("/home/ada/runs"),
        now=lambda: NOW,
    )


@pytest.fixture(autouse=True)
def _fixed_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(time, "localtime", time.gmtime)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("finetui.tui.screens.launch.suggest_name", lambda recipe, plan: "qwen3-8b-qlora-0301-1200")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Opens the app on a pty of its own, on a run or on Plan; what still runs at the end is killed."""
    opened: list[Terminal] = []

    def open_(
        run: Run | None = None, *, words: Sequence[str] = (), hup: bool = True, size: tuple[int, int] = (100, 30),
        **environ: str,
    ) -> Terminal:  # fmt: skip
        words = words or (["-m", "finetui", "attach", str(run.path)] if run else ["-m", "finetui"])
        opened.append(Terminal([sys.executable, "-P", *words], environment(tmp_path, **environ), size=size, hup=hup))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


@pytest.fixture
def app_of(backend: Backend) -> Callable[..., FinetuiApp]:
    """Makes an app on the fixed backend."""

    def make(mode: str = "plan", run: Run | None = None, **more: Any) -> FinetuiApp:
        recipe = more.pop("recipe", None) or Recipe.build(
            {"model": "Qwen/Qwen3-8B", "tuning": "qlora", "data": "/data/support.jsonl"}
        )
        return FinetuiApp(mode, run, recipe, backend=more.pop("backend", backend), **more)

    return make


async def _settle(pilot: Any) -> None:
    """Wait until workers and debounced edits have come to rest."""
    for _ in range(3):
        await pilot.pause(0.08)
        await pilot.app.workers.wait_for_complete()
    await pilot.pause()


@pytest.fixture
def settle() -> Callable[[Any], Awaitable[None]]:
    """Waits until workers and debounced edits have come to rest."""
    return _settle


@pytest.fixture
def training() -> Callable[..., list[tuple[float, Payload]]]:
    """Makes what a run says while it trains."""
    return _training


@pytest.fixture
def gpu_sample() -> Callable[..., GpuSample]:
    """Makes the reading of one GPU."""
    return _gpu_sample


@pytest.fixture
def now() -> float:
    """When every test takes place."""
    return NOW
