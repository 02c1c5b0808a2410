"""How much of what an SGLang server can score reaches the cache, and what the client needs for it;
in one run, against the same server.

    python benchmarks/scoring.py --json scoring.json

Three clients send the same requests. ``ours`` is the score stage: bounded in flight, ids and values
of every reply checked, shards published as they fill. ``raw`` is the load alone: bare sockets,
bodies built before the clock starts, replies read and thrown away; what it reaches is what the
engine gives. ``unbounded`` starts all requests at once, keeps every reply and writes one file at
the end, as the paper's reference code does.

Each runs in a process of its own. Rounds alternate, in changing order. A share is the median over
the rounds of the ratio within a round, because other work on the machine slows whole rounds; the
table has the fastest round of each client and its median. Tokens are those of prompts and
responses.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEY = "LOPD_BENCHMARK_KEY"
WAYS = ("ours", "raw", "unbounded")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).parents[1] / "examples/tiny_models/teacher",
        help="Hugging Face folder",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the served weights (default %(default)s)",
    )
    parser.add_argument(
        "--responses",
        type=int,
        default=600,
        help="responses to score in a round (default %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=4, help="of them for each prompt (default %(default)s)"
    )
    parser.add_argument(
        "--length",
        type=int,
        default=200,
        help="tokens of the longest response; the shortest has a quarter (default %(default)s)",
    )
    parser.add_argument(
        "--prompt", type=int, default=32, help="tokens of a prompt (default %(default)s)"
    )
    parser.add_argument(
        "--in-flight",
        type=int,
        nargs="+",
        default=[16, 64],
        help="requests open at once (default 16 64)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="of each client (default %(default)s)"
    )
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run_one(options)))
        return
    figures = compare(options)
    print_table(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Serves the model, writes the rollouts, runs every client so often, and compares."""
    from lopd.config import SGLangSection
    from sglang_rollout.servers.server import SGLangServer

    scratch = Path(tempfile.mkdtemp(prefix="lopd-scoring-"))
    context_length = options.prompt + options.length
    settings = SGLangSection(
        dtype=options.dtype,
        context_length=context_length,
        max_running_requests=max(options.in_flight),
        max_total_tokens=max(options.in_flight) * (context_length + 8),
    )
    rounds: dict[str, list[dict[str, Any]]] = {}
    try:
        write_rollouts(scratch / "rollouts", options)
        cases = [(way, number) for number in options.in_flight for way in ("ours", "raw")] + [
            ("unbounded", options.in_flight[-1])
        ]
        with SGLangServer(
            options.model, settings, log=scratch / "sglang.log", name="teacher"
        ) as server:
            environment = {**os.environ, KEY: server.api_key, "OMP_NUM_THREADS": "1"}
            for index in range(options.rounds + 1):  # the first warms up
                for way, number in cases if index % 2 else cases[::-1]:
                    command = client_command(options, way, number, server.url, scratch)
                    run = subprocess.run(
                        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
                    )
                    if index:
                        rounds.setdefault(f"{way} {number}", []).append(json.loads(run.stdout))
    finally:
        shutil.rmtree(scratch)
    rows = {name: summary(found) for name, found in rounds.items()}
    last = options.in_flight[-1]
    return {
        "model": options.model.name,
        "responses": options.responses,
        "rounds": options.rounds,
        "clients": rows,
        "share_of_engine": {
            str(number): share(rounds, f"ours {number}", f"raw {number}")
            for number in options.in_flight
        },
        "versus_unbounded_client": share(rounds, f"ours {last}", f"unbounded {last}"),
        "peak_memory_mb": {
            "ours": rows[f"ours {last}"]["peak_mb"],
            "unbounded": rows[f"unbounded {last}"]["peak_mb"],
        },
    }


def client_command(
    options: argparse.Namespace, way: str, number: int, url: str, folder: Path
) -> list[str]:
    """The command of a process that scores all responses once."""
    given = {
        "--one": way,
        "--in-flight": number,
        "--url": url,
        "--folder": folder,
        "--model": options.model,
        "--dtype": options.dtype,
        "--prompt": options.prompt,
        "--length": options.length,
    }
    words = [word for option, value in given.items() for word in (option, str(value))]
    return [sys.executable, __file__, *words]


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    rates = [rate(row) for row in found]
    return {
        "tokens_per_s": max(rates),
        "median_tokens_per_s": statistics.median(rates),
        "processor_s": statistics.median(row["processor_s"] for row in found),
        "peak_mb": statistics.median(row["peak_mb"] for row in found),
        "own_mb": statistics.median(row["peak_mb"] - row["before_mb"] for row in found),
    }


def rate(row: dict[str, Any]) -> float:
    return float(row["tokens"] / row["seconds"])


def share(rounds: dict[str, list[dict[str, Any]]], ours: str, other: str) -> float:
    """Median over the rounds of ours / other."""
    return statistics.median(
        rate(mine) / rate(theirs) for mine, theirs in zip(rounds[ours], rounds[other], strict=True)
    )


def print_table(figures: dict[str, Any]) -> None:
    print(
        f"{'client':14} {'tokens/s':>10} {'median':>10} {'processor s':>12} {'peak MB':>8} "
        f"{'beyond its start':>17}"
    )
    for name, row in figures["clients"].items():
        print(
            f"{name:14} {row['tokens_per_s']:10,.0f} {row['median_tokens_per_s']:10,.0f} "
            f"{row['processor_s']:12.2f} {row['peak_mb']:8.0f} {row['own_mb']:17.1f}"
        )
    for number, value in figures["share_of_engine"].items():
        print(f"share of the engine, {number} in flight: {value:.3f}")
    print(f"against the unbounded client: {figures['versus_unbounded_client']:.3f}")


# ---- the data ----


def write_rollouts(folder: Path, options: argparse.Namespace) -> None:
    """Synthetic responses of random tokens."""
    import numpy as np

    from lopd import cache
    from lopd.artifacts import ArtifactWriter
    from lopd.records import Response

    rng = np.random.default_rng(0)
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    writer = ArtifactWriter(
        folder, kind="rollouts", inputs={"synthetic": options.responses}, shard_size=256
    )
    responses = []
    for index in range(options.responses):
        if index % options.samples == 0:
            prompt = rng.integers(0, vocab_size, options.prompt, dtype=np.int32)
        ids = rng.integers(
            0,
            vocab_size,
            int(rng.integers(options.length // 4, options.length + 1)),
            dtype=np.int32,
        )
        key = (f"p{index // options.samples}", index % options.samples)
        responses.append(
            Response(
                prompt_id=key[0],
                sample_index=key[1],
                prompt_ids=prompt,
                token_ids=ids,
                sampling_logprobs=np.full(len(ids), -1, np.float32),
                finish_reason="length",
                weight_version="0",
            )
        )
    for shard, start in enumerate(range(0, len(responses), 256)):
        writer.publish_shard(shard, cache.to_table(responses[start : start + 256]))
    writer.finish()


# ---- the clients, each in a process of its own ----


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """{tokens, seconds, processor_s, before_mb, peak_mb} of one client."""
    return {"ours": ours, "raw": raw, "unbounded": unbounded}[options.one](options)


def measured(tokens: int, work: Callable[[], object]) -> dict[str, Any]:
    before = peak_mb()
    processor = processor_s()
    started = time.perf_counter()
    work()
    return {
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
        "processor_s": processor_s() - processor,
        "before_mb": before,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Of this process since it began; getrusage would also count its parent's, before the exec."""
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        / 1024
    )


def processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def bodies(options: argparse.Namespace) -> tuple[list[bytes], int]:
    """The bodies of all requests, and the number of tokens in them."""
    import orjson

    from lopd import cache
    from lopd.artifacts import read_manifest
    from sglang_rollout.requests.scoring import ScoreRequest, score_payload

    folder = options.folder / "rollouts"
    found = []
    tokens = 0
    for index, (response, _) in enumerate(cache.read_rows(folder, read_manifest(folder))):
        request = ScoreRequest(
            response.prompt_id, response.sample_index, response.prompt_ids, response.token_ids
        )
        body = score_payload([request], [f"{options.one}-{os.getpid()}-{index}"])
        found.append(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
        tokens += len(response.prompt_ids) + len(response.token_ids)
    return found, tokens


def ours(options: argparse.Namespace) -> dict[str, Any]:
    from lopd.artifacts import ArtifactWriter, read_manifest
    from lopd.config import SGLangSection
    from lopd.stages.score_shards import score_into
    from sglang_rollout.requests.client import SGLangEngine

    _, tokens = bodies(options)
    settings = SGLangSection(
        dtype=options.dtype,
        context_length=options.prompt + options.length,
        max_in_flight=options.in_flight[0],
    )
    engine = SGLangEngine(options.url, os.environ[KEY], settings)
    target = options.folder / f"scored-{os.getpid()}"
    rollouts = read_manifest(options.folder / "rollouts")

    def work() -> None:
        writer = ArtifactWriter(target, kind="teacher_cache", inputs={})
        # The progress bar goes to standard error.
        screen = sys.stdout
        sys.stdout = sys.stderr
        score_into(writer, engine, options.folder / "rollouts", rollouts, title="scoring")
        sys.stdout = screen
        writer.finish()

    found = measured(tokens, work)
    shutil.rmtree(target)
    return found


def raw(options: argparse.Namespace) -> dict[str, Any]:
    ready, tokens = bodies(options)
    host, port = options.url.removeprefix("http://").split(":")
    head = (
        b"POST /generate HTTP/1.1\r\n"
        b"Host: %s\r\n"
        b"Authorization: Bearer %s\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: "
        % (
            host.encode(),
            os.environ[KEY].encode(),
        )
    )
    remaining = iter(ready)

    async def send() -> None:
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**24)
        for body in remaining:
            writer.write(head + b"%d\r\n\r\n" % len(body) + body)
            status, _, fields = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            assert b" 200 " in status, status
            length = next(
                int(line.partition(b":")[2])
                for line in fields.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
        writer.close()

    async def load() -> None:
        await asyncio.gather(*(send() for _ in range(options.in_flight[0])))

    return measured(tokens, lambda: asyncio.run(load()))


def unbounded(options: argparse.Namespace) -> dict[str, Any]:
    import aiohttp
    import pyarrow as pa
    import pyarrow.parquet as pq

    ready, tokens = bodies(options)
    target = options.folder / f"unbounded-{os.getpid()}.parquet"

    async def load() -> None:
        headers = {"Authorization": f"Bearer {os.environ[KEY]}", "Content-Type": "application/json"}
        async with aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
        ) as session:

            async def ask(body: bytes) -> Any:
                async with session.post(f"{options.url}/generate", data=body) as reply:
                    return await reply.json()

            answers = await asyncio.gather(*(ask(body) for body in ready))
        logprobs = [
            [
                entry[0]
                for entry in itertools.islice(answer["meta_info"]["input_token_logprobs"], 1, None)
            ]
            for answer in answers
        ]
        pq.write_table(
            pa.table({"teacher_logprobs": pa.array(logprobs, pa.list_(pa.float32()))}), target
        )

    found = measured(tokens, lambda: asyncio.run(load()))
    target.unlink()
    return found


if __name__ == "__main__":
    main()
