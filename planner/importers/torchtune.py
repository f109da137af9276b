"""torchtune's YAML (read in torchtune 0.6.1: ``recipes``, ``recipes/configs``) as a recipe."""

from __future__ import annotations

from typing import Any

from .job import Job, is_file, split
from .ledger import Ledger
from .torchtune_models import CHAT_WORDS, DATASETS, FUSED, MLP, MODELS, MODULES
from .training import batch, simple

TITLE = "torchtune"
SIGNATURE = frozenset({"checkpointer", "metric_logger", "enable_activation_checkpointing"})
#: Its files are known by their components.
NEEDED: frozenset[str] = frozenset()
_COMPONENT = "_component_"
_OPTIMIZERS = {"AdamW": "adamw", "Adam": "adamw", "PagedAdamW": "paged-adamw", "PagedAdamW32bit": "paged-adamw",
               "PagedAdamW8bit": "paged-adamw-8bit", "AdamW8bit": "adamw-8bit", "SGD": "sgd", "Lion": "lion",
               "Lion8bit": "lion-8bit", "PagedLion8bit": "paged-lion-8bit", "Adafactor": "adafactor"}  # fmt: skip
_PLANNED = "the planner decides what is kept and what is computed again (hardware.checkpointing)"
_SHARING = "the planner decides how GPUs share the work, and says whether it fits (hardware.strategy)"
_WATCHED = "every step is kept in the run's events: finetui attach, finetui logs"
IDLE = {
    **dict.fromkeys(("enable_activation_checkpointing", "enable_activation_offloading", "ac_mode", "ac_option",
                     "optimizer_in_bwd", "clean_up_after_step"), _PLANNED),
    **dict.fromkeys(("fsdp", "fsdp_cpu_offload", "fsdp_reshard_after_forward", "fsdp_sharding_strategy",
                     "custom_sharded_layers", "memory_efficient_fsdp_wrap", "tensor_parallel_dim",
                     "tensor_parallel_plan", "data_parallel_shard_dim", "data_parallel_replicate_dim",
                     "context_parallel_dim", "use_loss_parallel_ctx_manager", "low_cpu_ram"), _SHARING),
    **dict.fromkeys(("metric_logger", "log_every_n_steps", "log_peak_memory_stats", "log_level", "profiler"), _WATCHED),
    "compile": "finetui's own kernels are on by default (hardware.kernels)",
    "output_dir": "a run's folder is its own: finetui run --name",
    "save_adapter_weights_only": "the adapter is the result; finetui export --to merged merges it",
    "save_last_epoch_only": "the latest checkpoints are kept: checkpoint.keep",
    "shuffle": "rows are shuffled by seed",
    "cudnn_deterministic_mode": "seed fixes order, initialisation and dropout",
    "collate_fn": "rows are put together by finetui itself",
    "dataloader": "data is read and tokenised once, before the first step",
    "ref_checkpointer": "the reference is the model that training begins with",
    "quantizer": "it is for quantisation-aware training alone",
    "enable_kv_cache": "it is for generating alone",
    "batch_size_val": "the planner picks the micro batch of an evaluation",
    "max_steps_per_epoch_val": "all held-out rows are looked at",
    "project": _WATCHED,
}  # fmt: skip
LOST = {
    "fine_tuning_method": "would train otherwise||tuning.type says what is trained.",
    "resume_from_checkpoint": "would continue from a checkpoint of torchtune||Finish that run there.",
    "enable_fp8_training": "would compute in 8 bits||tuning.type: lora-fp8 does, for adapters.",
    "fp8_recipe_name": "would compute in 8 bits||tuning.type: lora-fp8 does, for adapters.",
    "num_output_chunks": "would cut logits into chunks||They are never held whole.",
}


def has_components(tree: dict[str, Any]) -> bool:
    """Whether this is a config of torchtune: its parts name what builds them."""
    return any(isinstance(part, dict) and _COMPONENT in part for part in tree.values())


def carry(job: Job) -> None:
    """Carry all keys of a file.

    Raises:
        RecipeError: a value can't be what it is, the file is not for training, or there is no method like it here.
    """
    ledger = job.ledger
    if ledger.has("teacher_model"):
        do = "Write one with method: distill and distillation.teacher; kd_ratio is distillation.weight."
        raise job.refuse("teacher_model", "this file learns from a teacher, whose model it gives as a folder alone", do)
    for key, what in (("policy_model", "learns from a reward model"),
                      ("reward_and_value_model", "learns from a reward model")):  # fmt: skip
        if ledger.has(key):
            raise job.refuse(key, f"this file {what}, which finetui has no method for", "Train this with torchtune.")
    for key in ("model", "dataset", "optimizer"):
        if not ledger.has(key):
            what = f"this file does not train: it has no {key}"
            raise job.refuse(key, what, "Give the file that you give to tune run.")
    method = _method(job)
    tuning = _model(job)
    _tokenizer(ledger)
    method = _data(job, method)
    epochs, most = ledger.number("epochs"), ledger.integer("max_steps_per_epoch")
    if not simple(ledger, "epochs", "epochs", epochs):
        ledger.default("epochs", 1.0, "as without epochs")
    total = max(1, round(most * (epochs or 1))) if most and most > 0 else None
    if total:
        ledger.carry("max_steps_per_epoch", "max_steps", total, f"{most} × {epochs or 1:g} epochs")
    ledger.idle("max_steps_per_epoch", "epochs are whole")
    batch(ledger, "batch_size", "gradient_accumulation_steps", job.gpus, usual=1)
    _optimizer(ledger, total)
    _numbers(ledger, tuning)
    ledger.table(IDLE, LOST)


def _last(view: Ledger) -> str:
    """The name of what builds a part, without its modules."""
    return (view.text(_COMPONENT) or "").rpartition(".")[2]


def _method(job: Job) -> str:
    loss = job.ledger.at("loss")
    name = _last(loss)
    if any(word in name for word in ("PPO", "GRPO", "KD", "KL")):
        what = f"this file trains with {name}, which finetui has no method like"
        raise job.refuse("loss", what, "Train this with torchtune.")
    method = {"DPOLoss": "dpo", "RSOLoss": "dpo", "SimPOLoss": "simpo"}.get(name, "sft")
    if method == "sft":
        job.ledger.idle("loss", "cross-entropy over the trained tokens; logits are never held whole")
        return method
    loss.carry(_COMPONENT, "method", method)
    if name == "RSOLoss":
        loss.carry(_COMPONENT, "preference.loss", "hinge")
        simple(loss, "gamma", "preference.beta", loss.number("gamma"))
    elif not simple(loss, "beta", "preference.beta", loss.number("beta")) and method == "simpo":
        loss.default("preference.beta", 2.0, "as without beta")
    if method == "simpo" and not simple(loss, "gamma", "preference.margin", loss.number("gamma")):
        loss.default("preference.margin", 0.5, "as without gamma")
    if loss.number("label_smoothing"):
        do = "preference: {loss: robust, label_smoothing: …} is made for pairs the wrong way round."
        loss.lose("label_smoothing", "would expect some pairs to be the wrong way round (cDPO)", do)
    loss.idle(loss.here(), "it is off")
    return method


def _model(job: Job) -> str:
    """Carry the model and what is trained of it; the type of tuning."""
    model, files = job.ledger.at("model"), job.ledger.at("checkpointer")
    name = _last(model)
    kind = "qlora" if name.startswith("qlora_") or model.flag("quantize_base") else "lora"
    adapted = name.startswith(("lora_", "qlora_")) or model.has("lora_rank")
    kind = kind if adapted else "full"
    builder = name.removeprefix("q").removeprefix("lora_") if name.startswith(("lora_", "qlora_")) else name
    folder = files.text("checkpoint_dir") or ""
    here = job.found(folder)
    if here is not None:
        files.carry("checkpoint_dir", "model", here, "found here")
    elif builder in MODELS:
        base, chat = MODELS[builder]
        wanted = chat if any(word in folder.lower() for word in CHAT_WORDS) else base
        model.carry(_COMPONENT, "model", wanted, "the hub's weights")
        files.idle("checkpoint_dir", f"that folder is not here: {wanted} is downloaded when it is needed")
    elif folder:
        files.carry("checkpoint_dir", "model", folder, "the folder has to be there, in Hugging Face format")
    else:
        raise job.refuse("model", f"nobody knows which weights {name or 'this model'} has", "Give checkpoint_dir.")
    if adapted:
        model.carry(_COMPONENT, "tuning.type", kind)
        _adapter(model, builder)
    else:
        model.default("tuning.type", "full", "this builder trains all weights")
    for key in ("adapter_checkpoint", "recipe_checkpoint"):
        files.lose(key, "would continue from this", "Continue from an adapter: tuning.start_from.")
    files.idle(files.here(), "weights are read as the model's folder has them")
    vision = ("decoder_trainable", "encoder_trainable", "fusion_trainable", "image_size")
    model.lose(vision, "would train on images", "finetui trains on text alone.")
    model.idle([_COMPONENT], "the checkpoint says what the model is")
    left = [key for key in model.here() if not model.settled(key)]
    model.lose(left, "would build the model otherwise", "The checkpoint's config.json says what the model is.")
    model.idle(left, "it is empty")
    return kind


def _adapter(model: Ledger, builder: str) -> None:
    attention = model.names("lora_attn_modules") or []
    mlp = model.flag("apply_lora_to_mlp")
    theirs = [MODULES.get(name, name) for name in attention] + (list(MLP) if mlp else [])
    if builder.startswith("phi"):
        theirs = [FUSED.get(name, name) for name in theirs]
    names = list(dict.fromkeys(theirs))
    why = "transformers keeps some of these in one" if builder.startswith("phi") else "by the names of transformers"
    if names:
        model.carry(["lora_attn_modules", *(["apply_lora_to_mlp"] if mlp else [])], "tuning.targets", names, why)
    if model.flag("apply_lora_to_output"):
        do = "tuning.modules_to_save: [lm_head] trains it whole."
        model.lose("apply_lora_to_output", "would adapt the output head", do)
    model.idle(["lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"], "it is off")
    if not simple(model, "lora_rank", "tuning.rank", model.integer("lora_rank", least=1)):
        model.default("tuning.rank", 8, "as without lora_rank")
    if not simple(model, "lora_alpha", "tuning.alpha", model.number("lora_alpha")):
        model.default("tuning.alpha", 16.0, "as without lora_alpha")
    simple(model, "lora_dropout", "tuning.dropout", model.number("lora_dropout"))
    simple(model, "use_dora", "tuning.use_dora", model.flag("use_dora"))
    if model.flag("quantize_base"):
        model.carry("quantize_base", "tuning.type", "qlora")
    model.idle("quantize_base", "it is off")


def _tokenizer(ledger: Ledger) -> None:
    tokenizer = ledger.at("tokenizer")
    length = tokenizer.integer("max_seq_len")
    if length is not None and length >= 1:
        tokenizer.carry("max_seq_len", "sequence_length", length)
    else:
        tokenizer.idle("max_seq_len", "rows were never cut; sequence_length: auto is 2048, set it if yours are longer")
    form = tokenizer.raw("prompt_template")
    if form is not None:
        do = "The tokenizer's own template is used; or give a .jinja file as chat_template."
        tokenizer.lose("prompt_template", "would put these words around turns", do)
    tokenizer.idle(tokenizer.here(), "the model's own tokenizer is used")


def _data(job: Job, method: str) -> str:
    """Carry what is trained on; the method, which plain text makes a pretraining."""
    ledger = job.ledger
    if isinstance(ledger.raw("dataset"), list):
        views = [ledger.at("dataset", index) for index in range(ledger.items("dataset"))]
    else:
        views = [ledger.at("dataset")]
    views = [view for view in views if view.here()]
    kinds = [DATASETS.get(_last(view)) for view in views]
    if method == "sft" and kinds and all(kind is not None and kind[1] == "text" for kind in kinds):
        method = "pretrain"
        ledger.default("method", method, "plain text, all of which is trained on")
    packed: list[bool] = []
    everything: list[bool] = []
    place = 0
    for view, kind in zip(views, kinds, strict=True):
        packed.append(bool(view.flag("packed")))
        if _source(job, view, f"data.{place}", kind):
            place += 1
        asked = view.flag("train_on_input")
        everything.append(asked if asked is not None else bool(kind and kind[3]))
        if method == "sft" and asked:
            view.carry("train_on_input", "train_on", "all")
        view.idle("train_on_input", "answers are what is trained on")
        if method in ("sft", "pretrain") and view.has("packed"):
            view.carry("packed", "packing", packed[-1])
        view.idle("packed", "it has no effect on this method")
        left = [key for key in view.here() if not view.settled(key)]
        view.lose(left, "would be handed to the dataset's builder", "Look at data: format, columns, hub_split, limit.")
        view.idle(left, "it is empty")
    if method in ("sft", "pretrain"):
        wanted = any(packed)
        ledger.recipe["packing"] = wanted
        if not any(view.has("packed") for view in views):
            ledger.default("packing", wanted, "as without packed")
        if method == "sft" and any(everything):
            ledger.recipe["train_on"] = "all"
            if not any(view.has("train_on_input") for view in views):
                ledger.default("train_on", "all", "this dataset trains on prompts unless train_on_input is false")
    _held_out(job, place)
    return method


def _source(job: Job, view: Ledger, to: str, kind: tuple[str, str, dict[str, str], bool] | None) -> bool:
    """Carry one dataset; whether there is something to read."""
    path, files = view.text("source"), view.raw("data_files")
    known = kind or ("", "auto", {}, False)
    if isinstance(files, str) and path in ("json", "csv", "text", "parquet", None):
        view.carry(["source", "data_files"], f"{to}.path", job.local(files))
        path = files
    elif path:
        view.carry("source", f"{to}.path", job.local(path))
        view.lose("data_files", "would read these files alone", "Give each file as a source of its own.")
    elif known[0]:
        path = known[0]
        view.carry(_COMPONENT, f"{to}.path", path)
    else:
        view.lose(_COMPONENT, "would make rows by a builder of its own", "Name what is trained on in data: yourself.")
        return False
    if kind is None:
        do = "format: auto looks at them; see finetui data."
        view.lose(_COMPONENT, "would read rows by a builder of its own", do)
    else:
        view.carry(_COMPONENT, f"{to}.format", known[1] if known[1] != "messages" else _style(view))
    columns = dict(known[2])
    if isinstance(named := view.raw("column_map"), dict):
        parts = {"input": "question", "output": "answer"} if known[1] == "question-answer" else {}
        columns |= {parts.get(str(part), str(part)): str(column) for part, column in named.items()}
        columns = {part: column for part, column in columns.items() if part in _PARTS}
        view.carry("column_map", f"{to}.columns", columns)
    elif columns:
        view.default(f"{to}.columns", columns, "the columns of this dataset")
    for key, part in (("conversation_column", "messages"), ("column", "text")):
        if (column := view.text(key)) is not None and known[1] in ("messages", "text"):
            view.carry(key, f"{to}.columns.{part}", column)
    view.idle("conversation_style", "it is the format")
    split(view, "split", to, path)
    for key in ("name", "subset"):
        if (subset := view.text(key)) is not None and not is_file(path):
            view.carry(key, f"{to}.subset", subset)
    if (prompt := view.text("new_system_prompt")) is not None:
        view.lose("new_system_prompt", f"would begin each chat with {prompt[:40]!r}", "Put it into the rows.")
    view.idle(["add_eos", "split_across_pack"], "each text ends with its end token; long ones are split")
    return True


_PARTS = {"question", "answer", "instruction", "input", "output", "prompt", "chosen", "rejected", "text", "messages"}


def _style(view: Ledger) -> str:
    return "sharegpt" if view.raw("conversation_style") == "sharegpt" else "messages"


def _held_out(job: Job, place: int) -> None:
    ledger = job.ledger
    every = ledger.integer("run_val_every_n_steps")
    if not ledger.has("dataset_val"):
        ledger.default("evaluation.holdout", 0.0, "as without dataset_val: no row is held out")
        ledger.idle("run_val_every_n_steps", "there is nothing to measure on")
        return
    view = ledger.at("dataset_val")
    if _source(job, view, f"data.{place}", DATASETS.get(_last(view))):
        ledger.default(f"data.{place}.split", "eval", "dataset_val is never trained on")
    view.idle(view.here(), "as for the rows that are trained on")
    if every is not None and every >= 1:
        ledger.carry("run_val_every_n_steps", "evaluation.every", every)


def _optimizer(ledger: Ledger, total: int | None) -> None:
    view = ledger.at("optimizer")
    name = _last(view)
    if name in _OPTIMIZERS:
        view.carry(_COMPONENT, "optimizer.name", _OPTIMIZERS[name])
    else:
        view.lose(_COMPONENT, f"would update by {name}", "optimizer.name: auto is AdamW; there are others.")
    if not simple(view, "lr", "optimizer.learning_rate", view.number("lr")):
        view.default("optimizer.learning_rate", 1e-3, "as torch without lr")
    decay = view.number("weight_decay")
    if not simple(view, "weight_decay", "optimizer.weight_decay", decay) and "AdamW" in name:
        view.default("optimizer.weight_decay", 0.01, "as torch and bitsandbytes without weight_decay")
    betas, adam = view.raw("betas"), "Adam" in name
    numbers = isinstance(betas, list) and len(betas) == 2 and all(isinstance(beta, int | float) for beta in betas)
    if numbers and name in _OPTIMIZERS and name not in ("SGD", "Adafactor"):
        view.carry("betas", "optimizer.betas", betas)
    epsilon = view.number("eps")
    simple(view, "eps", "optimizer.epsilon", epsilon if adam and epsilon else None)
    simple(view, "momentum", "optimizer.momentum", view.number("momentum") if name == "SGD" else None)
    view.idle(["fused", "foreach"], "updates are fused where that is faster")
    left = [key for key in view.here() if not view.settled(key)]
    view.lose(left, "would be handed to the optimiser", "Look at optimizer: betas, epsilon, momentum.")
    view.idle(left, "it is empty")
    _schedule(ledger, total)
    clip = ledger.number("clip_grad_norm", least=0)
    if not simple(ledger, "clip_grad_norm", "optimizer.max_grad_norm", clip):
        ledger.default("optimizer.max_grad_norm", 0.0, "gradients are not clipped without clip_grad_norm")


def _schedule(ledger: Ledger, total: int | None) -> None:
    view = ledger.at("lr_scheduler")
    if not view.here():
        ledger.default("optimizer.schedule", "constant", "the rate is constant without lr_scheduler")
        ledger.default("optimizer.warmup_ratio", 0.0, "and has no warm-up")
        ledger.idle("lr_scheduler", "it is empty")
        return
    if "cosine" in _last(view):
        view.carry(_COMPONENT, "optimizer.schedule", "cosine")
    else:
        view.lose(_COMPONENT, f"would move the rate by {_last(view)}", "optimizer.schedule has cosine, linear, …")
    steps, cycles = view.integer("num_warmup_steps", least=0), view.number("num_cycles")
    if steps and not total:
        do = f"finetui plan says how many steps there are: set optimizer.warmup_ratio to {steps} ÷ that."
        view.lose("num_warmup_steps", "would raise the rate for so many steps; 3 % of all steps now", do)
    elif steps is not None:
        share = min(1.0, steps / total) if total else 0.0
        view.carry("num_warmup_steps", "optimizer.warmup_ratio", share, f"of {total} steps" if total else "")
    if cycles not in (None, 0.5):
        view.lose("num_cycles", "would let the rate rise again", "optimizer.schedule: cosine-restarts does.")
    view.idle(view.here(), "half a cosine is what a schedule is")


def _numbers(ledger: Ledger, tuning: str) -> None:
    simple(ledger, "seed", "seed", ledger.integer("seed", least=0))
    dtype = ledger.text("dtype")
    if dtype == "fp32":
        ledger.carry("dtype", "hardware.precision", "fp32")
    elif dtype == "bf16" and tuning == "full":
        ledger.carry("dtype", "hardware.precision", "bf16", "weights and states in 16 bits, as there")
    elif dtype not in (None, "bf16"):
        ledger.lose("dtype", f"would compute in {dtype}", "The planner decides (hardware.precision).")
    ledger.idle("dtype", "adapters are trained beside 16-bit weights, as the planner decides (hardware.precision)")
    device = ledger.text("device")
    if device == "cpu":
        ledger.carry("device", "hardware.device", "cpu")
    ledger.idle("device", "a GPU is taken where there is one")
