"""How much of the weights changes from one sync to the next, as the servers get them (bfloat16):
whole tensors, blocks, single values.

    python benchmarks/weight_sync_delta.py --json delta.json
        a synthetic optimizer
    python benchmarks/weight_sync_delta.py FOLDER FOLDER ... --json delta.json
        checkpoints, in the order of their syncs

Synthetic: values of a normal distribution of width 0.02, as of a trained model's matrices, under
Adam (float32, betas 0.9 and 0.95) with gradients of which a given part of the variance is shared by
all steps and the rest is noise; synced as bfloat16 every 1, 4 or 16 steps.

Beside it what finding the changes would cost: the seconds to compare a tensor of 256 MiB with the
one sent before, block by block, against copying it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = (64 * 2**10, 4 * 2**10, 256)
SIZE = 2**22
WARM_UP_STEPS = 20


def unchanged(before: Tensor, after: Tensor) -> dict[str, float]:
    """Shares of the values and of the blocks of bfloat16 that are the same; the last block may be
    short.
    """
    same = before.view(torch.int16).flatten() == after.view(torch.int16).flatten()
    shares = {"values": same.float().mean().item()}
    for num_bytes in BLOCK_BYTES:
        blocks = same.split(num_bytes // 2)
        shares[f"blocks of {num_bytes} B"] = sum(bool(block.all()) for block in blocks) / len(
            blocks
        )
    return shares


def synthetic(learning_rate: float, steps_between: int, shared: float) -> dict[str, float]:
    """After WARM_UP_STEPS of Adam."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, generator=generator) * 0.02
    direction = torch.randn(SIZE, generator=generator)
    optimizer = torch.optim.Adam([weight], lr=learning_rate, betas=(0.9, 0.95))
    before = weight
    for step in range(WARM_UP_STEPS + steps_between):
        if step == WARM_UP_STEPS:
            before = weight.to(torch.bfloat16)
        weight.grad = math.sqrt(shared) * direction + math.sqrt(1 - shared) * torch.randn(
            SIZE, generator=generator
        )
        optimizer.step()
    return unchanged(before, weight.to(torch.bfloat16))


def between_checkpoints(first: Path, second: Path) -> dict[str, float]:
    """Over all tensors, weighted by their sizes; and the share of tensors that are the same."""
    from safetensors.torch import load_file

    before, after = (
        {
            name: tensor
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for folder in (first, second)
    )
    assert before.keys() == after.keys(), "checkpoints of the same model, please"
    pairs = [(before[name].to(torch.bfloat16), after[name].to(torch.bfloat16)) for name in before]
    whole = unchanged(
        torch.cat([one.flatten() for one, _ in pairs]),
        torch.cat([other.flatten() for _, other in pairs]),
    )
    return {"tensors": sum(torch.equal(one, other) for one, other in pairs) / len(pairs), **whole}


def cost(num_bytes: int = 256 * 2**20, repeats: int = 7) -> dict[str, float]:
    """Best seconds, on one thread; everything is mapped before."""
    before = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
    after = before.clone()
    target = before.clone()

    def compare() -> None:
        for one, other in zip(
            before.view(torch.int64).split(2**13), after.view(torch.int64).split(2**13), strict=True
        ):
            assert torch.equal(one, other)

    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(after),
        "compare blocks of 64 KiB": compare,
    }
    seconds: dict[str, float] = dict.fromkeys(ways, math.inf)
    for _ in range(repeats):
        for name, work in ways.items():
            began = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    if args.folders:
        for first, second in zip(args.folders, args.folders[1:], strict=False):
            figures[f"{first.name} to {second.name}"] = between_checkpoints(first, second)
    else:
        for learning_rate in (1e-6, 1e-5, 1e-4):
            for steps in (1, 4, 16):
                for shared in (0.0, 0.5):
                    figures[f"lr {learning_rate:g}, {steps} steps, {shared:.0%} shared"] = (
                        synthetic(learning_rate, steps, shared)
                    )
        figures["seconds"] = cost()
    for what, shares in figures.items():
        print(f"{what}: " + ", ".join(f"{name} {value:.4f}" for name, value in shares.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
