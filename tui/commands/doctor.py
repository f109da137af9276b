"""``finetui doctor``: what is wrong with this machine; with a model, which of its modules run in which kernel."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...planner.errors import MissingExtraError, ModelError, RecipeError, UserError
from ...planner.hub import find_config
from ..format import sentence
from .options import JsonFlag, local_path

if TYPE_CHECKING:
    from ...engine.check import Check

ModelFlag = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Hub id, folder or config.json: what runs in which kernel."),
]
TuningFlag = Annotated[str | None, typer.Option("--tuning", help="With --model: lora (default) or full.")]
_MARKS = {"ok": "✔", "warn": "!", "fail": "✘"}


def doctor(model: ModelFlag = None, tuning: TuningFlag = None, as_json: JsonFlag = False) -> None:
    """Look for what is wrong with this machine, and what to do. Exit code 1 if anything fails."""
    if model is not None:
        _kernels(model, tuning or "lora", as_json=as_json)
        return
    if tuning is not None:
        raise UserError("--tuning has no effect without --model", do="Leave it out, or name a model.")
    from ...engine.doctor.checks import examine

    found = []
    for check in examine():
        found.append(check)
        if not as_json:
            _show(check)
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in found], indent=2, ensure_ascii=False))
    failed = sum(check.status == "fail" for check in found)
    if not as_json:
        warned = sum(check.status == "warn" for check in found)
        print(f"{len(found)} checks: {failed} failed, {warned} to look at", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def _show(check: Check) -> None:
    print(sentence(f"{_MARKS[check.status]} {check.name}: {check.detail}"), flush=True)
    if check.do:
        print(f"    {check.do}", flush=True)


def _kernels(model: str, tuning: str, *, as_json: bool) -> None:
    if tuning not in {"lora", "full"}:
        raise RecipeError(
            f"{tuning!r} is no tuning whose kernels can be told", where="--tuning", do="Use lora or full."
        )
    if any(find_spec(package) is None for package in ("torch", "transformers", "peft", "triton")):
        raise MissingExtraError("doctor --model", "train")
    from ...engine.doctor.checks import kernels_of

    name, config, _origin = find_config(local_path(model))
    answer = kernels_of(config, tuning)
    if "error" in answer:
        raise ModelError(answer["error"]["what"], where=name, do=answer["error"]["do"])
    if as_json:
        print(json.dumps({"model": name, **answer}, indent=2, ensure_ascii=False))
        return
    from ..bench_view import table, wide_console

    print(f"{name}: {answer['architecture']}, {tuning}, on {answer['device']}")
    print(f"built from its config with random weights: {answer['built']} of {answer['layers']} layers", file=sys.stderr)
    rows = table("", "modules", ">#", "kernel", "how, or why not")
    for (kernel, where, done, why), count in _alike(answer["modules"]).items():
        rows.add_row("✔" if done else "–", where, str(count), kernel if done else f"not {kernel}", why)
    if rows.row_count:
        rows.columns[-1].no_wrap = False
        wide_console().print(rows)
    else:
        print("No module of it has a form that a kernel stands in for: all of it runs as transformers wrote it.")


def _alike(modules: list[dict[str, Any]]) -> dict[tuple[str, str, bool, str], int]:
    """Modules that differ by the number of their layer alone, counted."""
    counts: dict[tuple[str, str, bool, str], int] = {}
    for item in modules:
        where = re.sub(r"\.\d+(?=\.|$)", ".*", re.sub(r"^base_model\.model\.", "", item["path"])) or "the model"
        key = item["kernel"], where, item["replaced"], item["why"]
        counts[key] = counts.get(key, 0) + 1
    return counts
