"""Peak memory of ranks that load a Hugging Face checkpoint: each reads its own slices, so none ever
holds the whole model.

    python benchmarks/load_memory.py --json load_memory.json

The checkpoint is a Qwen3-MoE of 2.2 GB in bfloat16, which is made up in a temporary folder. Two
ranks load it with TP2 EP2.

Figures of a rank, in bytes: own (its parameters), largest (the largest tensor of the checkpoint),
before (the process, before the model is built), built (after that; on a CPU the allocator keeps
some of what Megatron's random initialisation freed), loading (what loading took beyond that, at its
peak) and mapped (the same with pages of the checkpoint's open files, which the kernel takes back
when it needs the memory). All but the last count the process's own memory, RssAnon; peaks are
sampled every few milliseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
GIB = 2**30


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every rank")
    parser.add_argument("--layers", type=int, default=13, help="0.16 GB each; default 13")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--expert", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    # This option tells a rank where the checkpoint is.
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_checkpoint(folder: Path, num_layers: int) -> int:
    """Random weights in bfloat16, in files of up to 512 MB; the number of bytes."""
    import torch

    from lopd.megatron.weights.architecture import read_architecture
    from lopd.megatron.weights.hf_files import CheckpointWriter
    from lopd.megatron.weights.hf_mapping import hf_shapes

    source = folder.with_name("source")
    source.mkdir()
    (source / "config.json").write_text(
        json.dumps({**CONFIG, "num_hidden_layers": num_layers, "dtype": "bfloat16"})
    )
    total = 0
    with CheckpointWriter(folder, source=source, shard_bytes=512 * 2**20) as writer:
        for name, shape in hf_shapes(read_architecture(source)).items():
            writer.add(name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02))
            total += math.prod(shape) * 2
    return total


class PeakMemory:
    """Largest own memory and largest resident memory while watched, sampled: Linux keeps a
    high-water mark only of the latter, and since the process began.
    """

    def __init__(self) -> None:
        self.own, self.resident = memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            own, resident = memory()
            self.own = max(self.own, own)
            self.resident = max(self.resident, resident)


def memory() -> tuple[int, int]:
    """Bytes of RssAnon and of VmRSS, now."""
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    own, resident = (int(status[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
    return own, resident


def rank_main(options: argparse.Namespace) -> None:
    from lopd.config import ParallelSection
    from lopd.megatron.model.build import build_model
    from lopd.megatron.ranks import parallel
    from lopd.megatron.weights.architecture import read_architecture
    from lopd.megatron.weights.hf_mapping import hf_shapes
    from lopd.megatron.weights.transfer import load_hf

    section = ParallelSection(
        ranks=options.ranks, tensor=options.tensor, expert=options.expert, pipeline=options.pipeline
    )
    parallel.initialize(section, seed=1, timeout_s=300)
    arch = read_architecture(options.folder)
    figures: dict[str, Any] = {
        "largest": max(math.prod(shape) for shape in hf_shapes(arch).values()) * 2,
        "before": memory()[0],
    }
    model = build_model(
        arch, parallel=section, dtype="bfloat16", recompute="none", moe_aux_loss=0.0
    )
    figures["own"] = sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters()
    )
    figures["built"], resident = memory()
    start = time.perf_counter()
    with PeakMemory() as peak:
        load_hf(model, arch, options.folder)
    figures |= {
        "seconds": time.perf_counter() - start,
        "loading": peak.own - figures["built"],
        "mapped": peak.resident - resident,
    }
    (options.folder.parent / f"rank{parallel.rank()}.json").write_text(json.dumps(figures))
    parallel.shutdown()


def main() -> None:
    options = arguments()
    if options.folder is not None:
        rank_main(options)
        return
    with tempfile.TemporaryDirectory(prefix="lopd-load-memory-") as name:
        folder = Path(name) / "model"
        total = write_checkpoint(folder, options.layers)
        torchrun = [
            sys.executable,
            "-m",
            "lopd.megatron.ranks.torchrun",
            f"--nproc-per-node={options.ranks}",
        ]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
        subprocess.run(
            [*torchrun, __file__, *sys.argv[1:], "--folder", str(folder)],
            check=True,
            env=environment,
        )
        ranks = [
            json.loads((Path(name) / f"rank{rank}.json").read_text())
            for rank in range(options.ranks)
        ]
    print(
        f"checkpoint {total / GIB:.2f} GiB, its largest tensor {ranks[0]['largest'] / GIB:.3f} GiB"
    )
    print(
        f"{'rank':<6}{'own share':>12}{'before':>10}{'built':>10}"
        f"{'loading':>10}{'mapped':>10}{'time':>10}"
    )
    for rank, figures in enumerate(ranks):
        own, before, built, loading, mapped = (
            figures[key] / GIB for key in ("own", "before", "built", "loading", "mapped")
        )
        print(
            f"{rank:<6}{own:>8.2f} GiB{before:>10.2f}{built:>10.2f}"
            f"{loading:>10.3f}{mapped:>10.3f}{figures['seconds']:>8.1f} s"
        )
    if options.json is not None:
        options.json.write_text(
            json.dumps({"checkpoint_bytes": total, "ranks": ranks}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
