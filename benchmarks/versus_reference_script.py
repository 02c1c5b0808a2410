"""Our scoring against the way in which the paper's own script asks a server, on the same server.

    python -m benchmarks.versus_reference_script --json versus_reference_script.json

The script is re-created from its description. It starts all requests at once over one session, asks
for the log-probabilities of whole sequences and cuts the response's off the end, keeps all replies,
and writes one file at the end. It compares no ids and repeats nothing. Ours is the score stage with
all its checks, in bounded memory, with the default of sglang.max_in_flight.

A real SGLang server of the tiny teacher runs on the CPU. Each client runs in a process of its own,
one after the other, in changing order. Figures are medians over the rounds of the ratio within a
round, because other work on the machine slows whole rounds:

tokens_per_s_ratio  ours over the script's; tokens are those of prompts and responses
server_cpu_ratio    processor time of the server's processes for ours over that for the script's
prefill_batches     the server's own lines "Prefill batch" in a round, median
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import scoring
from lopd import cache
from lopd.artifacts import read_manifest
from lopd.config import SGLangSection
from sglang_rollout.servers.server import SGLangServer

WAYS = ("ours", "script")
BATCH_LINE = "Prefill batch"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    tiny = Path(__file__).parents[1] / "examples/tiny_models/teacher"
    parser.add_argument("--model", type=Path, default=tiny, help="Hugging Face folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--responses", type=int, default=2048, help="default %(default)s")
    parser.add_argument("--samples", type=int, default=1, help="for each prompt")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=200, help="tokens of the longest response")
    parser.add_argument("--running", type=int, default=64, help="requests the server runs at once")
    parser.add_argument(
        "--in-flight",
        type=int,
        nargs=1,
        default=[SGLangSection().max_in_flight],
        help="of ours (default %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(scoring.ours(options) if options.one == "ours" else script(options)))
        return
    figures = compare(options)
    print(json.dumps(figures, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Serve the model, run both clients in turn, and return the figures."""
    scratch = Path(tempfile.mkdtemp(prefix="lopd-versus-script-"))
    context_length = options.prompt + options.length
    settings = SGLangSection(
        dtype=options.dtype,
        context_length=context_length,
        max_running_requests=options.running,
        max_total_tokens=options.running * (context_length + 8),
    )
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    log = scratch / "sglang.log"
    try:
        scoring.write_rollouts(scratch / "rollouts", options)
        with SGLangServer(options.model, settings, log=log, name="teacher") as server:
            for index in range(options.rounds + 1):  # the first warms up
                for way in WAYS if index % 2 else WAYS[::-1]:
                    found = run(way, options, scratch, server, log)
                    if index:
                        rounds[way].append(found)
    finally:
        shutil.rmtree(scratch)
    return {
        "model": options.model.name,
        "responses": options.responses,
        "in_flight": options.in_flight[0],
        "rounds": options.rounds,
        "tokens_per_s_ratio": median_ratio(rounds, lambda row: row["tokens"] / row["seconds"]),
        "server_cpu_ratio": median_ratio(rounds, lambda row: row["server_cpu_s"]),
        "client_cpu_ratio": median_ratio(rounds, lambda row: row["processor_s"]),
        "beyond_start_mb": {
            way: statistics.median(row["peak_mb"] - row["before_mb"] for row in rows)
            for way, rows in rounds.items()
        },
        "prefill_batches": {
            way: statistics.median(row["prefill_batches"] for row in rows)
            for way, rows in rounds.items()
        },
        "of_each_round": rounds,
    }


def median_ratio(rounds: dict[str, list[dict[str, Any]]], figure: Any) -> float:
    """Return the median over the rounds of ours over the script's."""
    pairs = zip(rounds["ours"], rounds["script"], strict=True)
    return statistics.median(figure(ours) / figure(script) for ours, script in pairs)


def run(
    way: str, options: argparse.Namespace, scratch: Path, server: SGLangServer, log: Path
) -> dict[str, Any]:
    """Run one client in a process of its own and return its figures and those of the server."""
    command = [sys.executable, "-m", "benchmarks.versus_reference_script", "--one", way]
    command += ["--url", server.url, "--folder", str(scratch)]
    for name in ("model", "dtype", "prompt", "length"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--in-flight", str(options.in_flight[0])]
    environment = {**os.environ, scoring.KEY: server.api_key, "OMP_NUM_THREADS": "1"}
    before = server_cpu_s(), log.read_text().count(BATCH_LINE)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    found["server_cpu_s"] = server_cpu_s() - before[0]
    found["prefill_batches"] = log.read_text().count(BATCH_LINE) - before[1]
    return found


def server_cpu_s() -> float:
    """Return the processor time of all living processes that this one has started."""
    # Between two clients these are the server's alone.
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def script(options: argparse.Namespace) -> dict[str, Any]:
    """Ask as the script does."""
    folder = options.folder / "rollouts"
    rows = [response for response, _ in cache.read_rows(folder, read_manifest(folder))]
    tokens = sum(len(row.prompt_ids) + len(row.token_ids) for row in rows)
    target = options.folder / f"script-{os.getpid()}.parquet"

    def work() -> None:
        answers = asyncio.run(ask_all(options.url, rows))
        logprobs = [
            [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]][
                -len(row.token_ids) :
            ]
            for row, answer in zip(rows, answers, strict=True)
        ]
        columns = {
            "prompt_ids": [row.prompt_ids.tolist() for row in rows],
            "token_ids": [row.token_ids.tolist() for row in rows],
            "teacher_logprobs": logprobs,
        }
        pq.write_table(pa.table(columns), target)

    found = scoring.measured(tokens, work)
    target.unlink()
    return found


async def ask_all(url: str, rows: list[Any]) -> list[Any]:
    """Start all requests at once over one session and return all replies."""
    headers = {"Authorization": f"Bearer {os.environ[scoring.KEY]}"}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=timeout
    ) as session:

        async def ask(row: Any) -> Any:
            body = {
                "input_ids": [*row.prompt_ids.tolist(), *row.token_ids.tolist()],
                "sampling_params": {"temperature": 0, "max_new_tokens": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            async with session.post(f"{url}/generate", json=body) as reply:
                reply.raise_for_status()
                return await reply.json()

        return await asyncio.gather(*(ask(row) for row in rows))


if __name__ == "__main__":
    main()
