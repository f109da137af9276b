"""The YAML of TRL's command line (``trl sft --config file.yaml``; read in trl 1.16: ``scripts``, ``trainer``)."""

from __future__ import annotations

from ..objective import LOSSES
from . import rollouts
from .job import Job, is_file, template
from .ledger import Ledger
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

TITLE = "TRL"
SIGNATURE = frozenset({
    "dataset_name", "datasets", "use_peft", "lora_r", "lora_target_modules", "load_in_4bit", "max_length",
    "dataset_mixture", "dataset_mixer", "dataset_train_split", "dataset_text_field", "dataset_config",
    "assistant_only_loss", "max_completion_length", "num_generations", "reward_funcs", "packing_strategy",
    "precompute_ref_log_probs", "completion_only_loss",
})  # fmt: skip
NEEDED = frozenset({"model_name_or_path"})
#: Keys that one of its commands has alone.
_OF: dict[str, frozenset[str]] = {
    "kto": frozenset({"desirable_weight", "undesirable_weight"}),
    "rloo": frozenset({"normalize_advantages", "reward_clip_range"}),
    "grpo": frozenset({"scale_rewards", "delta", "importance_sampling_level", "multi_objective_aggregation",
                       "top_entropy_quantile", "sapo_temperature_pos", "vespo_k_pos", "use_bias_correction_kl"}),
    "reward": frozenset({"center_rewards_coefficient"}),
    "dpo": frozenset({"ld_alpha", "use_weighting", "discopop_tau", "f_divergence_type", "loss_weights"}),
    "sft": frozenset({"packing", "packing_strategy", "completion_only_loss", "assistant_only_loss", "eval_packing",
                      "dataset_text_field", "shuffle_dataset"}),
}  # fmt: skip
_SHARED = {"grpo": frozenset({"num_generations", "max_completion_length", "reward_funcs", "temperature", "epsilon"}),
           "dpo": frozenset({"precompute_ref_log_probs", "beta", "truncation_mode"})}  # fmt: skip
_RATES = {"sft": 2e-5, "reward": 1e-4}
_NO_EFFECT = "it has no effect on this method"
IDLE = {
    **dict.fromkeys(("dtype", "torch_dtype", "bnb_4bit_quant_storage"),
                    "the planner decides it anew for your GPUs (hardware.precision)"),
    **dict.fromkeys(("padding_free", "pad_to_multiple_of", "eval_packing", "dataset_kwargs", "packing_strategy",
                     "precompute_ref_batch_size", "dataset_streaming"), "finetui pads and packs rows by itself"),
    **dict.fromkeys(("eos_token", "pad_token"), "the tokenizer's own; a pad token that ends answers, too, is replaced"),
    "lora_task_type": "the method says it", "ignore_bias_buffers": "it is for distributed buffers of old models",
    "preprocessing_num_workers": "data is read and tokenised once, before the first step, on all cores",
    "shuffle_dataset": "rows are shuffled by seed", "disable_dropout": "dropout is tuning.dropout, 0 unless set",
    "label_pad_token_id": "labels are made by finetui itself",
}  # fmt: skip
LOST = {
    # The alignment-handbook's, whose scripts read TRL's keys and these.
    **dict.fromkeys(("dataset_mixer", "dataset_mixture", "dataset_splits", "dataset_configs"),
                    "would train on these||Write them into data: path, subset, hub_split, weight."),
    "chat_template": "would write chats by this template||Write it into a .jinja file: chat_template.",
    "max_prompt_length": "would cut prompts||sequence_length cuts the whole row.",
    "model_revision": "would take this revision of the model||Download it, and give its folder as model.",
    "model_init_kwargs": "would load the model otherwise||The planner decides how it is loaded.",
    "router_aux_loss_coef": "would balance the experts' load||The load is left as it is.",
    "truncation_mode": "would cut the beginning of rows||Their end is cut, or data says too_long: drop.",
    "bnb_4bit_quant_type": "would store 4 bits otherwise||NF4 is stored.",
    "use_weighting": "would weigh pairs by their probability (WPO)||preference.loss has other losses.",
    "f_divergence_type": "would bound by another divergence||The reverse KL is used.",
    "f_alpha_divergence_coef": "would bound by another divergence||The reverse KL is used.",
    "discopop_tau": "would set the temperature of discopop||TRL's default is used.",
    "center_rewards_coefficient": "would pull the mean reward to 0||Only the difference of rewards counts.",
    "reward_model_name_or_path": "would judge answers by a model||Write a function that asks it: rewards.",
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
                    "would let the reference follow the policy||The reference stays what training began with."),
}  # fmt: skip


def carry(job: Job) -> None:
    """Carry all keys of a file.

    Raises:
        RecipeError: a value can't be what it is, or neither the file nor the caller says which command it is for.
    """
    ledger = job.ledger
    ledger.carry("model_name_or_path", "model", job.local(job.need("model_name_or_path")))
    simple(ledger, "trust_remote_code", "trust_remote_code", ledger.flag("trust_remote_code"))
    method = _method(job)
    ledger.default("method", method, "the command that the file is for" if job.method else "by the keys that it has")
    tuning = _tuning(job, method)
    rollout = method in ("grpo", "rloo")
    if rollout:
        rollouts.carry(ledger, job, method)
    else:
        _objective(ledger, method)
        if not simple(ledger, "max_length", "sequence_length", ledger.integer("max_length", least=1)):
            ledger.default("sequence_length", 1024, "as without max_length")
    _rows(job, method)
    _data(job)
    steps = total_steps(ledger)
    if not simple(ledger, "num_train_epochs", "epochs", ledger.number("num_train_epochs")):
        ledger.default("epochs", 3.0, "as without num_train_epochs")
    pace(ledger, job.gpus, steps)
    rollouts.check_batch(job, "per_device_train_batch_size")
    optimizer(ledger, "optim", tuning)
    if not ledger.has("learning_rate"):
        ledger.default("optimizer.learning_rate", _RATES.get(method, 1e-6), "as without learning_rate")
    simple(ledger, "seed", "seed", ledger.integer("seed", least=0))
    simple(ledger, "neftune_noise_alpha", "neftune_alpha", ledger.number("neftune_noise_alpha", least=0))
    saving(ledger, steps)
    strategy = "eval_strategy" if ledger.has("eval_strategy") else "evaluation_strategy"
    evaluating(ledger, strategy, steps, "early_stopping_patience")
    ledger.idle("evaluation_strategy", "eval_strategy goes before it")
    precision(ledger)
    tracking(ledger)
    own = [key for keys in (*_OF.values(), *_SHARED.values()) for key in keys]
    ledger.idle([key for key in own if key not in LOST], _NO_EFFECT)
    if rollout:
        rollouts.settle(ledger)
    ledger.table({**IDLE_TRAINING, **IDLE}, {**LOST_TRAINING, **LOST})


def _method(job: Job) -> str:
    there = set(job.ledger.here())
    if job.method is not None:
        if job.method not in _OF:
            raise job.refuse("method", f"TRL has no command {job.method} here", f"Use {', '.join(_OF)}.")
        return job.method
    for keys in (_OF, _SHARED):
        found = [method for method, own in keys.items() if own & there]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            named = "; ".join(f"{min(keys[method] & there)} is of {method}" for method in found)
            raise job.refuse("method", f"this could be for several commands: {named}", "Add --method.")
    do = "Say which command you give it to: --method sft (or dpo, kto, grpo, rloo, reward)."
    raise job.refuse("method", "nothing in this file says whether it is for trl sft, dpo or another command", do)


def _tuning(job: Job, method: str) -> str:
    ledger = job.ledger
    four, eight, wanted = ledger.flag("load_in_4bit"), ledger.flag("load_in_8bit"), ledger.flag("use_peft")
    if not wanted:
        ledger.default("tuning.type", "full", "without use_peft all weights are trained")
        if four or eight:
            keys = [key for key in ("load_in_4bit", "load_in_8bit") if ledger.flag(key)]
            ledger.lose(keys, "would store the weights in fewer bits", "Set tuning.type: qlora to train on 4 bits.")
        unused = [key for key in ledger.here() if key.startswith(("lora_", "use_rslora", "use_dora", "use_bnb"))]
        ledger.idle([*unused, "use_peft", "load_in_4bit", "load_in_8bit"], "without use_peft it has no effect")
        return "full"
    kind = "qlora" if four else "lora"
    ledger.carry(["use_peft", "load_in_4bit"] if four else "use_peft", "tuning.type", kind)
    if eight and not four:
        do = "The base stays in 16 bits. Set tuning.type: qlora for 4 bits, or lora-fp8 for 8."
        ledger.lose("load_in_8bit", "would keep the base in bitsandbytes' 8 bits", do)
    ledger.idle(["load_in_4bit", "load_in_8bit"], "it is off")
    for key, to, usual in (("lora_r", "rank", 16), ("lora_alpha", "alpha", 32.0), ("lora_dropout", "dropout", 0.05)):
        value = ledger.integer(key, least=1) if key == "lora_r" else ledger.number(key)
        if not simple(ledger, key, f"tuning.{to}", value):
            ledger.default(f"tuning.{to}", usual, f"as without {key}")
    names = ledger.names("lora_target_modules")
    if names in (["all-linear"], ["all_linear"]):
        ledger.carry("lora_target_modules", "tuning.targets", "all-linear")
    elif names:
        ledger.carry("lora_target_modules", "tuning.targets", names)
    else:
        ledger.default("tuning.targets", "all-linear", "PEFT would choose by the model's family, mostly q_proj, v_proj")
    parameters = ledger.names("lora_target_parameters")
    if parameters and not ledger.recipe["tuning"].get("dropout") and not ledger.flag("use_dora"):
        ledger.carry("lora_target_parameters", "tuning.target_parameters", parameters)
    elif parameters:
        ledger.lose("lora_target_parameters", "would adapt these weights, too", "Set tuning.dropout: 0 and add them.")
    simple(ledger, "lora_modules_to_save", "tuning.modules_to_save", ledger.names("lora_modules_to_save") or None)
    simple(ledger, "use_rslora", "tuning.rank_stabilized", ledger.flag("use_rslora"))
    simple(ledger, "use_dora", "tuning.use_dora", ledger.flag("use_dora"))
    if (ledger.text("bnb_4bit_quant_type") or "nf4") == "nf4":
        ledger.idle("bnb_4bit_quant_type", "qlora stores NF4")
    ledger.idle("use_bnb_nested_quant", "the scales of NF4 are quantised again in any case")
    return kind


def _objective(ledger: Ledger, method: str) -> None:
    if method in ("dpo", "kto"):
        simple(ledger, "beta", "preference.beta", ledger.number("beta"))
    if method == "kto":
        for key in ("desirable_weight", "undesirable_weight"):
            simple(ledger, key, f"preference.{key}", ledger.number(key))
        loss = ledger.text("loss_type")
        if loss in LOSSES["kto"]:
            ledger.carry("loss_type", "preference.loss", loss)
    if method == "dpo":
        names = ledger.names("loss_type") or ["sigmoid"]
        raw = ledger.raw("loss_weights")
        weights = raw if isinstance(raw, list) and len(raw) == len(names) else [1.0] * len(names)
        if set(names) <= set(LOSSES["dpo"]) and all(isinstance(weight, int | float) for weight in weights):
            value = dict(zip(names, map(float, weights), strict=True)) if len(names) > 1 else names[0]
            ledger.carry(["loss_type", "loss_weights"], "preference.loss", value)
            smoothing = ledger.number("label_smoothing")
            if smoothing and set(names) & {"robust", "exo_pair", "aot", "aot_unpaired"}:
                ledger.carry("label_smoothing", "preference.label_smoothing", smoothing)
        simple(ledger, "ld_alpha", "preference.length_desensitization", ledger.number("ld_alpha"))
        if ledger.flag("precompute_ref_log_probs"):
            ledger.carry("precompute_ref_log_probs", "preference.reference", "precomputed")
    if method == "sft" and ledger.text("loss_type") in ("nll", "dft"):
        ledger.carry("loss_type", "loss", ledger.text("loss_type"))
    elif method == "sft" and ledger.text("loss_type") == "chunked_nll":
        ledger.idle("loss_type", "the loss is nll; logits are never held whole")
    if ledger.has("loss_type") and not ledger.settled("loss_type"):
        ledger.lose("loss_type", f"would minimise {ledger.raw('loss_type')}", "Look at loss and preference.loss.")
    smooth = "would expect some pairs to be the wrong way round (cDPO)"
    if ledger.number("label_smoothing") and not ledger.settled("label_smoothing"):
        ledger.lose("label_smoothing", smooth, "preference: {loss: robust, label_smoothing: …} is made for that.")
    ledger.idle("label_smoothing", "it is off")


def _rows(job: Job, method: str) -> None:
    ledger = job.ledger
    if method == "sft":
        packed = ledger.flag("packing")
        if not simple(ledger, "packing", "packing", packed):
            ledger.default("packing", False, "as without packing")
        if packed and (ledger.text("packing_strategy") or "bfd") == "wrapped":
            ledger.lose("packing_strategy", "would cut rows at will to fill others", "Rows stay whole.")
        if ledger.flag("completion_only_loss") is False:
            ledger.carry("completion_only_loss", "train_on", "all")
        elif not ledger.flag("assistant_only_loss") and not ledger.flag("completion_only_loss"):
            do = "Where your rows are chats and all of it should be trained on, set train_on: all."
            ledger.lose("assistant_only_loss", "would train on whole chats; on answers alone now", do)
            if not ledger.has("assistant_only_loss"):
                why = f"answers alone; without assistant_only_loss, TRL trains on whole chats. {do}"
                ledger.default("train_on", "auto", why)
        ledger.idle(["completion_only_loss", "assistant_only_loss"], "answers are what is trained on")
    if ledger.has("chat_template_path"):
        path = ledger.text("chat_template_path") or ""
        if path.endswith((".jinja", ".jinja2", ".j2")):
            template(ledger, "chat_template_path", {}, job)
        else:
            do = "Save its template as a .jinja file, and give that as chat_template."
            ledger.lose("chat_template_path", f"would take the chat template of {path}", do)


def _data(job: Job) -> None:
    ledger = job.ledger
    count = ledger.items("datasets")
    for index in range(count):
        source, to = ledger.at("datasets", index), f"data.{index}"
        path, files = source.text("path"), source.raw("data_files")
        if path in ("json", "csv", "parquet", "text") and isinstance(files, str):
            source.carry(["path", "data_files"], f"{to}.path", job.local(files))
        elif path:
            source.carry("path", f"{to}.path", job.local(path))
            source.lose(["data_files", "data_dir"], "would read these files alone", "Give each as a source of its own.")
        else:
            raise source.wrong("path", "the dataset to read")
        if (subset := source.text("name")) is not None:
            source.carry("name", f"{to}.subset", subset)
        name = source.text("split")
        if name not in (None, "train"):
            source.carry("split", f"{to}.hub_split", name)
        source.idle("split", "it is the one that is taken")
        share = source.number("fraction")
        if share is not None and 0 < share < 1:
            source.carry("fraction", f"{to}.weight", share, "a random share of the rows")
        source.idle("fraction", "all rows are taken")
        columns = source.names("columns") if not isinstance(source.raw("columns"), dict) else None
        source.idle("columns", "columns are found by their names" if columns else "columns are known by their names")
    name = ledger.text("dataset_name")
    if name and not count:
        ledger.carry("dataset_name", "data.0.path", job.local(name))
        if (subset := ledger.text("dataset_config")) is not None:
            ledger.carry("dataset_config", "data.0.subset", subset)
        train = ledger.text("dataset_train_split")
        if train not in (None, "train"):
            ledger.carry("dataset_train_split", "data.0.hub_split", train)
        column = ledger.text("dataset_text_field")
        if column not in (None, "text"):
            ledger.carry("dataset_text_field", "data.0.columns.text", column)
        if ledger.flag("dataset_streaming") and not is_file(name):
            ledger.carry("dataset_streaming", "data.0.streaming", True)
        _measured(ledger, name, subset)
    elif count:
        _share(ledger)
    else:
        ledger.default("evaluation.holdout", 0.0, "no row is held out")
    ledger.idle(["dataset_name", "dataset_config", "dataset_train_split", "dataset_text_field", "dataset_test_split",
                 "streaming", "test_split_size"], "datasets goes before it, or it is the usual one")  # fmt: skip


def _measured(ledger: Ledger, path: str, subset: str | None) -> None:
    """Held-out rows: those of the test split, where anything is measured."""
    if (ledger.text("eval_strategy") or "no") == "no":
        ledger.default("evaluation.holdout", 0.0, "without eval_strategy nothing is measured")
        ledger.idle("dataset_test_split", "without eval_strategy nothing is measured")
        return
    test = ledger.text("dataset_test_split") or "test"
    ledger.carry("dataset_test_split", "data.1.path", path)
    ledger.default("data.1.path", path, "its test split is measured on")
    ledger.recipe["data"][1] |= {"split": "eval", "hub_split": test} | ({"subset": subset} if subset else {})


def _share(ledger: Ledger) -> None:
    share = ledger.number("test_split_size")
    if share is not None and 0 < share < 1:
        ledger.carry("test_split_size", "evaluation.holdout", share)
    elif share:
        ledger.lose("test_split_size", f"would hold out {share:g} rows", "Set evaluation.holdout to a share.")
    else:
        ledger.default("evaluation.holdout", 0.0, "as without test_split_size: no row is held out")
