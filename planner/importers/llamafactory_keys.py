"""LLaMA-Factory's keys that need no arithmetic (``hparams`` of 0.9.5), beside those of transformers."""

from __future__ import annotations

#: Its templates to ours; ``auto`` is the tokenizer's own.
TEMPLATES: dict[str, str] = {
    "chatml": "chatml", "cohere": "cohere", "deepseek3": "deepseekv3", "gemma": "gemma", "gemma2": "gemma",
    "gemma3": "gemma3", "glm4_moe": "glm4moe", "gpt_oss": "gptoss", "llama3": "llama3", "phi": "phi3",
    "qwen": "qwen2_5", "qwen3": "qwen3", "qwen3_nothink": "qwen3_instruct_2507",
}  # fmt: skip


def _spread(groups: dict[str, str]) -> dict[str, str]:
    return {key: why for why, keys in groups.items() for key in keys.split()}


IDLE: dict[str, str] = _spread(
    {
        "finetui's own kernels are on by default (hardware.kernels), each proven on your GPU first": "flash_attn "
        "enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels use_kernels",
        "the planner decides what is kept and what is computed again (hardware.checkpointing)": "use_reentrant_gc "
        "disable_gradient_checkpointing",
        "the planner decides how GPUs share the work, and says whether it fits (hardware.strategy)": "device_map "
        "quantization_device_map offload_folder low_cpu_mem_usage ray_num_workers ray_init_kwargs ray_run_name "
        "ray_storage_path placement_strategy resources_per_worker master_addr master_port "
        "fsdp_transformer_layer_cls_to_wrap data_shared_file_system",
        "the planner decides it anew for your GPUs (hardware.precision)": "compute_dtype infer_dtype upcast_layernorm "
        "upcast_lmhead_output",
        "data is read, tokenised and kept by finetui itself, once for all ranks": "overwrite_cache "
        "preprocessing_num_workers preprocessing_batch_size buffer_size tokenized_path cache_dir "
        "ignore_pad_token_for_loss",
        "every step is kept in the run's events; finetui report draws the curves": "plot_loss "
        "include_effective_tokens_per_second include_num_input_tokens_seen print_param_status",
        "it is for other verbs of LLaMA-Factory": "infer_backend use_kv_cache export_dir export_size export_device "
        "export_quantization_bit export_quantization_dataset export_quantization_nsamples export_quantization_maxlen "
        "export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
        "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend "
        "predict_with_generate do_sample num_beams max_length length_penalty skip_special_tokens repetition_penalty "
        "temperature top_p top_k max_new_tokens eval_num_beams",
        "the model's own tokenizer is used": "use_fast_tokenizer split_special_tokens",
        "its switch is off, or it has no effect on this method": "galore_target galore_rank galore_update_interval "
        "galore_scale galore_proj_type galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale "
        "apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front badam_mode "
        "badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose "
        "asft_alpha eaft_alpha ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards pref_beta "
        "pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma "
        "ld_alpha fp8_backend fp8_enable_fsdp_float8_all_gather",
        "it is what finetui does": "resize_vocab",
    }
)

_IMAGES = "would train on images or sound||finetui trains on text alone."
_STRETCH = "would stretch or shift attention||Train with sequence_length as long as you need."
_TRACK = "would log there||Look at the run with finetui attach, or with TensorBoard at runs/<name>/tensorboard."
_MIX = "would mix datasets by turns||weight of a source says how often its rows are seen."
_WORDS = "would add words to the vocabulary||tuning.new_tokens lists them; with lora, qlora or full."
_TOKENS = "would be handed to a hub||Set HF_TOKEN in the environment."
_OTHER = "would train on another program (KTransformers, Megatron, HyperParallel)||Nothing like it is run."
_REFERENCE = "would compare with another model||The reference is the model that training begins with."
_PROFILE = "would profile steps with torch||finetui bench measures where the time goes."

LOST: dict[str, str] = _spread(
    {
        _IMAGES: "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model",
        _STRETCH: "rope_scaling shift_attn mixture_of_depths",
        _TRACK: "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
        "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
        _MIX: "mix_strategy interleave_probs",
        _WORDS: "add_tokens add_special_tokens new_special_tokens_config init_special_tokens",
        _TOKENS: "hf_hub_token ms_hub_token om_hub_token",
        _OTHER: "use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_config "
        "kt_lora_expert_intermediate_size use_mca use_hyper_parallel hyper_parallel_args tensor_model_parallel_size "
        "pipeline_model_parallel_size expert_model_parallel_size context_parallel_size sequence_parallel "
        "bias_activation_fusion apply_rope_fusion use_distributed_optimizer overlap_param_gather overlap_grad_reduce "
        "moe_grouped_gemm moe_token_dispatcher_type recompute_granularity",
        _REFERENCE: "ref_model ref_model_adapters ref_model_quantization_bit",
        _PROFILE: "enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps "
        "profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack "
        "profile_modules",
        "would judge answers by a model||finetui's ppo takes rewards, functions of yours.": "reward_model "
        "reward_model_adapters reward_model_quantization_bit reward_model_type",
        "would update by BAdam||optimizer.name has galore and apollo, which spare it too.": "use_badam",
        "would update by Adam-mini||optimizer.name has adamw-8bit, which spares more.": "use_adam_mini",
        "would hold the model near its start (ASFT)||loss: dft is it without the anchor.": "use_asft_loss",
        "would weigh tokens (DFT, EAFT)||loss has both, for sft and pretrain.": "use_dft_loss use_eaft_loss",
        "would compute in 8 bits||tuning.type: lora-fp8 does, for adapters.": "fp8",
        "would begin with random weights||Give a folder with the weights to begin with.": "train_from_scratch",
        "would take this revision of the model||Download it, and give its folder as model.": "model_revision",
        "would begin every chat with this||Put it into the rows as a system message.": "default_system",
        "would write tools otherwise||The chat template writes them; finetui data shows it.": "tool_format",
        "would write reasoning otherwise||finetui data shows what the template makes.": "enable_thinking "
        "preserve_thinking",
        "would measure each dataset by itself||Loss is measured over all held-out rows.": "eval_on_each_dataset",
        "would measure accuracy||Loss on held-out rows is measured; of preferences accuracy, too.": "compute_accuracy",
        "would log to MLflow||Look at the run with finetui attach, or with TensorBoard.": "mlflow_tracking_uri",
        "would keep the order of the rows||Rows are shuffled by seed.": "disable_shuffling",
        "would balance the experts' load||The load is left as it is.": "moe_aux_loss_coef",
        "would find the adapter in this folder of a hub||Give its folder as tuning.start_from.": "adapter_folder",
    }
)
