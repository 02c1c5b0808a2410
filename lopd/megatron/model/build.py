"""The Megatron-Core model: its configuration, construction, random weights, and the forward pass
over packed sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lopd.config import ParallelSection
from lopd.megatron.model import engine
from lopd.megatron.model.fusions import engine_fusions, fuse_weight_gradients
from lopd.megatron.model.logprobs import token_logprobs
from lopd.megatron.model.overrides import build
from lopd.megatron.ranks import parallel as ranks
from lopd.megatron.weights.architecture import Architecture, validate_layout
from lopd.megatron.weights.hf_mapping import hf_shapes
from lopd.megatron.weights.transfer import load_tensors
from megatron_patches.layer_spec import decoder_spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LogprobModel(GPTModel):
    """Megatron's GPTModel, which given labels gives their log-probabilities and never the logits of
    all tokens.

    Without labels it is GPTModel: logits. What the output layer does around its product (gather the
    tokens of sequence-parallel ranks, sum their gradients) is done here, by Megatron's own
    functions; its weight keeps its place and name.
    """

    def __init__(self, *, num_tokens_known: int, **settings: Any) -> None:
        """num_tokens_known: size of the tokenizer's vocabulary; rows past it (settings' vocab_size
        may be more) are padding. settings: of GPTModel.
        """
        super().__init__(**settings)
        self._num_tokens_known = num_tokens_known
        self._with_entropy = False

    def forward(self, *inputs: Any, entropy: bool = False, **named: Any) -> Any:
        self._with_entropy = entropy
        return super().forward(*inputs, **named)

    def _postprocess(self, *, hidden_states: Tensor, labels: Tensor | None, **rest: Any) -> Any:
        """GPTModel calls this after its decoder. Last stage with labels [1, T, ...]: (logprobs [T,
        ...], entropy [T] or None).
        """
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        group = ranks.tensor_group()
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return token_logprobs(
            hidden_states.squeeze(1),
            weight,
            labels.squeeze(0),
            group=group,
            vocab_size=self._num_tokens_known,
            entropy=self._with_entropy,
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        raise AssertionError(
            "Megatron-Core no longer ends in _postprocess: it would give cross entropy in place of log-probabilities"
        )


def build_model(
    arch: Architecture,
    *,
    parallel: ParallelSection,
    dtype: str,
    recompute: str,
    moe_aux_loss: float,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """This rank's part of the model on its device, in training mode, with arbitrary weights
    (load_hf or init_random come next).

    A GPTModel, in Megatron's Float16Module where dtype is bfloat16; ``model.config`` is its
    TransformerConfig, with calculate_per_token_loss set: losses are
    sums, and finalize_model_grads divides by the number of items. recompute: none, selective
    (selective_modules) or full. moe_aux_loss: coefficient of the
    load-balancing loss. overrides: fields of TransformerConfig that win over ours
    (lopd.megatron.model.overrides).
    ConfigError: the layout does not divide the model or needs Transformer Engine where it is not,
    or Megatron-Core refuses the settings.
    """
    validate_layout(arch, parallel)
    for problem in engine.context_problems(parallel, dtype):
        raise problem
    config = transformer_config(
        arch,
        parallel=parallel,
        dtype=dtype,
        recompute=recompute,
        moe_aux_loss=moe_aux_loss,
        overrides=overrides,
    )
    model = LogprobModel(
        num_tokens_known=arch.vocab_size,
        config=config,
        transformer_layer_spec=decoder_spec(
            config, qk_norm=arch.qk_norm, engine=engine.uses_engine(dtype)
        ),
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        pre_process=ranks.is_first_stage(),
        post_process=ranks.is_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope" if arch.yarn is None else "yarn",
        rotary_base=arch.rope_theta,
        rope_scaling=arch.rope_factor != 1,
        rope_scaling_factor=arch.rope_factor,
    ).to(ranks.device())
    model.train()
    if engine.uses_engine(dtype) and (overrides or {}).get("gradient_accumulation_fusion", True):
        fuse_weight_gradients(model)
    return Float16Module(config, model) if dtype == "bfloat16" else model


def transformer_config(
    arch: Architecture,
    *,
    parallel: ParallelSection,
    dtype: str,
    recompute: str,
    moe_aux_loss: float,
    overrides: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Megatron-Core's configuration of this architecture. The local layers get no fused kernels;
    Transformer Engine's, see fusions.py.
    """
    settings: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "sequence_parallel": parallel.tensor
        > 1,  # MoE with tensor parallelism demands it; for dense models it saves memory
        "variable_seq_lengths": parallel.pipeline
        > 1,  # packed microbatches differ in length: stages tell each other the shape
        # looked at for dense models too: the default refuses variable_seq_lengths
        "moe_token_dispatcher_type": "alltoall",
        "params_dtype": DTYPES[dtype],
        "pipeline_dtype": DTYPES[dtype],
        "bf16": dtype == "bfloat16",
        "attention_softmax_in_fp32": True,
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # Megatron's random weights are overwritten at once, but only while drawing them does it
        # mark parameters as split over tensor ranks. Without the mark the gradient norm counts them
        # on the first tensor rank alone, and clipping is wrong.
        "perform_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    if arch.num_experts:
        settings |= {
            "num_moe_experts": arch.num_experts,
            "moe_router_topk": arch.experts_per_token,
            "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
            # a softmax over the chosen logits IS the softmax over all, normalised over the chosen
            "moe_router_pre_softmax": not arch.norm_topk_prob,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss" if moe_aux_loss > 0 else "none",
            "moe_aux_loss_coeff": moe_aux_loss,
            "moe_grouped_gemm": engine.uses_engine(dtype),  # one product for all experts of a rank
        }
    if engine.uses_engine(dtype):
        settings |= engine_fusions(arch)
    if recompute == "selective":
        settings |= {
            "recompute_granularity": "selective",
            "recompute_modules": selective_modules(arch, engine=engine.uses_engine(dtype)),
        }
    elif recompute == "full":
        settings |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    config = build(TransformerConfig, {**settings, **(overrides or {})})
    if arch.yarn is not None:  # GPTModel and its attention look for these, which are no fields
        config.yarn_rotary_scaling_factor = arch.yarn.factor
        config.yarn_original_max_position_embeddings = arch.yarn.original_len
        config.yarn_beta_fast, config.yarn_beta_slow = arch.yarn.beta_fast, arch.yarn.beta_slow
        config.yarn_mscale = config.yarn_mscale_all_dim = (
            None  # queries and keys times 0.1 ln(factor) + 1
        )
        config.yarn_correction_range_round_to_int = arch.yarn.truncate
    return config


def selective_modules(arch: Architecture, *, engine: bool) -> list[str]:
    """What recompute = "selective" computes again: where the most memory is for the least time.

    Transformer Engine's attention keeps next to nothing, so there it is the feed-forward part: with
    experts most of what a layer keeps, for a third of a forward pass's operations (Qwen3-30B-A3B at
    8,000 tokens) and the experts' exchange. The local attention does keep its scores, and is
    computed again.
    """
    if not engine:
        return ["core_attn"]
    return ["moe"] if arch.num_experts else ["mlp"]


def init_random(model: Any, arch: Architecture, *, std: float, seed: int) -> None:
    """Fill the model with normal weights of this standard deviation (norms: 1), the same for every
    layout: each Hugging Face tensor has a seed of its own.
    """
    shapes = hf_shapes(arch)

    def tensor(name: str) -> Tensor:
        if len(shapes[name]) == 1:
            return torch.zeros(shapes[name]) if name.endswith("bias") else torch.ones(shapes[name])
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randn(shapes[name], generator=generator) * std

    load_tensors(model, arch, tensor)


def forward(
    model: Any,
    *,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    entropy: bool = False,
) -> Any:
    """What the model makes of packed sequences; what else it gives depends on the pipeline stage
    and on labels.

    Last stage with labels: (logprobs, as lopd.megatron.model.logprobs.token_logprobs gives them,
    entropy [T] or None), the same on every tensor rank. Last stage without labels: float32 logits
    [1, T, vocabulary / tp], padded columns included. Other stages: hidden states.

    token_ids int64 [T]: sequences one after the other; T divides by tp (pad with one more
    sequence). cu_seqlens int32 [S+1]: their bounds, from 0 to T. Of several context ranks each
    gives its part of every sequence (lopd.batching.context), and T times their number is the last
    of the bounds. max_seqlen: length of the longest, or more. labels int64 [T]: the tokens that
    follow, or any where it does not matter; [T, K] for several. Positions start at 0 in each
    sequence; position_ids are ignored (rotary embeddings count from cu_seqlens).
    """
    length = token_ids.shape[0]
    assert length % ranks.tensor_size() == 0, (
        f"{length} tokens do not divide by {ranks.tensor_size()} tensor ranks"
    )
    # Megatron takes a rotary table as long as the whole row for one of absolute positions. Only a
    # lone sequence may look like that.
    whole = length * ranks.context_size()
    longest = min(max_seqlen, whole) if cu_seqlens.numel() == 2 else min(max_seqlen, whole - 1)
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
    if (
        whole > length
    ):  # Transformer Engine demands them; the same tensors say that there is no room between sequences: what pads them is computed as tokens
        bounds |= {"cu_seqlens_q_padded": cu_seqlens, "cu_seqlens_kv_padded": cu_seqlens}
    packed = PackedSeqParams(
        qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest, **bounds
    )
    positions = None if position_ids is None else position_ids.unsqueeze(0)
    wanted = {} if labels is None else {"labels": labels.unsqueeze(0), "entropy": entropy}
    return model(token_ids.unsqueeze(0), positions, None, packed_seq_params=packed, **wanted)
