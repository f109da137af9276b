"""Keys of TRL's ``GRPOConfig`` and ``RLOOConfig`` (read in trl 1.16), which Axolotl hands on in its ``trl`` section."""

from __future__ import annotations

from typing import get_args

from ..policy_loss import PolicyLossName
from .job import Job
from .ledger import Ledger

#: Key to ours in ``rollout``, and how it is read. Those of grpo alone are in _GRPO.
_NUMBERS = {
    "temperature": "temperature", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "beta": "beta", "epsilon": "epsilon", "epsilon_high": "epsilon_high", "delta": "delta",
    "top_entropy_quantile": "top_entropy", "entropy_coef": "entropy_bonus",
    "off_policy_mask_threshold": "off_policy_limit",
}  # fmt: skip
_COUNTS = {"num_generations": "num_generations", "max_completion_length": "max_completion_length", "top_k": "top_k",
           "num_iterations": "num_iterations"}  # fmt: skip
_FLAGS = {"mask_truncated_completions": "mask_truncated", "use_bias_correction_kl": "unbiased_kl"}
_GRPO = {"delta", "top_entropy_quantile", "entropy_coef", "off_policy_mask_threshold", "use_bias_correction_kl"}
_DO_VLLM = "The planner decides what generates; set rollout.engine, or rollout.server for a vllm serve elsewhere."
_IDLE = {
    **dict.fromkeys(("log_completions", "num_completions_to_print", "log_unique_prompts", "log_multimodal",
                     "log_completions_hub_repo"), "answers to held-out prompts are kept in the run's events"),
    **dict.fromkeys(("use_liger_loss", "cast_lm_head_to_fp32", "ds3_gather_for_generation", "cache_implementation",
                     "vllm_mode", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length",
                     "vllm_tensor_parallel_size", "vllm_server_timeout", "vllm_group_port", "vllm_model_impl",
                     "vllm_sync_interval", "vllm_lora_sync", "use_transformers_paged", "reward_num_workers",
                     "use_transformers_continuous_batching", "transformers_continuous_batching_config",
                     "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
                     "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max",
                     "vllm_importance_sampling_clip_min"), "the planner decides what generates, and how"),
    "disable_dropout": "dropout is tuning.dropout, 0 unless set",
    "shuffle_dataset": "prompts are shuffled by seed",
}  # fmt: skip
_LOST = {
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
                    "would let the reference follow the policy||The reference stays what training began with."),
    **dict.fromkeys(("generation_batch_size", "steps_per_generation"),
                    "would generate for several steps at once||Each step has answers of its own: num_iterations."),
    **dict.fromkeys(("use_adaptive_entropy", "entropy_target", "entropy_coef_delta", "entropy_coef_min",
                     "entropy_coef_max"), "would steer the entropy||rollout.entropy_bonus is a fixed weight of it."),
    **dict.fromkeys(("generation_kwargs", "vllm_guided_decoding_regex", "vllm_structured_outputs_regex"),
                    "would bound what is generated||rollout has temperature, top_p, top_k, min_p."),
    "chat_template_kwargs": "would hand these to the chat template||Give a .jinja file as chat_template.",
    "num_generations_eval": "would write another number of answers in evaluation||rollout.num_generations holds.",
    "rollout_func": "would generate by a function of yours||rollout.server takes a vllm serve.",
    "max_tool_calling_iterations": "would call tools while answering||Answers are one turn.",
    "normalize_advantages": "would normalise advantages over the batch||method: grpo has scale_rewards.",
    "reward_clip_range": "would clip rewards||Clip them in the reward's function.",
    "max_prompt_length": "would cut prompts||sequence_length holds prompt and answer.",
    **dict.fromkeys(("use_data_producer", "async_prefetch", "prefetch_depth", "streaming_partial_batch",
                     "streaming_min_groups", "replay_buffer_size", "replay_recompute_logps", "reroll_start_fraction",
                     "reroll_max_groups", "skip_zero_advantage_batches"),
                    "would generate ahead of training||Answers are written by the policy that learns from them."),
}  # fmt: skip


def carry(view: Ledger, job: Job, method: str) -> None:
    """Carry the keys of a mapping that says how answers are written and judged."""
    for names, read in ((_NUMBERS, view.number), (_COUNTS, view.integer), (_FLAGS, view.flag)):
        for key, ours in names.items():
            value = read(key)
            if value is None:
                continue
            if key in _GRPO and method != "grpo":
                view.idle(key, f"it has no effect on {method}")
            elif (ours == "top_k" and value <= 0) or (ours == "entropy_bonus" and not value):
                view.idle(key, "it is off")
            else:
                view.carry(key, f"rollout.{ours}", value)
    if method == "rloo" and not view.has("num_generations"):
        view.default("rollout.num_generations", 2, "as without num_generations")
    _loss(view, method)
    _engine(view)
    _rewards(view, job)


def settle(view: Ledger) -> None:
    """Settle what is left of TRL's own keys for it."""
    view.table(_IDLE, _LOST)


def check_batch(job: Job, key: str) -> None:
    """Refuse a batch that holds no whole group of answers, which mostly means that it was for more GPUs.

    Raises:
        RecipeError: naming the key of the batch.
    """
    recipe = job.ledger.recipe
    group = recipe.get("rollout", {}).get("num_generations", 8)
    if recipe.get("method") in ("grpo", "rloo") and recipe["batch_size"] % group:
        what = f"{recipe['batch_size']} answers per step are no multiple of the {group} answers to each prompt"
        raise job.refuse(key, what, "Say on how many GPUs it is started: --gpus N.")


def _loss(view: Ledger, method: str) -> None:
    loss, level, scale = view.text("loss_type"), view.text("importance_sampling_level"), view.text("scale_rewards")
    if loss is not None and method == "grpo" and loss in get_args(PolicyLossName):
        view.carry("loss_type", "rollout.loss", loss)
    elif loss is not None:
        view.lose("loss_type", f"would minimise {loss}", f"rollout.loss has {', '.join(get_args(PolicyLossName))}.")
    if level in ("token", "sequence") and method == "grpo":
        view.carry("importance_sampling_level", "rollout.importance", level)
    elif level is not None:
        view.lose("importance_sampling_level", "would compare probabilities otherwise", "It is token or sequence.")
    how = view.text("multi_objective_aggregation")
    if how == "normalize_then_sum" and method == "grpo":
        view.carry("multi_objective_aggregation", "rollout.separate_rewards", True)
    view.idle("multi_objective_aggregation", "rewards are summed, then normalised")
    scales = {"true": "group", "false": "none", "group": "group", "batch": "batch", "none": "none"}
    if view.recipe.get("rollout", {}).get("separate_rewards"):
        view.idle("scale_rewards", "each reward is normalised by itself")
    elif scale in scales and method == "grpo":
        view.carry("scale_rewards", "rollout.scale_rewards", scales[scale])
    view.idle("scale_rewards", "it has no effect on this method")
    pairs = {"sapo_temperatures": ("sapo_temperature_pos", "sapo_temperature_neg"),
             "vespo_weights": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")}  # fmt: skip
    for ours, keys in pairs.items():
        values = [view.number(key) for key in keys]
        there = [key for key in keys if view.has(key)]
        if there and loss == ours.partition("_")[0] and all(value is not None for value in values):
            view.carry(keys, f"rollout.{ours}", values)
        elif there:
            view.lose(there, f"would set {ours.partition('_')[0]}", f"rollout.{ours} takes all {len(keys)} of them.")


def _engine(view: Ledger) -> None:
    wanted = view.flag("use_vllm")
    url, host, port = view.text("vllm_server_base_url"), view.text("vllm_server_host"), view.integer("vllm_server_port")
    if wanted and (url or (host and host != "0.0.0.0" and view.text("vllm_mode") != "colocate")):
        address = url or f"http://{host}:{port or 8000}"
        view.carry(["vllm_server_base_url", "vllm_server_host", "vllm_server_port"], "rollout.server", address)
    elif wanted and host:
        view.lose(["vllm_server_host", "vllm_server_port"], "would generate on this server", _DO_VLLM)
    if wanted:
        view.carry("use_vllm", "rollout.engine", "vllm")
    keys = ("use_vllm", "vllm_server_base_url", "vllm_server_host", "vllm_server_port")
    view.idle(keys, "vLLM is taken where it is installed and there is room for it")


def _rewards(view: Ledger, job: Job) -> None:
    names, weights = view.names("reward_funcs") or [], view.raw("reward_weights")
    weights = weights if isinstance(weights, list) and len(weights) == len(names) else [1.0] * len(names)
    ours, lost = [], []
    for name, weight in zip(names, weights, strict=True):
        module, _, function = name.rpartition(".")
        if not module or not function.isidentifier() or not isinstance(weight, int | float):
            lost.append(name)
            continue
        path = job.local(f"{module.replace('.', '/')}.py")
        path = path if path.startswith("/") else f"./{path}"
        ours.append({"function": f"{path}:{function}", **({"weight": float(weight)} if weight != 1 else {})})
    if ours:
        view.carry(["reward_funcs", "reward_weights"], "rewards", ours, "called alike: prompts, completions, columns")
    if lost:
        do = f"Not carried: {', '.join(lost)}. rewards has exact-answer, numeric, regex, json-schema, python-tests."
        view.lose("reward_funcs", "would judge by these", do)
    view.idle("reward_weights", "there are no rewards for it")
    settle(view)
