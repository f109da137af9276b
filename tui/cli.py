"""The command line. Each verb lives in one file of ``commands/`` and is imported only when it is asked for.

stdout is data, stderr is talk. Exit codes: 0 done, 1 a failure, 2 a mistake that the user can put right, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import sys

from ..engine import bytecode
from ..planner.errors import FinetuiError, UserError
from .outlet import give_up_output, guard_streams, open_streams

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

#: Verbs that start a run, and are called for nothing else.
STARTING = frozenset({"quickstart", "run", "resume"})

_ELSEWHERE = "Look whose it is (ls -ld), or name another place."
#: What a system says of a file that can't be used as it was named, wherever that comes up, and what to do about it.
_TOLD = {
    errno.EACCES: _ELSEWHERE, errno.EPERM: _ELSEWHERE, errno.EROFS: _ELSEWHERE,
    errno.ENAMETOOLONG: "Check the name.", errno.ELOOP: "Look where the link leads (ls -l).",
    errno.ENOTDIR: "Check the path: a part of it is a file.", errno.EISDIR: "Name a file.",
    errno.ENOSPC: "Free some space, or name another place.", errno.EDQUOT: "Free some space, or name another place.",
}  # fmt: skip
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_LONGEST_NAME = 200


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``finetui`` and of ``python -m finetui``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    open_streams()
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
        if arguments == ["--version"]:
            from ..planner.version import VERSION

            print(VERSION)
            return
        with _processes(verb, arguments):
            from .verbs import build

            _prefer(quiet="--json" in arguments or verb == "settings")
            app = build({verb: VERBS[verb]} if verb in VERBS else VERBS)
            gc.enable()
            try:
                app(args=arguments, prog_name="finetui", standalone_mode=True)
            finally:
                sys.stdout.flush()  # what can't be written is told below, and not by the interpreter on its way out
    except FinetuiError as error:
        _report(error, as_json="--json" in arguments)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `finetui logs | head` has seen enough
        give_up_output()
        raise SystemExit(141) from None
    except RuntimeError as error:  # what pathlib has for ELOOP before Python 3.13
        if not str(error).startswith("Symlink loop from "):
            raise
        where = str(error).removeprefix("Symlink loop from ").strip("'")
        told = UserError("this link leads back to itself", where=where, do=_TOLD[errno.ELOOP])
        _report(told, as_json="--json" in arguments)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _TOLD or (error.filename is None and error.errno not in _FULL):
            raise
        if error.filename is None:  # every file of ours is written by who names it
            give_up_output()
        name = str(error.filename or "standard output")
        where = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
        told = UserError(str(error.strerror), where=where, do=_TOLD[error.errno])
        _report(told, as_json="--json" in arguments and error.filename is not None)
        raise SystemExit(2) from None


def _processes(verb: str | None, arguments: list[str]) -> contextlib.AbstractContextManager[None]:
    """Within, those that a run will need begin to import what they need, if this command is to start one."""
    if verb not in STARTING or not {"--help", "--check"}.isdisjoint(arguments):
        return contextlib.nullcontext()
    from ..engine.standby import standing_by

    return standing_by()


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
