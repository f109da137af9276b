"""A rank without a model: ``fake_rank.py MODE RUN_DIR`` behaves as MODE says, through the same files as a real one."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from finetui.engine.events import EventLog, Failure, Step
from finetui.engine.run import Run
from finetui.engine.supervision.heartbeat import Pulse, leave_stacks


def hang_here() -> None:
    time.sleep(120)


def main(mode: str, folder: str) -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    run, rank = Run(folder), int(os.environ["RANK"])
    log = os.open(run.log_path(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
    (Path(folder) / f"environment{rank}").write_text("\n".join(f"{k}={v}" for k, v in os.environ.items()))
    leave_stacks()
    pulse, attempt = Pulse(rank), run.recorded.attempt
    with EventLog(run.events_path) as events:
        if rank == 0:
            run.update(state="running")
        match mode:
            case "say-oom":
                events.append(Failure(rank, "crash", "a peer went away"))
                events.append(Failure(rank, "oom", "out of memory in step 1", do="Use a smaller micro_batch."))
                return 1
            case "silent-crash":
                print("Traceback\nRuntimeError: the last words", flush=True)
                return 3
            case "killed-once" if attempt > 1:
                return 0
            case "killed" | "killed-once":
                os.kill(os.getpid(), signal.SIGKILL)
            case "second-dies" if rank == 1:
                time.sleep(0.3)
                return 7
            case "fill-disk":
                with open(Path(folder) / "filler", "wb", buffering=0) as filler:
                    while True:
                        filler.write(bytes(4096))
            case "deaf":  # ends for nothing but SIGKILL
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(120)
        hangs = mode == "hang" or (mode == "hang-once" and attempt == 1)
        for step in range(1, 2400 if mode in {"endless", "second-dies"} else 16):
            if hangs and rank == int(os.environ["WORLD_SIZE"]) - 1 and step == 3:
                hang_here()
            if hangs and step > 3:  # waits for its peer, as in a collective
                time.sleep(120)
            pulse.beat(step)
            if rank == 0:
                events.append(Step(step, 0.1, 2.0 / step, 1e-4, 1.0, step * 10, 100.0, 0.05, 16))
            if run.requested("stop"):
                if rank == 0:
                    run.update(state="stopping")
                break
            time.sleep(0.05)
    pulse.rest()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
