"""One step of this trainer against the recipe of the paper's reference code, in one run, on the
same layout, model and batches.

    python benchmarks/step_cost.py --json step_cost.json
    python benchmarks/step_cost.py --ranks 2 --tensor 2 --expert 2

Ours: per microbatch one forward and one backward pass (the Huber form of the update). The recipe: a
forward pass without gradient for the old log-probabilities, one of a frozen second copy of the
model for a KL term whose coefficient is 0, then forward and backward with PPO's ratio and clip.
Both go through the same Trainer: model, packing, pipeline schedule, optimizer. The KL term itself
is left out of the recipe's loss, which can only make it faster.

Steps of the two alternate, in changing order, so that a busy machine slows both. A speedup is the
median over pairs of neighbouring steps; the table gives median times, and on a CPU processor time
too (summed over ranks), which other work hardly touches. After three steps from the same weights
the parameters of the two are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# of PPO's ratio: the reference code's; with one update per batch the ratio is 1 and it never acts
CLIP = 0.2
ADVANTAGE_CLIP = 10.0
COMPARED_AFTER = 3  # steps


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--pairs", type=int, default=9, help="timed pairs of steps (default %(default)s)"
    )
    parser.add_argument(
        "--responses", type=int, default=16, help="responses per step (default %(default)s)"
    )
    parser.add_argument(
        "--length",
        type=int,
        default=320,
        help="tokens of the longest response; the shortest has a quarter (default %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        help="token budget of a microbatch (default %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=4,
        help="layers of the model with random weights (default %(default)s)",
    )
    parser.add_argument(
        "--hidden", type=int, default=256, help="its hidden size (default %(default)s)"
    )
    parser.add_argument(
        "--vocab", type=int, default=4096, help="its vocabulary (default %(default)s)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FOLDER",
        help="instead: the shape in this Hugging Face folder's config.json",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and activations (default %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads of a rank (default %(default)s)"
    )
    for size in ("ranks", "tensor", "pipeline", "expert"):
        parser.add_argument(
            f"--{size}", type=int, default=1, help=f"parallel.{size} (default %(default)s)"
        )
    return parser.parse_args()


def become_ranks(options: argparse.Namespace) -> None:
    """Replaces this process by torchrun, which starts this file again on every rank."""
    os.environ |= {
        "OMP_NUM_THREADS": str(options.threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
    }
    launcher = [
        sys.executable,
        "-m",
        "lopd.megatron.ranks.torchrun",
        f"--nproc-per-node={options.ranks}",
    ]
    os.execv(sys.executable, [*launcher, __file__, *sys.argv[1:]])


def write_shape(folder: Path, options: argparse.Namespace) -> Path:
    """A config.json of a small Qwen3-MoE; its weights will be random."""
    heads = max(4, options.hidden // 64)
    shape = {
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "vocab_size": options.vocab,
        "intermediate_size": 4 * options.hidden,
        "moe_intermediate_size": options.hidden,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": options.hidden // heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def run(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The figures, the same on every rank."""
    from lopd.config import ParallelSection
    from lopd.megatron.ranks import parallel

    layout = ParallelSection(
        ranks=options.ranks, tensor=options.tensor, pipeline=options.pipeline, expert=options.expert
    )
    parallel.initialize(layout, seed=1, timeout_s=600)
    folder = options.config or write_shape(folder, options)
    figures: dict[str, float] = {}
    for recompute, name in (("full", "full_recompute"), ("none", "no_recompute")):
        for key, value in compare(options, folder, layout, recompute).items():
            figures[f"{key}_{name}"] = value
        gc.collect()  # three models, before the next three
    for key, reduce in (("max_parameter_difference", max), ("max_parameter_change", min)):
        figures[key] = reduce(
            figures.pop(f"{key}_{name}") for name in ("full_recompute", "no_recompute")
        )
    parallel.shutdown()
    return figures


def compare(
    options: argparse.Namespace, folder: Path, layout: Any, recompute: str
) -> dict[str, float]:
    """Seconds per step of both, speedups, and how far parameters lie apart after three steps and
    how far they moved.
    """
    from lopd.config import TrainSection
    from lopd.megatron.training.trainer import Trainer
    from lopd.objective import Lightning

    settings = TrainSection(
        parallel=layout,
        num_steps=1000,
        dtype=options.dtype,
        recompute=recompute,
        max_tokens_per_microbatch=options.max_tokens,
        optimizer={"lr": 1e-5},
    )

    def trainer(objective: Any) -> Trainer:
        return Trainer(
            settings,
            model_dir=folder,
            init="random",
            init_std=0.02,
            seed=1,
            objective=objective,
            checkpoint_dir=None,
        )

    ours = trainer(Lightning(ADVANTAGE_CLIP))
    recipe = trainer(ClippedRatio())
    frozen = trainer(Lightning())
    initial = [parameter.detach().clone() for parameter in ours.module.parameters()]
    ways: dict[str, Callable[[Any], object]] = {
        "ours": ours.train_step,
        "recipe": lambda microbatches: reference_step(recipe, frozen, microbatches),
    }
    # Each pair is seconds and processor seconds.
    costs: dict[str, list[tuple[float, float]]] = {"ours": [], "recipe": []}
    differences = {"max_parameter_difference": 0.0, "max_parameter_change": 0.0}
    for step in range(COMPARED_AFTER + options.pairs):  # the compared steps also warm up
        microbatches = batch(step, options, folder)
        for way in sorted(ways, reverse=step % 2 == 1):
            cost = timed(ways[way], microbatches)
            if step >= COMPARED_AFTER:
                costs[way].append(cost)
        if step == COMPARED_AFTER - 1:
            differences["max_parameter_difference"] = largest_difference(
                ours.module.parameters(), recipe.module.parameters()
            )
            differences["max_parameter_change"] = largest_difference(
                ours.module.parameters(), initial
            )
    return {**differences, **cost_figures(costs)}


def cost_figures(costs: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Medians, and the speedup as the median of the ratios within a pair.

    Each cost is seconds and processor seconds.
    """
    figures: dict[str, float] = {}
    for place, prefix in enumerate(("", "processor_")):
        spent = {way: [cost[place] for cost in found] for way, found in costs.items()}
        figures[f"{prefix}speedup"] = statistics.median(
            theirs / own for theirs, own in zip(spent["recipe"], spent["ours"], strict=True)
        )
        figures |= {
            f"{prefix}seconds_{way}": statistics.median(values) for way, values in spent.items()
        }
    return figures


class ClippedRatio:
    """PPO's clipped objective for the same advantage; the old log-probabilities come in the place
    of the sampling ones.
    """

    def __call__(self, logprobs: Any, batch: Any) -> Any:
        import torch

        from lopd.objective import LossOutput, token_weights
        from lopd.objective.aggregation import count_sums

        old = batch.sampling_logprobs
        advantage = (batch.teacher_logprobs - old).clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
        ratio = torch.where(batch.loss_mask, logprobs - old, 0.0).exp()
        losses = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        weights, num_items = token_weights(batch, "response_mean", losses.dtype)
        return LossOutput((weights * losses).sum(), num_items, count_sums(batch))


def reference_step(trainer: Any, frozen: Any, microbatches: Sequence[Any]) -> None:
    old = trainer.logprobs_of(microbatches)
    frozen.logprobs_of(microbatches)  # for the KL term that is multiplied by 0
    trainer.train_step(
        [
            dataclasses.replace(one, sampling_logprobs=values.cpu().numpy())
            for one, values in zip(microbatches, old, strict=True)
        ]
    )


def batch(step: int, options: argparse.Namespace, folder: Path) -> list[Any]:
    """This data rank's microbatches of a step: random tokens, a prompt of an eighth, random
    log-probabilities of a teacher.
    """
    from lopd.batching import build_microbatch, plan_step
    from lopd.megatron.ranks import parallel
    from lopd.records import Sample

    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = np.random.default_rng(step)
    samples = []
    for length in generator.integers(
        max(2, options.length // 4), options.length + 1, options.responses
    ):
        tokens = generator.integers(0, vocab_size, length).astype(np.int32)
        teacher = -3 * generator.random(length, dtype=np.float32)
        samples.append(Sample(tokens, np.arange(length) >= max(1, length // 8), teacher, teacher))
    plan = plan_step(
        [len(sample) for sample in samples],
        parallel.data_size(),
        options.max_tokens,
        options.tensor,
    )
    return [
        build_microbatch([samples[index] for index in members], options.tensor)
        for members in plan[parallel.data_rank()]
    ]


def timed(act: Callable[[Any], object], microbatches: Sequence[Any]) -> tuple[float, float]:
    """Seconds until every rank has done it, and processor seconds of all ranks."""
    import torch
    import torch.distributed as dist

    from lopd.megatron.ranks import parallel

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        parallel.barrier()

    wait()
    start = time.perf_counter()
    processor = time.process_time()
    act(microbatches)
    wait()
    cost = torch.tensor(
        [time.perf_counter() - start, time.process_time() - processor],
        dtype=torch.float64,
        device=parallel.device(),
    )
    dist.all_reduce(cost)
    return cost[0].item() / parallel.world_size(), cost[1].item()


def largest_difference(left: Any, right: Any) -> float:
    """Over all parameters of all ranks."""
    import torch
    import torch.distributed as dist

    from lopd.megatron.ranks import parallel

    largest = (
        torch.stack(
            [
                (a.detach().float() - b.detach().float()).abs().max()
                for a, b in zip(left, right, strict=True)
            ]
        )
        .max()
        .to(parallel.device())
    )
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())


def table(figures: dict[str, float]) -> str:
    lines = [f"{'':<34}{'recipe':>10}{'ours':>12}{'speedup':>10}"]
    for name, title in (("full_recompute", "full recompute"), ("no_recompute", "no recompute")):
        for prefix, unit in (("", "a step"), ("processor_", "processor time")):
            recipe, ours, speedup = (
                figures[f"{prefix}{key}_{name}"]
                for key in ("seconds_recipe", "seconds_ours", "speedup")
            )
            lines.append(
                f"{title + ', ' + unit:<34}{recipe:>8.3f} s{ours:>10.3f} s{speedup:>9.2f}x"
            )
    moved = figures["max_parameter_change"]
    apart = figures["max_parameter_difference"]
    lines.append(
        f"parameters after {COMPARED_AFTER} steps: moved by up to {moved:.1e}, "
        f"apart by at most {apart:.1e}"
    )
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    if "RANK" not in os.environ:
        become_ranks(options)
    with tempfile.TemporaryDirectory(prefix="lopd-step-cost-") as folder:
        figures = run(options, Path(folder))
    if os.environ["RANK"] == "0":
        print(table(figures))
        if options.json is not None:
            options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
