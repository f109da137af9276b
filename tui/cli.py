"""The command line. Each verb lives in one file of ``commands/`` and is imported only when it is asked for.

stdout is data, stderr is talk. Exit codes: 0 done, 1 a failure, 2 a mistake that the user can put right, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import sys

from ..engine import bytecode
from ..planner.errors import FinetuiError, UserError
from .outlet import guard_streams

#: Verb → module in ``commands/``, in the order of the help page.
VERBS: dict[str, str] = {
    "quickstart": "quickstart",
    "plan": "plan",
    "fit": "fit",
    "gpus": "gpus",
    "advise": "advise",
    "run": "run",
    "runs": "runs",
    "attach": "attach",
    "logs": "logs",
    "compare": "compare",
    "report": "report",
    "top": "top",
    "serve": "serve",
    "stop": "stop",
    "resume": "resume",
    "import": "import_",
    "data": "data",
    "chat": "chat",
    "eval": "eval",
    "export": "export",
    "merge": "merge",
    "cluster": "cluster",
    "bench": "bench",
    "doctor": "doctor",
    "trust": "trust",
    "settings": "settings",
}

#: What a system says of a file or folder that this user may not read or write.
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``finetui`` and of ``python -m finetui``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    bytecode.keep()
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if not all(
        "utf" in (stream.encoding or "utf").lower() for stream in (sys.stdout, sys.stderr) if stream is not None
    ):
        from .charset import use_likenesses

        use_likenesses()
    guard_streams()
    gc.disable()  # while modules are imported the collector finds nothing to free
    try:
        if not arguments:  # the app paints before any verb is imported
            from .app import run_app

            gc.freeze()  # nor will it in what is imported
            gc.enable()
            run_app()
            return
        from .verbs import build

        _prefer(quiet="--json" in arguments or verb == "settings")
        app = build({verb: VERBS[verb]} if verb in VERBS else VERBS)
        gc.enable()
        app(args=arguments, prog_name="finetui", standalone_mode=True)
    except FinetuiError as error:
        _report(error, as_json="--json" in arguments)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `finetui logs | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in _FORBIDDEN or error.filename is None:
            raise
        do = "Look whose it is (ls -ld), or name another place."
        _report(UserError(str(error.strerror), where=str(error.filename), do=do), as_json="--json" in arguments)
        raise SystemExit(2) from None


def _prefer(*, quiet: bool) -> None:
    """Show figures as the user's settings say; ``quiet`` leaves out what is wrong with these."""
    from ..planner.preferences import load
    from .format import use_memory_unit

    preferences = load()
    use_memory_unit(preferences.memory_unit)
    for problem in () if quiet else preferences.problems:
        print(f"! {problem}", file=sys.stderr)


def _report(error: FinetuiError, *, as_json: bool) -> None:
    if as_json:
        parts = {"kind": type(error).__name__, "what": error.what, "where": error.where, "do": error.do}
        print(json.dumps({"error": parts}, indent=2, ensure_ascii=False))
        return
    from .format import sentence

    print(sentence(f"finetui: {error}"), file=sys.stderr)
