"""sft and distill over two machines, servers on a third, and machines that are lost: network
namespaces on this host. docs/launch.md tells what was seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lopd.cache.reader import CacheReader
from sglang_rollout.servers.launch import KEY_VARIABLE
from tests.launching.namespaces import Machine, machines, why_impossible

TINY = Path(__file__).parents[2] / "examples/tiny_moe.toml"
TIMEOUT_S = 15  # of a collective
PATIENCE_S = 400.0  # for a command on a busy machine
SMALL = [
    *(
        "prompts.sft.num_prompts=64",
        "prompts.opd.num_prompts=64",
        "prompts.eval.num_prompts=64",
        "rollout.shard_size=64",
    ),
    *("sft.num_steps=40", "sft.batch_size=16", "sft.log_every=1", f"sft.timeout_s={TIMEOUT_S}"),
    *(
        "distill.num_steps=24",
        "distill.batch_size=16",
        "distill.log_every=1",
        "distill.sync_every=4",
        f"distill.timeout_s={TIMEOUT_S}",
    ),
    *("distill.sync_num_prompts=16",),
]
TIMES = (
    "seconds",
    "data_wait",
    "peak_memory",
    "per_s",
)  # in the names of figures that differ from run to run
PORT = 30000
KEY = "key-of-the-third-machine"


@pytest.fixture(scope="module")
def three() -> Iterator[list[Machine]]:
    if reason := why_impossible():
        pytest.skip(reason)
    with machines(3) as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages on this machine alone, two ranks each, servers on loopback. LOPD_ALONE: such a
    run, of these settings, that is done.
    """
    if "LOPD_ALONE" in os.environ:
        return Path(os.environ["LOPD_ALONE"])
    run = tmp_path_factory.mktemp("alone") / "run"
    for stage in ("demonstrate", "sft", "rollout", "score", "distill"):
        done = subprocess.run(
            command(stage, run),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
            env=environment(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return run


def command(stage: str, run: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lopd.cli",
        stage,
        str(TINY),
        *SMALL,
        f"run.dir={run}",
        *overrides,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", KEY_VARIABLE: KEY}


def spread(
    stage: str,
    run: Path,
    over: list[Machine],
    *overrides: str,
    meanwhile: Callable[[], float] = time.monotonic,
) -> tuple[list[int], list[str], float]:
    """The stage on two machines, a rank each. Exit codes, what each wrote, and how many seconds
    after meanwhile's moment both had ended.
    """
    nodes = [f"{stage}.parallel.nodes={len(over)}", *overrides]
    logs = [run.with_name(f"{run.name}.{index}.log") for index in range(len(over))]
    for log in logs:
        log.unlink(missing_ok=True)
    started = [
        machine.start(
            [*command(stage, run, *nodes), "--node", f"{index}/{len(over)}"], log, environment()
        )
        for index, (machine, log) in enumerate(zip(over, logs, strict=True))
    ]
    moment = meanwhile()
    codes = [process.wait(PATIENCE_S) for process in started]
    took = time.monotonic() - moment
    return codes, [log.read_text() for log in logs], took


def weights(run: Path, stage: str) -> str:
    return hashlib.sha256(
        b"".join(
            path.read_bytes() for path in sorted((run / stage / "model").glob("*.safetensors"))
        )
    ).hexdigest()


def figures(run: Path, stage: str, kind: str = "train") -> list[dict[str, Any]]:
    """The stage's figures without those of the clock, one record a step: the last one, where a step
    was repeated.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["kind"] == kind and row["stage"] == stage]
    steady = {
        row["step"]: {
            key: value for key, value in row.items() if not any(word in key for word in TIMES)
        }
        for row in mine
    }
    return [steady[step] for step in sorted(steady)]


def without(run: Path, whole: Path, *stages: str) -> Path:
    """A copy of a run in which these stages have not run."""
    shutil.copytree(
        whole,
        run,
        ignore=lambda folder, _: (
            [*stages, "metrics.jsonl", "tensorboard"] if Path(folder) == whole else []
        ),
    )
    return run


def after_step(run: Path, step: int, act: Callable[[], None]) -> Callable[[], float]:
    """Waits for a step's line, acts, and tells when that was."""

    def wait() -> float:
        end = time.monotonic() + PATIENCE_S
        while f'"step": {step},' not in (
            (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        ):
            assert time.monotonic() < end
            time.sleep(0.05)
        act()
        return time.monotonic()

    return wait


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error")]


@pytest.mark.slow
def test_two_machines_are_one_to_the_bit(alone: Path, three: list[Machine], tmp_path: Path) -> None:
    run = without(tmp_path / "run", alone, "sft", "distill")
    # The stage distill reads the existing rollouts. They are this student's only if sft gave the
    # same weights.
    for stage in ("sft", "distill"):
        codes, said, _ = spread(stage, run, three[:2])
        assert codes == [0, 0], said
        assert weights(run, stage) == weights(alone, stage)
        assert figures(run, stage) == figures(alone, stage)
        assert (run / stage / "train-node1.log").is_file()
    assert figures(run, "distill", "eval") == figures(alone, "distill", "eval")
    other = tmp_path / "other"
    demonstrations = f"sft.demonstrations={alone / 'demonstrate'}"
    codes, said, _ = spread("sft", other, three[:2], demonstrations, "run.seed=18")
    assert codes == [0, 0], said
    assert weights(other, "sft") != weights(alone, "sft"), "control: another order of the data"
    assert figures(other, "sft") != figures(alone, "sft")


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "loss"), [(1, "network"), (1, "killed"), (0, "killed")])
def test_a_machine_that_disappears(
    lost: int, loss: str, alone: Path, three: list[Machine], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    demonstrations = f"sft.demonstrations={alone / 'demonstrate'}"
    left = 1 - lost
    act = three[lost].lose_network if loss == "network" else three[lost].kill
    codes, said, took = spread(
        "sft", run, three[:2], demonstrations, meanwhile=after_step(run, 13, act)
    )
    print(f"machine {lost}, {loss}: codes {codes}, {took:.1f} s;", *said, sep="\n")
    assert codes[left] == 2
    assert took < 5 * TIMEOUT_S
    [line] = error_lines(said[left])
    assert f"machine {lost} of 2 has " in line
    assert ("signs of life: see the network" in line) == (loss == "network")
    assert "run the same command again" in line
    if loss == "network":
        three[lost].regain_network()
    codes, said, _ = spread("sft", run, three[:2], demonstrations)
    assert codes == [0, 0], said
    assert weights(run, "sft") == weights(alone, "sft")
    assert figures(run, "sft") == figures(alone, "sft")


@pytest.fixture(scope="module")
def served_there(
    alone: Path, three: list[Machine], tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = tmp_path_factory.mktemp("served")
    log = folder / "log"
    url = f"http://{three[2].address}:{PORT}"
    words = [
        sys.executable,
        "-m",
        "tests.launching.server_there",
        str(alone / "sft/model"),
        three[2].address,
        str(PORT),
        str(folder / "sglang.log"),
    ]
    process = three[2].start(words, log, environment())
    end = time.monotonic() + PATIENCE_S
    while "serving" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    return url


@pytest.mark.slow
def test_rollouts_from_a_server_on_a_third_machine(
    alone: Path, three: list[Machine], served_there: str, tmp_path: Path
) -> None:
    run = without(tmp_path / "run", alone, "rollout", "score", "distill")
    process = three[0].start(
        command("rollout", run, f'sglang.student_urls=["{served_there}"]'),
        tmp_path / "log",
        environment(),
    )
    assert process.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    there, here = (list(CacheReader(folder / "rollout").rows()) for folder in (run, alone))
    assert len(there) == len(here) == 64
    for (ours, _), (theirs, _) in zip(there, here, strict=True):
        assert (ours.key, ours.token_ids.tolist()) == (theirs.key, theirs.token_ids.tolist())
        assert ours.sampling_logprobs.tolist() == theirs.sampling_logprobs.tolist()
    assert len({tuple(row.token_ids.tolist()) for row, _ in there}) > 32, (
        "control: responses differ from each other"
    )


@pytest.mark.slow
def test_weights_by_broadcast_into_a_server_on_a_third_machine(
    alone: Path, three: list[Machine], served_there: str, tmp_path: Path
) -> None:
    run = without(tmp_path / "run", alone, "distill")
    there = [
        f'sglang.student_urls=["{served_there}"]',
        "sync.transport=distributed",
        "sync.verify=tensors",
        "sync.timeout_s=30",
    ]
    codes, said, _ = spread("distill", run, three[:2], *there, f"sync.host={three[0].address}")
    print(*said, sep="\n")
    assert codes == [0, 0], said
    assert weights(run, "distill") == weights(alone, "distill")
    assert figures(run, "distill") == figures(alone, "distill")
    synced = [line for line in said[0].splitlines() if "weights synced" in line]
    assert len(synced) == 6
    assert all("by distributed" in line and " 102 tensors verified" in line for line in synced), (
        "every tensor's fingerprint is that of the one sent"
    )
    assert len(figures(run, "distill", "eval")) == 7, "the server answers with them"


@pytest.mark.slow
def test_the_server_s_machine_is_lost(
    alone: Path, three: list[Machine], served_there: str, tmp_path: Path
) -> None:
    run = without(tmp_path / "run", alone, "distill")
    there = [
        f'sglang.student_urls=["{served_there}"]',
        "sync.transport=distributed",
        "sync.timeout_s=10",
        "sync.host=auto",
        "sglang.outage_timeout_s=10",
    ]
    refused = subprocess.run(
        command("distill", run, *there[:2]),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert refused.returncode == 2
    assert "sync.host" in refused.stderr, "control: by itself it meets on loopback"
    codes, said, took = spread(
        "distill", run, three[:2], *there, meanwhile=after_step(run, 9, three[2].lose_network)
    )
    print(f"codes {codes}, {took:.1f} s", *said, sep="\n")
    assert codes[0] == 2
    assert took < 5 * TIMEOUT_S
    [line] = error_lines(said[0])
    assert three[2].address in line
    three[2].regain_network()
    codes, said, _ = spread("distill", run, three[:2], *there)
    assert codes == [0, 0], said
    assert weights(run, "distill") == weights(alone, "distill")
