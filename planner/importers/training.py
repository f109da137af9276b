"""What Axolotl, LLaMA-Factory and TRL share: they train through transformers, and so say batch, schedule, optimiser
and saving in the words of its ``TrainingArguments`` (read in transformers 5.23, ``training_args.py``)."""

from __future__ import annotations

from typing import Any

from ..options import LOW_RANK, TRAINS_BASE
from .ledger import Ledger

#: Names of transformers' ``optim``, and those that Axolotl adds, to ours and to what is different about it.
OPTIMIZERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla",
                     "adamw_torch_npu_fused"), ("adamw", "")),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), ("adamw-8bit", "")),
    **dict.fromkeys(("adamw_torch_8bit", "ao_adamw_8bit"), ("adamw-8bit", "in bitsandbytes' 8 bits, not torchao's")),
    **dict.fromkeys(("optimi_adamw", "flash_adamw"), ("adamw", "the same update, by another program")),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), ("paged-adamw", "")),
    "paged_adamw_8bit": ("paged-adamw-8bit", ""),
    **dict.fromkeys(("sgd", "flash_sgd"), ("sgd", "")),
    "adafactor": ("adafactor", ""),
    **dict.fromkeys(("lion", "lion_32bit", "flash_lion"), ("lion", "")),
    "paged_lion_32bit": ("lion", "its states stay on the GPU"),
    "lion_8bit": ("lion-8bit", ""),
    "paged_lion_8bit": ("paged-lion-8bit", ""),
    "muon": ("muon", ""),
    "adopt_adamw": ("adopt", ""),
    "came_pytorch": ("came", ""),
    "schedule_free_adamw": ("schedule-free", ""),
    **dict.fromkeys(("galore_adamw", "galore_adamw_layerwise"), ("galore", "")),
    **dict.fromkeys(("galore_adamw_8bit", "galore_adamw_8bit_layerwise"), ("galore", "its states in 32 bits")),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), ("apollo", "")),
}  # fmt: skip

_BETAS = frozenset({"auto", "adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "lion", "lion-8bit",
                    "paged-lion-8bit", "muon", "adopt", "came", "galore", "apollo", "apollo-mini",
                    "schedule-free"})  # fmt: skip
_EPSILON = _BETAS - {"lion", "lion-8bit", "paged-lion-8bit", "muon", "adopt", "came"}
_PLANNED = "the planner decides it anew for your GPUs"
_SHARING = "the planner decides how GPUs share the work, and says whether it fits"
_WATCHED = "every step is kept in the run's events: finetui attach, finetui logs"

#: Keys of ``TrainingArguments`` that change nothing here, by why.
IDLE_TRAINING: dict[str, str] = {
    key: why
    for why, keys in {
        f"{_PLANNED} (hardware.checkpointing)": "gradient_checkpointing gradient_checkpointing_kwargs "
        "activation_checkpointing activation_checkpointing_kwargs activation_offloading",
        f"{_PLANNED} (hardware.precision)": "bf16 tf32 bf16_full_eval fp16_full_eval half_precision_backend",
        "finetui's own kernels are on by default (hardware.kernels)": "use_liger_kernel liger_kernel_config "
        "torch_compile torch_compile_backend torch_compile_mode attn_implementation use_cache",
        f"{_SHARING} (hardware.strategy)": "fsdp fsdp_config deepspeed accelerator_config parallelism_config "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
        "local_rank",
        "data is read and tokenised once, before the first step, on all cores": "dataloader_num_workers "
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
        "dataloader_multiprocessing_context remove_unused_columns dataset_num_proc",
        _WATCHED: "logging_steps logging_strategy logging_first_step log_level log_level_replica log_on_each_node "
        "disable_tqdm include_num_input_tokens_seen logging_nan_inf_filter logging_dir skip_memory_metrics debug",
        "the planner picks the micro batch of an evaluation, too": "per_device_eval_batch_size eval_accumulation_steps "
        "auto_find_batch_size eval_do_concat_batches eval_use_gather_object prediction_loss_only batch_eval_metrics",
        "loss on held-out rows is measured at the start, too": "eval_on_start eval_delay do_eval",
        "training is what a recipe is for": "do_train",
        "each run has a folder of its own (finetui run --name)": "output_dir run_name overwrite_output_dir project",
        "checkpoints are always whole, and finetui resume continues from the latest": "save_only_model "
        "save_safetensors save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint",
        "memory is planned, not freed on the way": "torch_empty_cache_steps",
        "the data's order follows seed": "data_seed",
    }.items()
    for key in keys.split()
}
_HUB = "would upload what was trained||Upload runs/<name>/output with: hf upload"
_GROUPED = "would put rows of like length into one batch, against padding||Packing spares more: packing: auto."
#: Keys of ``TrainingArguments`` that we have nothing for: ``what it did||what to do``.
LOST_TRAINING: dict[str, str] = {
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
                     "hub_revision", "push_to_hub_model_id", "push_to_hub_organization"), _HUB),
    "resume_from_checkpoint": "would continue from a checkpoint of the other tool||"
    "Finish that run there; or continue from its adapter: tuning.start_from.",
    "ignore_data_skip": "would start the data anew when resumed||A run resumes at the row it was at.",
    "group_by_length": _GROUPED, "length_column_name": _GROUPED, "train_sampling_strategy": _GROUPED,
    "label_smoothing_factor": "would smooth the labels||Leave it out; finetui has no label smoothing for sft.",
    "optim_args": "would set options of the optimiser||Look at optimizer: betas, epsilon, momentum, projection_rank.",
    "optim_target_modules": "would name the modules of a low-rank optimiser||All linear modules are taken.",
    "trackio_space_id": "would log to a Space||Look at the run with finetui attach or TensorBoard.",
    "use_cpu": "would train on the CPU||Set hardware.device: cpu.",
    "full_determinism": "would force deterministic kernels||seed fixes order, initialisation and dropout.",
    "dataloader_drop_last": "would leave out the last, incomplete batch||It is trained on.",
    "average_tokens_across_devices": "would turn off the averaging of losses over all tokens||It is always on.",
    "metric_for_best_model": "would choose the best weights by this metric||Loss on held-out rows decides.",
    "greater_is_better": "would choose the best weights by the highest metric||Loss on held-out rows decides.",
    "include_for_metrics": "would hand more to compute_metrics||Evaluate the result with finetui chat.",
    "label_names": "would name the columns of labels||Labels are made from data; see finetui data.",
    "do_predict": "would predict after training||Use finetui chat.",
}  # fmt: skip


def batch(ledger: Ledger, micro: str, accumulation: str, gpus: int, *, usual: int) -> None:
    """Sequences per optimiser step: micro batch × accumulation × GPUs. The file does not say how many GPUs."""
    rows, steps = ledger.integer(micro, least=1), ledger.integer(accumulation, least=1)
    size = (rows or usual) * (steps or 1) * gpus
    devices = f"{gpus} GPUs" if gpus > 1 else "1 GPU (more: --gpus N)"
    how = f"{rows or usual} per GPU × {steps or 1} accumulated × {devices}"
    if rows is None and steps is None:
        ledger.default("batch_size", size, f"{how}, as without {micro}")
    else:
        ledger.carry([micro, accumulation], "batch_size", size, f"{how}; the planner picks the micro batch")


def total_steps(ledger: Ledger) -> int | None:
    """The number of steps, where the file limits it; it is carried over."""
    steps = ledger.integer("max_steps")
    if steps is None or steps < 1:
        ledger.idle("max_steps", "epochs decide")
        return None
    ledger.carry("max_steps", "max_steps", steps, "epochs may end it earlier; there, data was repeated instead")
    return steps


def schedule(ledger: Ledger, key: str, kwargs_key: str, *, usual: str) -> None:
    """Shape of the learning rate."""
    name = (ledger.text(key) or "").lower()
    kwargs = ledger.at(kwargs_key)
    low = kwargs.number("min_lr_rate")
    peak, floor = ledger.number("learning_rate"), kwargs.number("min_lr")
    if low is None and floor is not None and peak:
        low = floor / peak
    shape = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
             "cosine_with_restarts": "cosine-restarts", "inverse_sqrt": "inverse-sqrt", "polynomial": "linear",
             "cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine",
             "warmup_stable_decay": "wsd"}.get(name)  # fmt: skip
    if not name:
        ledger.default("optimizer.schedule", usual, f"{key} is {usual} where it is not given")
    elif shape is None:
        do = "It is cosine now; optimizer.schedule has linear, constant, wsd, inverse-sqrt, cosine-restarts."
        ledger.lose(key, f"would move the rate as {name} does", do)
    elif shape == "cosine-restarts" and (kwargs.integer("num_cycles") or 1) < 2:
        ledger.carry(key, "optimizer.schedule", "cosine", "with one cycle there is no restart")
        kwargs.idle("num_cycles", "one cycle is plain cosine")
    else:
        ledger.carry(key, "optimizer.schedule", shape, "with a power of 1" if name == "polynomial" else "")
    if shape == "cosine-restarts" and (cycles := kwargs.integer("num_cycles")) is not None and cycles >= 2:
        kwargs.carry("num_cycles", "optimizer.cycles", cycles)
    if shape == "cosine" and low is not None and 0 <= low < 1:
        kwargs.carry(["min_lr_rate", "min_lr"], "optimizer.min_rate", low, "as a share of the peak rate")
    decay, steps = kwargs.integer("num_decay_steps"), ledger.integer("max_steps")
    if shape == "wsd" and decay and steps and 0 < decay <= steps:
        kwargs.carry("num_decay_steps", "optimizer.decay_ratio", decay / steps, f"{decay} of {steps} steps")
    left = [other for other in kwargs.here() if not kwargs.settled(other)]
    kwargs.lose(left, "would shape the schedule", "Look at optimizer: min_rate, cycles, decay_ratio.")
    kwargs.idle(left, "it is empty")


def warmup(ledger: Ledger, steps: int | None, *, usual: float, never: bool = False) -> None:
    """Share of the steps in which the rate rises; steps alone can't be a share while nobody knows how many there are.

    Args:
        steps: all steps, where the file says how many.
        usual: what the tool does where its file says nothing.
        never: the schedule has no warm-up whatever the file says.
    """
    count, share = ledger.number("warmup_steps"), ledger.number("warmup_ratio")
    if never:
        ledger.idle(["warmup_steps", "warmup_ratio"], "a constant rate had no warm-up there")
        ledger.default("optimizer.warmup_ratio", 0.0, "a constant rate has no warm-up")
        return
    if count is not None and count > 0:
        ledger.idle("warmup_ratio", "warmup_steps goes before it")
        if count < 1:
            ledger.carry("warmup_steps", "optimizer.warmup_ratio", count, "below 1 it is a share of all steps")
        elif steps:
            ledger.carry("warmup_steps", "optimizer.warmup_ratio", min(1.0, count / steps), f"of {steps} steps")
        else:
            do = f"finetui plan says how many steps there are: set optimizer.warmup_ratio to {count:g} ÷ that."
            ledger.lose("warmup_steps", "would raise the rate for so many steps; 3 % of all steps now", do)
    elif share is not None:
        ledger.carry("warmup_ratio", "optimizer.warmup_ratio", min(1.0, max(0.0, share)))
        ledger.idle("warmup_steps", "warmup_ratio says it")
    elif count is not None:
        ledger.carry("warmup_steps", "optimizer.warmup_ratio", 0.0)
    else:
        ledger.default("optimizer.warmup_ratio", usual, "as without warmup_steps and warmup_ratio")


def pace(ledger: Ledger, gpus: int, steps: int | None) -> None:
    """Carry batch, schedule and warm-up where they have the names and defaults of transformers' own arguments."""
    batch(ledger, "per_device_train_batch_size", "gradient_accumulation_steps", gpus, usual=8)
    schedule(ledger, "lr_scheduler_type", "lr_scheduler_kwargs", usual="linear")
    warmup(ledger, steps, usual=0.0, never=ledger.raw("lr_scheduler_type") == "constant")


def optimizer(ledger: Ledger, key: str, tuning: str, instead: str = "") -> None:
    """The optimiser and its numbers.

    Args:
        key: names it.
        tuning: the recipe's type of tuning, which rules some of them out.
        instead: ours, where another key has named it already.
    """
    name = (ledger.text(key) or "").lower()
    ours, why = (instead, "") if instead else OPTIMIZERS.get(name, ("auto", ""))
    if instead:
        ledger.idle(key, f"{instead} is asked for by another key")
    elif ours in LOW_RANK and tuning not in TRAINS_BASE:
        ledger.lose(key, "would keep states of whole weights in a lower rank", f"With {tuning} there are none.")
        ours = "auto"
    elif ours != "auto":
        ledger.carry(key, "optimizer.name", ours, why)
    elif name:
        ledger.lose(key, f"would update by {name}", "optimizer.name: auto is AdamW; there are also muon, came, lion …")
    if ours == "schedule-free" and ledger.recipe.get("optimizer", {}).get("schedule", "constant") != "constant":
        ledger.default("optimizer.schedule", "constant", "schedule-free averages weights; it has no schedule")
    first, second = ledger.number("adam_beta1"), ledger.number("adam_beta2")
    if first is not None or second is not None:
        if ours in _BETAS:
            betas = [first if first is not None else 0.9, second if second is not None else 0.999]
            ledger.carry(["adam_beta1", "adam_beta2"], "optimizer.betas", betas)
        else:
            ledger.idle(["adam_beta1", "adam_beta2"], f"{ours} has none")
    small = "adam_epsilon" if ledger.has("adam_epsilon") else "adam_eps" if ledger.has("adam_eps") else "adam_epsilon"
    if (epsilon := ledger.number(small)) is not None:
        if ours in _EPSILON and epsilon > 0:
            ledger.carry(small, "optimizer.epsilon", epsilon)
        else:
            ledger.idle(small, f"{ours} has none")
    simple(ledger, "learning_rate", "optimizer.learning_rate", ledger.number("learning_rate"))
    simple(ledger, "weight_decay", "optimizer.weight_decay", ledger.number("weight_decay"))
    simple(ledger, "max_grad_norm", "optimizer.max_grad_norm", ledger.number("max_grad_norm"))


def simple(ledger: Ledger, key: str, to: str, value: Any) -> bool:
    """Carry a key as it is, if it says something; whether it did."""
    if value is None:
        return False
    ledger.carry(key, to, value)
    return True


def saving(ledger: Ledger, steps: int | None) -> None:
    """When checkpoints are written, and how many stay."""
    often = ledger.text("save_strategy") or "steps"
    every = ledger.number("save_steps")
    if often == "steps":
        ledger.idle("save_strategy", "checkpoints are always counted in steps")
        if every is not None and every >= 1:
            ledger.carry("save_steps", "checkpoint.every", int(every))
        elif every is not None and every > 0 and steps:
            ledger.carry("save_steps", "checkpoint.every", max(1, round(every * steps)), f"of {steps} steps")
        elif every is not None and every > 0:
            do = "finetui plan says how many steps there are: set checkpoint.every."
            ledger.lose("save_steps", "would save after this share of all steps", do)
        else:
            ledger.idle("save_steps", "the planner decides how often (checkpoint.every)")
    else:
        ledger.idle("save_steps", f"it had no effect with save_strategy: {often}")
        if often == "best" and held_out(ledger):
            ledger.carry("save_strategy", "evaluation.keep_best", True)
        elif often == "best":
            ledger.lose("save_strategy", "would keep the best weights on held-out rows", "Set evaluation.holdout.")
        elif often == "epoch":
            ledger.lose("save_strategy", "would save once an epoch", "The planner decides; or set checkpoint.every.")
        else:
            ledger.idle("save_strategy", "the result is always kept; checkpoints are what a run resumes from")
    keep = ledger.integer("save_total_limit")
    if keep is not None and keep >= 1:
        ledger.carry("save_total_limit", "checkpoint.keep", keep)
    else:
        ledger.idle("save_total_limit", "two are kept unless checkpoint.keep says otherwise")


def evaluating(ledger: Ledger, strategy_key: str, steps: int | None, patience_key: str) -> None:
    """How often held-out rows are looked at, and what hangs on it."""
    often, every = ledger.text(strategy_key), ledger.number("eval_steps")
    if every is not None and every >= 1 and often in (None, "steps"):
        ledger.carry("eval_steps", "evaluation.every", int(every))
    elif every is not None and 0 < every < 1 and steps and often in (None, "steps"):
        ledger.carry("eval_steps", "evaluation.every", max(1, round(every * steps)), f"of {steps} steps")
    elif every is not None and 0 < every < 1:
        do = "finetui plan says how many steps there are: set evaluation.every."
        ledger.lose("eval_steps", "would evaluate after this share of all steps", do)
    else:
        ledger.idle("eval_steps", "the planner decides how often (evaluation.every)")
    if often == "epoch":
        ledger.lose(strategy_key, "would evaluate once an epoch", "The planner decides; or set evaluation.every.")
    else:
        ledger.idle(strategy_key, "held-out rows decide: evaluation.holdout, or a source with split: eval")
    patience = ledger.integer(patience_key)
    if patience is not None and patience >= 1 and held_out(ledger):
        ledger.carry(patience_key, "evaluation.patience", patience)
    elif patience is not None and patience >= 1:
        ledger.lose(patience_key, "would stop once held-out loss stays", "Set evaluation.holdout, then patience.")
    else:
        ledger.idle(patience_key, "it is off")
    if ledger.flag("load_best_model_at_end") and held_out(ledger):
        ledger.carry("load_best_model_at_end", "evaluation.keep_best", True)
    elif ledger.flag("load_best_model_at_end"):
        ledger.lose("load_best_model_at_end", "would keep the best weights", "Set evaluation.holdout, then keep_best.")
    else:
        ledger.idle("load_best_model_at_end", "it is off")


def held_out(ledger: Ledger) -> bool:
    """Whether the recipe so far has rows to evaluate on."""
    sources = ledger.recipe.get("data", [])
    named = any(source.get("split") == "eval" for source in sources)
    return named or ledger.recipe.get("evaluation", {}).get("holdout", "auto") != 0


def tracking(ledger: Ledger, key: str = "report_to") -> None:
    """Where metrics are written; TensorBoard files are always among it."""
    value = ledger.raw(key)
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    others = sorted({str(name) for name in names} - {"none", "all", "tensorboard"})
    if others:
        do = "Look at the run with finetui attach, or with TensorBoard at runs/<name>/tensorboard."
        ledger.lose(key, f"would log to {', '.join(others)}", do)
    else:
        ledger.idle(key, "metrics are in the run's folder, for TensorBoard, too")


def precision(ledger: Ledger) -> None:
    """fp16 is asked for where a GPU has no bf16, or for its numbers: it is carried; the rest the planner decides."""
    if ledger.flag("fp16"):
        ledger.carry("fp16", "hardware.precision", "fp16")
    else:
        ledger.idle("fp16", "the planner decides it anew for your GPUs (hardware.precision)")
