"""``finetui merge``: several models or adapters made into one, tensor by tensor."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...planner.errors import MissingExtraError, RecipeError
from .options import JsonFlag, local_path

if TYPE_CHECKING:
    from ...engine.merge.make import Merged, Prepared
    from ...engine.merge.recipe import MergeRecipe

ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL", help="Folders, hub ids, runs, adapters (BASE+ADAPTER names a base); or one merge (.yaml)."
    ),
]
MethodFlag = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="linear slerp nuslerp task_arithmetic ties dare_linear dare_ties della della_linear breadcrumbs "
        "breadcrumbs_ties model_stock nearswap passthrough; of adapters: linear cat svd. Default: linear.",
    ),
]
BaseFlag = Annotated[str | None, typer.Option("--base", help="The model that the others were made from.")]
WeightsFlag = Annotated[str | None, typer.Option("--weights", metavar="X,X", help="One for all, or one for each.")]
DensityFlag = Annotated[
    str | None,
    typer.Option("--density", metavar="X,X", help="Share of each model's changes to keep: one, or one each."),
]
TFlag = Annotated[float | None, typer.Option("--t", help="slerp: 0 is the first model, 1 the second.")]
EpsilonFlag = Annotated[float | None, typer.Option("--epsilon", help="della: spread of the chances around density.")]
GammaFlag = Annotated[float | None, typer.Option("--gamma", help="breadcrumbs: share of the largest changes to drop.")]
ScaleFlag = Annotated[float | None, typer.Option("--scale", help="Factor on the sum of changes (lambda).")]
NormalizeFlag = Annotated[
    bool | None, typer.Option("--normalize/--no-normalize", help="Divide by the sum of the weights.")
]
PerFlag = Annotated[str | None, typer.Option("--per", help="Angles between each tensor, row or column.")]
RankFlag = Annotated[int | None, typer.Option("--rank", help="svd: rank of the new adapter.")]
ToFlag = Annotated[str | None, typer.Option("--to", help="model, or adapter to add adapters with linear.")]
DtypeFlag = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: that of the base or first model.")
]
TokenizerFlag = Annotated[
    str | None, typer.Option("--tokenizer", help="Of differing vocabularies keep that of the base, or the union.")
]
SeedFlag = Annotated[int | None, typer.Option("--seed", help="dare and della: where to begin to draw.")]
OutFlag = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must be new or empty.")]
DryFlag = Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and download no weights.")]


def merge(
    models: ModelsArgument,
    method: MethodFlag = None,
    base: BaseFlag = None,
    weights: WeightsFlag = None,
    density: DensityFlag = None,
    t: TFlag = None,
    epsilon: EpsilonFlag = None,
    gamma: GammaFlag = None,
    scale: ScaleFlag = None,
    normalize: NormalizeFlag = None,
    per: PerFlag = None,
    rank: RankFlag = None,
    to: ToFlag = None,
    dtype: DtypeFlag = None,
    tokenizer: TokenizerFlag = None,
    seed: SeedFlag = None,
    out: OutFlag = Path("merged"),
    dry_run: DryFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Make one model of several, or one adapter of several."""
    if find_spec("torch") is None or find_spec("safetensors") is None:
        raise MissingExtraError("merge", "train")
    flags: dict[str, Any] = {
        "method": method, "base": None if base is None else local_path(base), "t": t, "epsilon": epsilon,
        "gamma": gamma, "scale": scale, "normalize": normalize, "per": per, "rank": rank, "to": to, "dtype": dtype,
        "tokenizer": tokenizer, "seed": seed,
    }  # fmt: skip
    flags = {name: value for name, value in flags.items() if value is not None}
    recipe = _recipe(models, flags, weights, density)
    if recipe.makes_adapter:
        _adapter(recipe, out, dry_run, as_json)
        return
    from ...engine.merge import make

    prepared = make.prepare(recipe, listed=dry_run)
    for note in prepared.layout.notes:
        print(f"! {note}", file=sys.stderr)
    if dry_run:
        _tell(_sizes(prepared, out), as_json)
        return
    merged = make.merge(prepared, out, _progress())
    _made(merged, as_json)


def _recipe(models: list[str], flags: dict[str, Any], weights: str | None, density: str | None) -> MergeRecipe:
    from ...engine.merge.recipe import MergeRecipe

    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        given = [*flags, *(["weights"] if weights else []), *(["density"] if density else [])]
        if given:
            do = "Set it in the file, or name models in place of the file."
            raise RecipeError(f"--{given[0]} has no effect beside a file", where=f"--{given[0]}", do=do)
        recipe, notes = MergeRecipe.load(models[0])
        for note in notes:
            print(f"! not carried over: {note}", file=sys.stderr)
        return recipe
    tree: dict[str, Any] = {"method": "linear", "models": [{"model": _absolute(name)} for name in models], **flags}
    if len(models) == 1 and "method" not in flags and _is_adapter(tree["models"][0]["model"]):
        tree["method"] = "passthrough"
        print("One adapter: it is merged into its base.", file=sys.stderr)
    for key, flag, text in (("weight", "--weights", weights), ("density", "--density", density)):
        if text is None:
            continue
        values = _numbers(text, flag)
        if len(values) == 1:
            tree[key] = values[0]
        elif len(values) == len(models):
            for one, value in zip(tree["models"], values, strict=True):
                one[key] = value
        else:
            what = f"{len(values)} values are given for {len(models)} models"
            raise RecipeError(what, where=flag, do="Give one for all of them, or one for each.")
    return MergeRecipe.build(tree, source="command line")


def _absolute(name: str) -> str:
    """A folder by its whole path, so that merge.yaml means the same elsewhere; of BASE+ADAPTER both."""
    if "+" in name and not Path(name).expanduser().exists():
        return "+".join(local_path(part) for part in name.split("+"))
    return local_path(name)


def _is_adapter(name: str) -> bool:
    from ...engine.merge.sources import parts

    return parts(name)[1] is not None


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{text!r} is no list of numbers", where=flag, do="Write it as 0.5,0.5") from None


def _adapter(recipe: MergeRecipe, out: Path, dry_run: bool, as_json: bool) -> None:
    from ...engine.merge.adapters import merge_adapters, ranks_of

    if dry_run:
        base, ranks = ranks_of(recipe)
        answer = {"method": recipe.method, "models": recipe.names, "base": base, "modules": len(ranks)}
        _tell({**answer, "rank": max(ranks.values()), "path": str(out.expanduser().resolve())}, as_json)
        return
    _made(merge_adapters(recipe, out), as_json)


def _sizes(prepared: Prepared, out: Path) -> dict[str, Any]:
    from ...engine.merge.write import shards_of

    target = out.expanduser().resolve()
    free = shutil.disk_usage(next(folder for folder in (target, *target.parents) if folder.is_dir())).free
    pieces = prepared.layout.pieces
    return {
        "method": prepared.recipe.method,
        "models": prepared.recipe.names,
        "parameters": sum(piece.numel for piece in pieces),
        "tensors": len(pieces),
        "dtypes": sorted({piece.dtype for piece in pieces}),
        "files": list(shards_of(pieces)),
        "disk_gib": prepared.bytes / 2**30,
        "disk_free_gib": free / 2**30,
        "fits": prepared.bytes <= free,
        "memory_gib": prepared.layout.memory / 2**30,
        "notes": prepared.layout.notes,
        "path": str(target),
    }


def _tell(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    from ..format import bare_gib, count, memory_unit

    shown = {
        "models": ", ".join(answer["models"]),
        "parameters": count(answer.get("parameters", 0)),
        "files": len(answer.get("files", ())),
        "dtypes": ", ".join(answer.get("dtypes", ())),
        "fits": "on the disk" if answer.get("fits") else "not on the disk",
    }
    for name, value in answer.items():
        if name == "notes":
            continue
        text = str(shown.get(name, value))
        if name.endswith("_gib"):
            name, text = name.removesuffix("_gib").replace("_", " "), f"{bare_gib(value, 2)} {memory_unit()}"
            text += " at most" if name == "memory" else ""
        print(f"{name:12} {text}")


def _made(merged: Merged, as_json: bool) -> None:
    if merged.same is False:
        print("! The result is not that of then: merge.yaml tells the versions that made it.", file=sys.stderr)
    if as_json:
        answer = {"path": str(merged.path), "files": merged.files, "same": merged.same}
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    print(merged.path)
    if merged.same:
        print("The same bits as then.", file=sys.stderr)
    kind = "PeftModel" if "adapter_model.safetensors" in merged.files else "AutoModelForCausalLM"
    again = shlex.join(["finetui", "merge", str(merged.path / "merge.yaml")])
    print(f"Load it with {kind}.from_pretrained; make it again with: {again} -o NEW", file=sys.stderr)


def _progress() -> Any:
    """Says on a terminal how much is written."""
    if not sys.stderr.isatty():
        return lambda done, total: None
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from ..console import Console

    bar = Progress(BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(), console=Console(stderr=True))
    task = bar.add_task("merge")
    bar.start()

    def tell(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return tell
