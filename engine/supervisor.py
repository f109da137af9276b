"""The process above the ranks: starts them, watches over them, keeps the limits, records how the run ended.

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
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from ..planner.cgroup import oom_kills
from ..planner.errors import FinetuiError, RunError, TrainingError
from ..planner.plan import Plan
from ..planner.recipe import Recipe
from ..planner.version import VERSION
from .checkpoints.store import find
from .durable import write_atomically
from .events import Failure, Fallback, Phase, Warn, parse_line
from .launcher import WORKER
from .learning import learn_from
from .modes import keep_private
from .run import Run
from .standby import WaitingRank
from .status import LIVE_STATES, Status
from .supervision import at_end, gpulock, hang
from .supervision.budget import Budget
from .supervision.heartbeat import VARIABLE, Hearts
from .supervision.orders import Orders, signals
from .supervision.outcome import Facts, Outcome, decide, first_exit
from .supervision.preemption import Notices
from .supervision.ranks import end_ranks, environment, launcher
from .supervision.recovery import Restarts, again
from .supervision.redacted import redact_streams
from .telemetry import Sampler

#: Share of the time between SIGTERM and SIGKILL that ranks get for their last checkpoint: the supervisor needs some.
GRACE_SHARE = 2 / 3
#: Seconds that ranks get to end when a limit is reached: a rank that hangs must not spend more money.
LIMIT_S = 600.0
#: Seconds after which a rank that was killed and is still there waits in the kernel, for a disk or a driver.
KILL_S = 60.0


def supervise(
    run: Run,
    *,
    worker: Sequence[str] = WORKER,
    ready: Callable[[], None] = lambda: None,
    preemption_s: float | None = None,
    waiting: WaitingRank | None = None,
) -> Outcome:
    """Carry out a run, from the claim to the final state. Needs the main thread, for signals.

    Args:
        worker: what each rank runs, as arguments of Python before the run directory.
        ready: called when the run and its GPUs are claimed.
        preemption_s: seconds that the ranks get for a checkpoint after SIGTERM, instead of what the recipe says.
        waiting: a rank that is there already, to be the only one of the first attempt.

    Raises:
        RunError: another process is at work on the run, another run on its GPUs, it has finished, or its files are
            damaged.
    """
    orders = Orders()
    with signals(orders):
        lock = run.claim()
        try:
            recipe, plan = run.recipe, run.plan
            orders.grace_s = recipe.limits.grace_s * GRACE_SHARE if preemption_s is None else preemption_s
            gpus = plan.resolved.gpus if plan.resolved.device == "cuda" and not plan.stages else []
            with gpulock.held(gpus, run, shared=recipe.hardware.shared):
                status = _begin(run)
                ready()
                outcome = _Supervision(run, recipe, plan, status, worker, orders, waiting).carry_out()
        finally:
            os.close(lock)
        at_end.act(run, recipe.limits.at_end, outcome, orders.reason)
    return outcome


def _begin(run: Run) -> Status:
    """Enter the new attempt into run.json."""
    before = run.recorded
    if before.state == "finished":
        raise RunError("has finished already", where=run.name, do="To train on, start a run with tuning.start_from.")
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
    if before.attempt and before.version != VERSION:
        what = f"it was begun by finetui {before.version or 'of an unknown release'} and goes on with {VERSION}"
        run.append(Warn(what, where=run.name, do="Compare its curve before and after."))
    if after.attempt > 1 and not find(run.path / "checkpoints"):
        run.append(Warn("there is no complete checkpoint: training starts from the beginning", where=run.name))
    return after


class _Supervision:
    """One supervisor's work on a run: attempts, until one ends for good."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        plan: Plan,
        status: Status,
        worker: Sequence[str],
        orders: Orders,
        waiting: WaitingRank | None,
    ) -> None:
        self.run, self.recipe, self.plan, self.status, self.worker = run, recipe, plan, status, worker
        self.orders, self.waiting = orders, waiting
        self.budget = Budget.of(run, plan, recipe.limits, status)
        # The one process of a run with stages waits for runs that have supervisors of their own.
        self.hang_s = None if plan.stages else hang.hang_limit_s(recipe)

    def carry_out(self) -> Outcome:
        """All attempts; records how the last one ended, and teaches the planner."""
        run, resolved = self.run, self.plan.resolved
        restarts = Restarts(run, 0 if self.plan.stages else self.recipe.limits.restarts)
        sampler = Sampler(run.events_path, resolved.gpus if resolved.device == "cuda" else [])
        sampler.start()
        try:
            with Notices(self.recipe.limits, run, self.taken):
                outcome = self.attempt(restarts)
                while outcome is None:
                    outcome = self.attempt(restarts)
        except TrainingError as error:
            outcome = Outcome("failed", "hang", error.what, error.do)
        except FinetuiError as error:
            outcome = Outcome("failed", "crash", error.what, error.do)
        except Exception as error:
            traceback.print_exc()
            see = f"See {run.path}/log/supervisor.log"
            outcome = Outcome("failed", "crash", f"the supervisor failed: {error!r}", see)
        finally:
            sampler.stop()
        self.record(outcome)
        if outcome.state == "finished" and not self.plan.stages:  # its stages have taught already
            try:
                learn_from(run, self.plan)
            except (OSError, KeyError, TypeError):  # a history that can't be kept costs a correction, not a run
                traceback.print_exc()
        return outcome

    def record(self, outcome: Outcome) -> None:
        """Write down how the run ended; where its folder can't be written, it will be found lost and can be resumed."""
        run = self.run
        try:
            run.update(**dataclasses.asdict(outcome), ended=self.budget.ended(self.status.started))
            run.withdraw("stop")
            run.withdraw("checkpoint")
            run.free_reserve()
        except OSError as error:
            print(f"{run.name} {outcome.state}: {outcome.message}\nThis can't be written down ({error}).", flush=True)

    def taken(self, who: str, left_s: float) -> None:
        """The machine will be taken away; told by another thread."""
        within = max(left_s - self.recipe.limits.grace_s * (1 - GRACE_SHARE), 2.0)
        self.orders.end("preempted", within)
        what = f"{who} will take this machine away in {left_s:.0f} s: a checkpoint is written"
        self.run.append(Warn(what, where=self.run.name, do=f"Continue with: finetui resume {self.run.name}"))

    def attempt(self, restarts: Restarts) -> Outcome | None:
        """Start the ranks and wait for their end; None if they are to be started again."""
        run, orders = self.run, self.orders
        kills, begin, began = oom_kills(), run.events_path.stat().st_size, time.time()
        run.append(Phase("starting"))
        exit_codes, hung = self.ranks()
        facts = Facts(
            name=run.name,
            exit_codes=exit_codes,
            failures=_failures(run.events_path, begin),
            stopping=run.recorded.state == "stopping" or orders.forced or bool(hung),
            reason=orders.reason or ("hang" if hung else None),
            forced=orders.forced or bool(hung),
            oom_kills=oom_kills() - kills,
            disk_free=shutil.disk_usage(run.path).free,
            last_line=_last_line(run.log_path(first_exit(exit_codes)[0]), began) if exit_codes else "",
            hung="; ".join(map(str, hung)),
        )
        outcome = decide(facts)
        if orders.reason is not None or run.requested("stop"):
            return outcome
        way = again(run, self.recipe, self.plan, facts, outcome, restarts)
        if way is None:
            return outcome
        self.go_on(way.why, way.plan, restarts)
        return None

    def go_on(self, why: str, plan: Plan | None, restarts: Restarts) -> None:
        """Prepare the next attempt and say why there is one."""
        run, step = self.run, restarts.newest()
        where = f"step {step}, the last checkpoint" if step else "the beginning: there is no checkpoint yet"
        do = f"Restart {restarts.count} of at most {restarts.most} without a new checkpoint (limits.restarts)."
        run.append(Warn(f"{why}; training goes on from {where}", where=run.name, do=do))
        if plan is not None:
            before, after = self.plan.resolved, plan.resolved
            what = f"micro batch {after.micro_batch} instead of {before.micro_batch}"
            rows = f"{after.accumulation} of them make a step instead of {before.accumulation}: the same rows"
            run.append(Fallback(what, f"out of memory; {rows}"))
            write_atomically(run.path / "plan.json", plan.to_json() + "\n")
            self.plan = plan
        run.hold_reserve()
        run.update(state="preparing", attempt=run.recorded.attempt + 1)
        until = time.monotonic() + restarts.pause_s()
        while time.monotonic() < until and self.orders.reason is None and not run.requested("stop"):
            time.sleep(0.1)

    def ranks(self) -> tuple[dict[int, int], list[hang.Silent]]:
        """Run the ranks to their end: the exit codes of those that failed, and the ranks that hung, if some did."""
        run, orders, plan = self.run, self.orders, self.plan
        os.environ.update(environment(plan, os.environ))
        world = 1 if plan.stages else plan.resolved.world_size
        launch = launcher(run, world, self.worker, self.waiting)
        self.waiting = None
        failed: dict[int, int] = {}
        crash: list[BaseException] = []

        def work() -> None:
            try:
                failed.update(launch())
            except BaseException as error:
                crash.append(error)

        if orders.reason is not None or run.requested("stop"):  # asked to end while PyTorch was loading
            orders.reason, orders.forced = orders.reason or "request", True
            return {}, []
        with Hearts(world) as hearts:
            os.environ[VARIABLE] = hearts.path
            # Waiting for ranks blocks; in a thread of its own it leaves signals and deadlines to this one. That thread
            # must outlive the ranks: PR_SET_PDEATHSIG, by which they die with the supervisor, goes by the thread that
            # forked.
            thread = threading.Thread(target=work, name="elastic", daemon=True)
            thread.start()
            hung = self.wait_for(thread, hearts)
        if crash:
            traceback.print_exception(crash[0])
            do = f"See {run.path}/log/supervisor.log"
            raise FinetuiError(f"the ranks could not be started or watched ({crash[0]!r})", do=do)
        return failed, hung

    def wait_for(self, thread: threading.Thread, hearts: Hearts) -> list[hang.Silent]:
        """Wait for the ranks and keep the limits; the ranks that hung, if some did and so all were ended.

        Raises:
            TrainingError: ranks can't be ended, cause ``hang``.
        """
        run, orders = self.run, self.orders
        watch = hang.Watch(hearts.read, self.hang_s)
        requested = False
        hung: list[hang.Silent] = []
        woken: set[int] = set()
        killed_at: float | None = None
        while thread.is_alive():
            thread.join(0.2)
            reason = self.budget.exceeded()
            if reason and orders.reason is None:
                orders.end(reason, LIMIT_S)
            if orders.reason in {"preempted", "hours", "cost"} and not requested:
                requested = True
                run.request("stop")
            late = orders.deadline is not None and time.monotonic() > orders.deadline
            if late or hung:
                orders.forced = orders.forced or late
                end_ranks(politely=orders.reason == "quit")  # again and again: elastic may just be starting some
                killed_at = killed_at or time.monotonic()
                if time.monotonic() > killed_at + KILL_S:
                    what = "ranks were killed and do not end: they wait for a disk, a network drive or a driver"
                    raise TrainingError(what, cause="hang", do="Look at dmesg, and restart the machine.")
            elif silent := watch.look():
                asleep = [rank for rank in silent if rank.stopped and rank.pid not in woken]
                if asleep:
                    woken.update(rank.pid for rank in asleep)
                    self.wake(asleep)
                    watch.forgive()
                else:
                    hung = silent
                    self.keep_stacks([beat.pid for beat in hearts.read() if beat.pid])
        return hung

    def wake(self, asleep: list[hang.Silent]) -> None:
        """Let ranks go on that something has stopped; should they be stopped again, they hang."""
        for rank in asleep:
            do = "It was woken up (SIGCONT). To pause a run, stop and resume it."
            self.run.append(Warn(str(rank), where=self.run.name, do=do))
            hang.take_stacks([rank.pid], wait_s=0.0)  # written as it wakes up
            hang.wake(rank.pid)

    def keep_stacks(self, pids: list[int]) -> None:
        """Have every rank say in its log where it is, before all are ended."""
        print(f"ranks hang; their stacks are in log/rank*.log (processes {pids})", flush=True)
        hang.take_stacks(pids)


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
    keep_private()
    redact_streams()

    def tell(answer: str) -> None:
        if options.ready_fd is not None:
            with contextlib.suppress(BrokenPipeError), open(options.ready_fd, "w", encoding="utf-8") as pipe:
                pipe.write(answer)

    waiting = WaitingRank.inherited()
    try:
        outcome = supervise(Run(options.run), worker=options.worker, ready=lambda: tell("ready"), waiting=waiting)
    except FinetuiError as error:
        print(error, file=sys.stderr)
        tell(json.dumps({"what": error.what, "where": error.where, "do": error.do}))
        return error.exit_code
    finally:
        if waiting is not None:
            waiting.dismiss()
    return 0 if outcome.state in {"finished", "stopped"} else 1


if __name__ == "__main__":
    sys.exit(main())
