"""Refreshes: which step learns from what, and that a training killed in the middle of one ends as
one never killed. Real ranks, fake servers.

What real servers make of it is measured by benchmarks/refresh.py; the longer tests here start them
too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from lopd.artifacts import ArtifactWriter, publish_json, read_manifest, read_shard
from lopd.batching import ResponseOrder
from lopd.cache import read_rows
from lopd.config import Config, load_config
from lopd.errors import ArtifactError, EngineError, TrainingError
from lopd.megatron.ranks.launch import run_ranks
from lopd.report.console import teacher_line
from lopd.stages import distill, refresh_teachers
from lopd.stages.context import StageContext
from lopd.stages.refresh_record import REQUEST, RefreshRecord, completed
from lopd.stages.refresh_service import RefreshService, next_prompts, num_responses
from lopd.stages.training import TrainingJob
from sglang_rollout.requests.client import SGLangEngine
from tests.pipeline.holding import HOLDS
from tests.pipeline.refreshing import DELAY, REFUSES
from tests.pipeline.running import deterministic, files, metrics
from tests.pipeline.waiting_cases import COLLECTIVE_TIMEOUT_S, REFRESH_S
from tests.stand_ins import Engine, scored_project

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 5
EVERY = 2
BATCH = 4
SETTINGS = (
    (
        f"distill={{num_steps={NUM_STEPS}, batch_size={BATCH}, dtype='float32', "
        "sync_every=4, sync_num_prompts=2, checkpoint_every=1}"
    ),
    f"distill.refresh.every={EVERY}",
    "rollout.shard_size=4",
    "sglang.max_in_flight=1",
    "sync.verify=off",  # the fake server cannot tell what it holds
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages are done up to score, by stand-ins; its run directory is ``run``."""
    with scored_project(tmp_path_factory.mktemp("refreshing"), config_of) as folder:
        return folder


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.toml", [*SETTINGS, *overrides])


class Distill:
    """``lopd distill`` in a process of its own; delay_s: of each answer of its servers; hold: where
    it waits to be killed (tests.pipeline.holding).
    """

    def __init__(
        self, folder: Path, *overrides: str, delay_s: float = 0, refuses: str = "", hold: str = ""
    ) -> None:
        self._folder = folder
        self._holds = folder / "holds"
        self._holds.mkdir(exist_ok=True)
        if hold:
            (self._holds / hold).touch()
        arguments = [
            sys.executable,
            "-m",
            "tests.pipeline.refreshing",
            str(folder),
            "distill",
            str(folder / "config.toml"),
            *SETTINGS,
            *overrides,
        ]
        self._output = (folder / "output.txt").open("ab")
        environment = {**os.environ, DELAY: str(delay_s), REFUSES: refuses, HOLDS: str(self._holds)}
        self._process = subprocess.Popen(
            arguments,
            env=environment,
            cwd=ROOT,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def succeeds(self) -> str:
        """What stood on the screen of all commands in this folder."""
        code = self._process.wait(500)
        assert code == 0, self.output
        return self.output

    def fails(self) -> str:
        """The last line of its screen, where it ended with an error and left no rank behind."""
        assert self._process.wait(500) == 2, self.output
        self._leaves_nothing()
        return self.output.splitlines()[-1]

    @property
    def output(self) -> str:
        return (self._folder / "output.txt").read_text()

    def kill_when(self, reached: Callable[[], bool]) -> None:
        """kill -9 as soon as reached() is true; then nothing of it is left."""
        deadline = time.monotonic() + 400
        while not reached():
            assert self._process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(120)
        self._leaves_nothing()

    def kill_when_held(self) -> None:
        self.kill_when(lambda: any(self._holds.glob("*.held")))
        for held in self._holds.iterdir():
            held.unlink()

    def _leaves_nothing(self) -> None:
        deadline = time.monotonic() + 60
        while self._ranks():
            assert time.monotonic() < deadline, "its ranks outlive it"
            time.sleep(0.1)

    def _ranks(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    found.append(
                        entry.joinpath("cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                except OSError:
                    continue
        return [
            line for line in found if str(self._folder) in line and "lopd.stages.distill" in line
        ]


def asked(folder: Path) -> list[dict[str, Any]]:
    path = folder / "asked.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.fixture(scope="module")
def never_killed(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(scored, tmp_path_factory.mktemp("never") / "project")
    Distill(folder).succeeds()
    return folder


def test_what_each_step_learns_from(never_killed: Path) -> None:
    """Two refreshes, before the third and the fifth step: fresh responses to the prompts that
    Lightning OPD would learn from in these steps.
    """
    stage = never_killed / "run" / "distill"
    refreshes = read_manifest(stage).extra["refreshes"]
    assert [
        (made["number"], made["step"], made["rows"], made["version"]) for made in refreshes
    ] == [(1, 2, 8, "step-2"), (2, 4, 4, "step-4")]
    rollouts = [response for response, _ in read_rows(never_killed / "run" / "score")]
    order = ResponseOrder(len(rollouts), BATCH, seed=17)
    for made, steps in zip(refreshes, ((2, 3), (4,)), strict=True):
        folder = stage / f"refresh-{made['number']:04d}"
        assert read_manifest(folder / "scores").fingerprint == made["fingerprint"]
        fresh = list(read_rows(folder / "scores"))
        expected = [
            rollouts[index].prompt_id for step in steps for index in order.batch_indices(step)
        ]
        assert [response.prompt_id for response, _ in fresh] == expected
        assert all(
            response.weight_version == made["version"] and scores is not None
            for response, scores in fresh
        )
        frozen = {response.prompt_id: response.token_ids.tolist() for response in rollouts}
        assert all(
            response.token_ids.tolist() != frozen[response.prompt_id] for response, _ in fresh
        ), "not the cache's responses"
    rows = metrics(never_killed / "run", "distill")
    assert [row["refreshes"] for row in rows] == [0, 0, 1, 1, 2]


def test_servers_do_what_is_needed_and_no_more(never_killed: Path) -> None:
    done = asked(never_killed)
    assert [line["weights"] for line in done if "weights" in line] == [
        "step-2",
        "step-4",
        "step-5",
    ], "a sync and a refresh of the same step share the weights"
    fresh = [line["seed"] for line in done if line.get("version") in ("step-2", "step-4")]
    assert len(fresh) == len(set(fresh)) == 8 + 4 + 2, (
        "with two held-out prompts after the fourth step"
    )
    scored_by_teacher = [
        line["scored"] for line in done if "scored" in line and line["role"] == "teacher"
    ]
    assert len(scored_by_teacher) == 8 + 4


def test_the_summary_counts_what_the_teacher_did(never_killed: Path) -> None:
    run_dir = never_killed / "run"
    work = json.loads((run_dir / "summary.json").read_text())["teacher_work"]
    made = read_manifest(run_dir / "distill").extra["refreshes"]
    scored_tokens = sum(len(response.token_ids) for response, _ in read_rows(run_dir / "score"))
    fresh_tokens = [
        sum(
            len(response.token_ids)
            for response, _ in read_rows(run_dir / "distill" / f"refresh-000{n}" / "scores")
        )
        for n in (1, 2)
    ]
    assert [refresh["tokens"] for refresh in made] == fresh_tokens
    assert (work["refreshes"], work["tokens"]) == (2, scored_tokens + sum(fresh_tokens))
    seconds = [
        json.loads(path.read_text())["teacher_seconds"]
        for path in sorted(run_dir.glob("distill/refresh-*/seconds.json"))
    ]
    assert len(seconds) == 2
    assert work["seconds"] == pytest.approx(
        json.loads((run_dir / "score" / "seconds.json").read_text())["seconds"] + sum(seconds),
        abs=1e-3,
    )
    assert teacher_line(work).startswith(f"teacher: {work['tokens']} response tokens scored in ")
    assert teacher_line(work).endswith(", 2 refreshes")
    assert "refresh" not in teacher_line({**work, "refreshes": 0}), (
        "Lightning OPD's line says nothing of them"
    )


def test_killed_while_it_samples_ends_as_one_never_killed(
    scored: Path, never_killed: Path, tmp_path: Path
) -> None:
    folder = copied(scored, tmp_path / "project")
    first = folder / "run" / "distill" / "refresh-0001"
    Distill(folder, hold="rollouts-1").kill_when_held()
    assert (first / "rollouts" / "shard-00000.parquet").exists()
    assert not (first / "rollouts" / "shard-00001.parquet").exists()
    assert not (first / "scores").exists()
    published = files(first, "**/*.parquet")
    Distill(folder, "sync.colocate=true").succeeds()  # which changes no result
    assert published.items() <= files(first, "**/*.parquet").items()
    assert_same_result(folder, never_killed)
    given_back = [set(line["away"]) for line in asked(folder) if "away" in line]
    everything = {"weights", "kv_cache", "cuda_graph"}
    turns = [everything, *[everything - {"weights"}, set(), everything] * 3]
    assert given_back == turns, (
        "two refreshes and two evaluations, of which one has its weights from the evaluation "
        "before the same step"
    )
    seeds = [line["seed"] for line in asked(folder) if line.get("version") == "step-2"]
    assert 8 <= len(seeds) <= 8 + 4, "at most the shard that the kill cut off is sampled again"
    assert len(set(seeds)) == 8, "what is asked again is asked with the same seed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "refresh-0001/scores/shard-00000.parquet",
        "refresh-0001/seconds.json",
        "refresh-0002/rollouts/manifest.json",
    ],
)
def test_killed_while_it_scores_or_trains_on_it_or_begins_the_next(
    moment: str, scored: Path, never_killed: Path, tmp_path: Path
) -> None:
    folder = copied(scored, tmp_path / "project")
    stage = folder / "run" / "distill"
    Distill(folder, delay_s=0.15).kill_when(lambda: (stage / moment).exists())
    published = files(stage, "refresh-*/**/*.parquet")
    Distill(folder).succeeds()
    assert published.items() <= files(stage, "refresh-*/**/*.parquet").items(), (
        "nothing published is made again"
    )
    assert_same_result(folder, never_killed)


@pytest.mark.slow
def test_a_teacher_that_refuses_ends_the_waiting_ranks_with_its_error(
    scored: Path, never_killed: Path, tmp_path: Path
) -> None:
    folder = copied(scored, tmp_path / "project")
    assert "error: " in (line := Distill(folder, refuses="teacher").fails())
    assert "as told" in line
    assert "Traceback" not in line
    Distill(folder).succeeds()
    assert_same_result(folder, never_killed)


def assert_same_result(folder: Path, never_killed: Path) -> None:
    stage = folder / "run" / "distill"
    expected = never_killed / "run" / "distill"
    assert read_manifest(stage).fingerprint == read_manifest(expected).fingerprint
    assert read_manifest(stage).extra == read_manifest(expected).extra
    for pattern in ("model/*", "refresh-*/**/*.parquet"):
        assert {name: file.sha256 for name, file in files(stage, pattern).items()} == {
            name: file.sha256 for name, file in files(expected, pattern).items()
        }
    assert files(stage, "refresh-*/**/*.parquet"), "there is something to compare"
    for kind in ("train", "eval"):
        assert deterministic(metrics(folder / "run", "distill", kind)) == deterministic(
            metrics(never_killed / "run", "distill", kind)
        )


def test_ranks_wait_for_a_refresh_longer_than_a_collective_may_last(
    scored: Path, tmp_path: Path
) -> None:
    """And then go on together; the control is a rank that waits as long in a collective."""
    job = job_of(scored, tmp_path)
    publish_json(tmp_path / "job.json", job.to_json())
    score = scored / "run" / "score"
    lines = []

    def hear(line: str) -> None:
        lines.append(line)
        if (tmp_path / REQUEST).exists():
            (tmp_path / REQUEST).unlink()
            time.sleep(REFRESH_S)
            writer = ArtifactWriter(
                tmp_path / "refresh-0001" / "scores",
                kind="teacher_cache",
                inputs={"refresh.step": 2},
            )
            writer.publish_shard(0, read_shard(score, read_manifest(score).shards[0]))
            writer.finish()

    assert REFRESH_S > COLLECTIVE_TIMEOUT_S
    with pytest.raises(TrainingError, match="waited too long for the other ranks"):
        run_ranks(
            "tests.pipeline.waiting_cases",
            [str(tmp_path / "job.json")],
            ranks=2,
            threads_per_rank=1,
            log=tmp_path / "train.log",
            timeout_s=500,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            on_line=hear,
        )
    learns = "learns from 4, next refresh: None"
    assert {f"rank 0 {learns}", f"rank 1 {learns}"} <= set(lines)
    assert {
        f"rank {rank} is told: a server: no, says rank 0; remedy: ask another" for rank in (0, 1)
    } <= set(lines)
    assert "waited in a collective" not in lines


def job_of(project: Path, folder: Path) -> TrainingJob:
    return TrainingJob(
        "distill",
        config_of(project),
        folder,
        project / "run" / "score",
        project / "run" / "sft" / "model",
        "checkpoint",
        NUM_STEPS,
        17,
    )


def test_responses_that_last_for_longer_are_gone_through_again_in_another_order(
    scored: Path, tmp_path: Path
) -> None:
    from lopd.stages.batches import Batches
    from lopd.stages.training_data import load_samples

    job = job_of(scored, tmp_path)
    samples = load_samples(job)
    batches = Batches(samples, job)
    assert batches.indices(3) == ResponseOrder(24, BATCH, seed=17).batch_indices(3).tolist(), (
        "before any refresh: Lightning OPD's order"
    )
    batches.use_refreshed(samples[:8], 3)
    rounds = [batches.indices(3 + step) + batches.indices(4 + step) for step in (0, 2, 4)]
    assert rounds[0] == list(range(8)), "in the order in which they were sampled"
    assert all(sorted(once) == list(range(8)) for once in rounds)
    assert rounds[1] != rounds[0] != rounds[2] != rounds[1]
    batches.use_refreshed(samples[:8], 5)
    assert batches.indices(5) == [0, 1, 2, 3], "the next refresh begins anew"


class OneVersion(Engine):
    """Says it has the weights that were asked for, whatever it samples with."""

    def model_info(self) -> dict[str, str]:
        return {"weight_version": "step-2"}


def test_responses_of_other_weights_are_not_learnt_from(scored: Path, tmp_path: Path) -> None:
    """As after a restart of a server that nobody could tell the newest weights; and a server that
    has others is not asked at all.
    """
    folder = copied(scored, tmp_path / "project")
    context = StageContext(config_of(folder), distill.STAGE)
    context.writer()
    service = RefreshService(
        context, cast(SGLangEngine, engine := OneVersion()), folder / "run" / "sft" / "model"
    )
    RefreshRecord(1, 2, "2 steps", version="step-2").request(context.folder)
    with pytest.raises(
        EngineError,
        match="the shard has responses sampled with the weights stand-in, but all must come from "
        "step-2",
    ):
        service.serve_requests()
    asked_for = engine.answered
    RefreshRecord(2, 4, "2 steps", version="step-4").request(context.folder)
    with pytest.raises(
        ArtifactError,
        match="responses sampled with the weights step-4 are missing, but the server now has the "
        "weights step-2",
    ):
        service.serve_requests()
    assert engine.answered == asked_for == 8


def test_scores_are_complete_only_after_the_teachers_server_has_ended(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks take shared GPUs back once the scores are complete."""
    folder = copied(scored, tmp_path / "project")
    refresh = RefreshRecord(1, 2, "2 steps", version="stand-in")

    def told(keep_teacher: bool) -> list[bool]:
        """Return whether the scores were complete when the teacher's server began to end."""
        config = config_of(folder, f"distill.refresh.keep_teacher={str(keep_teacher).lower()}")
        context = StageContext(config, distill.STAGE)
        seen: list[bool] = []

        @contextlib.contextmanager
        def serve(_: StageContext) -> Iterator[SGLangEngine]:
            yield cast(SGLangEngine, Engine())
            seen.append(completed(refresh, context.folder) is not None)

        monkeypatch.setattr(refresh_teachers, "serve_teacher", serve)
        context.writer()
        student = folder / "run" / "sft" / "model"
        with RefreshService(context, cast(SGLangEngine, StandInVersion()), student) as service:
            refresh.request(context.folder)
            service.serve_requests()
        assert completed(refresh, context.folder) is not None
        return seen

    assert told(keep_teacher=False) == [False]
    # All is scored, so no teacher is started, and completing is all that is left to do.
    (folder / "run/distill/refresh-0001/scores/manifest.json").unlink()
    assert told(keep_teacher=False) == []
    # The control: a teacher that lives on beside the training ends after its scores.
    shutil.rmtree(folder / "run/distill")
    assert told(keep_teacher=True) == [True]


class StandInVersion(Engine):
    """Says it has the weights that it samples with."""

    def model_info(self) -> dict[str, str]:
        return {"weight_version": "stand-in"}


def test_how_many_responses_and_of_which_prompts(scored: Path) -> None:
    by_steps = config_of(scored)
    by_drift = config_of(scored, "distill.refresh={max_chi_square=0.5}")
    assert [num_responses(by_steps, step, 24) for step in (2, 4)] == [8, 4], (
        "no more than the steps left learn from"
    )
    assert num_responses(by_drift, 1, 24) == 16
    assert num_responses(by_drift, 1, 8) == 8, (
        "no more than there are prompts: they would be twice among the responses"
    )
    assert num_responses(config_of(scored, "distill.refresh.num_responses=6"), 2, 24) == 6
    twice = config_of(scored, "rollout.samples_per_prompt=2")
    assert next_prompts(24, 2, 4, by_steps)[:2] == next_prompts(24, 4, 4, twice)[:2], (
        "two samples a prompt: half as many prompts a step"
    )
    later = [next_prompts(24, step, 4, by_steps) for step in range(12)]
    assert sorted(index for part in later[:6] for index in part) == list(range(24)), (
        "all, before any comes again"
    )
    assert later[6:] == later[:6]
