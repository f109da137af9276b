"""The process above the ranks: starts them, samples the machine, keeps the limits, records how the run ended.

    python -P -m finetui.engine.supervisor RUN_DIR

One per run, in a session of its own, without a terminal. Several ranks are started through
``torch.distributed.elastic``; that needs PyTorch, which takes seconds to import, so the run is claimed, its state
written and the first samples taken before. Signals:

    SIGTERM          the machine wants its resources back: checkpoint within a deadline, then end (cause preempted)
    SIGQUIT          end at once, without a checkpoint
    SIGHUP, SIGINT   ignored: a run outlives the terminal and its Ctrl-C
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from ..planner.cgroup import oom_kills, usable_cpus
from ..planner.errors import FinetuiError, RunError
from ..planner.limits import Limits
from ..planner.plan import Plan
from ..planner.version import VERSION
from . import bytecode
from .checkpoint import find
from .events import Failure, Phase, Warn, parse_line
from .launcher import WORKER, import_environment
from .learning import learn_from
from .outcome import EndReason, Facts, Outcome, decide, first_exit
from .ranks import launcher
from .run import LIVE_STATES, Run, Status
from .telemetry import Sampler

#: Seconds that ranks get for their last checkpoint: clouds give 30 s from SIGTERM to SIGKILL, some of which the
#: supervisor needs itself.
PREEMPTION_S = 20.0
#: Seconds that ranks get to end when a limit is reached: a rank that hangs must not spend more money.
LIMIT_S = 600.0
#: Seconds between SIGTERM and SIGKILL for ranks that are ended without a checkpoint.
QUIT_S = 3.0


@dataclasses.dataclass
class _Orders:
    """What the supervisor was told to do, by signals or by limits."""

    reason: EndReason | None = None
    deadline: float | None = None
    forced: bool = False

    def end(self, reason: EndReason, within_s: float) -> None:
        """Note that the ranks shall end; the sooner deadline counts."""
        deadline = time.monotonic() + within_s
        if self.deadline is None or deadline < self.deadline:
            self.reason, self.deadline = reason, deadline


def supervise(
    run: Run,
    *,
    worker: Sequence[str] = WORKER,
    ready: Callable[[], None] = lambda: None,
    preemption_s: float = PREEMPTION_S,
) -> Outcome:
    """Carry out one attempt at a run, from the claim to the final state. Needs the main thread, for signals.

    Args:
        worker: what each rank runs, as arguments of Python before the run directory.
        ready: called when the run is claimed.
        preemption_s: seconds that the ranks get for a checkpoint after SIGTERM.

    Raises:
        RunError: another process is at work on the run, it has finished, or its files are damaged.
    """
    orders = _Orders()
    with _signals(orders, preemption_s):
        lock = run.claim()
        try:
            plan, limits = run.plan, run.recipe.limits
            status = _begin(run)
            ready()
            return _attempt(run, plan, limits, status, worker, orders)
        finally:
            os.close(lock)


def _begin(run: Run) -> Status:
    """Enter the new attempt into run.json."""
    before = run.recorded
    if before.state == "finished":
        raise RunError("has finished already", where=run.name)
    spent = before.spent_s
    if before.started:
        ended = run.status.ended if before.state in LIVE_STATES else before.ended
        spent += max(0.0, ended - before.started)
    run.hold_reserve()
    after = run.update(
        state="preparing", cause=None, message="", do="", attempt=before.attempt + 1, pid=os.getpid(),
        pid_started=psutil.Process().create_time(), host=socket.gethostname(), started=time.time(), ended=0.0,
        spent_s=spent, version=VERSION,
    )  # fmt: skip
    if after.attempt > 1 and not find(run.path / "checkpoints"):
        run.append(Warn("there is no complete checkpoint: training starts from the beginning", where=run.name))
    return after


def _attempt(run: Run, plan: Plan, limits: Limits, status: Status, worker: Sequence[str], orders: _Orders) -> Outcome:
    resolved = plan.resolved
    kills = oom_kills()
    begin = run.events_path.stat().st_size
    sampler = Sampler(run.events_path, resolved.gpus if resolved.device == "cuda" else [])
    sampler.start()
    try:
        run.append(Phase("starting"))
        exit_codes = _ranks(run, plan, limits, status, worker, orders)
        outcome = decide(
            Facts(
                name=run.name,
                exit_codes=exit_codes,
                failures=_failures(run.events_path, begin),
                stopping=run.recorded.state == "stopping" or orders.forced,
                reason=orders.reason,
                forced=orders.forced,
                oom_kills=oom_kills() - kills,
                disk_free=shutil.disk_usage(run.path).free,
                last_line=_last_line(run.log_path(first_exit(exit_codes)[0]), status.started) if exit_codes else "",
            )
        )
    except FinetuiError as error:
        outcome = Outcome("failed", "crash", error.what, error.do)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome("failed", "crash", f"the supervisor failed: {error!r}", f"See {run.path}/log/supervisor.log")
    finally:
        sampler.stop()
    run.withdraw("stop")
    run.withdraw("checkpoint")
    run.update(**dataclasses.asdict(outcome), ended=time.time())
    run.free_reserve()
    if outcome.state == "finished" and not plan.stages:  # its stages have taught already
        try:
            learn_from(run, plan)
        except (OSError, KeyError, TypeError):  # a history that can't be kept costs a correction, not a run
            traceback.print_exc()
    return outcome


def _ranks(
    run: Run, plan: Plan, limits: Limits, status: Status, worker: Sequence[str], orders: _Orders
) -> dict[int, int]:
    """Start the ranks and wait for their end; the exit code of each rank that failed."""
    os.environ.update(_environment(plan, os.environ))
    budget = _Budget.of(run, plan, limits, status)
    launch = launcher(run, 1 if plan.stages else plan.resolved.world_size, worker)
    failed: dict[int, int] = {}
    crash: list[BaseException] = []

    def work() -> None:
        try:
            failed.update(launch())
        except BaseException as error:
            crash.append(error)

    if orders.reason is not None or run.requested("stop"):  # asked to end while PyTorch was loading
        orders.reason, orders.forced = orders.reason or "request", True
        return {}
    # Waiting for ranks blocks; in a thread of its own it leaves signals and deadlines to this one. That thread must
    # outlive the ranks: PR_SET_PDEATHSIG, by which they die with the supervisor, goes by the thread that forked.
    thread = threading.Thread(target=work, name="elastic", daemon=True)
    thread.start()
    requested = False
    while thread.is_alive():
        thread.join(0.2)
        reason = budget.exceeded()
        if reason and orders.reason is None:
            orders.end(reason, LIMIT_S)
        if orders.reason in {"preempted", "hours", "cost"} and not requested:
            requested = True
            run.request("stop")
        if orders.deadline is not None and time.monotonic() > orders.deadline:
            orders.forced = True
            _end_ranks(orders.reason)  # again and again: elastic may just be starting some
    if crash:
        traceback.print_exception(crash[0])
        do = f"See {run.path}/log/supervisor.log"
        raise FinetuiError(f"the ranks could not be started or watched ({crash[0]!r})", do=do)
    return failed


def _environment(plan: Plan, present: Mapping[str, str]) -> dict[str, str]:
    """What the ranks need in their environment; what the user has set by hand stays."""
    resolved = plan.resolved
    wanted = {
        "OMP_NUM_THREADS": str(max(1, usable_cpus() // resolved.world_size)),
        # Idle OpenMP threads sleep instead of spinning: on two cores shared with other work, spinning made a step of
        # the tiny model eight times slower (2.0 s against 0.25 s).
        "OMP_WAIT_POLICY": "PASSIVE",
        "GLOO_SOCKET_IFNAME": "lo",
        # After one rank has failed, its peers hang in a collective: elastic waits so long before it kills them.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
    }
    if resolved.device == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in present:  # its old name, which torch still reads
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    environment = {key: value for key, value in wanted.items() if key not in present}
    visible = ",".join(map(str, resolved.gpus)) if resolved.device == "cuda" else ""
    devices = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
    return environment | devices | import_environment() | bytecode.environment(present)


def _end_ranks(reason: EndReason | None) -> None:
    """End all ranks with what they have started; elastic gave each a session of its own.

    Their exit status is left for elastic to collect, so nothing here waits for them in the way a parent does.
    """
    ranks = _working_children()
    if reason == "quit":
        for rank in ranks:
            _signal_group(rank, signal.SIGTERM)
        deadline = time.monotonic() + QUIT_S
        while (ranks := _working_children()) and time.monotonic() < deadline:
            time.sleep(0.05)
    for rank in ranks:
        _signal_group(rank, signal.SIGKILL)


def _working_children() -> list[int]:
    working = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                working.append(child.pid)
    return working


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


@dataclasses.dataclass(frozen=True)
class _Budget:
    """The limits of a run as points on the monotonic clock."""

    money_ends: float | None
    time_ends: float | None

    @classmethod
    def of(cls, run: Run, plan: Plan, limits: Limits, status: Status) -> _Budget:
        # The clock may be set while a run is at work: wall time is read once, here.
        begun = time.monotonic() - status.elapsed_s()
        money_ends = None
        if limits.cost_usd is not None:
            if plan.cost.usd_per_h > 0:
                seconds = limits.cost_usd / plan.cost.usd_per_h * 3600
                # The last checkpoint costs as well.
                money_ends = begun + seconds - min(60.0, 0.05 * seconds)
            else:
                what = "limits.cost_usd has no effect: the plan has no price"
                run.append(Warn(what, where=run.name, do="Plan with a priced GPU, or use limits.hours."))
        return cls(money_ends, begun + limits.hours * 3600 if limits.hours is not None else None)

    def exceeded(self) -> EndReason | None:
        """Which limit is reached, if any."""
        now = time.monotonic()
        if self.money_ends is not None and now >= self.money_ends:
            return "cost"
        if self.time_ends is not None and now >= self.time_ends:
            return "hours"
        return None


@contextlib.contextmanager
def _signals(orders: _Orders, preemption_s: float) -> Iterator[None]:
    def preempt(number: int, frame: FrameType | None) -> None:
        orders.end("preempted", preemption_s)

    def quit_now(number: int, frame: FrameType | None) -> None:
        orders.end("quit", 0.0)

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None] | signal.Handlers] = {
        signal.SIGTERM: preempt,
        signal.SIGQUIT: quit_now,
        signal.SIGHUP: signal.SIG_IGN,
        signal.SIGINT: signal.SIG_IGN,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failures(events: Path, begin: int) -> list[Failure]:
    """What ranks said about their end, from byte ``begin`` on; an event file may be too long to parse it all."""
    names = {f.name for f in dataclasses.fields(Failure)}
    with open(events, "rb") as file:
        file.seek(begin)
        told = [parse_line(raw) for raw in file if b'"type":"failure"' in raw]
    return [Failure(**{k: v for k, v in event.data.items() if k in names}) for event in told if event is not None]


def _last_line(path: Path, since: float) -> str:
    """The last words in a log, if it was written to after a moment in time."""
    try:
        if path.stat().st_mtime < since:
            return ""
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise one run; the exit code is 0 when it finished or was stopped."""
    parser = argparse.ArgumentParser(prog="finetui.engine.supervisor", description="Carry out one run.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--ready-fd", type=int, help="descriptor that is told 'ready' or the error")
    parser.add_argument("worker", nargs="*", default=list(WORKER), help="what each rank runs instead (after --)")
    options = parser.parse_args(argv)

    def tell(answer: str) -> None:
        if options.ready_fd is not None:
            with contextlib.suppress(BrokenPipeError), open(options.ready_fd, "w", encoding="utf-8") as pipe:
                pipe.write(answer)

    try:
        outcome = supervise(Run(options.run), worker=options.worker, ready=lambda: tell("ready"))
    except FinetuiError as error:
        print(error, file=sys.stderr)
        tell(json.dumps({"what": error.what, "where": error.where, "do": error.do}))
        return error.exit_code
    return 0 if outcome.state in {"finished", "stopped"} else 1


if __name__ == "__main__":
    sys.exit(main())
