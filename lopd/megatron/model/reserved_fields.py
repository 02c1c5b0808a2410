"""Fields of Megatron-Core's configurations that a ``megatron`` table may not set, and why.

Each table says who sets the field instead. A test compares the names with the fields of the
installed Megatron-Core, because a renamed field would no longer be refused.
"""

from __future__ import annotations

# For each field the knob of the same section that sets it.
KNOBS = {
    # Parallelism.
    "tensor_model_parallel_size": "parallel.tensor",
    "sequence_parallel": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert_tensor",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    # The optimizer.
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
    "clip_grad": "optimizer.clip_grad",
    "decoupled_lr": "optimizer.lr",
    "decoupled_min_lr": "optimizer.min_lr",
    # Number formats.
    "params_dtype": "dtype",
    "pipeline_dtype": "dtype",
    "bf16": "dtype",
    "fp16": "dtype",
    "autocast_dtype": "dtype",
    "enable_autocast": "dtype",
    # The rest of the section.
    "recompute_granularity": "recompute",
    "moe_aux_loss_coeff": "moe_aux_loss",
    "moe_router_load_balancing_type": "moe_aux_loss",
    "init_method_std": "init_std",
    "embedding_init_method_std": "init_std",
}

# Fields that the model's config.json sets. Another value would build another model than the weights
# belong to.
MODEL_SHAPE = frozenset(
    {
        # The sizes and the parts of every layer.
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "normalization",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "gated_linear_unit",
        "activation_func",
        "activation_func_clamp_value",
        "glu_linear_offset",
        "add_bias_linear",
        "add_qkv_bias",
        "qk_layernorm",
        "qk_l2_norm",
        # Positions and attention.
        "rotary_interleaved",
        "window_size",
        "window_attn_skip_freq",
        "softmax_scale",
        "softmax_type",
        "multi_latent_attention",
        "experimental_attention_variant",
        "attention_output_gate",
        "no_rope_freq",
        "mrope_section",
        "mtp_num_layers",
        "apply_residual_connection_post_layernorm",
        # Experts and their router.
        "num_moe_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_layer_freq",
        "moe_latent_size",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
        "moe_router_pre_softmax",
        "moe_router_score_function",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_topk_scaling_factor",
        "moe_router_enable_expert_bias",
        "is_hybrid_model",
        "heterogeneous_block_specs",
    }
)

# Reasons that several fields share.
_SUMS = "losses are sums, divided once by the global count"
_ADAMW = "checkpoints hold the state of AdamW"
_READ_WEIGHTS = "weights are read between steps, for checkpoints and weight syncs"
_ONE_CHUNK = "a rank holds one chunk of the model"
_OWN_LAYOUTS = "weights are loaded and exported by Megatron's own layouts"
_ALL_CONTEXT = "every sequence is cut over all context ranks"
_NO_LOGITS = "log-probabilities are computed without logits, in float32"
_ONE_LEVEL = "the process groups are made for one level of context ranks"

# For each field the reason why the trainer sets it and nobody else may.
TRAINER = {
    "calculate_per_token_loss": _SUMS,
    "average_in_collective": _SUMS,
    "variable_seq_lengths": "packed microbatches differ in length",
    "perform_initialization": "initialising marks the parameters that tensor ranks share",
    "use_cpu_initialization": "it follows the device",
    "optimizer": _ADAMW,
    "decoupled_weight_decay": _ADAMW,
    "overlap_param_gather": _READ_WEIGHTS,
    "overlap_param_gather_with_optimizer_step": _READ_WEIGHTS,
    "virtual_pipeline_model_parallel_size": _ONE_CHUNK,
    "microbatch_group_size_per_vp_stage": _ONE_CHUNK,
    "use_megatron_fsdp": _OWN_LAYOUTS,
    "use_custom_fsdp": _OWN_LAYOUTS,
    "init_model_with_meta_device": "weights are loaded into the model as it stands",
    "num_distributed_optimizer_instances": "the process groups are made for one instance",
    "hybrid_context_parallel": _ALL_CONTEXT,
    "max_seqlen_per_dp_cp_rank": _ALL_CONTEXT,
    "hierarchical_context_parallel_sizes": _ONE_LEVEL,
    "defer_embedding_wgrad_compute": "the output layer is part of the log-probabilities",
    "cross_entropy_loss_fusion": _NO_LOGITS,
    "cross_entropy_fusion_impl": _NO_LOGITS,
    "moe_enable_routing_replay": "distill.routing_replay sets it, with the rollouts' experts",
    "moe_token_dispatcher_type": "the alltoall dispatcher is tested in every layout",
}
