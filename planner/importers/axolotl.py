"""Axolotl's YAML (read in axolotl 0.19: ``utils/schemas``, ``core/builders``) as a recipe."""

from __future__ import annotations

from ..objective import LOSSES, PREFERENCE_METHODS
from . import rollouts
from .axolotl_data import TEMPLATES, raw_text, sources
from .axolotl_keys import IDLE, LOST
from .job import Job, is_file, template
from .ledger import Ledger
from .training import (
    batch,
    evaluating,
    optimizer,
    precision,
    saving,
    schedule,
    simple,
    total_steps,
    tracking,
    warmup,
)

TITLE = "Axolotl"
#: Keys that only this tool has, by which its files are known.
SIGNATURE = frozenset({"base_model", "sequence_len", "micro_batch_size", "lora_target_linear", "sample_packing"})
NEEDED = frozenset({"base_model"})
#: ``rl`` to our method.
_METHODS = {"dpo": "dpo", "ipo": "ipo", "orpo": "orpo", "kto": "kto", "simpo": "simpo", "grpo": "grpo", "gdpo": "grpo"}
_INITS = {"pissa": "pissa", "olora": "olora", "gaussian": "gaussian", "eva": "eva", "loftq": "loftq",
          "orthogonal": "orthogonal"}  # fmt: skip


def carry(job: Job) -> None:
    """Carry all keys of a file.

    Raises:
        RecipeError: a value can't be what it is, or there is no method like it here.
    """
    ledger = job.ledger
    ledger.carry("base_model", "model", job.local(job.need("base_model")))
    simple(ledger, "trust_remote_code", "trust_remote_code", ledger.flag("trust_remote_code"))
    method = _method(job)
    tuning = _tuning(job, method)
    length = ledger.integer("sequence_len", least=1)
    if length is not None:
        ledger.carry("sequence_len", "sequence_length", length)
    else:
        ledger.default("sequence_length", 512, "as without sequence_len")
    sources(job, method, _too_long(ledger, method))
    _rows(job, method)
    _held_out(ledger)
    steps = total_steps(ledger)
    simple(ledger, "num_epochs", "epochs", ledger.number("num_epochs"))
    _batch(job)
    rollouts.check_batch(job, "micro_batch_size")
    _schedule(ledger, steps)
    optimizer(ledger, "optimizer", tuning)
    _rest(job, method, steps)


def _method(job: Job) -> str:
    ledger = job.ledger
    for key in ("process_reward_model", "kd_trainer", "diffusion", "ebft"):
        if ledger.raw(key) not in (None, False, {}):
            raise job.refuse(key, f"finetui has no method like {key}", "Train this one with axolotl.")
    name = (ledger.text("rl") or "").lower()
    if name and name not in _METHODS:
        raise job.refuse("rl", f"finetui has no method {name}", f"It has {', '.join(sorted(set(_METHODS.values())))}.")
    if name:
        method = _METHODS[name]
        ledger.carry("rl", "method", method)
        if name == "gdpo":
            ledger.carry("rl", "rollout.separate_rewards", True)
    elif ledger.flag("reward_model"):
        method = "reward"
        ledger.carry("reward_model", "method", method)
    elif raw_text(ledger):
        method = "pretrain"
        ledger.default("method", method, "plain text, all of which is trained on; long texts are split")
    else:
        method = "sft"
    ledger.idle("reward_model", "it is off")
    if method in PREFERENCE_METHODS:
        _preference(ledger, method)
    elif method == "grpo":
        rollouts.carry(ledger.at("trl"), job, method)
    ledger.idle((*_PREFERENCE_KEYS, *(() if method in {*PREFERENCE_METHODS, "grpo"} else ("trl",))), _USELESS)
    return method


_USELESS = "it has no effect on this method"
_PREFERENCE_KEYS = (
    "rl_beta", "dpo_beta", "orpo_alpha", "simpo_gamma", "cpo_alpha", "rpo_alpha", "kto_desirable_weight",
    "kto_undesirable_weight", "dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing", "precompute_ref_log_probs",
)  # fmt: skip


def _preference(ledger: Ledger, method: str) -> None:
    trl = ledger.at("trl")
    beta = trl.number("beta")
    if beta is not None:
        trl.carry("beta", "preference.beta", beta)
    for key in ("rl_beta", "dpo_beta", "orpo_alpha"):
        value = ledger.number(key)
        if value is not None and beta is None:
            beta = value
            ledger.carry(key, "preference.beta", value)
        elif value is not None:
            ledger.idle(key, "another key sets beta before it")
    if beta is None and method == "simpo":
        ledger.default("preference.beta", 0.1, "as without rl_beta")
    if method == "simpo":
        gamma, weight = ledger.number("simpo_gamma"), ledger.number("cpo_alpha")
        if not simple(ledger, "simpo_gamma", "preference.margin", gamma):
            ledger.default("preference.margin", 0.5, "as without simpo_gamma")
        if not simple(ledger, "cpo_alpha", "preference.nll_weight", weight):
            ledger.default("preference.nll_weight", 1.0, "as without cpo_alpha")
    if method == "kto":
        for key, to in (("kto_desirable_weight", "desirable_weight"), ("kto_undesirable_weight", "undesirable_weight")):
            simple(ledger, key, f"preference.{to}", ledger.number(key))
    if method == "dpo":
        _dpo_losses(ledger)
    if method in ("dpo", "ipo") and ledger.flag("precompute_ref_log_probs"):
        ledger.carry("precompute_ref_log_probs", "preference.reference", "precomputed")
    trl.idle(trl.here(), _USELESS)


def _dpo_losses(ledger: Ledger) -> None:
    names = ledger.names("dpo_loss_type") or []
    raw = ledger.raw("dpo_loss_weights")
    numbers = isinstance(raw, list) and all(isinstance(weight, int | float) for weight in raw)
    weights = raw if numbers and len(raw) == len(names) else [1.0] * len(names)
    losses = {name: float(weight) for name, weight in zip(names, weights, strict=True) if name in LOSSES["dpo"]}
    nll = ledger.number("rpo_alpha")
    if names and set(losses) == set(names) and (len(losses) > 1 or nll):
        losses |= {"sft": nll} if nll else {}
        ledger.carry(["dpo_loss_type", "dpo_loss_weights", "rpo_alpha"], "preference.loss", losses)
    elif names and set(losses) == set(names):
        ledger.carry(["dpo_loss_type", "dpo_loss_weights"], "preference.loss", names[0])
    elif names:
        do = f"preference.loss has {', '.join(LOSSES['dpo'])}."
        ledger.lose(["dpo_loss_type", "dpo_loss_weights"], "would minimise another loss", do)
    elif nll:
        ledger.carry("rpo_alpha", "preference.loss", {"sigmoid": 1.0, "sft": nll}, "likelihood of the better answer")
    smoothing = ledger.number("dpo_label_smoothing")
    if smoothing and set(names) & {"robust", "exo_pair", "aot", "aot_unpaired"} and 0 < smoothing < 0.5:
        ledger.carry("dpo_label_smoothing", "preference.label_smoothing", smoothing)
    elif smoothing:
        do = "preference.loss: robust, with label_smoothing, is made for pairs the wrong way round."
        ledger.lose("dpo_label_smoothing", "would expect some pairs to be the wrong way round (cDPO)", do)


def _tuning(job: Job, method: str) -> str:
    ledger = job.ledger
    four, eight = ledger.flag("load_in_4bit"), ledger.flag("load_in_8bit")
    adapter = (ledger.text("adapter") or "").lower()
    if adapter not in ("", "lora", "qlora"):
        raise job.refuse("adapter", f"finetui has no adapter {adapter}", "Set it to lora or qlora, or leave it out.")
    if adapter == "":
        return _full(ledger)
    kind = "qlora" if adapter == "qlora" or four else "lora"
    ledger.carry(["adapter", "load_in_4bit"] if kind == "qlora" else "adapter", "tuning.type", kind)
    ledger.idle("load_in_4bit", "it is off")
    if eight and kind == "lora":
        do = "The base stays in 16 bits. Set tuning.type: qlora for 4 bits, or lora-fp8 for 8."
        ledger.lose("load_in_8bit", "would keep the base in bitsandbytes' 8 bits", do)
    ledger.idle("load_in_8bit", "4 bits go before it" if eight else "it is off")
    _adapter(job, kind, method)
    return kind


def _full(ledger: Ledger) -> str:
    frozen = ledger.raw("unfrozen_parameters")
    if frozen not in (None, []):
        do = "tuning: {type: freeze, trained_layers: N} trains the last layers, trained_modules those of a name."
        ledger.lose("unfrozen_parameters", "would train the weights that these patterns match alone", do)
    for key in ("load_in_4bit", "load_in_8bit"):
        if ledger.flag(key):
            ledger.lose(key, "would store the weights in fewer bits", "Set tuning.type: qlora to train on 4 bits.")
        else:
            ledger.idle(key, "it is off")
    ledger.default("tuning.type", "full", "without an adapter all weights are trained")
    unused = [key for key in ledger.here() if key.startswith(("lora_", "peft_", "loraplus_")) or key == "peft"]
    ledger.idle(unused, "without an adapter it has no effect")
    ledger.idle("adapter", "it is empty: all weights are trained")
    return "full"


def _adapter(job: Job, kind: str, method: str) -> None:
    ledger = job.ledger
    rank = ledger.integer("lora_r", least=1)
    if not simple(ledger, "lora_r", "tuning.rank", rank):
        ledger.default("tuning.rank", 8, "as PEFT without lora_r")
    simple(ledger, "lora_alpha", "tuning.alpha", ledger.number("lora_alpha"))
    simple(ledger, "lora_dropout", "tuning.dropout", ledger.number("lora_dropout"))
    _targets(ledger)
    ledger.lose("unfrozen_parameters", "would train these beside the adapter", "Name them in tuning.modules_to_save.")
    parameters = ledger.names("lora_target_parameters")
    if parameters and not ledger.number("lora_dropout") and not ledger.flag("peft_use_dora"):
        ledger.carry("lora_target_parameters", "tuning.target_parameters", parameters)
    elif parameters:
        ledger.lose("lora_target_parameters", "would adapt these weights, too", "Set tuning.dropout: 0 and add them.")
    simple(ledger, "lora_modules_to_save", "tuning.modules_to_save", ledger.names("lora_modules_to_save") or None)
    simple(ledger, "peft_use_dora", "tuning.use_dora", ledger.flag("peft_use_dora"))
    simple(ledger, "peft_use_rslora", "tuning.rank_stabilized", ledger.flag("peft_use_rslora"))
    ratio = ledger.number("loraplus_lr_ratio")
    simple(ledger, "loraplus_lr_ratio", "tuning.lora_plus_ratio", ratio if ratio and ratio >= 1 else None)
    folder = ledger.text("lora_model_dir")
    if folder:
        ledger.carry("lora_model_dir", "tuning.start_from", job.local(folder))
    _initial(ledger, kind, method, continued=bool(folder))


def _targets(ledger: Ledger) -> None:
    named = ledger.raw("lora_target_modules")
    if ledger.flag("lora_target_linear"):
        ledger.carry("lora_target_linear", "tuning.targets", "all-linear")
        ledger.idle("lora_target_modules", "they are among all linear modules")
    elif isinstance(named, str) and named not in ("all-linear",) and not named.replace("_", "").isalnum():
        do = "List their names: tuning.targets: [q_proj, v_proj]."
        ledger.lose("lora_target_modules", "would adapt what this pattern matches; all linear modules now", do)
    elif named == "all-linear":
        ledger.carry("lora_target_modules", "tuning.targets", "all-linear")
    elif named:
        names = ledger.names("lora_target_modules") or []
        if any(set(name) & set("*[](|\\^$+") for name in names):
            do = "List their names: tuning.targets: [q_proj, v_proj]."
            ledger.lose("lora_target_modules", "would adapt what these patterns match; all linear modules now", do)
        else:
            ledger.carry("lora_target_modules", "tuning.targets", names)
    else:
        ledger.default("tuning.targets", "all-linear", "PEFT would choose by the model's family, mostly q_proj, v_proj")
    ledger.idle("lora_target_linear", "it is off")


def _initial(ledger: Ledger, kind: str, method: str, *, continued: bool) -> None:
    bits = ledger.at("peft").at("loftq_config")
    wanted = ledger.text("peft_init_lora_weights")
    init = _INITS.get((wanted or "").partition("_niter")[0])
    if bits.raw("loftq_bits") is not None:
        init = init or "loftq"
    source, key = (bits, "loftq_bits") if bits.raw("loftq_bits") is not None else (ledger, "peft_init_lora_weights")
    impossible = (init == "loftq" and kind != "qlora") or (init in ("pissa", "olora") and (
        kind == "qlora" or method in ("dpo", "ipo", "kto"))) or (init == "eva" and method != "sft")  # fmt: skip
    if init and not continued and not impossible:
        source.carry(key, "tuning.init", init)
    elif init or (wanted and wanted != "true"):
        source.lose(key, "would begin the adapter otherwise", "tuning.init has pissa, olora, eva, loftq, …")
    ledger.idle("peft_init_lora_weights", "it is the usual beginning")


def _too_long(ledger: Ledger, method: str) -> str:
    """What happens to rows that are too long: Axolotl leaves them out unless it is told otherwise."""
    asked = ledger.text("excess_length_strategy")
    if method == "pretrain":
        ledger.idle("excess_length_strategy", "long texts are split")
        return "cut"
    if asked == "raise":
        do = "They are cut; finetui data tells which, before anything is trained."
        ledger.lose("excess_length_strategy", "would stop at a row that is too long", do)
    ledger.idle("excess_length_strategy", "rows are cut unless a source says too_long: drop")
    return "cut" if asked in ("raise", "truncate") else "drop"


def _rows(job: Job, method: str) -> None:
    ledger = job.ledger
    packed = ledger.flag("sample_packing")
    if method in ("sft", "pretrain"):
        if not simple(ledger, "sample_packing", "packing", packed):
            ledger.default("packing", False, "as without sample_packing")
    else:
        ledger.idle("sample_packing", "it had no effect on this method")
    if method == "sft" and ledger.flag("train_on_inputs"):
        ledger.carry("train_on_inputs", "train_on", "all")
    else:
        ledger.idle("train_on_inputs", "answers are what is trained on" if method == "sft" else "no effect here")
    if ledger.text("chat_template") == "jinja":
        words = ledger.text("chat_template_jinja") or ""
        if len(words) < 300 and words.endswith((".jinja", ".jinja2", ".j2")):
            ledger.carry(["chat_template", "chat_template_jinja"], "chat_template", job.local(words))
        else:
            do = "Write it into a .jinja file, and give its path as chat_template."
            ledger.lose(["chat_template", "chat_template_jinja"], "would write chats by this template", do)
    else:
        template(ledger, "chat_template", TEMPLATES, job)
        ledger.idle("chat_template_jinja", "chat_template goes before it")
    alpha = ledger.number("neftune_noise_alpha", least=0)
    old = ledger.number("noisy_embedding_alpha", least=0)
    if not simple(ledger, "neftune_noise_alpha", "neftune_alpha", alpha):
        simple(ledger, "noisy_embedding_alpha", "neftune_alpha", old)
    ledger.idle("noisy_embedding_alpha", "neftune_noise_alpha goes before it")
    if ledger.flag("use_eaft") and method in ("sft", "pretrain"):
        ledger.carry("use_eaft", "loss", "eaft")
        ledger.lose(["eaft_alpha", "eaft_k"], "would set how sure the model must be", "finetui takes the paper's.")
    ledger.idle(["use_eaft", "eaft_alpha", "eaft_k"], "it is off")
    _words(ledger)
    for place, source in enumerate(ledger.recipe.get("data", [])):
        if ledger.flag("streaming") and source.get("split") != "eval" and not is_file(source["path"]):
            ledger.carry("streaming", f"data.{place}.streaming", True)
    ledger.idle("streaming", "files are read as a stream in any case" if ledger.flag("streaming") else "it is off")
    for key in ("shuffle_merged_datasets", "shuffle_before_merging_datasets"):
        if ledger.flag(key) is False and key == "shuffle_merged_datasets":
            ledger.lose(key, "would keep the order of the rows", "Rows are shuffled by seed.")
        else:
            ledger.idle(key, "rows are shuffled by seed")


def _words(ledger: Ledger) -> None:
    """``special_tokens`` and ``tokens``."""
    special = ledger.at("special_tokens")
    why = "the tokenizer's own are used; a pad token that ends answers, too, is replaced"
    special.idle([key for key in ("pad_token", "bos_token", "eos_token", "unk_token") if key in special.here()], why)
    new = special.names("additional_special_tokens") or []
    tokens = ledger.raw("tokens")
    if isinstance(tokens, dict):  # as special_tokens were called once
        ledger.idle("tokens", why)
    else:
        new += ledger.names("tokens") or []
    trains = ledger.recipe.get("tuning", {}).get("type") in ("lora", "qlora", "full")
    if new and trains:
        special.carry("additional_special_tokens", "tuning.new_tokens", list(dict.fromkeys(new)))
        ledger.carry("tokens", "tuning.new_tokens", list(dict.fromkeys(new)), "their rows alone are trained")
    ledger.lose([] if ledger.settled("tokens") else "tokens", "would add these words", "tuning.new_tokens adds them.")
    left = [key for key in special.here() if not special.settled(key)]
    special.lose(left, "would be this special token", "The tokenizer's own are used.")


def _held_out(ledger: Ledger) -> None:
    share = ledger.number("val_set_size", least=0)
    named = any(source.get("split") == "eval" for source in ledger.recipe.get("data", []))
    if named:
        ledger.idle("val_set_size", "test_datasets are held out")
    elif share is None:
        ledger.default("evaluation.holdout", 0.0, "as without val_set_size: no row is held out")
    elif share < 1:
        ledger.carry("val_set_size", "evaluation.holdout", share)
    else:
        do = "5 % are held out, at most 200 rows; set evaluation.holdout to a share."
        ledger.lose("val_set_size", f"would hold out {share:g} rows", do)
    for key, verb, what in (
        ("evals_per_epoch", "evaluate", "evaluation.every"),
        ("saves_per_epoch", "save", "checkpoint.every"),
    ):
        if often := ledger.number(key):
            do = f"The planner decides; or set {what} to steps: finetui plan says how many an epoch has."
            ledger.lose(key, f"would {verb} {often:g}× an epoch", do)
        ledger.idle(key, "it is off")


def _batch(job: Job) -> None:
    ledger = job.ledger
    total, rows = ledger.integer("batch_size", least=1), ledger.integer("micro_batch_size", least=1) or 1
    if total is not None and not ledger.has("gradient_accumulation_steps"):
        size = max(1, total // rows) * rows * job.gpus
        ledger.carry(["batch_size", "micro_batch_size"], "batch_size", size, f"{total} × {job.gpus} GPU per step")
        ledger.idle("gradient_accumulation_steps", "batch_size sets it")
        return
    ledger.idle("batch_size", "gradient_accumulation_steps goes before it")
    batch(ledger, "micro_batch_size", "gradient_accumulation_steps", job.gpus, usual=1)


def _schedule(ledger: Ledger, steps: int | None) -> None:
    schedule(ledger, "lr_scheduler", "lr_scheduler_kwargs", usual="cosine")
    low = ledger.number("cosine_min_lr_ratio")
    shape = ledger.recipe.get("optimizer", {}).get("schedule")
    if low is not None and shape == "cosine" and 0 <= low < 1:
        ledger.carry("cosine_min_lr_ratio", "optimizer.min_rate", low)
    elif low == 1 and shape == "cosine":
        ledger.carry("cosine_min_lr_ratio", "optimizer.schedule", "constant", "a cosine that falls by nothing")
    elif low is not None:
        ledger.idle("cosine_min_lr_ratio", "it had no effect on this schedule")
    warmup(ledger, steps, usual=0.03, never=ledger.raw("lr_scheduler") == "constant")


def _rest(job: Job, method: str, steps: int | None) -> None:
    ledger = job.ledger
    simple(ledger, "seed", "seed", ledger.integer("seed", least=0))
    saving(ledger, steps)
    strategy = "eval_strategy" if ledger.has("eval_strategy") else "evaluation_strategy"
    evaluating(ledger, strategy, steps, "early_stopping_patience")
    ledger.idle("evaluation_strategy", "eval_strategy goes before it")
    if ledger.flag("fp16") or ledger.flag("float16"):
        ledger.carry(["fp16", "float16"], "hardware.precision", "fp16")
    else:
        precision(ledger)
    ledger.idle("float16", "it is off")
    plugins = ledger.names("plugins") or []
    plain = ("liger", "cut_cross_entropy", "kernels", "expert_parallel", "spectrum", "lm_eval", "swanlab")
    if all(any(word in plugin.lower() for word in plain) for plugin in plugins):
        ledger.idle("plugins", "finetui's own kernels are on by default; what else a plugin does, its keys say")
    else:
        ledger.lose("plugins", "would run the code of these plugins", "Nothing like it is run.")
    tracking(ledger)
    ledger.table(IDLE, LOST)
