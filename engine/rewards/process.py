"""A reward seen from the trainer: scores of completions, and a count of what could not be scored, by its reason.

Every reward runs in a process of its own (``host.py``). One that takes too long is killed and started anew; its
completions stay without a score, which leaves them out of the gradient. Nothing fails in silence: every failure is
counted, the first and every tenfold is told as a warning, and a reward that scores nothing in three batches in a row
ends the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...planner.errors import RecipeError, TrainingError
from ...planner.secrets import without_secrets
from ..events import Warn

#: Batches in a row without a single score after which a run ends.
MOST_EMPTY = 3
#: Seconds that a reward's file may take to load.
_LOADING_S = 120.0
_ROOT = Path(__file__).parents[2]


class RewardProcess:
    """One reward.

    Args:
        name: as events and metrics call it.
        wanted: the first line that ``host.py`` reads.
        timeout_s: for one batch of completions.
        emit: receives warnings.
        keep: variables of the environment that it gets although they hold secrets.
    """

    def __init__(
        self,
        name: str,
        wanted: dict[str, Any],
        *,
        timeout_s: float,
        emit: Callable[[Any], object],
        keep: tuple[str, ...] = (),
    ) -> None:
        self.name, self.wanted, self.timeout_s, self.emit, self.keep = name, wanted, timeout_s, emit, keep
        self.failures: Counter[str] = Counter()
        """Completions without a score so far, by reason."""
        self._empty = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = bytearray()

    def start(self) -> None:
        """Load the reward.

        Raises:
            RecipeError: its file can't be loaded, or has no such function.
        """
        # The package may be a checkout that was never installed: the child must find the same one.
        path = os.pathsep.join([str(_ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = without_secrets(os.environ, keep=self.keep)
        environment = {**own, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        package = __package__ or "finetui.engine.rewards"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{package}.host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._unread.clear()
        answer = self._ask(self.wanted, _LOADING_S)
        if answer is None or "failed" in answer:
            why = "it takes too long to load" if answer is None else answer["failed"]
            self.close()
            do = "Mend its file."
            if "PermissionError" in why or "MemoryError" in why or "KeyError" in why:
                do = "Mend its file, or give it what it needs: network: true, memory_mib, environment: [NAME]."
            raise RecipeError(f"the reward {self.name} can't be loaded ({why})", where="rewards", do=do)

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], texts: Sequence[str], columns: dict[str, list[Any]]
    ) -> list[float | None]:
        """A reward per completion; None where there is none.

        Args:
            prompts, completions: as the user's function gets them: texts or messages.
            texts: what the model said, as plain text.
            columns: what else the rows hold.

        Raises:
            TrainingError: it has scored nothing for several batches in a row.
        """
        if self._process is None:
            self.start()
        batch = {"prompts": prompts, "completions": completions, "texts": texts, "columns": columns}
        answer = self._ask(batch, self.timeout_s)
        if answer is None:
            why = f"it took longer than {self.timeout_s:g} s" if self._running() else "its process died"
            self.close()
            answer = {"rewards": [None] * len(texts), "errors": [[row, why] for row in range(len(texts))]}
        for _, message in answer["errors"]:
            self._count(str(message))
        rewards: list[float | None] = answer["rewards"]
        self._empty = 0 if any(reward is not None for reward in rewards) else self._empty + 1
        if self._empty >= MOST_EMPTY:
            last = answer["errors"][-1][1] if answer["errors"] else "it gave no number"
            raise TrainingError(
                f"the reward {self.name} has scored nothing for {MOST_EMPTY} batches in a row; the last reason: {last}",
                cause="data",
                where="rewards",
                do="Mend the reward or the column that it compares with, then resume the run.",
            )
        return rewards

    def close(self) -> None:
        """End the process, and what it started."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _count(self, why: str) -> None:
        before = sum(self.failures.values())
        self.failures[why] += 1
        total = before + 1
        if total == 10 ** (len(str(total)) - 1):
            told = "one completion" if total == 1 else f"{total} completions so far"
            what = f"the reward {self.name} gave no score for {told}: {why}"
            self.emit(Warn(what, "rewards", "They do not count for the update."))

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """One line there, one line back; None if the process ends or the time is over."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        deadline = time.monotonic() + timeout_s
        try:
            process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            process.stdin.flush()
        except (BrokenPipeError, OSError):
            return None
        line = self._line(deadline)
        return None if line is None else json.loads(line)

    def _line(self, deadline: float) -> bytes | None:
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                more = os.read(stream.fileno(), 1 << 16)
                if not more:
                    self._process.wait()
                    return None
                self._unread += more
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread = bytearray(rest)
        return line
