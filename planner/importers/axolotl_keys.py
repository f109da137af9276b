"""Axolotl's keys that need no arithmetic, read in axolotl 0.19 (``utils/schemas``): those without effect on what is
learned here, and those that are lost, each with the way out."""

from __future__ import annotations


def _spread(groups: dict[str, str]) -> dict[str, str]:
    return {key: why for why, keys in groups.items() for key in keys.split()}


_KERNELS = "finetui's own kernels are on by default (hardware.kernels), each proven on your GPU first"
_SHARING = "the planner decides how GPUs share the work, and says whether it fits (hardware.strategy)"
_MEMORY = "the planner decides what is kept and what is computed again (hardware.checkpointing)"
_PRECISION = "the planner decides it anew for your GPUs (hardware.precision)"
_TOKENIZER = "the model's own tokenizer and class are used, as its config.json says"
_DATA = "data is read, tokenised and kept by finetui itself, once for all ranks"
_WATCH = "every step is kept in the run's events: finetui attach, finetui logs"

#: Key to why it is not needed.
IDLE: dict[str, str] = _spread(
    {
        f"{_KERNELS}": "flash_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp "
        "flash_attn_fuse_qkv flash_optimum xformers_attention sdp_attention flex_attention flex_attn_compile_kwargs "
        "sage_attention eager_attention attn_implementation large_head_attention flash_attn_d512 sdpa_varlen "
        "fused_attn_kernel gemma4_hybrid_attn_impl lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
        "liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation "
        "liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling liger_kernel_impl "
        "cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks use_kernels use_scattermoe "
        "use_sonicmoe experts_implementation expert_backend moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast "
        "use_dsv4_kernels use_glm_dsa_kernels dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel torch_compile "
        "torch_compile_backend torch_compile_mode torch_compile_options deepcompile dpo_use_liger_kernel "
        "dpo_padding_free dpo_use_logits_to_keep tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "batch_flattening heads_k_stride ring_attn_func",
        _SHARING: "deepspeed fsdp fsdp_config fsdp_version fsdp_final_state_dict_type dp_shard_size dp_replicate_size "
        "tensor_parallel_size context_parallel_size context_parapllel_size sequence_parallel_degree ddp ddp_timeout "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters accelerator_config device device_map "
        "world_size local_rank max_memory gpu_memory_limit low_cpu_mem_usage lora_on_cpu expert_parallel_size "
        "expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes "
        "expert_parallel_token_capacity expert_parallel_fallback_on_unsupported qlora_sharded_model_loading "
        "experimental_skip_move_to_device use_ray ray_run_name ray_num_workers resources_per_worker",
        _MEMORY: "gradient_checkpointing gradient_checkpointing_kwargs selective_checkpointing activation_offloading "
        "layer_offloading ple_cpu_offload gc_steps gc_collect_steps torch_empty_cache_steps",
        _PRECISION: "bf16 bfloat16 tf32 float32 torch_dtype fp32_norms fp32_norm_classes embeddings_skip_upcast "
        "peft_autocast_adapter_dtype",
        _TOKENIZER: "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files "
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model type_of_model "
        "cls_model_config base_model_ignore_patterns hf_use_auth_token",
        _DATA: "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory skip_prepare_dataset "
        "dataset_shard_num dataset_shard_idx num_dataset_shards_to_save dataloader_pin_memory dataloader_num_workers "
        "dataloader_prefetch_factor dataloader_drop_last remove_unused_columns push_dataset_to_hub preprocess_iterable "
        "is_preprocess total_num_tokens total_supervised_tokens axolotl_config_path streaming_multipack_buffer_size "
        "pretrain_multipack_buffer_size",
        "rows are packed by finetui's own packing, without attention between examples": "sample_packing_group_size "
        "sample_packing_bin_size sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est "
        "sample_packing_seq_len_multiplier multipack_real_batches pretrain_multipack_attn "
        "pretraining_sample_concatenation pad_to_sequence_len pad_to_multiple_of eval_sample_packing",
        _WATCH: "logging_steps use_tensorboard include_tokens_per_second include_tkps debug profiler_steps "
        "profiler_steps_start capabilities env_capabilities",
        "the planner picks the micro batch of an evaluation, too": "eval_batch_size auto_find_batch_size",
        "a run's folder is its own: finetui run --name": "output_dir",
        "a run resumes by finetui resume, and by itself after a fault": "auto_resume_from_checkpoints "
        "dynamic_checkpoint save_only_model save_safetensors save_first_step",
        "held-out loss is measured at the start and at the end in any case": "do_causal_lm_eval",
        "it had no effect on what is learned": "strict test_value torchdistx_path eval_table_size "
        "eval_table_max_new_tokens eval_max_new_tokens max_packed_sequence_len fix_untrained_tokens",
        "it is for other verbs of axolotl": "gradio_title gradio_share gradio_server_name gradio_server_port "
        "gradio_max_new_tokens gradio_temperature merge_lora merge_method vllm quantization",
        "plain rows are what rewards and templates get": "chat_template_kwargs",
    }
)

_TRACK = "would log there||Look at the run with finetui attach, or with TensorBoard at runs/<name>/tensorboard."
_HUB = "would upload what was trained||Upload runs/<name>/output with: hf upload"
_QUANT = "would train for, or store, other bits||finetui has tuning types qlora (NF4) and lora-fp8."
_IMAGES = "would train on images or sound||finetui trains on text alone."
_PATTERN = "would give layers another rank, scale or place||One rank and scale is used for all targets."
_RATE = "would give some weights a rate of their own||One rate is used; tuning.lora_plus_ratio splits A from B."
_RELORA = "would merge and restart the adapter on the way||A higher tuning.rank comes near it."
_POSE = "would train on stretched or skipped positions||Train with sequence_length as long as you need."
_SAMPLES = "would print what the model says on the way||Ask it afterwards: finetui chat."
_EVAL = "would measure with another tool||Loss on held-out rows is measured; ask the model with finetui chat."
_MASK = "would choose which tokens count||Look at it with finetui data; train_on has answers, last-answer, all."
_VOCABULARY = "would change the vocabulary||Add words with tuning.new_tokens; their rows are trained."
_OWN = "would run Python code of yours or of a plugin||Nothing like it is run."
_ORDER = "would keep the order of the rows||Rows are shuffled by seed."

#: Key to what it did and what to do instead: ``what||do``.
LOST: dict[str, str] = _spread(
    {
        _TRACK: "use_wandb wandb_project wandb_entity wandb_name wandb_run_id wandb_mode wandb_watch wandb_log_model "
        "use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet "
        "comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config use_trackio trackio_project_name trackio_run_name trackio_space_id use_otel_metrics "
        "otel_metrics_host otel_metrics_port use_swanlab swanlab_project swanlab_experiment_name swanlab_description "
        "swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model swanlab_web_host swanlab_api_host "
        "swanlab_lark_webhook_url swanlab_lark_secret swanlab_log_completions swanlab_completion_log_interval "
        "swanlab_completion_max_buffer",
        _HUB: "hub_model_id hub_strategy hub_revision",
        _QUANT: "gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama fp8 fp8_config "
        "fp8_enable_fsdp_float8_all_gather quantize_moe_experts model_quantization_config "
        "model_quantization_config_kwargs bnb_config_kwargs use_onebitllms nonexpert_quantization "
        "dsv4_fp8_nonexpert_mode dsv4_bf16_all dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert "
        "nvfp4_merge_aware nvfp4_merge_aware_start_step llmcompressor qat",
        _IMAGES: "processor_type processor_kwargs image_size image_resize_algorithm role_boundaries freeze_mm_modules",
        _PATTERN: "lora_rank_pattern lora_alpha_pattern peft_layers_to_transform peft_layers_pattern "
        "peft_layer_replication lora_fan_in_fan_out peft_trainable_token_indices peft_ensure_weight_tying "
        "loraplus_lr_embedding mora",
        _RATE: "embedding_lr embedding_lr_scale lr_groups",
        _RELORA: "relora relora_steps relora_warmup_steps relora_anneal_steps relora_prune_ratio relora_prune_method "
        "relora_cpu_offload jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps",
        "would train a few random layers at a time (LISA)||tuning: {type: freeze, trained_layers: N} trains the last "
        "ones.": "lisa_n_layers lisa_step_interval lisa_layers_attribute",
        "would train the layers with the most signal (Spectrum)||tuning: {type: freeze, trained_modules: [...]} trains "
        "the ones you name.": "spectrum_top_fraction spectrum_model_name",
        _POSE: "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks rope_scaling s2_attention "
        "overrides_of_model_config model_config overrides_of_model_kwargs scaling_softmax scaling_softmax_factor "
        "scaling_softmax_bias",
        _SAMPLES: "generate_samples num_generation_samples generation_max_new_tokens generation_temperature "
        "generation_top_p generation_top_k generation_prompt_ratio generation_do_sample dpo_generate_during_eval",
        _EVAL: "eval_causal_lm_metrics do_bench_eval bench_dataset bench_split lm_eval_tasks lm_eval_batch_size "
        "lm_eval_post_train lm_eval_model metric_for_best_model greater_is_better",
        _MASK: "eot_tokens",
        _VOCABULARY: "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings added_tokens_overrides "
        "tokenizer_config tokenizer_use_mistral_common",
        _OWN: "trainer_cls grokfast_alpha grokfast_lamb dense_mixer hatchery nemo_gym_enabled nemo_gym_dir "
        "nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port nemo_gym_server_timeout nemo_gym_verify_timeout "
        "nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name nemo_gym_multi_turn "
        "nemo_gym_max_turns",
        _ORDER: "curriculum_sampling",
        "would begin with random weights||Give a folder with the weights to begin with.": "reinit_weights",
        "would read its config, not the model's||Give the folder of one model.": "base_model_config",
        "would take this revision of the model||Download it, and give its folder as model.": "revision_of_model",
        "would change how experts are built||They are trained as the model has them.": "llama4_linearized_experts",
        "would put rows of like length into one batch||Packing spares more padding: packing: auto.": "group_by_length",
        "would begin every chat with this||Put it into the rows as a system message.": "default_system_message",
        "would leave out rows that are there twice||Leave them out of the file.": "dataset_exact_deduplication",
        "would leave out shorter rows||Leave them out of the file.": "min_sample_len",
        "would cut prompts||sequence_length cuts the whole row.": "max_prompt_len",
        "would cut rows of evaluation elsewhere||sequence_length is for all rows.": "eval_sequence_len",
        "would stop at a loss above this||limits.explosion stops at a loss so far above the latest.": ""
        "loss_watchdog_threshold loss_watchdog_patience",
        "would continue from a checkpoint of axolotl||Finish that run there; or continue from its adapter: "
        "tuning.start_from.": "resume_from_checkpoint",
        "would move the rate otherwise||optimizer has schedule, warmup_ratio and min_rate.": ""
        "lr_quadratic_warmup lr_div_factor cosine_constant_lr_ratio eta_min",
        "would set options of the optimiser||Look at optimizer: betas, epsilon, projection_rank.": ""
        "optim_args optim_target_modules adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction "
        "dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant "
        "qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size",
        "would pull the mean reward to 0||Only the difference of rewards counts.": "center_rewards_coefficient",
        "would have another number of scores||A reward model here has one.": "num_labels",
        "would weigh pairs by their probability (WPO)||preference.loss has other losses.": "dpo_use_weighting",
        "would normalise the loss||preference.loss: sigmoid_norm does.": "dpo_norm_loss",
    }
)
