"""A run that goes on is read from its files, whatever they are in the middle of."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lopd.report import run_state
from lopd.report.gpus import Gpu, gpus
from lopd.report.held_out import newest_transcripts, write_transcripts
from lopd.report.metrics import METRICS, MetricsLog
from lopd.report.run_state import STAGE_NAMES, MetricsTail, state_of
from lopd.report.sparkline import PLAIN, sparkline
from lopd.report.text_width import printable
from lopd.stages.order import STAGES

BATCH = (
    "[2026-11-30 09:03:15] Decode batch, #running-req: 10, #token: 1121, token usage: 0.14, "
    "cpu graph: False, gen throughput (token/s): 88.61, #queue-req: 3\n"
)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def manifest(folder: Path, fingerprint: str, **parents: str) -> None:
    write(
        folder / "manifest.json",
        {"complete": True, "fingerprint": fingerprint, "parents": parents},
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose distillation is at step 3 of 16, with a server that answers."""
    for name, parents in (
        ("demonstrate", {}),
        ("sft", {"demonstrate": "demonstrate"}),
        ("rollout", {"sft": "sft"}),
        ("score", {"rollout": "rollout"}),
    ):
        manifest(tmp_path / name, name, **parents)
        write(tmp_path / name / "seconds.json", {"seconds": 61.0})
    write(tmp_path / "distill/job.json", {"num_steps": 16})
    write(tmp_path / "distill/log.txt", "2026-11-30T09:06:53Z distill: starting SGLang\n")
    write(tmp_path / "distill/sglang-student.log", f"starting\n{BATCH}not a batch\n")
    write(tmp_path / "distill/sglang-student.log.weights.json.0.starts", "2")
    log = MetricsLog(tmp_path, trackers=[])
    for step in (1, 2, 3):
        log.train("distill", step, {"loss": 1 / step, "seconds": 4.0 if step > 1 else 60.0})
    return tmp_path


def test_a_run_is_read_from_its_files(run: Path) -> None:
    state = state_of(run)
    assert [stage.state for stage in state.stages] == ["done"] * 4 + ["begun"] + ["absent"] * 2
    assert state.stages[0].seconds == 61.0
    assert state.current is not None
    work = state.current.work
    assert work is not None
    assert (work.unit, work.done, work.total) == ("step", 3, 16)
    # The first step of a process is slower than the others.
    assert work.seconds_left == pytest.approx(13 * 4.0)
    (server,) = state.servers
    assert server.load == {"running": 10, "queued": 3, "cache_use": 0.14, "tokens_per_s": 88.61}
    assert (server.name, server.starts) == ("distill/sglang-student", 2)
    assert state.last_line == "distill: starting SGLang"
    assert state.process is None
    assert not state.is_done


def test_a_stage_whose_parent_runs_again_is_outdated(run: Path) -> None:
    manifest(run / "rollout", "another", sft="sft")
    assert [stage.state for stage in state_of(run).stages][3] == "outdated"


def test_shards_have_a_rate(run: Path) -> None:
    (run / "score/manifest.json").unlink()
    write(run / "score/expected.json", {"shards": 8})
    now = time.time()
    for index in range(3):
        shard = run / f"score/shard-{index:05d}.parquet"
        shard.touch()
        os.utime(shard, (now + 10 * index, now + 10 * index))
    current = state_of(run).current
    assert current is not None
    assert current.name == "score"
    assert current.work is not None
    assert (current.work.done, current.work.total) == (3, 8)
    assert current.work.seconds_left == pytest.approx(50.0, rel=0.01)


def test_an_evaluation_counts_models(run: Path) -> None:
    manifest(run / "distill", "distill", sft="sft", score="score")
    for name in ("base", "sft"):
        manifest(run / f"evaluate/answers-{name}", name)
    (run / "evaluate/answers-distilled").mkdir()
    write(run / "config.json", {"evaluate.equal_compute_baseline": True})
    current = state_of(run).current
    assert current is not None
    assert current.work is not None
    assert (current.work.part, current.work.done, current.work.total) == ("answers", 2, 5)


def test_damaged_files_are_no_error(run: Path) -> None:
    for path in (*run.glob("*/*"), run / METRICS):
        path.write_bytes(b"\xff\x00{")
    state = state_of(run)
    assert state.rows == []
    assert [stage.state for stage in state.stages].count("begun") == 5
    assert state_of(run / "absent").age_s is None


def test_nothing_of_the_run_is_touched(run: Path) -> None:
    for path in (run, *run.rglob("*")):
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))
    before = {path: path.stat() for path in run.rglob("*")}
    state_of(run)
    after = {path: path.stat() for path in run.rglob("*")}
    assert [(one.st_mtime_ns, one.st_size) for one in after.values()] == [
        (one.st_mtime_ns, one.st_size) for one in before.values()
    ]
    for path in (run, *run.rglob("*")):
        path.chmod(0o700)


def test_who_holds_the_run_is_known_without_its_lock(run: Path) -> None:
    lock = run / ".lock"
    lock.write_text(f"{os.getpid()}\n")
    # The file alone says nothing: it stays when its process ends.
    assert state_of(run).process is None
    with lock.open("r+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert state_of(run).process == os.getpid()
    assert state_of(run).process is None


def test_the_tail_reads_only_what_is_new(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, trackers=[])
    tail = MetricsTail(tmp_path / METRICS)
    assert tail.rows() == []
    log.train("sft", 1, {"loss": 1.0})
    assert len(tail.rows()) == 1
    with (tmp_path / METRICS).open("a") as handle:
        handle.write('{"kind": "train", "sta')
        handle.flush()
        assert len(tail.rows()) == 1, "a line that is half written"
        handle.write('ge": "sft", "step": 2}\n')
    assert [row["step"] for row in tail.rows()] == [1, 2]
    # A resumed training has its file replaced.
    MetricsLog(tmp_path, trackers=[]).truncate_after("sft", 1)
    log.train("sft", 2, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in tail.rows()] == [(1, 1.0), (2, 9.0)]


def test_the_tail_of_a_long_run_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_state, "_MOST_ROWS", 100)
    monkeypatch.setattr(run_state, "_NEWEST_ROWS", 10)
    with (tmp_path / METRICS).open("w") as handle:
        for step in range(1, 2001):
            kind = "eval" if step % 500 == 0 else "train"
            handle.write(json.dumps({"kind": kind, "stage": "sft", "step": step}) + "\n")
    rows = MetricsTail(tmp_path / METRICS).rows()
    steps = [row["step"] for row in rows]
    assert len(rows) <= 100
    assert steps[0] == 1
    assert steps[-10:] == [*range(1991, 2001)]
    assert steps == sorted(steps)
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [500, 1000, 1500, 2000]


def test_the_stages_are_those_of_the_pipeline() -> None:
    assert tuple(stage.name for stage in STAGES) == STAGE_NAMES


def test_a_curve_rises_where_its_values_do() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0], 8, PLAIN) == "@_"
    assert sparkline([2.0, 2.0], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert sparkline([float("nan"), 1.0], 8) == "▁"
    assert len(sparkline([*range(1001)], 10)) <= 11
    # The newest values have a character of their own.
    assert sparkline([0, 0, 0, 9], 2) == "▁█"


def test_commands_to_the_terminal_are_shown_and_not_obeyed() -> None:
    assert printable("a\x1b[31mb\x07\x9bc\n\td") == "a␛[31mb␇\N{REPLACEMENT CHARACTER}c\n\td"


def test_gpus_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 1024, 80000, 97'\necho '1, 2, 80000, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus() == [Gpu(0, 1024, 80000, 97), Gpu(1, 2, 80000, None)]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpus() == []


def test_the_newest_sync_is_found(tmp_path: Path) -> None:
    assert newest_transcripts(tmp_path) is None
    for step in (4, 16, 8):
        write_transcripts(tmp_path, step, [{"response": f"{step}\u2028\ud800"}])
    assert newest_transcripts(tmp_path) == (16, [{"response": "16\u2028\ud800"}])


def test_reading_a_run_imports_nothing_heavy() -> None:
    code = "import sys, lopd.report.run_state, lopd.report.watch_view; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert not {"torch", "transformers", "matplotlib"} & set(done.stdout.split())
