"""Counts parameters by building the model through Megatron-Core on the meta device.

It is run as ``python -m lopd.planning.count < jobs.json``. It needs a process of its own, because
it changes two things of the whole process: the process groups, which talk to nobody (torch's
``fake`` backend stands for all ranks of a node), and the device on which a model is built. On the
meta device nothing has storage, so a model of any size is built in a second or two.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from lopd.config import ParallelSection
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.parameters import CountJob, StageParameters

# Part of the name of every expert's parameter in Megatron-Core's modules.
EXPERT = ".mlp.experts."


def count(arch: Architecture, parallel: ParallelSection) -> list[StageParameters]:
    """Count what a rank of each pipeline stage holds.

    Args:
        arch: The shape of the model.
        parallel: The layout.

    Raises:
        ConfigError: The layout does not divide the model.
    """
    # Context ranks hold the same weights. Layers for several of them are Transformer Engine's,
    # which a machine without a GPU does not have.
    parallel = parallel.model_copy(update={"context": 1})
    # Megatron-Core numbers ranks by pipeline stage last, so the ranks of a stage are one block.
    ranks_per_stage = parallel.ranks // parallel.pipeline
    return [
        _count_stage(arch, parallel, rank=stage * ranks_per_stage)
        for stage in range(parallel.pipeline)
    ]


def _count_stage(arch: Architecture, parallel: ParallelSection, rank: int) -> StageParameters:
    """Count what one rank holds."""
    import torch

    from lopd.megatron.model.build import build_model
    from lopd.megatron.ranks import parallel as ranks

    _start_fake_ranks(rank, parallel.ranks)
    # The same call as the trainer's. Nothing is drawn, so the seed does not matter.
    ranks.initialize(parallel, seed=0, timeout_s=60)
    try:
        with torch.device("meta"):
            # Without initialisation Megatron-Core leaves out its marks of split parameters, which
            # only gradient norms need, and minutes of drawing numbers.
            unmarked = {"perform_initialization": False}
            model = build_model(
                arch,
                parallel=parallel,
                dtype="bfloat16",
                recompute="none",
                moe_aux_loss=0.0,
                overrides=unmarked,
            )
        # A parameter with storage would mean that a model of any size no longer fits here.
        assert all(parameter.is_meta for parameter in model.parameters())
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    finally:
        ranks.shutdown()
    # Parameters are told apart by Megatron-Core's names. A formula that knows no names checks the
    # result (lopd.planning.plan).
    experts = sum(size for name, size in sizes.items() if EXPERT in name)
    routers = sum(size for name, size in sizes.items() if name.endswith(".router.weight"))
    vocabulary = sum(
        size for name, size in sizes.items() if "word_embeddings" in name or "output_layer" in name
    )
    return StageParameters(
        dense=sum(sizes.values()) - experts, experts=experts, routers=routers, vocabulary=vocabulary
    )


def _start_fake_ranks(rank: int, world_size: int) -> None:
    """Make this process one of several ranks of which no other exists.

    Every collective returns at once and exchanges nothing.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lopd.megatron.ranks import parallel as ranks

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    # So that nothing of the model is made on a real device.
    ranks.device = lambda: torch.device("meta")
    # This function runs once for each stage. The replacement must not be replaced again.
    if not hasattr(dist.new_group, "is_fake"):
        new_group = dist.new_group

        def fake_group(*arguments: Any, **named: Any) -> Any:
            # Megatron-Core also asks for gloo groups. They would wait for the other ranks.
            return new_group(*arguments, **{**named, "backend": "fake", "pg_options": None})

        fake_group.is_fake = True  # type: ignore[attr-defined]
        dist.new_group = fake_group
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def main() -> None:
    """Read jobs from stdin, and write the counts to stdout, both as JSON."""
    import logging
    import warnings

    # Megatron-Core warns at length of packages that are not installed. None matters here.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Both trainings are counted in one process.
    jobs = [CountJob.from_json(raw) for raw in json.load(sys.stdin)]
    counts = [[asdict(stage) for stage in count(job.arch, job.parallel)] for job in jobs]
    json.dump(counts, sys.stdout)


if __name__ == "__main__":
    main()
