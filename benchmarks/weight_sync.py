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
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Also as a plain script, whose folder alone is searched for modules.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.launches import launches_of_a_sync
from lopd.config import SGLangSection, SyncSection

VOCABULARY = 4096
SMALL_PIECE = 32 * 2**20  # bytes
TRANSPORTS = ("disk", "tensor", "distributed")
Named = list[tuple[str, torch.Tensor]]


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


# ---- the plain copies ----


def flat(bucket: Named) -> torch.Tensor:
    """The bucket's bytes in one piece; made before any clock runs."""
    return torch.cat([tensor.view(torch.uint8).flatten() for _, tensor in bucket])


def copy_by_disk(pieces: list[torch.Tensor], folder: Path) -> Callable[[], None]:
    target = torch.empty(sum(len(piece) for piece in pieces), dtype=torch.uint8)
    target.fill_(0)
    places = target.split([len(piece) for piece in pieces])

    def copy() -> None:
        folder.mkdir()
        for index, piece in enumerate(pieces):
            (folder / str(index)).write_bytes(piece.numpy().data)
        for index, place in enumerate(places):
            with (folder / str(index)).open("rb", buffering=0) as file:
                assert file.readinto(place.numpy().data) == len(place)
        shutil.rmtree(folder)

    return copy


def copy_by_shared_memory(
    pieces: list[torch.Tensor], link: Connection, num_buffers: int = 1
) -> Callable[[], None]:
    """With two buffers the other process copies out of one while the next piece is copied into the
    other.
    """
    size = max(len(piece) for piece in pieces)
    shared = [shared_memory.SharedMemory(create=True, size=size) for _ in range(num_buffers)]
    views = [torch.frombuffer(one.buf, dtype=torch.uint8) for one in shared]
    link.send(([one.name for one in shared], [len(piece) for piece in pieces]))

    def copy() -> None:
        # This function holds the shared memory, which therefore lives as long as the function.
        assert all(size <= one.size for one in shared)
        for index, piece in enumerate(pieces):
            if index >= num_buffers:
                link.recv()
            views[index % num_buffers][: len(piece)].copy_(piece)
            link.send((index % num_buffers, index))
        for _ in range(min(num_buffers, len(pieces))):
            link.recv()

    return copy


def take_from_shared_memory(link: Connection) -> None:
    torch.set_num_threads(1)
    names, lengths = link.recv()
    shared = [shared_memory.SharedMemory(name=name) for name in names]
    sources = [torch.frombuffer(one.buf, dtype=torch.uint8) for one in shared]
    target = torch.empty(sum(lengths), dtype=torch.uint8).fill_(0)
    places = target.split(lengths)
    while (told := link.recv()) is not None:
        buffer, index = told
        places[index].copy_(sources[buffer][: lengths[index]])
        link.send(None)
    for one in shared:
        one.unlink()
    os._exit(0)  # views of the buffers would forbid closing them


def gloo_group(rank: int, port: int) -> Any:
    """Two processes on loopback."""
    import datetime

    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch_distributed: Any = dist
    timeout = datetime.timedelta(seconds=120)
    store = torch_distributed.TCPStore("127.0.0.1", port, 2, rank == 0, timeout)
    return torch_distributed.ProcessGroupGloo(store, rank, 2, timeout)


def copy_by_broadcast(buckets: list[list[torch.Tensor]], link: Connection) -> Callable[[], None]:
    """Those of a bucket all at once, then the next bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    link.send((port, [[len(piece) for piece in bucket] for bucket in buckets]))
    group = gloo_group(0, port)

    def copy() -> None:
        link.send(True)
        for bucket in buckets:
            for work in [group.broadcast(piece, 0) for piece in bucket]:
                work.wait()
        link.recv()

    return copy


def take_broadcasts(link: Connection) -> None:
    torch.set_num_threads(1)
    port, lengths = link.recv()
    group = gloo_group(1, port)
    target = torch.empty(sum(map(sum, lengths)), dtype=torch.uint8).fill_(0)
    places = target.split([sum(bucket) for bucket in lengths])
    while link.recv() is not None:
        for place, bucket in zip(places, lengths, strict=True):
            for work in [group.broadcast(piece, 0) for piece in place.split(bucket)]:
                work.wait()
        link.send(None)
    os._exit(0)


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

    dtype = getattr(torch, args.dtype)
    num_bytes = write_model(scratch / "model", args.megabytes, dtype)
    named: Named = [
        (name, tensor.clone())
        for name, tensor in load_file(scratch / "model" / "model.safetensors").items()
    ]
    bucket_bytes = int(args.bucket_mib * 2**20)
    buckets = [*in_buckets(named, bucket_bytes)]
    pieces = [flat(bucket) for bucket in buckets]
    context = multiprocessing.get_context("spawn")
    links = []

    def other_process(target: Callable[[Connection], None]) -> Connection:
        ours, theirs = context.Pipe()
        context.Process(target=target, args=(theirs,), daemon=True).start()
        links.append(ours)
        return ours

    small_pieces = [part for piece in pieces for part in piece.split(SMALL_PIECE)]
    bytes_of_tensors = [[flat([one]) for one in bucket] for bucket in buckets]
    raw = {
        "disk": [copy_by_disk(pieces, scratch / "raw")],
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
            ways = {"sync": None, "verified": both._verification}
            seconds: dict[str, list[float]] = {
                **{way: [] for way in ways},
                **{f"raw {index}": [] for index in range(len(raw[transport]))},
            }
            for repeat in range(args.repeats + 1):  # the first is to warm up
                for index, copy in enumerate(raw[transport]):
                    seconds[f"raw {index}"].append(timed(copy))
                for way in sorted(ways, reverse=repeat % 2 == 0):
                    both._verification = ways[way]
                    version = f"{way}-{repeat}"
                    began = time.perf_counter()
                    sync(both, version, named, bucket_bytes)
                    seconds[way].append(time.perf_counter() - began)
            best = {name: min(values[1:]) for name, values in seconds.items()}
            middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}
            for figure in (best, middle):
                figure["raw"] = min(
                    value for name, value in figure.items() if name.startswith("raw")
                )
            figures[transport] = {
                "seconds": best["sync"],
                "bytes_per_s": num_bytes / best["sync"],
                "raw_seconds": best["raw"],
                "raw_bytes_per_s": num_bytes / best["raw"],
                "share_of_raw": best["raw"] / best["sync"],
                "share_of_raw_median": middle["raw"] / middle["sync"],
                "verified_seconds": best["verified"],
                "verification_ratio": statistics.median(
                    verified / without
                    for verified, without in zip(
                        seconds["verified"][1:], seconds["sync"][1:], strict=True
                    )
                ),
                "verification_ratio_of_best": best["verified"] / best["sync"],
                "rounds": {
                    name: [round(value, 4) for value in values[1:]]
                    for name, values in seconds.items()
                },
                "extra_bytes": both.report.extra_bytes,
            }
            say(transport, figures[transport])
        if args.delta:
            figures["delta"] = {
                transport: measure_delta(receiver(transport, delta=True), named, bucket_bytes)
                for transport in ("tensor", "distributed")
            }
    for link in links:
        link.send(None)
    figures["verification_ratios"] = {
        transport: figures[transport]["verification_ratio"] for transport in TRANSPORTS
    }
    figures["verification_ratio"] = max(figures["verification_ratios"].values())
    figures["share_of_raw"] = {
        transport: figures[transport]["share_of_raw"] for transport in TRANSPORTS
    }
    return figures


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
