"""LLaMA-Factory's YAML (read in 0.9.5: ``hparams``) as a recipe."""

from __future__ import annotations

from ..objective import PREFERENCE_METHODS
from .job import Job, template
from .ledger import Ledger
from .llamafactory_data import sources
from .llamafactory_keys import IDLE, LOST, TEMPLATES
from .training import (
    IDLE_TRAINING,
    LOST_TRAINING,
    evaluating,
    optimizer,
    pace,
    precision,
    saving,
    simple,
    total_steps,
    tracking,
)

TITLE = "LLaMA-Factory"
SIGNATURE = frozenset({
    "stage", "finetuning_type", "template", "cutoff_len", "dataset", "dataset_dir", "lora_target", "lora_rank",
    "quantization_bit", "pref_beta", "pref_loss", "neat_packing", "overwrite_cache",
})  # fmt: skip
NEEDED = frozenset({"model_name_or_path"})
_STAGES = {"pt": "pretrain", "sft": "sft", "rm": "reward", "ppo": "ppo", "kto": "kto", "dpo": "dpo"}


def carry(job: Job) -> None:
    """Carry all keys of a file.

    Raises:
        RecipeError: a value can't be what it is, the file is not for training, or there is no method like it here.
    """
    ledger = job.ledger
    ledger.carry("model_name_or_path", "model", job.local(job.need("model_name_or_path")))
    simple(ledger, "trust_remote_code", "trust_remote_code", ledger.flag("trust_remote_code"))
    if not ledger.has("stage") and not ledger.has("dataset"):
        what = "this file is for chat, export or prediction: it names no stage and no dataset"
        raise job.refuse("stage", what, "Give the file that you train with.")
    method = _method(job)
    tuning = _tuning(job, method)
    length = ledger.integer("cutoff_len", least=1)
    if length is not None:
        ledger.carry("cutoff_len", "sequence_length", length)
    else:
        ledger.default("sequence_length", 2048, "as without cutoff_len")
    sources(job)
    _rows(job, method)
    _held_out(ledger)
    steps = total_steps(ledger)
    if not simple(ledger, "num_train_epochs", "epochs", ledger.number("num_train_epochs")):
        ledger.default("epochs", 3.0, "as without num_train_epochs")
    pace(ledger, job.gpus, steps)
    _optimizer(ledger, tuning)
    simple(ledger, "seed", "seed", ledger.integer("seed", least=0))
    saving(ledger, steps)
    strategy = "eval_strategy" if ledger.has("eval_strategy") else "evaluation_strategy"
    evaluating(ledger, strategy, steps, "early_stopping_steps")
    ledger.idle("evaluation_strategy", "eval_strategy goes before it")
    if ledger.flag("pure_bf16"):
        ledger.carry("pure_bf16", "hardware.precision", "bf16")
        ledger.idle("fp16", "pure_bf16 goes before it")
    else:
        precision(ledger)
    ledger.idle("pure_bf16", "it is off")
    tracking(ledger)
    ledger.table({**IDLE_TRAINING, **IDLE}, {**LOST_TRAINING, **LOST})


def _method(job: Job) -> str:
    ledger = job.ledger
    stage = (ledger.text("stage") or "sft").lower()
    if stage not in _STAGES:
        raise job.refuse("stage", f"finetui has no stage {stage}", f"It has {', '.join(_STAGES)}.")
    predicts = ledger.flag("do_predict") and not ledger.flag("do_train")
    if ledger.flag("do_train") is False or predicts:
        raise job.refuse("do_train", "this file does not train", "Give the file that you train with.")
    loss = ledger.text("pref_loss") or "sigmoid"
    method = loss if stage == "dpo" and loss in ("orpo", "simpo") else _STAGES[stage]
    ledger.carry("stage", "method", method)
    if method in PREFERENCE_METHODS:
        _preference(ledger, method, loss)
    if method == "ppo":
        ledger.lose(
            ["reward_model", "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type"],
            "would judge answers by a model",
            "finetui's ppo takes rewards: write a function that asks that model, rewards: [./mine.py:score].",
        )
        simple(ledger, "ppo_epochs", "rollout.num_iterations", ledger.integer("ppo_epochs", least=1))
        simple(ledger, "ppo_target", "rollout.kl_target", ledger.number("ppo_target"))
        simple(ledger, "max_new_tokens", "rollout.max_completion_length", ledger.integer("max_new_tokens", least=1))
        simple(ledger, "temperature", "rollout.temperature", ledger.number("temperature"))
        simple(ledger, "top_p", "rollout.top_p", ledger.number("top_p"))
        top = ledger.integer("top_k")
        simple(ledger, "top_k", "rollout.top_k", top if top and top > 0 else None)
        buffer = ledger.integer("ppo_buffer_size")
        if buffer is not None and buffer > 1:
            ledger.lose("ppo_buffer_size", "would collect several batches of answers", "Raise batch_size.")
        for key in ("ppo_score_norm", "ppo_whiten_rewards"):
            if ledger.flag(key):
                ledger.lose(key, "would normalise rewards", "Normalise them in the reward's function.")
    return method


def _preference(ledger: Ledger, method: str, loss: str) -> None:
    beta = ledger.number("pref_beta")
    if not simple(ledger, "pref_beta", "preference.beta", beta) and method == "simpo":
        ledger.default("preference.beta", 0.1, "as without pref_beta")
    extra = ledger.number("pref_ftx")
    if method == "simpo":
        if not simple(ledger, "simpo_gamma", "preference.margin", ledger.number("simpo_gamma")):
            ledger.default("preference.margin", 0.5, "as without simpo_gamma")
        if extra:
            ledger.carry("pref_ftx", "preference.nll_weight", extra)
    if method == "kto":
        for key, to in (("kto_chosen_weight", "desirable_weight"), ("kto_rejected_weight", "undesirable_weight")):
            simple(ledger, key, f"preference.{to}", ledger.number(key))
    if method == "dpo":
        form = loss if loss in ("sigmoid", "hinge", "ipo") else ""
        if not form:
            do = "The loss is sigmoid; method: kto is for single answers that are good or bad."
            ledger.lose("pref_loss", f"would minimise {loss}", do)
        elif extra:
            value = {form: 1.0, "sft": extra}
            ledger.carry(["pref_loss", "pref_ftx"], "preference.loss", value, "with likelihood of the better answer")
        else:
            ledger.carry("pref_loss", "preference.loss", form)
        if (alpha := ledger.number("ld_alpha")) is not None:
            ledger.carry("ld_alpha", "preference.length_desensitization", alpha)
        if ledger.number("dpo_label_smoothing"):
            do = "preference: {loss: robust, label_smoothing: …} is made for pairs the wrong way round."
            ledger.lose("dpo_label_smoothing", "would expect some pairs to be the wrong way round (cDPO)", do)
    elif method in ("orpo", "simpo"):
        ledger.carry("pref_loss", "method", method)
    if extra and not ledger.settled("pref_ftx"):
        ledger.lose("pref_ftx", "would add likelihood of the better answer", "orpo has it; kto can't have it.")
    if ledger.number("pref_bco_weight"):
        ledger.lose("pref_bco_weight", "would add the loss of BCO", "method: kto has preference.loss: bco.")


def _tuning(job: Job, method: str) -> str:
    ledger = job.ledger
    name = (ledger.text("finetuning_type") or "lora").lower()
    if name not in ("lora", "full", "freeze", "oft"):
        raise job.refuse("finetuning_type", f"finetui has no finetuning_type {name}", "It has lora, full, freeze, oft.")
    bits = ledger.integer("quantization_bit")
    how = (ledger.text("quantization_method") or "bnb").lower()
    four = bits == 4 and how in ("bnb", "bitsandbytes") and name in ("lora", "oft")
    kind = "qlora" if four and name == "lora" else name
    if ledger.has("finetuning_type"):
        ledger.carry("finetuning_type", "tuning.type", kind)
    else:
        ledger.default("tuning.type", kind, "as without finetuning_type")
    if four:
        where = ("tuning.type", "qlora") if kind == "qlora" else ("tuning.quantization", "nf4")
        ledger.carry(["quantization_bit", "quantization_method"], *where)
        if (ledger.text("quantization_type") or "nf4") != "nf4" or ledger.flag("double_quantization") is False:
            ledger.lose(["quantization_type", "double_quantization"], "would store 4 bits otherwise", "NF4 is stored, "
                        "its scales quantised again.")  # fmt: skip
        ledger.idle(["quantization_type", "double_quantization"], "qlora stores NF4, its scales quantised again")
    elif bits is not None:
        do = "The base stays in 16 bits. Set tuning.type: qlora for 4 bits, or lora-fp8 for 8."
        ledger.lose(["quantization_bit", "quantization_method"], f"would store the base in {bits} bits by {how}", do)
    ledger.idle(["quantization_bit", "quantization_method", "quantization_type", "double_quantization"], "it is off")
    if name in ("lora", "oft"):
        _adapter(job, kind, method)
    elif name == "freeze":
        _freeze(ledger)
    ledger.idle(_ADAPTER_KEYS if name in ("full", "freeze") else _FREEZE_KEYS, f"it has no effect on {name}")
    return kind


_FREEZE_KEYS = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
_ADAPTER_KEYS = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora", "use_dora",
    "pissa_init", "pissa_iter", "pissa_convert", "loraplus_lr_ratio", "loraplus_lr_embedding", "create_new_adapter",
    "adapter_name_or_path", "oft_target", "oft_block_size", "oft_rank", "module_dropout",
)  # fmt: skip


def _adapter(job: Job, kind: str, method: str) -> None:
    ledger = job.ledger
    target = "oft_target" if kind == "oft" else "lora_target"
    names = ledger.names(target)
    if names == ["all"] or not names:
        ledger.carry(target, "tuning.targets", "all-linear")
    elif any(set(name) & set("*[](|\\^$+") for name in names):
        do = "List their names: tuning.targets: [q_proj, v_proj]."
        ledger.lose(target, "would adapt what this pattern matches; all linear modules now", do)
    else:
        ledger.carry(target, "tuning.targets", names)
    simple(ledger, "additional_target", "tuning.modules_to_save", ledger.names("additional_target") or None)
    folder = ledger.names("adapter_name_or_path") or []
    if len(folder) == 1 and not ledger.flag("create_new_adapter"):
        ledger.carry("adapter_name_or_path", "tuning.start_from", job.local(folder[0]))
    elif folder:
        do = "Merge them first (finetui export of a run, or llamafactory-cli export), and train on the result."
        ledger.lose(["adapter_name_or_path", "create_new_adapter"], "would merge these adapters, then train", do)
    if kind == "oft":
        simple(ledger, "oft_block_size", "tuning.block_size", ledger.integer("oft_block_size", least=2) or None)
        simple(ledger, "module_dropout", "tuning.dropout", ledger.number("module_dropout"))
        ledger.idle(_ADAPTER_KEYS, "it has no effect on oft")
        return
    rank = ledger.integer("lora_rank", least=1)
    if not simple(ledger, "lora_rank", "tuning.rank", rank):
        ledger.default("tuning.rank", 8, "as without lora_rank")
    simple(ledger, "lora_alpha", "tuning.alpha", ledger.number("lora_alpha"))
    simple(ledger, "lora_dropout", "tuning.dropout", ledger.number("lora_dropout"))
    simple(ledger, "use_rslora", "tuning.rank_stabilized", ledger.flag("use_rslora"))
    simple(ledger, "use_dora", "tuning.use_dora", ledger.flag("use_dora"))
    ratio = ledger.number("loraplus_lr_ratio")
    simple(ledger, "loraplus_lr_ratio", "tuning.lora_plus_ratio", ratio if ratio and ratio >= 1 else None)
    if ledger.flag("pissa_init"):
        if kind == "lora" and not folder and method not in ("dpo", "kto", "ppo"):
            ledger.carry("pissa_init", "tuning.init", "pissa")
        else:
            do = "It takes a part out of 16-bit weights, and changes the reference of dpo and kto."
            ledger.lose("pissa_init", "would begin the adapter with the largest part of the weights", do)
        ledger.idle("pissa_iter", "the decomposition has its own number of iterations")
        if ledger.flag("pissa_convert"):
            ledger.lose("pissa_convert", "would save a plain adapter", "finetui export --to merged merges it.")
    ledger.idle(_ADAPTER_KEYS, "it is off, or has no effect on lora")


def _freeze(ledger: Ledger) -> None:
    layers = ledger.integer("freeze_trainable_layers")
    extra = ledger.names("freeze_extra_modules") or []
    if layers is None and not extra:
        ledger.default("tuning.trained_layers", 2, "as without freeze_trainable_layers")
    elif layers is not None and layers > 0:
        ledger.carry("freeze_trainable_layers", "tuning.trained_layers", layers)
    elif layers is not None:
        ledger.lose("freeze_trainable_layers", "would train the first layers", "The last ones are trained.")
        ledger.default("tuning.trained_layers", max(1, -layers), "as many, but the last ones")
    modules = ledger.names("freeze_trainable_modules") or ["all"]
    if modules == ["all"]:
        ledger.idle("freeze_trainable_modules", "whole layers are trained")
    else:
        do = "Whole layers are trained; tuning.trained_modules trains modules by name in all layers."
        ledger.lose("freeze_trainable_modules", "would train these modules of the layers alone", do)
    if extra:
        ledger.carry("freeze_extra_modules", "tuning.trained_modules", extra)
    if ledger.flag("use_llama_pro"):
        do = "The last layers are trained as they are."
        ledger.lose("use_llama_pro", "would train the layers that were put in between (LLaMA Pro)", do)


def _rows(job: Job, method: str) -> None:
    ledger = job.ledger
    packed, neat = ledger.flag("packing"), ledger.flag("neat_packing")
    if method in ("sft", "pretrain"):
        wanted = bool(packed or neat) if packed is not None or neat else method == "pretrain"
        if packed is None and not neat:
            ledger.default("packing", wanted, "as without packing")
        else:
            why = "without attention between examples, as neat_packing" if wanted else ""
            ledger.carry(["packing", "neat_packing"], "packing", wanted, why)
    ledger.idle(["packing", "neat_packing"], "it is off, or has no effect on this method")
    if method == "sft" and ledger.flag("train_on_prompt"):
        ledger.carry("train_on_prompt", "train_on", "all")
    elif method == "sft" and ledger.flag("mask_history"):
        ledger.carry("mask_history", "train_on", "last-answer")
    ledger.idle(["train_on_prompt", "mask_history"], "answers are what is trained on")
    if method == "pretrain":
        ledger.idle("template", "plain text has no turns")
    else:
        template(ledger, "template", TEMPLATES, job)
    simple(ledger, "neftune_noise_alpha", "neftune_alpha", ledger.number("neftune_noise_alpha", least=0))
    for key, loss in (("use_dft_loss", "dft"), ("use_eaft_loss", "eaft")):
        if ledger.flag(key) and method in ("sft", "pretrain"):
            ledger.carry(key, "loss", loss)
    new = [*(ledger.names("add_tokens") or []), *(ledger.names("add_special_tokens") or [])]
    if new and ledger.recipe["tuning"]["type"] in ("lora", "qlora", "full"):
        ledger.carry(["add_tokens", "add_special_tokens"], "tuning.new_tokens", list(dict.fromkeys(new)))
        ledger.idle("resize_vocab", "the vocabulary grows by the new words")


def _held_out(ledger: Ledger) -> None:
    share = ledger.number("val_size", least=0)
    if any(source.get("split") == "eval" for source in ledger.recipe.get("data", [])):
        ledger.idle("val_size", "eval_dataset is held out")
    elif share is None:
        ledger.default("evaluation.holdout", 0.0, "as without val_size: no row is held out")
    elif share < 1:
        ledger.carry("val_size", "evaluation.holdout", share)
    else:
        do = "5 % are held out, at most 200 rows; set evaluation.holdout to a share."
        ledger.lose("val_size", f"would hold out {share:g} rows", do)


def _optimizer(ledger: Ledger, tuning: str) -> None:
    instead = ""
    for name, key, usual in (("galore", "use_galore", 2.0), ("apollo", "use_apollo", 32.0)):
        if ledger.flag(key) and tuning not in ("full", "freeze"):
            ledger.lose(key, "would keep states of whole weights in a lower rank", f"With {tuning} there are none.")
        elif ledger.flag(key):
            instead = "apollo-mini" if ledger.raw("apollo_scale_type") == "tensor" and name == "apollo" else name
            ledger.carry([key, f"{name}_scale_type"], "optimizer.name", instead)
            rank, every = ledger.integer(f"{name}_rank", least=1), ledger.integer(f"{name}_update_interval", least=1)
            simple(ledger, f"{name}_rank", "optimizer.projection_rank", rank if instead == name else None)
            simple(ledger, f"{name}_update_interval", "optimizer.projection_every", every)
            scale = ledger.number(f"{name}_scale", least=0) or None
            if not simple(ledger, f"{name}_scale", "optimizer.projection_scale", scale):
                ledger.default("optimizer.projection_scale", usual, f"as without {name}_scale")
    if ledger.flag("use_muon"):
        instead = "muon"
        ledger.carry("use_muon", "optimizer.name", "muon")
    optimizer(ledger, "optim", tuning, instead)
    if not ledger.has("learning_rate"):
        ledger.default("optimizer.learning_rate", 5e-5, "as without learning_rate")
