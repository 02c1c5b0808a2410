"""Lightning OPD in a bare Megatron-Core training loop: what a team with a training stack of its own
adds to it. README.md says what is what.

torchrun --nproc-per-node=2 examples/extend_megatron/train.py MODEL_FOLDER TEACHER_CACHE --tensor 2
--expert 2
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_patches

# before the rest of Megatron-Core is used; on a GPU, with Transformer Engine, your own stack does
# without
megatron_patches.apply()

from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    model_parallel_cuda_manual_seed,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from lopd import cache
from lopd.batching import ResponseOrder, build_microbatch, make_sample, plan_step
from lopd.megatron.weights.architecture import Architecture, read_architecture
from lopd.megatron.weights.transfer import load_hf
from lopd.objective import Lightning, TokenBatch, reduce_metrics
from lopd.records import Microbatch
from megatron_patches.layer_spec import local_spec


def build(arch: Architecture, options: argparse.Namespace) -> GPTModel:
    """Your model. ``calculate_per_token_loss``: the loss is a sum, and Megatron divides gradients
    by the global number of items.
    """
    config = TransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, num_attention_heads=arch.num_heads, num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim, ffn_hidden_size=arch.ffn_hidden_size, num_moe_experts=arch.num_experts or None, moe_router_topk=arch.experts_per_token,
        moe_ffn_hidden_size=arch.moe_ffn_hidden_size, moe_router_pre_softmax=not arch.norm_topk_prob, moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none", moe_router_dtype="fp32", normalization="RMSNorm", layernorm_epsilon=arch.norm_eps, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=arch.qkv_bias, qk_layernorm=arch.qk_norm, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=options.tensor, expert_model_parallel_size=options.expert, expert_tensor_parallel_size=1,
        sequence_parallel=options.tensor > 1, use_cpu_initialization=not torch.cuda.is_available(), bias_activation_fusion=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False, persist_layer_norm=False, calculate_per_token_loss=True,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    return GPTModel(
        config, local_spec(config, qk_norm=arch.qk_norm), arch.vocab_size, arch.max_position_embeddings, position_embedding_type="rope",
        rotary_base=arch.rope_theta, share_embeddings_and_output_weights=arch.tied_embeddings,
    )  # fmt: skip


def forward_step(
    objective: Lightning, microbatches: Iterator[Microbatch], model: Any
) -> tuple[torch.Tensor, Any]:
    """Megatron's forward_step_func, on a packed microbatch."""
    microbatch = next(microbatches)
    device = next(model.parameters()).device
    tokens, labels, bounds = (
        torch.as_tensor(column, device=device)
        for column in (microbatch.token_ids, microbatch.labels, microbatch.cu_seqlens)
    )
    longest = min(microbatch.max_seqlen, max(1, len(tokens) - (len(bounds) > 2)))
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    logits = model(
        tokens[None], None, None, packed_seq_params=packed
    )  # [1, T, vocabulary / tensor]

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        logprobs = -vocab_parallel_cross_entropy(
            output.squeeze(0).float().clone(), labels
        )  # [T], log p of each label
        result = objective(logprobs, TokenBatch.from_microbatch(microbatch, device))
        return (
            result.loss_sum,
            result.num_items,
            {
                "loss": result.loss_sum.detach().double(),
                "items": result.num_items.double(),
                **result.metric_sums,
            },
        )

    return logits, loss


def main(options: argparse.Namespace) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    mpu.initialize_model_parallel(
        options.tensor, expert_model_parallel_size=options.expert, expert_tensor_parallel_size=1
    )
    model_parallel_cuda_manual_seed(1)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    arch = read_architecture(options.model)
    if arch.num_experts and options.tensor > 1 and options.expert == 1:
        raise SystemExit(
            "with --tensor above 1 experts need --expert above 1 too: see README.md, traps"
        )
    module = build(arch, options).to(torch.cuda.current_device())
    load_hf(module, arch, options.model)
    model = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        module,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=options.lr, weight_decay=0.0, adam_beta2=0.98, use_distributed_optimizer=True
        ),
        [model],
    )

    samples = [
        make_sample(response, teacher_logprobs)
        for response, teacher_logprobs in cache.read_rows(options.cache)
    ]
    order = ResponseOrder(len(samples), options.batch_size, seed=options.seed)
    objective = Lightning(advantage_clip=10.0, aggregation="response_mean")
    data_rank, data_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    for step in range(options.steps):
        chosen = order.batch_indices(step)
        plan = plan_step(
            [len(samples[index]) for index in chosen], data_size, options.max_tokens, options.tensor
        )
        microbatches = [
            build_microbatch([samples[chosen[index]] for index in members], options.tensor)
            for members in plan[data_rank]
        ]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=partial(forward_step, objective), data_iterator=iter(microbatches), model=[model], num_microbatches=len(microbatches),
            seq_length=options.max_tokens, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        sums = torch.stack([torch.stack([*output.values()]) for output in outputs]).sum(dim=0)
        dist.all_reduce(sums, group=mpu.get_data_parallel_group())
        summed = dict(zip(outputs[0], sums.tolist(), strict=True))
        loss = summed.pop("loss") / summed.pop("items")
        if dist.get_rank() == 0:
            print(
                f"step {step + 1}  loss {loss!r}  advantage {reduce_metrics(summed)['advantage']:+.3f}",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of the student")
    parser.add_argument("cache", type=Path, help="teacher cache: folder of the score stage")
    for name, default in {
        "steps": 8,
        "batch_size": 16,
        "max_tokens": 4096,
        "tensor": 1,
        "expert": 1,
        "seed": 17,
    }.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-6)
    main(parser.parse_args())
