"""Killed anywhere, by anything: nothing of a command keeps running, and the same command again ends
where a run never killed ends.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lopd.artifacts import read_manifest
from tests.pipeline.conftest import NUM_STEPS, SHORT, CompletedRun
from tests.pipeline.running import (
    Command,
    FileState,
    Finished,
    deterministic,
    files,
    fingerprints,
    lopd,
    metrics,
    shards,
    states,
    tensorboard,
)

pytestmark = pytest.mark.timeout(1800)  # whichever test is first makes the run

# The results of these stages are equal bit for bit. Those of evaluate and export name folders.
LEARNT = ("demonstrate", "sft", "rollout", "score", "distill")
RANK = "-u -m lopd.stages."
HELD_RANK = "-u -m tests.pipeline.holding"
SERVER = "sglang::scheduler"


def assert_same_result(run_dir: Path, never_killed: Path, stages: tuple[str, ...] = LEARNT) -> None:
    """Every response, score and weight bit for bit, and each step's figures once."""
    assert fingerprints(run_dir, stages) == fingerprints(never_killed, stages)
    for stage in stages:
        for pattern in ("shard-*.parquet", "model/*"):
            assert {
                name: file.sha256 for name, file in files(run_dir / stage, pattern).items()
            } == {
                name: file.sha256 for name, file in files(never_killed / stage, pattern).items()
            }, stage
        for kind in ("train", "eval"):
            assert deterministic(metrics(run_dir, stage, kind)) == deterministic(
                metrics(never_killed, stage, kind)
            ), (stage, kind)


def assert_one_line(finished: Finished) -> None:
    assert "Traceback" not in finished.stdout + finished.stderr
    assert finished.stderr.count("\n") == 1, finished.stderr


def kill(command: Command, number: signal.Signals = signal.SIGKILL) -> Finished:
    """Ends lopd alone by a signal and sees that all the rest ends by itself."""
    assert len(command.processes()) > 1, "it has children"
    command.send(number)
    finished = command.wait(120)
    assert command.ends_completely(), f"left: {command.processes()}"
    return finished


def num_shards(run_dir: Path, stage: str) -> int:
    return len(list((run_dir / stage).glob("shard-*.parquet")))


def steps_done(run_dir: Path, stage: str) -> int:
    return len(metrics(run_dir, stage))


def test_a_run_killed_again_and_again_ends_as_one_never_killed(
    completed: CompletedRun, done_up_to: Callable[[str], Path]
) -> None:
    """One run directory, always the same command: killed amid rollouts and between two checkpoints
    of distill; the server dies amid the scores, and between two buckets of a weight sync, and is
    started again.
    """
    rng = random.Random(7)
    run_dir = done_up_to("sft")
    kept: dict[str, FileState] = {}

    def start(verb: str = "run", holds: Sequence[str] = ()) -> Command:
        return Command(verb, run_dir, [*SHORT, "distill.checkpoint_every=2"], holds=holds)

    def nothing_is_rewritten() -> None:
        now = {
            f"{stage}/{name}": file
            for stage in ("rollout", "score")
            for name, file in shards(run_dir, stage).items()
        }
        assert kept.items() <= now.items()
        kept.update(now)

    first = rng.randint(1, 2)
    command = start(holds=[f"rollout-{first}"])
    command.wait_for(f"rollout-{first}")
    assert kill(command).code == -signal.SIGKILL
    assert num_shards(run_dir, "rollout") == first
    nothing_is_rewritten()
    assert states(run_dir, SHORT)["rollout"] == "partial"

    second = rng.randint(1, 3)
    # The save after step 4 has completed the one after step 2.
    step = 2 * rng.randint(2, 3) + 1
    command = start(holds=[f"score-{second}", f"distill-{step}"])
    command.wait_for(f"score-{second}")
    command.kill_child(SERVER)
    command.wait_until(lambda: "the teacher server died" in command.output, "its death is told")
    assert num_shards(run_dir, "score") == second
    nothing_is_rewritten()
    command.release(f"score-{second}")

    command.wait_for(f"distill-{step}")
    kill(command)
    assert steps_done(run_dir, "distill") == step, "between two checkpoints"
    nothing_is_rewritten()

    command = Command(
        "distill",
        run_dir,
        [
            *SHORT,
            "distill.checkpoint_every=2",
            "sync.transport=distributed",
            "sync.bucket_bytes=50_000",
        ],
        holds=["sync-3"],
    )
    command.wait_for("sync-3")
    command.kill_child(SERVER)
    command.wait_until(lambda: "the student server died" in command.output, "its death is told")
    command.release("sync-3")
    finished = command.wait()
    assert finished.code == 0, finished.stderr
    assert finished.stdout.count("the weights are sent again") == 1
    assert f"distill {step + 1}/{NUM_STEPS}" in finished.stdout
    assert f"distill 1/{NUM_STEPS}" not in finished.stdout, "it goes on from a checkpoint"
    nothing_is_rewritten()
    assert_same_result(run_dir, completed.folder)
    curve = tensorboard(run_dir, "distill", "train/loss")
    assert curve == tensorboard(completed.folder, "distill", "train/loss"), (
        "steps done twice are shown once"
    )
    assert (
        read_manifest(run_dir / "distill").extra
        == read_manifest(completed.folder / "distill").extra
    )


def test_training_goes_on_after_a_rank_was_killed(
    completed: CompletedRun, done_up_to: Callable[[str], Path]
) -> None:
    run_dir = done_up_to("demonstrate")
    overrides = [*SHORT, "sft.checkpoint_every=1"]
    command = Command("sft", run_dir, overrides, holds=["sft-3"])
    command.wait_for("sft-3")
    command.kill_child(HELD_RANK)
    failed = command.wait(120)
    assert failed.code == 2
    assert_one_line(failed)
    assert "train.log" in failed.stderr
    assert command.ends_completely()

    again = Command("sft", run_dir, overrides).wait()
    assert again.code == 0
    assert "sft 1/4" not in again.stdout, "it goes on from a checkpoint"
    assert_same_result(run_dir, completed.folder, ("demonstrate", "sft"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_a_server_starts(number: signal.Signals, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = Command("demonstrate", run_dir, SHORT)
    # The server's start may begin before the stage has written anything.
    manifest = run_dir / "demonstrate" / "manifest.json"
    command.wait_until(
        lambda: bool(command.processes("sglang_rollout.servers.launch")) and manifest.exists(),
        "a server beside a stage that has begun",
    )
    interrupted = kill(command, number)
    assert interrupted.code == 130
    assert_one_line(interrupted)
    assert states(run_dir, SHORT)["demonstrate"] == "partial"


# ---- longer ----

MICRO = (
    "prompts.sft.num_prompts=64",
    "prompts.opd.num_prompts=96",
    "prompts.eval.num_prompts=16",
    "demonstrate.shard_size=16",
    "rollout.shard_size=16",
    (
        "sft={num_steps=4, batch_size=16, dtype='float32', max_tokens_per_microbatch=8192, "
        "checkpoint_every=1}"
    ),
    (
        "distill={num_steps=8, batch_size=24, dtype='float32', max_tokens_per_microbatch=8192, "
        "checkpoint_every=2, sync_every=2, sync_num_prompts=16}"
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(4800)
@pytest.mark.parametrize("seed", [11, 12])
def test_many_kills_at_random_moments(seed: int, tmp_path: Path) -> None:
    """From nothing to the end on one rank; lopd, a rank or a server killed at any moment of any
    stage.
    """
    lopd("run", tmp_path / "never", MICRO)
    rng = random.Random(seed)
    run_dir = tmp_path / "often"
    num_kills = 0
    while num_kills < 10 and states(run_dir, MICRO)["export"] != "done":
        command = Command("run", run_dir, MICRO)
        command.sleep(rng.uniform(3, 20))
        victim = rng.choice(("lopd", "lopd", RANK, SERVER))
        if victim != "lopd" and command.processes(victim):
            command.kill_child(victim)
            num_kills += 1
            if victim == RANK:
                stopped = command.wait(120)
                assert stopped.code in (0, 2)  # 0: it was no longer needed
                if stopped.code == 2:
                    assert_one_line(stopped)
            else:
                command.sleep(rng.uniform(3, 20))  # it is started again, and the run goes on
        if command.running:
            command.send(signal.SIGKILL)
            command.wait(120)
            num_kills += 1
        assert command.ends_completely()
    assert num_kills > 1
    lopd("run", run_dir, MICRO)
    assert_same_result(run_dir, tmp_path / "never")


@pytest.mark.slow
def test_killed_while_it_evaluates(
    completed: CompletedRun, done_up_to: Callable[[str], Path]
) -> None:
    run_dir = done_up_to("distill")
    command = Command("run", run_dir, SHORT)
    command.wait_until(
        lambda: (run_dir / "evaluate" / "answers-sft" / "manifest.json").exists(),
        "the SFT student's answers",
    )
    kill(command)
    answers = files(run_dir / "evaluate", "answers-base/shard-*.parquet")
    assert answers
    lopd("run", run_dir, SHORT)
    assert files(run_dir / "evaluate", "answers-base/shard-*.parquet") == answers
    figures, expected = (
        json.loads((folder / "summary.json").read_text()) for folder in (run_dir, completed.folder)
    )
    for name in ("accuracy", "reverse_kl", "distill", "cache", "sft_longer"):
        assert figures[name] == expected[name], name
    assert deterministic(metrics(run_dir, "sft_longer")) == deterministic(
        metrics(completed.folder, "sft_longer")
    )
