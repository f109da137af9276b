"""How many parameters a tuning trains, counted from shapes alone; equal to PEFT's own counts.

For a linear module of d_in x d_out and rank r (where each was read: peft 0.21, ``tuners/<name>/layer.py``)::

    lora      r (d_in + d_out), and d_out magnitudes with DoRA
    adalora   r (d_in + d_out + 1) at its first rank, singular values included
    ia3       d_out, or d_in where it scales what enters the MLP's last projection
    vera      r + d_out; the two shared random matrices are not trained
    oft       d_in (b - 1) / 2 for blocks of width b
    loha      2 r (d_in + d_out)
    lokr      a c + b d, or a c + r (b + d) where that is fewer, for d_out = a b and d_in = c d near their roots

Prompt tuning learns hidden values per virtual token, prefix tuning keys and values of every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

from .architecture import Architecture
from .errors import RecipeError
from .layer import Layer, Linear
from .options import LORA_TYPES, TuningOptions
from .settings import Settings

#: What transformers calls the input embeddings and the output head.
EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings"})
HEADS = frozenset({"lm_head", "embed_out"})
#: Adapters that PEFT has for ``nn.Linear``, and not for GPT-2's transposed ``Conv1D``.
_LINEAR_ALONE = frozenset({"oft", "loha", "lokr"})


def trained_parameters(architecture: Architecture, settings: Settings) -> int:
    """Parameters that are trained.

    Raises:
        RecipeError: a name that no module has, or a block size that does not divide a width.
    """
    if settings.trained:
        return settings.trained
    return _count(architecture, settings.kind or settings.tuning, settings.rank, settings.targets, settings.options)


@lru_cache(maxsize=1024)
def _count(
    architecture: Architecture, kind: str, rank: int, targets: str | tuple[str, ...], options: TuningOptions
) -> int:
    if kind == "full":
        return architecture.parameters
    if kind == "freeze":
        return unfrozen_parameters(architecture, options)
    if kind == "prompt":
        return options.virtual_tokens * architecture.hidden
    if kind == "prefix":
        return options.virtual_tokens * 2 * architecture.kv_width * architecture.num_layers
    if kind == "xlora":
        return _mixer(architecture, len(options.experts))
    whole = _saved(architecture, options.modules_to_save)
    rows = len(options.new_tokens) * architecture.hidden * (1 if architecture.tied else 2)
    return _adapters(architecture, kind, rank, targets, options) + whole + rows


def _adapters(
    architecture: Architecture, kind: str, rank: int, targets: str | tuple[str, ...], options: TuningOptions
) -> int:
    if kind in LORA_TYPES:
        pairs = architecture.lora_parameters(rank, targets)
        magnitudes = _over(adapted(architecture, targets), lambda m: m.d_out) if options.use_dora else 0
        _refuse_twice(architecture, targets, options.target_parameters)
        return pairs + magnitudes + _expert_pairs(architecture, rank, options.target_parameters)
    counts: dict[str, Callable[[Linear], int]] = {
        "adalora": lambda m: options.initial_rank * (m.d_in + m.d_out + 1),
        "ia3": lambda m: m.d_in if m.name in feedforward(architecture) else m.d_out,
        "vera": lambda m: rank + m.d_out,
        "oft": lambda m: _rotations(m, options.block_size),
        "loha": lambda m: 2 * rank * (m.d_in + m.d_out),
        "lokr": lambda m: _kronecker(m, rank),
    }
    if kind in _LINEAR_ALONE and architecture.model_type == "gpt2":
        what = f"{kind} can't be put on {architecture.name}, whose projections are no plain linear layers"
        raise RecipeError(what, where="tuning.type", do="Use lora, vera or ia3.")
    return _over(adapted(architecture, targets), counts[kind])


def saved_parameters(architecture: Architecture, settings: Settings) -> int:
    """Parameters of the modules that are trained whole beside adapters."""
    return _saved(architecture, settings.options.modules_to_save) if settings.options.modules_to_save else 0


@lru_cache(maxsize=64)
def _saved(architecture: Architecture, names: tuple[str, ...]) -> int:
    whole = sum(module_parameters(architecture, name, "tuning.modules_to_save") for name in names)
    return whole - (architecture.vocab * architecture.hidden if architecture.tied and _both_ends(names) else 0)


def shared_bytes(architecture: Architecture, settings: Settings) -> float:
    """Bytes that come with an adapter and are not trained: VeRA's two random matrices, AdaLoRA's importances."""
    if settings.kind == "vera":
        wide_in, wide_out = largest(architecture.layers)
        return 4.0 * settings.rank * (wide_in + wide_out)
    if settings.kind == "adalora":  # the last importance of each parameter, its mean and its uncertainty
        return 12.0 * trained_parameters(architecture, settings)
    return 0.0


def adapted(architecture: Architecture, targets: str | Iterable[str]) -> list[tuple[int, list[Linear]]]:
    """Linear modules of each kind of layer that get an adapter, and how many layers of that kind there are."""
    return [
        (layer.count, modules)
        for layer, modules in architecture.targeted(targets if isinstance(targets, str) else list(targets))
    ]


def feedforward(architecture: Architecture) -> set[str]:
    """Names of the modules whose input IA3 scales: the last projection of each MLP (arXiv:2205.05638)."""
    return {layer.mlp[-1].name for layer in architecture.layers if layer.mlp}


def module_parameters(architecture: Architecture, name: str, where: str) -> int:
    """Parameters of all modules of a name.

    Raises:
        RecipeError: there is none that can be counted.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in EMBEDDINGS:
        return architecture.vocab * architecture.hidden
    if leaf in HEADS:
        return architecture.vocab * architecture.hidden + architecture.head_bias
    found = [(layer.count, m) for layer in architecture.layers for m in layer.linears if m.name == leaf]
    if found:
        return sum(count * module.parameters for count, module in found)
    known = sorted({m.name for layer in architecture.layers for m in layer.linears})
    do = f"Use the embeddings (embed_tokens), the head (lm_head), or some of: {', '.join(known)}."
    raise RecipeError(f"{architecture.name} has no module named {name!r}", where=where, do=do)


def unfrozen_parameters(architecture: Architecture, options: TuningOptions) -> int:
    """Parameters that freeze tuning leaves trainable: the last layers, and modules by name in the others."""
    order = [layer for layer in architecture.layers for _ in range(layer.count)]
    if options.trained_layers > len(order):
        what = f"{architecture.name} has {len(order)} layers, not {options.trained_layers}"
        raise RecipeError(what, where="tuning.trained_layers", do="Use fewer, or type: full.")
    kept = len(order) - options.trained_layers
    total = sum(layer.parameters for layer in order[kept:])
    for name in options.trained_modules:
        leaf = name.rsplit(".", 1)[-1]
        total_of_name = module_parameters(architecture, name, "tuning.trained_modules")
        if leaf in EMBEDDINGS | HEADS:
            total += total_of_name
        else:
            total += sum(m.parameters for layer in order[:kept] for m in layer.linears if m.name == leaf)
    if architecture.tied and _both_ends(options.trained_modules):
        total -= architecture.vocab * architecture.hidden
    return total


def _both_ends(names: Iterable[str]) -> bool:
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    return bool(leaves & EMBEDDINGS and leaves & HEADS)


def _over(modules: list[tuple[int, list[Linear]]], count: Callable[[Linear], int]) -> int:
    return sum(times * sum(count(module) for module in found) for times, found in modules)


def _refuse_twice(architecture: Architecture, targets: str | tuple[str, ...], names: tuple[str, ...]) -> None:
    """PEFT puts one pair on an expert weight however often it is named: the second naming has no effect."""
    if not names or not architecture.adapted_experts:
        return
    _router, gate, _up, down = architecture.adapted_experts
    leaves = {gate, down} if targets == "all-linear" else {target.rsplit(".", 1)[-1] for target in targets}
    covered = {"gate_up_proj": gate in leaves, "down_proj": down in leaves}
    for name in names:
        if covered.get(name.rsplit(".", 1)[-1]):
            what = f"{name} has no effect: targets put adapters on the experts of {architecture.name} already"
            do = "Remove it, or name the targets beside the experts: targets: [q_proj, k_proj, v_proj, o_proj]."
            raise RecipeError(what, where="tuning.target_parameters", do=do)


def _expert_pairs(architecture: Architecture, rank: int, names: tuple[str, ...]) -> int:
    """LoRA on fused expert weights: a pair for each expert, on gate and up projection as one."""
    total = 0
    for name in names:
        leaf = name.rsplit(".", 1)[-1]
        shapes = {"gate_up_proj": (1, 2), "down_proj": (1, 1)}
        if leaf not in shapes or not any(layer.experts for layer in architecture.layers):
            what = f"{architecture.name} has no expert weights named {name!r}"
            do = "Use mlp.experts.gate_up_proj and mlp.experts.down_proj of a mixture of experts, or targets."
            raise RecipeError(what, where="tuning.target_parameters", do=do)
        hidden, wide = shapes[leaf]
        total += sum(
            layer.count * layer.experts * rank * (hidden * architecture.hidden + wide * layer.expert_width)
            for layer in architecture.layers
            if layer.experts
        )
    return total


def _rotations(module: Linear, block: int) -> int:
    if module.d_in % block:
        what = f"block_size {block} does not divide the width {module.d_in} of {module.name}"
        near = max(n for n in range(1, block + 1) if module.d_in % n == 0)
        raise RecipeError(what, where="tuning.block_size", do=f"Use {near}, or leave that module out of targets.")
    return module.d_in * (block - 1) // 2


def _kronecker(module: Linear, rank: int) -> int:
    a, b = _near_root(module.d_out)
    c, d = _near_root(module.d_in)
    return a * c + (rank * (b + d) if rank < max(b, d) / 2 else b * d)


def _near_root(number: int) -> tuple[int, int]:
    """Two factors of a number, the smaller first, as near to its root as there are."""
    low = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)
    return low, number // low


def _mixer(architecture: Architecture, experts: int) -> int:
    """X-LoRA's classifier of depth 1: from hidden states to one weight per adapter."""
    return architecture.hidden * experts + experts


def largest(layers: Iterable[Layer]) -> tuple[int, int]:
    """The widest input and output of any linear module: the shape of VeRA's shared matrices."""
    modules = [module for layer in layers for module in layer.linears]
    return max(m.d_in for m in modules), max(m.d_out for m in modules)
