"""How fast a teacher cache is read, and in how much memory: a synthetic one of a given size, in
order and in the shuffled order of training.

Every reading runs in a process of its own, and its peak memory is compared with that of the same
process on a cache of one shard: what a reader needs beyond the interpreter and its libraries must
not grow with the cache. Random values do not compress, so bytes per token are those of the worst
case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# tokens, as of a reasoning model
RESPONSE = 2048
PROMPT = 256
VOCABULARY = 151_936


def write_cache(folder: Path, megabytes: float, seed: int = 0, distinct: int = 0) -> None:
    """Shards of 256 responses until the size is reached, every one with content of its own;
    distinct: after so many, copies of them, which is faster.
    """
    from lopd import cache
    from lopd.artifacts import ArtifactWriter
    from lopd.records import Response, TeacherScores, token_hash

    rng = np.random.default_rng(seed)
    writer = ArtifactWriter(folder, kind="teacher_cache", inputs={"synthetic": megabytes})
    index = 0
    size = 0
    while size < megabytes * 1e6 and (not distinct or index < distinct):
        responses = []
        scores = []
        for row in range(256):
            length = int(rng.integers(RESPONSE // 2, RESPONSE * 3 // 2))
            response = Response(
                prompt_id=f"p{index * 256 + row}",
                sample_index=0,
                prompt_ids=rng.integers(0, VOCABULARY, PROMPT, dtype=np.int32),
                token_ids=rng.integers(0, VOCABULARY, length, dtype=np.int32),
                sampling_logprobs=-rng.exponential(0.3, length).astype(np.float32),
                finish_reason="stop",
                weight_version="0",
            )
            responses.append(response)
            teacher = -rng.exponential(0.3, length).astype(np.float32)
            scores.append(
                TeacherScores(
                    response.prompt_id,
                    0,
                    token_hash(response.prompt_ids, response.token_ids),
                    teacher,
                )
            )
        writer.publish_shard(index, cache.to_table(responses, scores))
        size += (folder / f"shard-{index:05d}.parquet").stat().st_size
        index += 1
    while size < megabytes * 1e6:
        copy = folder / f"shard-{index:05d}.parquet"
        shutil.copyfile(folder / f"shard-{index % distinct:05d}.parquet", copy)
        size = size + copy.stat().st_size
        index = index + 1
    # A new writer takes in the copies too.
    writer = ArtifactWriter(folder, kind="teacher_cache", inputs={"synthetic": megabytes})
    writer.finish(vocab_size=VOCABULARY)


def read(folder: Path, how: str, seconds: float) -> dict[str, Any]:
    """One reading in this process: tokens per second and peak memory."""
    import psutil

    from lopd.batching import ResponseOrder
    from lopd.cache.reader import CacheReader

    process = psutil.Process()
    before = process.memory_info().rss
    peak = 0
    reader = CacheReader(folder)
    started = time.perf_counter()
    processor = time.process_time()
    tokens = 0
    rows = 0
    if how == "in order":
        for response, _ in reader.rows():
            tokens = tokens + len(response.token_ids)
            rows = rows + 1
            if rows % 64 == 0:
                peak = max(peak, process.memory_info().rss)
    else:
        order = ResponseOrder(len(reader), 32, seed=0)
        step = 0
        while time.perf_counter() - started < seconds and step * 32 < len(reader):
            tokens += sum(
                len(response.token_ids) for response, _ in reader.fetch(order.batch_indices(step))
            )
            peak = max(peak, process.memory_info().rss)
            step = step + 1
    elapsed = time.perf_counter() - started
    used = time.process_time() - processor
    return {
        "tokens": tokens,
        "seconds": elapsed,
        "tokens_per_s": tokens / elapsed,
        "tokens_per_processor_s": tokens / used,  # what other work on the machine hardly touches
        "memory_mb": (max(peak, process.memory_info().rss) - before) / 1e6,
    }


def measure(folder: Path, how: str, seconds: float) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--how",
        how,
        "--seconds",
        str(seconds),
    ]
    figures: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=1000.0, help="size of the cache")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the shuffled order")
    parser.add_argument(
        "--trainer",
        type=float,
        default=30_000.0,
        help="tokens per second that the trainer consumes",
    )
    parser.add_argument(
        "--distinct", type=int, default=0, help="shards of content of their own; 0: all"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--how", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        print(json.dumps(read(given.folder, given.how, given.seconds)))
        return
    scratch = Path(tempfile.mkdtemp(prefix="lopd-cache-"))
    try:
        started = time.perf_counter()
        write_cache(scratch / "small", 1)
        write_cache(scratch / "large", given.megabytes, distinct=given.distinct)
        size = sum(path.stat().st_size for path in (scratch / "large").glob("*.parquet"))
        figures: dict[str, Any] = {"bytes": size, "write_seconds": time.perf_counter() - started}
        for how in ("in order", "shuffled"):
            small, large = (
                measure(scratch / name, how, given.seconds) for name in ("small", "large")
            )
            figures[how] = {
                **large,
                "memory_mb_one_shard": small["memory_mb"],
                "times_the_trainer": large["tokens_per_s"] / given.trainer,
            }
    finally:
        shutil.rmtree(scratch)
    for how in ("in order", "shuffled"):
        row = figures[how]
        rate = (
            f"{row['tokens_per_s']:,.0f} tokens/s "
            f"({row['tokens_per_processor_s']:,.0f} per processor second), "
            f"{row['times_the_trainer']:.0f} times the trainer"
        )
        print(
            f"{how:9} {rate}; memory {row['memory_mb']:.0f} MB, "
            f"with one shard {row['memory_mb_one_shard']:.0f} MB"
        )
    print(f"cache of {size / 1e6:,.0f} MB, written in {figures['write_seconds']:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
