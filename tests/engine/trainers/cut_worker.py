"""A rank that is gone at once, and all others with it: ``python -P cut_worker.py RUN_DIR STEP``."""

from __future__ import annotations

import os
import sys
from typing import Any

from finetui.engine import worker
from finetui.engine.trainers import callbacks

if __name__ == "__main__":
    tell = callbacks.Reporter.on_log

    def tell_and_end(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        tell(self, args, state, *rest, **more)
        if state.global_step == int(sys.argv[2]):
            self.trainer.saver.wait()  # or whether the latest checkpoint is there would be a matter of luck
            os._exit(137)

    callbacks.Reporter.on_log = tell_and_end  # type: ignore[method-assign]
    sys.exit(worker.main(sys.argv[1:2]))
