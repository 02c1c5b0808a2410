"""What a second command does again and what not: decided by what a stage's result depends on, and
by nothing else.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lopd import pipeline
from lopd.artifacts import ArtifactWriter
from lopd.cache import to_table
from lopd.errors import ArtifactError
from lopd.records import Response, float32, int32
from tests.pipeline.conftest import NUM_STEPS, SHORT, CompletedRun
from tests.pipeline.running import STAGES, config_of, files, fingerprints, lopd, metrics, states

pytestmark = pytest.mark.timeout(1800)  # whichever test is first makes the run

OTHER = (
    *SHORT,
    "distill.optimizer.lr=3e-5",
    "distill.num_steps=2",
    "distill.sync_every=0",
    "prompts.eval.num_prompts=24",
    "evaluate.equal_compute_baseline=false",
)
"""Another distillation and evaluation, quickly done; the cache is the same."""
ARTIFACTS = ("*/*.parquet", "*/manifest.json", "*/model/*", "evaluate/*/*", "tensorboard/**/*")


def artifacts(run_dir: Path) -> dict[str, object]:
    """The files of the artifacts. Kept prompts save time, and are none (lopd.tasks.rendered)."""
    return {
        name: state
        for pattern in ARTIFACTS
        for name, state in files(run_dir, pattern).items()
        if not name.startswith("prompts/")
    }


def of_what_starts(run_dir: Path) -> dict[str, object]:
    """The logs of servers and ranks, to which each start adds."""
    return {
        name: state
        for pattern in ("*/sglang*.log", "**/train.log")
        for name, state in files(run_dir, pattern).items()
    }


def test_the_same_command_again_does_nothing_and_touches_nothing(completed: CompletedRun) -> None:
    before = artifacts(completed.folder)
    logs = of_what_starts(completed.folder)
    rows = (completed.folder / "metrics.jsonl").read_bytes()
    figures = json.loads((completed.folder / "summary.json").read_text())
    again = lopd("run", completed.folder, SHORT)
    assert [line for line in again.stdout.splitlines() if ": " in line][: len(STAGES)] == [
        f"{stage}: reused" for stage in STAGES
    ]
    assert artifacts(completed.folder) == before
    assert of_what_starts(completed.folder) == logs, "no server and no rank was started"
    assert {name.rpartition("/")[2] for name in logs} == {
        "sglang-teacher.log",
        "train.log",
    }, f"one server served all stages: {sorted(logs)}"
    assert (completed.folder / "metrics.jsonl").read_bytes() == rows
    summary = json.loads((completed.folder / "summary.json").read_text())
    assert {stage["status"] for stage in summary.pop("stages")} == {"reused"}
    assert summary == {name: value for name, value in figures.items() if name != "stages"}


def test_a_knob_that_decides_no_result_runs_nothing(completed: CompletedRun) -> None:
    overrides = (
        "export.shard_bytes=2000000",
        "sglang.max_in_flight=7",
        "rollout.shard_size=9",
        "sft.timeout_s=77",
        "distill.checkpoint_every=3",
    )
    assert states(completed.folder, [*SHORT, *overrides]) == dict.fromkeys(STAGES, "done")


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("demonstrate.temperature=0.9", "demonstrate"),
        ("sft.optimizer.lr=1e-5", "sft"),
        ("rollout.max_new_tokens=50", "rollout"),
        ("score.allow_foreign_teacher=true", "score"),
        ("distill.advantage_clip=3.0", "distill"),
        ("evaluate.top_p=0.9", "evaluate"),
    ],
)
def test_status_foretells_what_a_knob_runs_again(
    completed: CompletedRun, override: str, first: str
) -> None:
    depending = {
        "demonstrate": STAGES[0:],
        "sft": STAGES[1:],
        "rollout": STAGES[2:],
        "score": STAGES[3:],
        "distill": STAGES[4:],
        "evaluate": ["evaluate"],
    }
    found = states(completed.folder, [*SHORT, override])
    assert found == {stage: "outdated" if stage in depending[first] else "done" for stage in STAGES}


def test_a_changed_knob_runs_what_depends_on_it_and_going_back_runs_nothing(
    completed: CompletedRun, done_up_to: Callable[[str], Path]
) -> None:
    run_dir = done_up_to("export")
    former = artifacts(run_dir)
    changed = lopd("run", run_dir, OTHER)
    told = next(line for line in changed.stdout.splitlines() if "another config" in line)
    assert "distill.optimizer.lr: 0.0002 -> 3e-05" in told
    assert f"distill.num_steps: {NUM_STEPS} -> 2" in told
    assert "sft." not in told
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["reused"] * 4 + ["done"] * 3
    assert summary["distill"]["num_steps"] == 2
    assert "sft_longer" not in summary["accuracy"], "no figure of the former evaluation"
    assert [row["step"] for row in metrics(run_dir, "distill")] == [1, 2]
    assert metrics(run_dir, "sft_longer") == []

    back = lopd("run", run_dir, SHORT)
    assert back.stdout.count(": reused") == len(STAGES)
    assert fingerprints(run_dir, STAGES) == fingerprints(completed.folder, STAGES)
    assert artifacts(run_dir) == former, "the very files"
    for stage in ("sft", "distill", "sft_longer"):
        assert metrics(run_dir, stage) == metrics(completed.folder, stage), stage
    assert metrics(run_dir, "distill", "eval") == metrics(completed.folder, "distill", "eval")


def test_a_run_directory_is_used_by_one_command_at_a_time(completed: CompletedRun) -> None:
    with (completed.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match=r"in use by process \d+"):
            pipeline.run(config_of(completed.folder, SHORT))


# ---- stages alone ----


def test_a_stage_before_its_parent_names_it(tmp_path: Path) -> None:
    refused = lopd("sft", tmp_path / "run", SHORT, code=2)
    assert refused.stderr.count("\n") == 1
    assert "sft needs demonstrate, which is absent" in refused.stderr
    assert "lopd demonstrate" in refused.stderr, "the remedy"
    assert "Traceback" not in refused.stderr
    for stage, parent in (
        ("rollout", "sft"),
        ("score", "rollout"),
        ("distill", "sft"),
        ("evaluate", "sft"),
        ("export", "distill"),
    ):
        with pytest.raises(ArtifactError, match=f"{stage} needs {parent}, which is absent"):
            pipeline.run(config_of(tmp_path / "run", SHORT), only=[stage])


def test_a_stage_whose_parent_is_of_other_knobs_names_it(completed: CompletedRun) -> None:
    with pytest.raises(
        ArtifactError,
        match=r"rollout needs sft, which was made with other settings \(sft.optimizer.lr\)",
    ):
        pipeline.run(
            config_of(completed.folder, [*SHORT, "sft.optimizer.lr=1e-5"]), only=["rollout"]
        )
    with pytest.raises(
        ArtifactError,
        match=r"distill needs score, which was made with other settings \(parent rollout\)",
    ):
        pipeline.run(config_of(completed.folder, [*SHORT, "rollout.top_p=0.5"]), only=["distill"])
    assert states(completed.folder, SHORT) == dict.fromkeys(STAGES, "done"), (
        "a refused command changes nothing"
    )
    assert json.loads((completed.folder / "config.json").read_text())["rollout.top_p"] == 1.0


def test_status_before_amid_and_after(
    completed: CompletedRun, done_up_to: Callable[[str], Path], tmp_path: Path
) -> None:
    assert states(tmp_path / "nothing", SHORT) == dict.fromkeys(STAGES, "absent")
    assert not (tmp_path / "nothing").exists(), "status writes nothing"
    run_dir = done_up_to("score")
    manifest = run_dir / "score" / "manifest.json"
    manifest.write_text(
        json.dumps({**json.loads(manifest.read_text()), "complete": False, "shards": []})
    )
    (run_dir / "score" / "shard-00003.parquet").unlink()
    rows = {
        row["name"]: row for row in json.loads(lopd("status", run_dir, [*SHORT, "--json"]).stdout)
    }
    assert [rows[stage]["state"] for stage in STAGES] == ["done"] * 3 + ["partial"] + ["absent"] * 3
    assert rows["score"]["rows"] == 1280 - 256, "what is published counts, listed or not"
    after = lopd("status", completed.folder, SHORT).stdout
    for stage in STAGES:
        line = next(line for line in after.splitlines() if f" {stage} " in line)
        assert "done" in line
        assert fingerprints(completed.folder, [stage])[stage][:12] in line


# ---- what a writer takes for its own ----


def responses(indices: range) -> list[Response]:
    return [
        Response(f"p{index}", 0, int32([1]), int32([2, 3]), float32([-1, -2]), "stop", "0")
        for index in indices
    ]


def test_a_shard_size_changed_amid_a_stage_does_not_move_its_rows(tmp_path: Path) -> None:
    first = ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={}, shard_size=4)
    first.publish_shard(0, to_table(responses(range(4))))
    assert ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={}, shard_size=2).shard_size == 4
    assert ArtifactWriter(tmp_path / "b", kind="rollouts", inputs={}, shard_size=2).shard_size == 2


def test_a_shard_of_another_artifact_is_not_adopted(tmp_path: Path) -> None:
    first = ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={"temperature": 1.0})
    first.publish_shard(0, to_table(responses(range(4))))
    (tmp_path / "a" / "manifest.json").unlink()
    assert ArtifactWriter(
        tmp_path / "a", kind="rollouts", inputs={"temperature": 1.0}
    ).published == {0}
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"shard-00000\.parquet.*other inputs"):
        ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={"temperature": 0.5})


def test_a_knob_newer_than_the_artifact_counts_as_its_default(
    done_up_to: Callable[[str], Path],
) -> None:
    run_dir = done_up_to("demonstrate")
    manifest = run_dir / "demonstrate" / "manifest.json"
    about = json.loads(manifest.read_text())
    del about["inputs"]["demonstrate.min_p"]  # as if made before there was such a knob
    manifest.write_text(json.dumps(about))
    assert states(run_dir, SHORT)["demonstrate"] == "done"
    assert states(run_dir, [*SHORT, "demonstrate.min_p=0.1"])["demonstrate"] == "outdated"
