"""Flags that several verbs share, and how they and a target make a recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ...planner import inside
from ...planner.errors import RecipeError
from ...planner.options import LORA_TYPES, SHORT
from ...planner.recipe import Recipe, apply_overrides

JsonFlag = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
RunOrLatest = Annotated[
    str | None, typer.Argument(metavar="RUN", help="Name, its beginning, or directory; the latest run if left out.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, its beginning, or its directory.")]

_SUFFIXES = (".yaml", ".yml")


def recipe_from(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|MODEL", help="A recipe (.yaml), a checkpoint folder, a config.json or a hub id."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="sft pretrain distill dpo ipo orpo kto cpo simpo reward grpo rloo ppo."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="distill: the model to learn from: a hub id, a folder or a run's.")
    ] = None,
    tuning: Annotated[
        str | None,
        typer.Option(
            "--tuning", help="full freeze lora qlora lora-fp8 dora pissa adalora ia3 vera oft loha lokr prompt prefix …"
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the adapters.")] = None,
    targets: Annotated[str | None, typer.Option("--targets", help="all-linear, or module names with commas.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="File, folder or hub dataset; may be repeated.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for this GPU of the catalog (see: finetui gpus).")
    ] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", help="How many (2) or which (0,1).")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="Longest sequence in tokens.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", help="Sequences per GPU in one forward pass.")
    ] = None,
    checkpointing: Annotated[
        str | None, typer.Option("--checkpointing", help="none, selective, offload or full.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", help="adamw, adamw-8bit, …")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the recipe; may be repeated.")
    ] = None,
) -> Recipe:
    """A recipe from its file, a preset's name or a bare model, with flags on top and ``--set`` above all.

    Raises:
        RecipeError: nothing was named, or what was named doesn't make a recipe.
    """
    if target is None:
        target = "recipe.yaml"
        if not Path(target).is_file():
            raise RecipeError(
                "nothing to plan: no RECIPE or MODEL was given, and there is no recipe.yaml here",
                do="Try: finetui plan Qwen/Qwen3-8B --gpu RTX4090",
            )
    flags: dict[str, Any] = {
        "method": method,
        "distillation.teacher": local_path(teacher) if teacher else teacher,
        "tuning.type": tuning,
        "tuning.rank": rank,
        "tuning.targets": targets if targets in (None, "all-linear") else targets.split(","),
        "data": [local_path(path) for path in data] if data else None,
        "hardware.gpu": gpu,
        "hardware.gpus": parse_gpus(gpus) if gpus is not None else None,
        "sequence_length": seq_len,
        "micro_batch": micro_batch,
        "hardware.checkpointing": checkpointing,
        "optimizer.name": optimizer,
    }
    settings = {key: value for key, value in flags.items() if value is not None}
    # Another kind of tuning replaces the whole section: the rank of a recipe's adapter has no meaning any more.
    if tuning is not None and SHORT.get(tuning, {"type": tuning})["type"] not in LORA_TYPES:
        section = {key: settings.pop(f"tuning.{key}", None) for key in ("type", "rank", "targets")}
        settings["tuning"] = {key: value for key, value in section.items() if value is not None}
    path = find_recipe(target)
    if path is None:
        recipe = Recipe.build(apply_overrides({"model": local_path(target)}, settings), source="command line")
    else:
        recipe = Recipe.load(path, settings)
    return recipe.with_overrides(overrides) if overrides else recipe


def takes_recipe(
    *, without: Collection[str] = (), optional: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of :func:`recipe_from`; the recipe made of them is its first argument.

    Args:
        without: flags that have no effect on this command.
        optional: without a target the recipe is None.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = [p for p in signature(recipe_from, eval_str=True).parameters.values() if p.name not in without]
        own = list(signature(command, eval_str=True).parameters.values())[1:]

        def wrapped(**values: Any) -> None:
            chosen = {flag.name: values.pop(flag.name) for flag in flags}
            nothing = optional and chosen["target"] is None
            command(None if nothing else recipe_from(**chosen), **values)

        wrapped.__doc__ = command.__doc__
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*flags, *own)}
        wrapped.__signature__ = Signature([*flags, *own])  # type: ignore[attr-defined]
        return wrapped

    return decorate


def local_path(text: str) -> str:
    """What a user typed, as an absolute path if it is one here; hub ids stay as they are."""
    path = inside.local_path(text)
    return str(path.resolve()) if path.exists() or text.startswith(("./", "../", "~")) else text


def find_recipe(target: str) -> Path | None:
    """The recipe file that a target names: a path, or a preset by its bare name; None if it is no recipe."""
    if target.endswith(_SUFFIXES):
        return Path(target)
    if "/" not in target and not Path(target).exists():
        preset = Path(__file__).parents[2] / "presets" / f"{target}.yaml"
        if preset.is_file():
            return preset
    return None


def parse_gpus(text: str) -> int | list[int] | str:
    """``2`` is a count, ``0,1`` and ``0,`` are indices, ``auto`` stays.

    Raises:
        RecipeError: the text is none of these.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if text == "auto":
        return text
    if not parts or not all(part.isdigit() for part in parts):
        raise RecipeError(f"{text!r} names no GPUs", where="--gpus", do="Give a count (2) or indices (0,1).")
    numbers = [int(part) for part in parts]
    if max(numbers) > 2**16:
        raise RecipeError(f"{text!r} are more GPUs than there are", where="--gpus", do="Check the number.")
    if "," not in text and numbers[0] > 0:
        return numbers[0]
    if len(set(numbers)) != len(numbers):
        raise RecipeError(f"{text!r} names a GPU twice", where="--gpus", do="Name each GPU once.")
    return numbers
