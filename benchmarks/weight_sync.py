"""Weights into a running server by each transport, against a plain copy of the same bytes over the
same path.

A synthetic Qwen3-MoE checkpoint is made on the spot, a real server started on it, and the
checkpoint's tensors are synced again and again from this process, which stands for the trainer's
rank 0. The plain copy, which alternates with the syncs:

disk         write the bytes to files, bucket by bucket, and read them back into memory
tensor       copy a bucket into shared memory, have another process copy it out, next bucket; or
             with two buffers of 32 MiB, which are used alternately
distributed  broadcast a bucket over gloo to another process, into memory that is there already,
             next bucket; or its tensors one by one, all at once

Where there are two ways of a plain copy, the faster one counts. share_of_raw is the time of the
plain copy over that of a sync with its calls, without verification, best of all rounds; beside it
that of the medians.

A sync with verification alternates with these too. Its ratio to the one without is the median over
the rounds of the ratio within a round. verification_ratio is that of the worst transport, and
verification_ratios has all. launches are the operations that the fingerprints of a sync of
Qwen3-30B-A3B would give to GPUs, trainer and server together, counted on tensors without data.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Also as a plain script, whose folder alone is searched for modules.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.launches import launches_of_a_sync
from benchmarks.plain_copies import (
    Named,
    copy_by_broadcast,
    copy_by_disk,
    copy_by_shared_memory,
    flat,
    take_broadcasts,
    take_from_shared_memory,
)
from lopd.config import SGLangSection, SyncSection

VOCABULARY = 4096
SMALL_PIECE = 32 * 2**20  # bytes
TRANSPORTS = ("disk", "tensor", "distributed")


# ---- the model ----


def write_model(
    folder: Path,
    megabytes: float,
    dtype: torch.dtype,
    *,
    hidden: int = 2048,
    width: int = 768,
    experts: int = 16,
) -> int:
    """A Qwen3-MoE of random weights and about this size, its tensors of the shapes of
    Qwen3-30B-A3B; returns its bytes.
    """
    from safetensors.torch import save_file

    from lopd.megatron.weights.architecture import read_architecture
    from lopd.megatron.weights.hf_mapping import hf_shapes

    layer = experts * 3 * hidden * width + hidden * 128 * (
        2 * hidden // 64 + 2 * max(1, hidden // 512)
    )
    layers = max(1, round((megabytes * 1e6 / dtype.itemsize - 2 * VOCABULARY * hidden) / layer))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 512),
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = hf_shapes(read_architecture(folder))
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def in_buckets(named: Named, bucket_bytes: int) -> Iterator[Named]:
    """As the trainer's exporter yields them."""
    bucket: Named = []
    size = 0
    for name, tensor in named:
        bucket.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= bucket_bytes:
            yield bucket
            bucket = []
            size = 0
    if bucket:
        yield bucket


# ---- the measurement ----


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sync(receiver: Any, version: str, named: Named, bucket_bytes: int) -> None:
    receiver.begin(version)
    for bucket in in_buckets(named, bucket_bytes):
        receiver.receive(bucket)
    receiver.commit()


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    from sglang_rollout.requests.client import SGLangEngine
    from sglang_rollout.servers.server import SGLangServer
    from sglang_rollout.weight_sync import build_receiver

    num_bytes = write_model(scratch / "model", args.megabytes, getattr(torch, args.dtype))
    named: Named = [
        (name, tensor.clone())
        for name, tensor in load_file(scratch / "model" / "model.safetensors").items()
    ]
    bucket_bytes = int(args.bucket_mib * 2**20)
    links: list[Connection] = []
    raw = raw_copies([*in_buckets(named, bucket_bytes)], scratch / "raw", links)
    figures: dict[str, Any] = {
        "bytes": num_bytes,
        "tensors": len(named),
        "bucket_bytes": bucket_bytes,
        "dtype": args.dtype,
        "repeats": args.repeats,
    }
    print(
        f"{num_bytes / 1e6:,.0f} MB in {len(named)} tensors of {args.dtype}, "
        f"buckets of {args.bucket_mib:g} MiB; best of {args.repeats}",
        flush=True,
    )
    settings = SGLangSection(
        dtype=args.dtype, context_length=64, max_running_requests=4, max_total_tokens=1024
    )
    with SGLangServer(scratch / "model", settings, log=scratch / "server.log") as server:
        engine = SGLangEngine(server.url, server.api_key, settings, server=server)

        def receiver(transport: str, **more: Any) -> Any:
            section = SyncSection.model_validate({"transport": transport, "verify": "off", **more})
            return build_receiver(
                section, [engine], folder=scratch / "sync", template_dir=scratch / "model"
            )

        for transport in TRANSPORTS:
            # One receiver for both, because a server keeps the memory of one mapped.
            both = receiver(transport, verify="tensors")
            seconds = time_transport(both, raw[transport], named, bucket_bytes, args.repeats)
            figures[transport] = figures_of(seconds, num_bytes)
            figures[transport]["extra_bytes"] = both.report.extra_bytes
            say(transport, figures[transport])
        if args.delta:
            figures["delta"] = {
                transport: measure_delta(receiver(transport, delta=True), named, bucket_bytes)
                for transport in ("tensor", "distributed")
            }
    for link in links:
        link.send(None)
    for key, name in (
        ("verification_ratio", "verification_ratios"),
        ("share_of_raw", "share_of_raw"),
    ):
        figures[name] = {transport: figures[transport][key] for transport in TRANSPORTS}
    figures["verification_ratio"] = max(figures["verification_ratios"].values())
    return figures


def raw_copies(
    buckets: list[Named], folder: Path, links: list[Connection]
) -> dict[str, list[Callable[[], None]]]:
    """The plain copies of each transport. The links to the processes that take them are added."""
    context = multiprocessing.get_context("spawn")
    pieces = [flat(bucket) for bucket in buckets]
    small_pieces = [part for piece in pieces for part in piece.split(SMALL_PIECE)]
    bytes_of_tensors = [[flat([one]) for one in bucket] for bucket in buckets]

    def other_process(target: Callable[[Connection], None]) -> Connection:
        ours, theirs = context.Pipe()
        context.Process(target=target, args=(theirs,), daemon=True).start()
        links.append(ours)
        return ours

    return {
        "disk": [copy_by_disk(pieces, folder)],
        "tensor": [
            copy_by_shared_memory(pieces, other_process(take_from_shared_memory)),
            copy_by_shared_memory(
                small_pieces, other_process(take_from_shared_memory), num_buffers=2
            ),
        ],
        "distributed": [
            copy_by_broadcast([[piece] for piece in pieces], other_process(take_broadcasts)),
            copy_by_broadcast(bytes_of_tensors, other_process(take_broadcasts)),
        ],
    }


def time_transport(
    receiver: Any,
    copies: list[Callable[[], None]],
    named: Named,
    bucket_bytes: int,
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds by round of a sync, of a sync with verification, and of each plain copy."""
    ways = {"sync": None, "verified": receiver._verification}
    seconds: dict[str, list[float]] = {
        **{way: [] for way in ways},
        **{f"raw {index}": [] for index in range(len(copies))},
    }
    # All take turns, so that a busy moment of the machine meets all of them. One round more than
    # asked for: the first is to warm up.
    for repeat in range(repeats + 1):
        for index, copy in enumerate(copies):
            seconds[f"raw {index}"].append(timed(copy))
        for way in sorted(ways, reverse=repeat % 2 == 0):
            receiver._verification = ways[way]
            version = f"{way}-{repeat}"
            began = time.perf_counter()
            sync(receiver, version, named, bucket_bytes)
            seconds[way].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def figures_of(seconds: dict[str, list[float]], num_bytes: int) -> dict[str, Any]:
    """The figures of one transport, from the seconds of its rounds."""
    best = {name: min(values) for name, values in seconds.items()}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for figure in (best, middle):
        figure["raw"] = min(value for name, value in figure.items() if name.startswith("raw"))
    ratios = [
        verified / without
        for verified, without in zip(seconds["verified"], seconds["sync"], strict=True)
    ]
    return {
        "seconds": best["sync"],
        "bytes_per_s": num_bytes / best["sync"],
        "raw_seconds": best["raw"],
        "raw_bytes_per_s": num_bytes / best["raw"],
        "share_of_raw": best["raw"] / best["sync"],
        "share_of_raw_median": middle["raw"] / middle["sync"],
        "verified_seconds": best["verified"],
        "verification_ratio": statistics.median(ratios),
        "verification_ratio_of_best": best["verified"] / best["sync"],
        "rounds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    }


def say(transport: str, row: dict[str, Any]) -> None:
    print(
        f"{transport:12} {row['seconds']:.2f} s ({row['bytes_per_s'] / 1e9:.2f} GB/s), "
        f"plain copy {row['raw_seconds']:.2f} s: "
        f"share {row['share_of_raw']:.2f} (of medians {row['share_of_raw_median']:.2f}); "
        f"with verification {row['verified_seconds']:.2f} s, ratio "
        f"{row['verification_ratio']:.2f} (of best {row['verification_ratio_of_best']:.2f}); "
        f"extra memory {row['extra_bytes'] / 2**20:.0f} MiB",
        flush=True,
    )


def measure_delta(receiver: Any, named: Named, bucket_bytes: int) -> dict[str, float]:
    """Seconds of a sync of which this share of the tensors, the last ones, have changed."""
    seconds = {"1": timed(lambda: sync(receiver, "delta-1", named, bucket_bytes))}
    for share in (0.5, 0.1, 0.0):
        first = len(named) - round(share * len(named))
        for _, tensor in named[first:]:
            tensor.neg_()
        seconds[f"{share:g}"] = timed(
            lambda share=share: sync(receiver, f"delta-{share:g}", named, bucket_bytes)
        )  # type: ignore[misc]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=1880.0, help="size of the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--bucket-mib", type=float, default=512.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-delta", dest="delta", action="store_false")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="lopd-weight-sync-"))
    try:
        figures = measure(args, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    figures["launches_of"] = launches_of_a_sync()
    figures["launches"] = sum(figures["launches_of"].values())
    print(f"operations of a sync of Qwen3-30B-A3B: {figures['launches']:,}")
    for transport, seconds in figures.get("delta", {}).items():
        print(
            f"delta, {transport}: "
            + ", ".join(
                f"{float(share):.0%} changed {value:.2f} s" for share, value in seconds.items()
            )
        )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
