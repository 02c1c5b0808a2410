"""Training steps of Qwen3-30B-A3B's shape on one GPU, with as many of its 48 layers as fit.

Variants: `local` has Megatron-Core's local layers, `engine` those of Transformer Engine. Each
trains with full and with no recompute; the last of the steps counts, and the memory is held
against what `lopd plan` says. A figure is of one GPU without any communication. Where Transformer
Engine is installed, the optimizer is its FusedAdam in both.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.bodies import engine_obstacle, stage
from benchmarks.gpu.part import arguments
from benchmarks.gpu.sheet import Sheet

from lopd.megatron.weights.architecture import Architecture, read_architecture
from tests.megatron.gpu_cases import (
    layers_that_fit,
    planned_bytes,
    settings_of_stage,
    write_stage,
)
from tests.megatron.launch import RanksFailed, run_ranks

GIB = 2**30
MOST_LAYERS = 8  # more of them cost time and say nothing more
FULL = {"num_tokens": 12_288, "sequence_len": 4_096, "dtype": "bfloat16", "num_steps": 5}
TINY = {"num_tokens": 128, "sequence_len": 32, "dtype": "float32", "num_steps": 2}
TINY_SHAPE = {
    "hidden_size": 64,
    "vocab_size": 512,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SHOWN = ("tokens_per_s", "seconds", "model_tflops_per_s", "mfu", "peak_memory_gib", "loss")


def main() -> None:
    options = arguments(__doc__)
    engine = options.variant == "engine"
    sheet = Sheet(options.out, f"trainer, {options.variant}", dry_run=options.dry_run)
    if engine and (reason := engine_obstacle()):
        sheet.lacks("steps", f"needs Transformer Engine: {reason}")
    elif engine and options.dry_run:
        sheet.add("import", {"transformer_engine": "loads"})
        sheet.lacks("steps", "needs a GPU: Transformer Engine's kernels have no form for a CPU")
    else:
        for recompute in ("full", "none"):
            run(sheet, recompute, engine=engine)
    sheet.done()


def run(sheet: Sheet, recompute: str, *, engine: bool) -> None:
    sizes = TINY if sheet.dry_run else FULL
    name = f"recompute {recompute}"
    with tempfile.TemporaryDirectory(prefix="lopd-gpu-") as scratch:
        folder = Path(scratch)
        layers = 2 if sheet.dry_run else layers_here(folder / "whole", recompute)
        if layers < 1:
            sheet.lacks(name, "needs a larger GPU: not one layer fits")
            return
        shape = TINY_SHAPE if sheet.dry_run else {}
        model = write_stage(folder / "stage", layers, **shape)
        sent: dict[str, Any] = {**sizes, "folder": str(model), "recompute": recompute}
        try:
            steps = run_ranks(stage, 1, env={}, timeout_s=250, engine=engine, **sent)[0]
        except RanksFailed as error:
            sheet.lacks(name, f"failed: {reason_of(error)}")
            return
        planned = planned_gib(read_architecture(model), sizes, recompute, engine)
    last = steps[-1]
    figures = {"layers": layers, "planned_gib": planned}
    figures |= {key: last[key] for key in SHOWN if key in last}
    if sheet.dry_run:
        del figures["peak_memory_gib"]  # a CPU's is of the whole process
        sheet.lacks(f"{name}: mfu, memory", "needs a GPU: a CPU has no peak and no allocator")
    else:
        figures["measured_over_planned"] = last["peak_memory_gib"] / planned
    sheet.add(name, figures)


def layers_here(folder: Path, recompute: str) -> int:
    import torch

    arch = read_architecture(write_stage(folder, 48))
    return min(MOST_LAYERS, layers_that_fit(arch, torch.cuda.mem_get_info()[0], recompute))


def planned_gib(arch: Architecture, sizes: dict[str, Any], recompute: str, engine: bool) -> float:
    settings = settings_of_stage(
        num_tokens=sizes["num_tokens"], dtype=sizes["dtype"], recompute=recompute
    )
    return planned_bytes(arch, settings, engine=engine) / GIB


def reason_of(error: Exception) -> str:
    """The last line of the log that names an error, else the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return (named or lines)[-1][:300]


if __name__ == "__main__":
    main()
