"""Adapters of one base added to one adapter, as PEFT's ``add_weighted_adapter`` does it for a model in memory.

With pairs B_i A_i of scaling s_i and weights w_i:

========== ============================================= ======================== =====================================
method     the new pair                                  rank                     what it adds to a weight
========== ============================================= ======================== =====================================
``cat``    ``[B_1 B_2]``, ``[w_1 s_1 A_1; w_2 s_2 A_2]``   the sum                  ``sum(w s B A)``, exactly
``svd``    the largest singular values of that sum       chosen, else the largest what is nearest to it of that rank
``linear`` ``sum(c B)``, ``sum(c A)``, ``c = sqrt(w s)`` that of all              that sum, and mixed terms B_i A_j
========== ============================================= ======================== =====================================

Nearest is meant in the Frobenius norm (Eckart and Young 1936).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...planner.errors import ModelError
from ..modes import give_usual_modes
from ..output import written_whole
from . import record
from .adapted import CONFIG, WEIGHTS, Adapter
from .make import Merged, copy_along, free_folder
from .parameters import first_of
from .recipe import MergeRecipe
from .sources import parts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What of the first adapter's config is about how it was begun or trained.
_OVER = (
    "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "corda_config", "eva_config",
    "loftq_config", "layer_replication", "lora_ga_config",
)  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """A new pair, A [r, in] and B [out, r], and how much of the sum's squared norm it holds (svd alone)."""

    a: torch.Tensor
    b: torch.Tensor
    kept: float = 1.0


def merge_adapters(recipe: MergeRecipe, destination: str | Path) -> Merged:
    """Write the new adapter, the tokenizer of the first, and merge.yaml.

    Args:
        destination: a folder that does not exist yet, or is empty.

    Raises:
        UserError: the adapters belong to several bases or are of other kinds, or the folder is not empty.
    """
    base, adapters = open_adapters(recipe)
    weights = [first_of((one.weight, recipe.weight, 1.0), "", 0.0) or 0.0 for one in recipe.models]
    files = {adapter.name: [adapter.folder / WEIGHTS] for adapter in adapters}
    hashes = record.hashes_of_all(files)
    record.check_same(recipe, hashes)
    target = free_folder(destination, sum(file.stat().st_size for group in files.values() for file in group))
    dtype = _DTYPES.get(recipe.dtype) or adapters[0].dtype
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.pairs):
        names = next(adapter.pairs[module].names for adapter in adapters if module in adapter.pairs)
        new = add(adapters, weights, module, recipe)
        a, b = ("a", "b") if "a" in names else ("embedding_a", "embedding_b")
        tensors[names[a]], tensors[names[b]] = new.a.to(dtype).contiguous(), new.b.to(dtype).contiguous()
        ranks[module] = new.a.shape[0]
    from safetensors.torch import save_file

    with written_whole(target) as partial:
        copy_along([adapters[0].folder], partial)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config_of(adapters, base, ranks), indent=2, ensure_ascii=False) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        written = record.hashes_of([partial / WEIGHTS])
        record.write(partial, recipe, hashes, written)
        give_usual_modes(partial)
    return Merged(target, written, None if recipe.made is None else written == recipe.made.output)


def ranks_of(recipe: MergeRecipe) -> tuple[str, dict[str, int]]:
    """The base, and the rank that each module of the result gets, read from headers alone.

    Raises:
        ModelError: as :func:`open_adapters`.
    """
    base, adapters = open_adapters(recipe)
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.pairs):
        own = [adapter.pairs[module].rank for adapter in adapters if module in adapter.pairs]
        ranks[module] = sum(own) if recipe.method == "cat" else (recipe.rank or max(own))
    return base, ranks


def open_adapters(recipe: MergeRecipe) -> tuple[str, list[Adapter]]:
    """The base that the adapters share, and the adapters.

    Raises:
        ModelError: one is no adapter, is none of pairs alone, or belongs to another base.
    """
    adapters, bases = [], []
    for one in recipe.models:
        base, folder = parts(one.model)
        if folder is None:
            do = "Merge models with to: model, or give folders or runs with an adapter."
            raise ModelError("this is no adapter", where=one.model, do=do)
        adapters.append(adapter := Adapter(one.model, folder))
        bases.append(base)
        whole = next(iter(adapter.saved), None)
        scaled = next((m for m, pair in adapter.pairs.items() if "magnitude" in pair.names), None)
        if whole or scaled:
            what = f"it holds {whole} whole" if whole else f"it learned magnitudes (DoRA), as of {scaled}"
            do = "Such can't be added as pairs: merge to a model, with to: model."
            raise ModelError(what, where=one.model, do=do)
        if adapter.transposed != adapters[0].transposed:
            raise ModelError("its weights lie the other way round", where=one.model, do="Use adapters of one base.")
        if _place(base) != _place(bases[0]):
            do = "Only adapters of one base can be added."
            raise ModelError(
                f"its base is {base}, and that of {adapters[0].name} is {bases[0]}", where=one.model, do=do
            )
    return bases[0], adapters


def _place(base: str) -> str:
    path = Path(base).expanduser()
    return str(path.resolve()) if path.is_dir() else base


def add(adapters: Sequence[Adapter], weights: Sequence[float], module: str, recipe: MergeRecipe) -> Sum:
    """The new pair of one module, of those adapters that have one there.

    Raises:
        ModelError: their shapes or ranks don't fit.
    """
    having = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if module in adapter.pairs]
    factors = [adapter.factors(module) for adapter, _ in having]
    shares = [weight * adapter.pairs[module].scaling for adapter, weight in having]
    sizes = {(a.shape[1], b.shape[0]) for a, b in factors}
    if len(sizes) > 1:
        names = " and ".join(adapter.name for adapter, _ in having)
        raise ModelError(f"{module} has several sizes in {names}", where="merge", do="Use adapters of one base.")
    if recipe.method == "linear":
        ranks = {a.shape[0] for a, _ in factors}
        if len(ranks) > 1:
            what = f"linear adds pairs of one rank, and those of {module} are {sorted(ranks)}"
            raise ModelError(what, where="method", do="Use cat or svd.")
        roots = [math.sqrt(abs(share)) for share in shares]
        a = sum(root * one for root, (one, _) in zip(roots, factors, strict=True))
        b = sum(math.copysign(root, s) * one for root, s, (_, one) in zip(roots, shares, factors, strict=True))
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        return Sum(a, b)
    a = torch.cat([share * one for share, (one, _) in zip(shares, factors, strict=True)])
    b = torch.cat([one for _, one in factors], dim=1)
    if recipe.method == "cat":
        return Sum(a, b)
    return nearest(a, b, recipe.rank or max(adapter.pairs[module].rank for adapter, _ in having))


def nearest(a: torch.Tensor, b: torch.Tensor, rank: int) -> Sum:
    """The pair of this rank whose product is nearest to B A, by the singular values of a small matrix.

    With ``B = Q R`` and ``A^T = P S`` the singular values of B A are those of ``R S^T``, which has the rank of the pair
    on both sides, not the size of the weight. Each factor gets the square roots of them.
    """
    q, r = torch.linalg.qr(b.double())
    p, s = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(r @ s.T)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    whole = float(values.square().sum())
    kept = float(values[:rank].square().sum()) / whole if whole else 1.0
    return Sum((root[:, None] * (v[:rank] @ p.T)).float(), ((q @ u[:, :rank]) * root).float(), kept)


def config_of(adapters: Sequence[Adapter], base: str, ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json of the sum: its scaling is 1 everywhere, as weights and scalings are in the factors."""
    config = dict(adapters[0].config)
    rank = max(ranks.values())
    other = {module: own for module, own in sorted(ranks.items()) if own != rank}
    targets = [adapter.config.get("target_modules") for adapter in adapters]
    plain = all(
        set(adapter.pairs) == set(ranks) and one == targets[0] for adapter, one in zip(adapters, targets, strict=True)
    )
    plain = plain and not any(adapters[0].config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    config |= {key: None for key in _OVER if key in config}
    return config | {
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": targets[0] if plain and targets[0] else sorted(ranks),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
