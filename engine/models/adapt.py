"""Decide what of a loaded model is trained: all weights, some of them, or adapters put on by PEFT.

Adapters, whole modules beside them and virtual tokens are fp32 whatever the base is stored in: at a learning rate of
2e-4 an update is smaller than half a bf16 step of most weights and would be rounded away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...planner.architecture import Architecture
from ...planner.errors import ModelError, RecipeError, first_line
from ...planner.options import LORA_TYPES, VIRTUAL_TOKENS
from ...planner.plan import Resolved
from ...planner.trained import feedforward
from .adapter_start import continue_from, find_adapter
from .ground import Ground
from .initial import begin


def adapt(model: Any, resolved: Resolved, name: str, ground: Ground | None = None) -> Any:
    """Freeze or unfreeze weights and add adapters; returns a ``PeftModel`` unless the model's own weights are trained.

    Args:
        name: the base model as the adapter will name it: hub id or folder.

    Raises:
        RecipeError: no module has one of the target names, or nothing would be trained.
        ModelError: the adapter that training should go on from can't be read.
    """
    ground = ground or Ground(steps=resolved.steps)
    options = resolved.options
    grown = resolved.trains_base and ground.resumed is not None  # a checkpoint has its new rows, trained
    if options.new_tokens and ground.tokenizer is not None and not grown:
        grow_vocabulary(model, ground.tokenizer, len(options.new_tokens))
    if resolved.tuning == "full":
        model.requires_grad_(True)
    elif resolved.tuning == "freeze":
        _unfreeze(model, options.trained_layers, options.trained_modules)
    else:
        model = _with_adapters(model, resolved, name, ground)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("no parameter of the model would be trained", where="tuning", do="Choose other targets.")
    return model


def grow_vocabulary(model: Any, tokenizer: Any, added: int) -> None:
    """Room for the tokenizer's last ``added`` words; they begin as the mean of all others.

    Many models have more rows than words, so that nothing has to grow.
    """
    size = len(tokenizer)
    if model.get_input_embeddings().weight.shape[0] < size:
        model.resize_token_embeddings(size, mean_resizing=False)
    seen: set[int] = set()
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = table.weight if table is not None else None
            if weight is None or id(weight) in seen or weight.is_meta:
                continue
            seen.add(id(weight))
            weight[size - added : size] = weight[: size - added].float().mean(0).to(weight.dtype)


# --- weights of the model itself


def _unfreeze(model: Any, layers: int, modules: Iterable[str]) -> None:
    model.requires_grad_(False)
    stack = decoder_layers(model)
    for layer in stack[len(stack) - layers :] if layers else []:
        layer.requires_grad_(True)
    named = dict(model.named_modules())
    for wanted in modules:
        found = [module for path, module in named.items() if path == wanted or path.endswith(f".{wanted}")]
        if not found:
            leaves = sorted({path.rsplit(".", 1)[-1] for path in named} - {""})
            do = f"Modules of this model: {', '.join(leaf for leaf in leaves if not leaf.isdigit())}."
            raise RecipeError(f"no module is named {wanted!r}", where="tuning.trained_modules", do=do)
        for module in found:
            module.requires_grad_(True)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers in order: the one list of modules that is as long as the config says."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ModelError("its decoder layers can't be told", where=type(model).__name__, do="Use type: full or lora.")
    return list(lists[0])


# --- adapters


def _with_adapters(model: Any, resolved: Resolved, name: str, ground: Ground) -> Any:
    from peft import get_peft_model

    from .load import Numerics

    model.requires_grad_(False)
    torch.manual_seed(resolved.seed)
    config = _config(model, resolved, ground)
    try:
        adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as error:
        raise _not_put_on(model, resolved, error) from error
    adapted.peft_config["default"].base_model_name_or_path = name
    if resolved.tuning == "ia3":
        scaled = adapted.peft_config["default"].feedforward_modules
        placed = adapted.peft_config["default"].target_modules  # spelled out by now; both have to match when loaded
        adapted.peft_config["default"].feedforward_modules = {x for x in placed if x.rsplit(".", 1)[-1] in scaled}
    _as_fp32(adapted)
    for path, parameter in adapted.named_parameters():
        if ".ranknum." in path:  # AdaLoRA's note of its rank, which PEFT unfreezes on the meta device
            parameter.requires_grad_(False)
    if Numerics.of(resolved).autocast is not None:
        # PEFT would cast each adapter's input to fp32 and keep that copy for the backward pass; autocast casts
        # the adapter's weights to 16 bits instead, with the same result.
        for module in adapted.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    options = resolved.options
    if options.start_from and ground.resumed is None:
        continue_from(adapted, options.start_from)
    if resolved.tuning in LORA_TYPES and options.init != "default":
        begin(adapted, resolved, ground)
    return adapted


def _config(model: Any, resolved: Resolved, ground: Ground) -> Any:
    """PEFT's description of the adapter."""
    import peft

    options, kind = resolved.options, resolved.tuning
    task: dict[str, Any] = {"task_type": "SEQ_CLS" if resolved.method == "reward" else "CAUSAL_LM"}
    if kind == "xlora":
        adapters = {str(number): str(find_adapter(folder)) for number, folder in enumerate(options.experts)}
        hidden = model.config.get_text_config().hidden_size
        return peft.XLoraConfig(**task, hidden_size=hidden, adapters=adapters, xlora_depth=1)
    if kind in VIRTUAL_TOKENS:
        if kind == "prefix":
            return peft.PrefixTuningConfig(**task, num_virtual_tokens=options.virtual_tokens)
        return _prompt_config(model, resolved, ground)
    placed: dict[str, Any] = {"target_modules": resolved.targets, "modules_to_save": list(options.modules_to_save)}
    placed["modules_to_save"] = placed["modules_to_save"] or None
    if kind in LORA_TYPES:
        return peft.LoraConfig(**task, **placed, **_lora(model, resolved, ground))
    if kind == "adalora":
        return peft.AdaLoraConfig(
            **task,
            **placed,
            target_r=resolved.rank,
            init_r=options.initial_rank,
            lora_alpha=resolved.alpha,
            lora_dropout=resolved.dropout,
            **_budget(ground.steps or resolved.steps),
        )
    if kind == "ia3":
        scaled = feedforward(Architecture.from_config(model.config.to_dict(), "model"))
        if resolved.targets != "all-linear":
            scaled = {target for target in resolved.targets if target.rsplit(".", 1)[-1] in scaled}
        return peft.IA3Config(**task, **placed, feedforward_modules=sorted(scaled))
    if kind == "vera":
        return peft.VeraConfig(
            **task,
            **placed,
            r=resolved.rank,
            vera_dropout=resolved.dropout,
            projection_prng_key=resolved.seed,
        )
    if kind == "oft":
        return peft.OFTConfig(**task, **placed, oft_block_size=options.block_size, module_dropout=resolved.dropout)
    if kind in ("loha", "lokr"):
        form = peft.LoHaConfig if kind == "loha" else peft.LoKrConfig
        return form(**task, **placed, r=resolved.rank, alpha=resolved.alpha)
    raise AssertionError(f"no adapter of type {kind}")


def _lora(model: Any, resolved: Resolved, ground: Ground) -> dict[str, Any]:
    options = resolved.options
    config: dict[str, Any] = {
        "r": resolved.rank,
        "lora_alpha": resolved.alpha,
        "lora_dropout": resolved.dropout,
        "bias": "none",
        "use_dora": options.use_dora,
        "use_rslora": options.rank_stabilized,
        "target_parameters": list(options.target_parameters) or None,
        "trainable_token_indices": _rows_to_train(model, resolved, ground),
    }
    if options.init in ("gaussian", "orthogonal"):
        config["init_lora_weights"] = options.init
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and options.modules_to_save:
        config["ensure_weight_tying"] = True
    return config


def _rows_to_train(model: Any, resolved: Resolved, ground: Ground) -> dict[str, list[int]] | None:
    words = resolved.options.new_tokens
    if not words:
        return None
    if ground.tokenizer is None:  # only the shapes are wanted
        indices = list(range(len(words)))
    else:
        indices = [int(ground.tokenizer.convert_tokens_to_ids(word)) for word in words]
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = tables[1] is None or tables[1].weight is tables[0].weight
    leaf = {id(module): path.rsplit(".", 1)[-1] for path, module in model.named_modules()}
    return {leaf[id(table)]: indices for table in tables[: 1 if tied else 2]}


def _budget(steps: int) -> dict[str, Any]:
    """When AdaLoRA takes ranks away: after a tenth of the steps, until the last fifth (arXiv:2303.10512, section 4)."""
    final = max(1, steps // 5) if steps > 1 else 0
    return {"total_step": max(steps, 1), "tinit": min(steps // 10, max(steps - final - 1, 0)), "tfinal": final}


def _prompt_config(model: Any, resolved: Resolved, ground: Ground) -> Any:
    import peft

    options = resolved.options
    config: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": options.virtual_tokens}
    if not options.init_text:
        return peft.PromptTuningConfig(**config, prompt_tuning_init="SAMPLE_VOCAB")
    where = str(ground.folder or model.config.name_or_path)
    return peft.PromptTuningConfig(
        **config, prompt_tuning_init="TEXT", prompt_tuning_init_text=options.init_text, tokenizer_name_or_path=where
    )


def _as_fp32(adapted: Any) -> None:
    """Modules that are trained as a whole, too; what they give goes on in the format that the base has."""
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]:
        saved = wrapper.modules_to_save["default"]
        form = next(saved.parameters()).dtype
        saved.float()
        if isinstance(saved, nn.Embedding) and form != torch.float32:
            saved.register_forward_hook(lambda _module, _inputs, out, form=form: out.to(form))
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _not_put_on(model: Any, resolved: Resolved, error: Exception) -> RecipeError:
    linears = {path.rsplit(".", 1)[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    what = f"no adapter can be put on {resolved.targets} ({first_line(error)})"
    do = f"Linear modules of this model: {', '.join(sorted(linears))}."
    return RecipeError(what, where="tuning.targets", do=do)


@contextlib.contextmanager
def adapters_kept_in_their_format(model: Any) -> Iterator[None]:
    """Undo TRL's cast of a quantised model's adapters to bf16, in which small updates are rounded away."""
    before = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name].to(parameter.device)
