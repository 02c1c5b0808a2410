"""Lightning OPD in a bare Megatron-Core training loop: what a team adds to a stack of its own.

On a CPU or on one GPU, in one process:

    python examples/extend_megatron/train.py MODEL_FOLDER TEACHER_CACHE

On several GPUs, or with several processes on a CPU:

    torchrun --nproc-per-node=2 examples/extend_megatron/train.py MODEL_FOLDER TEACHER_CACHE \\
        --tensor 2 --expert 2

README.md beside this file says which lines to take over, and which traps to avoid.
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

# Before the rest of Megatron-Core is used. It lets Megatron-Core run on a CPU over gloo. A stack on
# GPUs with Transformer Engine does without it.
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
    """Build the model, which is yours to replace."""
    config = TransformerConfig(
        # The method needs this one. The loss of a microbatch is a sum, and Megatron divides the
        # gradient once, by the number of tokens over all microbatches and data-parallel ranks. So
        # neither the packing nor the number of ranks changes the gradient.
        calculate_per_token_loss=True,
        # Shape, as in the config.json of the model.
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        # Experts. Router probabilities in float32: in bfloat16 near ties go to other experts.
        num_moe_experts=arch.num_experts or None,
        moe_router_topk=arch.experts_per_token,
        moe_ffn_hidden_size=arch.moe_ffn_hidden_size,
        moe_router_pre_softmax=not arch.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        # Dropout would make the student's log-probabilities those of another policy.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Layout of the ranks. Experts with tensor parallelism need sequence parallelism.
        tensor_model_parallel_size=options.tensor,
        expert_model_parallel_size=options.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=options.tensor > 1,
        # Fused kernels need Transformer Engine or apex. Your stack sets its own.
        use_cpu_initialization=not torch.cuda.is_available(),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    # The optimizer step does not call it by itself: this field is where Megatron looks it up.
    config.finalize_model_grads_func = finalize_model_grads
    return GPTModel(
        config=config,
        transformer_layer_spec=local_spec(config, qk_norm=arch.qk_norm),
        vocab_size=arch.vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        share_embeddings_and_output_weights=arch.tied_embeddings,
    )


def forward_step(
    objective: Lightning, microbatches: Iterator[Microbatch], model: Any
) -> tuple[torch.Tensor, Any]:
    """Run the model on a packed microbatch. This is Megatron's forward_step_func."""
    microbatch = next(microbatches)
    device = next(model.parameters()).device
    tokens = torch.as_tensor(microbatch.token_ids, device=device)  # [T]
    labels = torch.as_tensor(microbatch.labels, device=device)  # [T]
    # Sequence i has the tokens bounds[i] to bounds[i + 1]. Attention does not cross a bound.
    bounds = torch.as_tensor(microbatch.cu_seqlens, device=device)
    # Megatron takes a rotary table that is as long as the whole row for one of absolute positions.
    # Only a lone sequence may look like that.
    row = len(tokens) if len(bounds) == 2 else max(1, len(tokens) - 1)
    longest = min(microbatch.max_seqlen, row)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    # The shape is [1, T, vocabulary / tensor].
    logits = model(tokens[None], None, None, packed_seq_params=packed)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        # Megatron's cross entropy works in place, and the backward pass needs the logits.
        own_logits = output.squeeze(0).float().clone()
        logprobs = -vocab_parallel_cross_entropy(own_logits, labels)  # [T], log p of each label
        result = objective(logprobs, TokenBatch.from_microbatch(microbatch, device))
        figures = {
            "loss": result.loss_sum.detach().double(),
            "items": result.num_items.double(),
            **result.metric_sums,
        }
        return result.loss_sum, result.num_items, figures

    return logits, loss


def start(options: argparse.Namespace) -> None:
    """Join the process group and form Megatron's groups."""
    # Without torchrun this process is the only rank.
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)
    # First the device: NCCL's communicators and the seeds below belong to the current device.
    # Without this line every rank would take GPU 0.
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=options.tensor,
        expert_model_parallel_size=options.expert,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(options.seed)


def main(options: argparse.Namespace) -> None:
    start(options)
    arch = read_architecture(options.model)
    if arch.num_experts and options.tensor > 1 and options.expert == 1:
        raise SystemExit("--tensor above 1 needs --expert above 1 for experts: README.md, traps")
    module = build(arch, options).to(torch.cuda.current_device())
    load_hf(module, arch, options.model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    model = DistributedDataParallel(module.config, ddp_config, module)
    optimizer_config = OptimizerConfig(
        lr=options.lr, weight_decay=0.0, adam_beta2=0.98, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(optimizer_config, [model])

    samples = [
        make_sample(response, teacher) for response, teacher in cache.read_rows(options.cache)
    ]
    order = ResponseOrder(len(samples), options.batch_size, seed=options.seed)
    objective = Lightning(advantage_clip=10.0, aggregation="response_mean")
    data_rank = mpu.get_data_parallel_rank()
    data_size = mpu.get_data_parallel_world_size()
    for step in range(options.steps):
        # Every rank computes the same plan from the lengths, and takes its own part of it. Every
        # data-parallel rank gets the same number of microbatches, so no collective waits for ever.
        chosen = order.batch_indices(step)
        lengths = [len(samples[index]) for index in chosen]
        plan = plan_step(lengths, data_size, options.max_tokens, options.tensor)
        microbatches = [
            build_microbatch([samples[chosen[index]] for index in members], options.tensor)
            for members in plan[data_rank]
        ]

        model.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=partial(forward_step, objective),
            data_iterator=iter(microbatches),
            model=[model],
            num_microbatches=len(microbatches),
            seq_length=options.max_tokens,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()

        # Sums over microbatches and data ranks first, the division after them.
        sums = torch.stack([torch.stack([*output.values()]) for output in outputs]).sum(dim=0)
        dist.all_reduce(sums, group=mpu.get_data_parallel_group())
        summed = dict(zip(outputs[0], sums.tolist(), strict=True))
        loss = summed.pop("loss") / summed.pop("items")
        if dist.get_rank() == 0:
            advantage = reduce_metrics(summed)["advantage"]
            print(f"step {step + 1}  loss {loss!r}  advantage {advantage:+.3f}", flush=True)
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of the student")
    parser.add_argument("cache", type=Path, help="teacher cache: the folder of the score stage")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="responses per step")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens per microbatch")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--expert", type=int, default=1, help="expert-parallel size")
    parser.add_argument("--seed", type=int, default=17, help="seed of the order of responses")
    parser.add_argument("--lr", type=float, default=2e-6, help="learning rate")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
