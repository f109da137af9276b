"""Monitor: a run from its start, whatever became of it, while it goes on being written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from textual.widgets._toast import Toast

from finetui.engine.events import EventLog, Metrics, Step, Warn
from finetui.engine.run import Run
from finetui.planner.errors import RunError
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.keys import key_of
from finetui.tui.processes import _module
from finetui.tui.screens.base import StatusLine
from finetui.tui.screens.monitor import MonitorScreen
from finetui.tui.widgets.bars import KeyBar
from finetui.tui.widgets.gpu_panel import GpuPanel
from finetui.tui.widgets.line_chart import LineChart
from finetui.tui.widgets.log_pane import LogPane
from finetui.tui.widgets.run_header import RunHeader

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


def shown(app: FinetuiApp) -> str:
    widgets = [app.screen.query_one(kind) for kind in (RunHeader, GpuPanel, LogPane)]
    charts = list(app.screen.query(LineChart))
    return "\n".join(widget.text for widget in [*widgets, *charts])


async def test_a_run_from_its_start(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        text = shown(app)
        words = "● running|step 240/412|ETA 9 min|$0.5|loss 1.2238|held-out 1.3492|61.2/79.6 GiB|97 %|642 W|67 °C"
        for word in f"{words}|checkpoint at step 200|tokens/s 5,184|RAM 42/252 GiB".split("|"):
            assert word in text, word
        assert "Stop" in app.screen.query_one(KeyBar).text
        assert "Resume" not in app.screen.query_one(KeyBar).text


async def test_what_is_written_meanwhile_appears(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        with EventLog(fleet[0].events_path) as log:
            log.append(Step(241, 0.6, 0.9876, 1e-4, 0.4, 1, 5000.0, 3.2, 412))
            log.append(Warn("GPU 0 is hot"))
        await pilot.pause(1.6)
        assert "loss 0.9876" in shown(app)
        assert "GPU 0 is hot" in shown(app)


async def test_why_it_failed_and_what_to_try(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[2])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        text = shown(app)
        assert "✘ failed: oom" in text
        assert "CUDA out of memory at step 3" in text
        assert "Try: Use hardware.checkpointing: full" in text
        assert "Resume" in app.screen.query_one(KeyBar).text


async def test_losses_that_are_not_finite(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[3])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "loss nan" in shown(app)
        assert "failed: nan" in shown(app)
        await pilot.press("y")
        assert app.screen.query_one("#loss", LineChart).log_scale


@pytest.mark.parametrize("count", [0, 1, 8])
async def test_any_number_of_gpus(
    app_of: AppOf, settle: Settle, make_run: Callable[..., Run], training: Any, now: float, count: int
) -> None:
    run = make_run("many", training(begin=now - 784, gpus=count))
    app = app_of("monitor", run)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        text = app.screen.query_one(GpuPanel).text
        assert text.count("67 °C") == count
        assert "no GPU in use" in text or count
        assert app.screen.query_one(LogPane).region.bottom <= 23


async def test_runs_can_be_switched(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert fleet[0].name in shown(app)
        await pilot.press("n")
        await settle(pilot)
        assert fleet[1].name in shown(app)
        assert "step 412/412" in shown(app)
        await pilot.press("p")
        await settle(pilot)
        assert "step 240/412" in shown(app)


async def test_every_view_of_the_pane_below(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("v")
        assert "How do I see what uses my GPU?" in shown(app)
        await pilot.press("v")
        assert "predicted" in shown(app)
        await pilot.press("v")
        assert "   0      9.1 GiB      9.4 GiB      9.8 GiB" in shown(app)
        await pilot.press("v")
        assert "checkpoint at step 200" in shown(app)


async def test_stop_and_kill_are_asked_about(app_of: AppOf, settle: Settle, fleet: list[Run], calls: list[Any]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("x", "enter", "K", "n")
        await settle(pilot)
        assert calls == []
        await pilot.press("x", "y")
        await settle(pilot)
        await pilot.press("K", "y")
        await settle(pilot)
        await pilot.press("w")
        await settle(pilot)
        assert [call[0] for call in calls] == ["stop", "kill", "checkpoint"]


async def test_leaving_the_screen_and_coming_back_loses_nothing(
    app_of: AppOf, settle: Settle, fleet: list[Run]
) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        for _ in range(3):
            await pilot.press(key_of("runs"))
            await settle(pilot)
            await pilot.press(key_of("monitor"))
            await settle(pilot)
        assert isinstance(app.screen, MonitorScreen)
        history = app.screen._history
        assert sum(bucket.count for bucket in history.loss.buckets) == 240


async def test_a_run_that_is_deleted_while_it_is_watched(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        shutil.rmtree(fleet[0].path)
        await pilot.pause(1.6)
        assert "? lost" in shown(app)
        assert "step 240/412" in shown(app)


async def test_no_runs_at_all(app_of: AppOf, settle: Settle) -> None:
    app = app_of("monitor")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "no runs yet" in app.screen.query_one(RunHeader).text
        await pilot.press("x", "w", "K", "r", "n", "y", "v")
        assert app.is_running


async def test_below_sixty_by_eighteen_there_is_one_line(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    for size in ((59, 24), (80, 17), (12, 3), (1, 1)):
        app = app_of("monitor", fleet[0])
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            assert not app.screen.query_one("#body").display
            assert "running"[: max(size[0] - 5, 0)] in app.screen.query_one(StatusLine).text


async def _next_figure(pilot: Any) -> str:
    """What the last small chart shows, and on to the next."""
    title = pilot.app.screen.query_one("#figure", LineChart).text.splitlines()[0].strip("╭╮─ ")
    await pilot.press("t")
    return str(title)


async def test_the_figures_of_the_method(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    with EventLog(fleet[0].events_path) as log:
        log.append(Metrics(241, {"rewards/margins": 0.75, "rewards/accuracies": 0.625, "logps/chosen": -80.0}))
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        titles = [await _next_figure(pilot) for _ in range(4)]
        assert titles[0].startswith("rewards/accuracies 0.625 (1 of 10)")
        assert titles[1].startswith("rewards/margins 0.75")
        assert titles[3].startswith("learning rate")


async def test_the_figures_of_the_machine(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        titles = [await _next_figure(pilot) for _ in range(7)]
        assert [title.partition(" (")[0] for title in titles[1:]] == [
            "GPU load 97 %", "GPU power 642 W", "hottest GPU 67 °C", "fullest GPU 61.2 GiB", "host load 38 %",
            "host memory 41.5 GiB",
        ]  # fmt: skip
        await pilot.press("T")
        assert app.screen.query_one("#figure", LineChart).text.splitlines()[0].strip("╭╮─ ") == titles[6]


async def test_the_newest_part_of_every_chart(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        chart = app.screen.query_one("#loss", LineChart)
        whole = chart.text
        seen = []
        for _ in range(3):
            await pilot.press("z")
            seen.append((chart.text.splitlines()[-2].strip("│ ").split()[0], "newest 1/" in chart.text.splitlines()[0]))
        assert seen == [("154", True), ("219", True), ("0", False)]
        assert chart.text == whole


async def test_a_step_that_does_not_come_is_told(app_of: AppOf, settle: Settle, fleet: list[Run], now: float) -> None:
    for later, told in ((10.0, False), (90.0, True)):
        backend = replace(app_of().backend, now=lambda later=later: now + later)
        app = app_of("monitor", fleet[0], backend=backend)
        async with app.run_test(size=(120, 40)) as pilot:
            await settle(pilot)
            assert ("no step for" in app.screen.query_one(RunHeader).text) is told


async def test_the_loss_smoothed_as_one_likes(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[1])
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        titles = []
        for _ in range(4):
            titles.append(app.screen.query_one("#loss", LineChart).text.splitlines()[0])
            await pilot.press("s")
        assert ["mean over 50" in title for title in titles] == [False, True, False, False]
        assert ["mean" in title for title in titles] == [True, True, False, True]
        assert "mean over 3" in titles[3]


async def test_what_happened_is_marked_below_the_curve(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[3])
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        marks = app.screen.query_one("#loss", LineChart).text.splitlines()[-3]
        assert marks.count("◆") == 1
        assert "×" in marks


async def test_the_gpus_other_figures(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("g")
        assert "1755 MHz" in app.screen.query_one(GpuPanel).text
        await pilot.press("g")
        assert "67 °C" in app.screen.query_one(GpuPanel).text


async def test_mfu_and_what_it_will_have_cost(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        rate, plan = app.screen.query_one("#rate", LineChart).text, fleet[0].plan
        history = app.screen._history  # type: ignore[attr-defined]
        assert f"MFU {0.41 * history.median_rate() / plan.speed.tokens_per_s:.0%}" in rate
        spent = fleet[0].recorded.elapsed_s(app.backend.now())
        whole = (spent + history.eta_s()) / 3600 * plan.cost.usd_per_h
        header = app.screen.query_one(RunHeader).text
        assert f"of ~${whole:.2f}" in header
        assert f"(plan 22 min, ${plan.cost.usd:.2f})" in header


async def test_the_processes_are_named_before_they_are_killed(
    app_of: AppOf, settle: Settle, fleet: list[Run], calls: list[Any]
) -> None:
    app = app_of("monitor", fleet[0])  # whose process is this one
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("K")
        await pilot.pause()
        words = str(app.screen.query("Static").first().render())
        assert f"{os.getpid()} pytest" in words or f"{os.getpid()} python" in words
        await pilot.press("y")
        await settle(pilot)
    assert ("kill", fleet[0].name) in calls


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_a_run_that_ends_is_announced(
    app_of: AppOf, settle: Settle, fleet: list[Run], monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    told: list[str] = []
    monkeypatch.setattr("finetui.tui.screens.actions.sound", lambda alert, run, wanted: told.append(alert.text) or "")
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(pilot)
        if elsewhere:
            await pilot.press(key_of("runs"))
            await settle(pilot)
        fleet[0].update(state="failed", cause="oom", message="[rank0]: CUDA out of memory [/tmp]")
        for _ in range(50):
            await pilot.pause(0.1)
            if told:
                break
        await settle(pilot)
        shown = [str(toast.render()) for toast in app.screen.query(Toast)]
        words = f"{fleet[0].name} failed (oom): [rank0]: CUDA out of memory [/tmp]"
        assert told == [words]
        assert shown == ([f"failed\n{words}"] if elsewhere else [])  # the header says it
        assert elsewhere or "[rank0]: CUDA out of memory [/tmp]" in app.screen.query_one(RunHeader).text


async def test_a_notice_leaves_the_gpus_in_sight(
    app_of: AppOf, settle: Settle, fleet: list[Run], backend: Backend
) -> None:
    def refuse(run: Run) -> None:
        raise RunError("can't be told to: its folder is read-only [/srv]", where=run.name, do="Make it writable.")

    app = app_of("monitor", fleet[0], backend=replace(backend, checkpoint=refuse))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(pilot)
        await pilot.press("w")
        await settle(pilot)
        (toast,) = app.screen.query(Toast)
        assert "read-only [/srv]" in str(toast.render())
        assert toast.region.width > 70  # not half of it, which takes twice the lines
        for _ in range(3):
            await pilot.press("w")
            await settle(pilot)
        assert len(app.screen.query(Toast)) == 2
        assert not any(one.region.overlaps(app.screen.query_one(GpuPanel).region) for one in app.screen.query(Toast))
        await pilot.press("escape")
        await settle(pilot)
        assert not app.screen.query(Toast)


@pytest.mark.parametrize("kept", [True, False])
async def test_what_can_be_done_with_a_result(app_of: AppOf, settle: Settle, fleet: list[Run], kept: bool) -> None:
    run = fleet[1]
    if kept:
        run.output_path.mkdir(parents=True)
    app = app_of("monitor", run)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        words = " ".join(app.screen.query_one(RunHeader).text.split())
        assert (f"Next: finetui chat {run.name}" in words) == kept


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["-P", "-m", "finetui.engine.supervisor", "-m", "x"], "finetui.engine.supervisor"),
        (["-X", "utf8", "-m", "torch.distributed.run"], "torch.distributed.run"),
        (["/usr/bin/pytest", "-m", "not slow"], ""),
        (["train.py"], ""),
        ([], ""),
    ],
)
def test_the_module_that_python_runs(words: list[str], module: str) -> None:
    assert _module(words) == module
