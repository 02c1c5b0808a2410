"""The Megatron-Core model: construction, random weights, the forward pass over packed sequences."""

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
from torch import Tensor

from lopd.config import ParallelSection
from lopd.megatron.model import engine
from lopd.megatron.model.fusions import fuse_weight_gradients
from lopd.megatron.model.logprobs import token_logprobs
from lopd.megatron.model.routing_replay import forget_routers
from lopd.megatron.model.transformer_config import transformer_config
from lopd.megatron.ranks import parallel as ranks
from lopd.megatron.weights.architecture import Architecture, validate_layout
from lopd.megatron.weights.hf_mapping import hf_shapes
from lopd.megatron.weights.transfer import load_tensors
from megatron_patches.layer_spec import decoder_spec


class LogprobModel(GPTModel):
    """Megatron's GPTModel that returns log-probabilities instead of the logits of all tokens.

    It does so if it is given labels. Without labels it is GPTModel and returns logits.
    """

    def __init__(self, *, num_tokens_known: int, **settings: Any) -> None:
        """Build the model.

        Args:
            num_tokens_known: The size of the tokenizer's vocabulary. The rows of the output layer
                past it are padding.
            settings: The arguments of GPTModel. Their vocab_size includes the padding.
        """
        super().__init__(**settings)
        self._num_tokens_known = num_tokens_known
        self._with_entropy = False

    def forward(self, *inputs: Any, entropy: bool = False, **named: Any) -> Any:
        # GPTModel.forward has no such argument and passes none on, so _postprocess finds it here.
        self._with_entropy = entropy
        return super().forward(*inputs, **named)

    def _postprocess(self, *, hidden_states: Tensor, labels: Tensor | None, **rest: Any) -> Any:
        """GPTModel calls this after its decoder.

        On the last stage with labels [1, T, ...] it returns the log-probabilities [T, ...] and the
        entropies [T] or None.
        """
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        group = ranks.tensor_group()
        # The output layer is not called, because it would make the logits. What it does around its
        # product is done here by Megatron's own functions: it gathers the tokens of
        # sequence-parallel ranks, and it sums the gradient of the hidden states over tensor ranks.
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        # The weight keeps its place and its name, so loading, export and the optimizer see no
        # difference.
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        # Hidden states are [T, 1, H] in Megatron, labels [1, T, ...].
        return token_logprobs(
            hidden_states.squeeze(1),
            weight,
            labels.squeeze(0),
            group=group,
            vocab_size=self._num_tokens_known,
            entropy=self._with_entropy,
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Stop: GPTModel calls this only if it no longer calls _postprocess."""
        raise AssertionError(
            "Megatron-Core no longer ends in _postprocess: it would give cross entropy in place of"
            " log-probabilities"
        )


def build_model(
    arch: Architecture,
    *,
    parallel: ParallelSection,
    dtype: str,
    recompute: str,
    moe_aux_loss: float,
    routing_replay: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Return this rank's part of the model on its device, in training mode.

    Its weights are arbitrary. load_hf or init_random come next.

    Args:
        arch: The architecture of the whole model.
        parallel: The layout of the ranks.
        dtype: "float32" or "bfloat16".
        recompute: What the backward pass computes again: "none", "selective" or "full".
        moe_aux_loss: The coefficient of the load-balancing loss.
        routing_replay: Whether routers can replay recorded choices (routing_replay.py).
        overrides: Fields of TransformerConfig that win over ours (lopd.megatron.model.overrides).

    Returns:
        A GPTModel, inside of Megatron's Float16Module if dtype is bfloat16. ``model.config`` is its
        TransformerConfig.

    Raises:
        ConfigError: The layout does not divide the model, or it needs Transformer Engine and that
            is missing, or Megatron-Core refuses the settings.
    """
    # Both checks first, because Megatron-Core would fail later, with an assertion.
    validate_layout(arch, parallel)
    for problem in engine.context_problems(parallel, dtype):
        raise problem
    config = transformer_config(
        arch,
        parallel=parallel,
        dtype=dtype,
        recompute=recompute,
        moe_aux_loss=moe_aux_loss,
        routing_replay=routing_replay,
        overrides=overrides,
    )
    uses_engine = engine.uses_engine(dtype)
    model = LogprobModel(
        num_tokens_known=arch.vocab_size,
        config=config,
        transformer_layer_spec=decoder_spec(config, qk_norm=arch.qk_norm, engine=uses_engine),
        # Padding included, so that it divides by the tensor ranks.
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        # Only the first stage has the embedding, and only the last one the norm and the output
        # layer.
        pre_process=ranks.is_first_stage(),
        post_process=ranks.is_last_stage(),
        # Every tensor rank keeps its columns of the logits.
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope" if arch.yarn is None else "yarn",
        rotary_base=arch.rope_theta,
        # Llama 3 scales its rotary frequencies in Megatron-Core itself.
        rope_scaling=arch.rope_factor != 1,
        rope_scaling_factor=arch.rope_factor,
    ).to(ranks.device())
    forget_routers()
    # Megatron-Core computes the balancing loss, and computes activations again, in training mode
    # only.
    model.train()
    # The user may switch this fusion off by its own name.
    if uses_engine and (overrides or {}).get("gradient_accumulation_fusion", True):
        fuse_weight_gradients(model)
    return Float16Module(config, model) if dtype == "bfloat16" else model


def init_random(model: Any, arch: Architecture, *, std: float, seed: int) -> None:
    """Fill the model with random weights that are the same for every layout of ranks.

    Args:
        model: This rank's part of the model.
        arch: The architecture of the whole model.
        std: The standard deviation of the normal distribution. Norms are 1 and biases 0.
        seed: The seed of all weights together.
    """
    shapes = hf_shapes(arch)

    def tensor(name: str) -> Tensor:
        if len(shapes[name]) == 1:
            return torch.zeros(shapes[name]) if name.endswith("bias") else torch.ones(shapes[name])
        # Each Hugging Face tensor has a seed of its own, made of its name. So it does not matter
        # which rank draws which tensors. 7 bytes fit into the 64 signed bits of a seed.
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        # On the CPU, so that the numbers do not depend on the device.
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
    """Run the model over packed sequences.

    Of several context ranks each gives its part of every sequence (lopd.batching.context). The last
    of the bounds is then T times the number of context ranks.

    Args:
        model: This rank's part of the model.
        token_ids: int64 [T], the sequences one after the other. T must divide by tp: pad it with
            one more sequence.
        cu_seqlens: int32 [S+1], the bounds of the sequences, from 0 to T.
        max_seqlen: The length of the longest sequence, or more.
        position_ids: They are ignored. Rotary embeddings count from cu_seqlens, so positions start
            at 0 in each sequence.
        labels: int64 [T], the tokens that follow, or any token where it does not matter. [T, K] for
            several tokens.
        entropy: Whether the entropies are wanted in addition to the log-probabilities.

    Returns:
        On the last stage with labels: (log-probabilities, entropies or None), as token_logprobs
        gives them, the same on every tensor rank. On the last stage without labels: float32 logits
        [1, T, vocabulary / tp], padded columns included. On other stages: the hidden states.
    """
    length = token_ids.shape[0]
    assert length % ranks.tensor_size() == 0, (
        f"{length} tokens do not divide by {ranks.tensor_size()} tensor ranks"
    )
    # Megatron takes a rotary table as long as the whole row for a table of absolute positions. Only
    # a row of one sequence may look like that, so otherwise the longest is given as shorter.
    whole = length * ranks.context_size()
    is_single = cu_seqlens.numel() == 2
    longest = min(max_seqlen, whole) if is_single else min(max_seqlen, whole - 1)
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
    # With context ranks Transformer Engine demands the padded bounds as well. The same tensors say
    # that nothing lies between sequences: what pads them is computed like tokens.
    if whole > length:
        bounds |= {"cu_seqlens_q_padded": cu_seqlens, "cu_seqlens_kv_padded": cu_seqlens}
    packed = PackedSeqParams(
        qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest, **bounds
    )
    positions = None if position_ids is None else position_ids.unsqueeze(0)
    # Without labels the model may be any GPTModel, which knows no entropy.
    wanted = {} if labels is None else {"labels": labels.unsqueeze(0), "entropy": entropy}
    # A packed microbatch is one row of a batch of size 1. There is no attention mask: it follows
    # from the bounds.
    return model(token_ids.unsqueeze(0), positions, None, packed_seq_params=packed, **wanted)
