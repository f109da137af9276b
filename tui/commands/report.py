"""``finetui report``: what came of a run beside what was planned, to keep, to mail or to plot."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...planner.errors import RunError
from ..report import Report, refuse_empty, write_csv
from .options import JsonFlag, RunOrLatest
from .places import HostFlag, the_run

Format = Literal["md", "csv", "svg"]
FormatFlag = Annotated[
    Format | None,
    typer.Option("--format", help="md: a summary; csv: one row per step; svg: the loss. By --out's ending, else md."),
]
OutFlag = Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead of standard output.")]


def report(run: RunOrLatest = None, form: FormatFlag = None, out: OutFlag = None, host: HostFlag = None,
           as_json: JsonFlag = False) -> None:  # fmt: skip
    """A run's summary, its steps, or its curves. As far as it has come."""
    if as_json and form:
        raise RunError("--json is a form of its own", do="Leave out --format, or --json.")
    ending = out.suffix.lstrip(".").lower() if out else ""
    chosen = form or (ending if ending in ("md", "csv", "svg") else "md")
    with the_run(run, host) as found:
        if chosen == "csv" and not as_json:
            if out is None:
                write_csv(found, sys.stdout)
                return
            rows = io.StringIO()
            write_csv(found, rows)
            _write(out, rows.getvalue())
            return
        told = Report.of(found)
        refuse_empty(told)
    if as_json:
        content = json.dumps(told.figures(), indent=2, ensure_ascii=False) + "\n"
    else:
        content = told.svg() if chosen == "svg" else told.markdown()
    if out:
        _write(out, content)
    else:
        print(content, end="")


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        what = f"the report can't be written ({error.strerror})"
        raise RunError(what, where=str(path), do="Give another path.") from error
    print(f"wrote {path}", file=sys.stderr)
