"""Bad input met by a run: one line (what, where, limit, remedy), exit code 2, no traceback; and
nothing finished is lost, so the remedy leads on.

What can be found before anything starts is in test_checks.py, what is typed wrongly in test_cli.py,
and what only a real server or a real rank can meet in test_bad_input_real.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lopd.artifacts import SCHEMA_VERSION, read_manifest
from lopd.errors import ArtifactError, EngineError
from tests.stand_ins import (
    STAGES,
    Lopd,
    StandIns,
    command,
    contents,
    cut,
    flip_bit,
    states,
    write_project,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run, made once; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        StandIns().install(patch)
        from lopd import checks, pipeline
        from lopd.config import load_config

        loaded = load_config(config)
        checks.check_all(loaded)
        pipeline.run(loaded)
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project; its config."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "config.toml"


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns().install(monkeypatch)


def artifacts(config: Path) -> dict[str, str]:
    """Every published file of the run by its content, and every stage by its fingerprint."""
    run_dir = config.parent / "run"
    found = {
        name: digest
        for name, digest in contents(run_dir).items()
        if name.endswith((".parquet", ".safetensors"))
    }
    return {
        **found,
        **{
            stage: read_manifest(run_dir / stage).fingerprint
            for stage in STAGES
            if _readable(run_dir / stage)
        },
    }


def _readable(folder: Path) -> bool:
    try:
        return read_manifest(folder).complete
    except ArtifactError:
        return False


def test_the_control_a_finished_run_is_reused(project: Path, lopd: Lopd, started: StandIns) -> None:
    before = artifacts(project)
    shown = lopd("run", project).succeeded()
    assert [line for line in shown.out.splitlines() if line.endswith(": reused")] == [
        f"{stage}: reused" for stage in STAGES
    ]
    assert artifacts(project) == before
    assert not started.started


# ---- damaged files ----


@pytest.mark.parametrize("damage", [flip_bit, cut], ids=["bit-flipped", "truncated"])
@pytest.mark.parametrize(
    ("maker", "file", "reader", "changed"),
    [
        ("demonstrate", "shard-00001.parquet", "sft", "sft.num_steps=1"),
        ("rollout", "shard-00001.parquet", "score", "score.allow_foreign_teacher=true"),
        ("score", "shard-00001.parquet", "distill", "distill.num_steps=1"),
        ("sft", "model/model.safetensors", "rollout", "rollout.temperature=0.5"),
        ("distill", "model/model.safetensors", "export", "export.shard_bytes=1048577"),
    ],
)
def test_a_damaged_file_is_met_before_anything_is_touched(
    project: Path,
    lopd: Lopd,
    started: StandIns,
    damage: Callable[[Path], None],
    maker: str,
    file: str,
    reader: str,
    changed: str,
) -> None:
    """By the stage that reads it, run alone; by that stage when a knob has changed; and by lopd
    run.
    """
    path = project.parent / "run" / maker / file
    damage(path)
    before = artifacts(project)
    for verb, more in ((reader, ()), (reader, (changed,)), ("run", ())):
        lopd(verb, project, *more).refused(
            f"{path}: the file was truncated or changed: its checksum differs",
            "limit: exactly the recorded sha256, ",
            "remedy: remove ",
            f"stage {maker}",
        )
    assert artifacts(project) == before, "nothing was moved or written"
    assert not started.started


@pytest.mark.parametrize(
    ("stage", "file"), [("demonstrate", "shard-00001.parquet"), ("score", "shard-00002.parquet")]
)
def test_the_remedy_for_a_damaged_shard_makes_that_shard_only(
    project: Path, lopd: Lopd, started: StandIns, stage: str, file: str
) -> None:
    before = artifacts(project)
    shard = project.parent / "run" / stage / file
    flip_bit(shard)
    lopd("run", project).refused(f"remove this file and {shard.parent}/manifest.json")
    shard.unlink()
    (shard.parent / "manifest.json").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in shard.parent.glob("shard-*.parquet")}
    shown = lopd("run", project).succeeded()
    assert started.engine.answered == 8, "one shard of eight responses"
    assert artifacts(project) == before, "the same artifact, file for file"
    assert {name: (shard.parent / name).stat().st_mtime_ns for name in kept} == kept
    assert shown.out.count(": reused") == len(STAGES) - 1


def test_the_remedy_for_a_damaged_model_repeats_that_stage_only(
    project: Path, lopd: Lopd, started: StandIns
) -> None:
    before = artifacts(project)
    flip_bit(project.parent / "run" / "sft" / "model" / "model.safetensors")
    line = lopd("run", project).refused("remedy: remove the folder")
    shutil.rmtree(line.partition("remove the folder ")[2].partition(",")[0])
    lopd("run", project).succeeded()
    assert started.trained == ["sft"]
    assert artifacts(project) == before


def test_a_model_without_a_manifest_is_not_taken_for_that_of_other_knobs(
    project: Path, lopd: Lopd, started: StandIns
) -> None:
    folder = project.parent / "run" / "sft"
    (folder / "manifest.json").unlink()
    shown = lopd("sft", project, "sft.num_steps=1").succeeded().out
    assert "they are kept in superseded/sft-without-manifest" in shown
    assert started.trained == ["sft"]
    assert read_manifest(folder).extra["num_steps"] == 1
    assert (
        folder.parent / "superseded" / "sft-without-manifest" / "model" / "model.safetensors"
    ).is_file()


def test_a_missing_shard(project: Path, lopd: Lopd) -> None:
    (project.parent / "run" / "rollout" / "shard-00000.parquet").unlink()
    for verb in ("score", "run"):
        lopd(verb, project).refused(
            "rollout/shard-00000.parquet: the file is missing", "remedy: remove this file and "
        )


def test_damage_of_the_user_s_own_model_changes_its_fingerprint(
    project: Path, lopd: Lopd, started: StandIns
) -> None:
    """Nobody published a checksum of it: a flipped bit makes another teacher, whose stages run
    again; the former results are kept.
    """
    flip_bit(project.parent / "teacher" / "model.safetensors", at=0.9)
    assert states(lopd, project)["demonstrate"] == "outdated"
    cut(project.parent / "teacher" / "model.safetensors", to=0.9)
    lopd("run", project).refused(
        "teacher/model.safetensors: the file is damaged", "remedy: copy the file again"
    )
    assert not started.started


# ---- manifests ----


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


NEWER = (
    f"the manifest has schema version {SCHEMA_VERSION + 1}; limit: at most {SCHEMA_VERSION}, "
    "which this lopd reads; remedy: install a newer lopd"
)


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (lambda folder: change_manifest(folder, schema_version=SCHEMA_VERSION + 1), NEWER),
        (
            lambda folder: change_manifest(folder, schema_version="1"),
            "the manifest has schema version 1",
        ),
        (
            lambda folder: change_manifest(folder, from_the_future=1),
            "the manifest has wrong fields",
        ),
        (lambda folder: change_manifest(folder, shards=3), "the manifest has wrong fields"),
        (lambda folder: cut(folder / "manifest.json"), "the manifest cannot be read"),
        (
            lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
            "the manifest cannot be read",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text("[]"),
            "the manifest has schema version None",
        ),
    ],
    ids=[
        "newer schema",
        "schema is text",
        "unknown field",
        "wrong type",
        "truncated",
        "binary",
        "no object",
    ],
)
def test_a_manifest_that_cannot_be_used(
    project: Path, lopd: Lopd, started: StandIns, spoil: Callable[[Path], object], fragment: str
) -> None:
    folder = project.parent / "run" / "rollout"
    spoil(folder)
    before = artifacts(project)
    for verb in ("run", "rollout", "score"):
        lopd(verb, project).refused(f"{folder}/manifest.json: {fragment}")
    assert states(lopd, project)["rollout"] == "damaged"
    assert fragment[:30] in lopd("check", project).out
    assert artifacts(project) == before
    assert not started.started


@pytest.mark.parametrize(
    "name", ["config.json", "summary.json", "rollout/seconds.json", "metrics.jsonl"]
)
def test_files_that_decide_nothing_may_be_damaged_or_missing(
    project: Path, lopd: Lopd, name: str
) -> None:
    path = project.parent / "run" / name
    path.write_text("{")
    lopd("status", project).succeeded()
    path.unlink()
    lopd("run", project).succeeded()


# ---- the teacher ----


@pytest.fixture
def foreign(project: Path) -> tuple[str, ...]:
    """Overrides by which the demonstrations of one teacher are scored by another."""
    shutil.copytree(project.parent / "run" / "demonstrate", project.parent / "demonstrations")
    return ("sft.demonstrations=demonstrations", "models.teacher=student", "run.dir=other")


def test_a_foreign_teacher_is_refused_before_anything_starts(
    project: Path, lopd: Lopd, started: StandIns, foreign: tuple[str, ...]
) -> None:
    for verb in ("run", "score"):
        lopd(verb, project, *foreign).refused(
            "is not the teacher of the student's demonstrations",
            "limit: ",
            "score.allow_foreign_teacher=true",
        )
    assert not started.started
    assert not (project.parent / "other").exists()


def test_the_stage_itself_refuses_too(
    project: Path,
    lopd: Lopd,
    started: StandIns,
    foreign: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Should the check be left out: no score of a foreign teacher is ever published."""
    from lopd import checks

    monkeypatch.setattr(checks, "check_all", lambda *_, **__: None)
    lopd("run", project, *foreign).refused("is not the teacher of the student's demonstrations")
    assert started.served == ["student"], "rolled out, not scored"
    assert not list((project.parent / "other" / "score").glob("*.parquet"))


@pytest.mark.usefixtures("started")
def test_the_override_is_recorded_and_printed_in_every_summary(
    project: Path, lopd: Lopd, foreign: tuple[str, ...]
) -> None:
    allowed = (*foreign, "score.allow_foreign_teacher=true")
    warning = "WARNING: score.allow_foreign_teacher is set"
    run_dir = project.parent / "other"
    for _ in ("made", "reused"):
        assert warning in lopd("run", project, *allowed).succeeded().out
        assert warning in json.loads((run_dir / "summary.json").read_text())["notes"][0]
    assert warning in lopd("evaluate", project, *allowed).succeeded().out, (
        "a stage alone prints a summary too"
    )
    for stage in ("score", "distill", "evaluate"):
        lineage = read_manifest(run_dir / stage).lineage
        assert lineage["allow_foreign_teacher"] is True
        assert lineage["consistent"] is False
    assert "NOT shown to be the teacher" in (run_dir / "export" / "model" / "README.md").read_text()
    assert warning not in lopd("run", project).succeeded().out, (
        "the control: the teacher's own demonstrations"
    )


def test_demonstrations_of_nobody_known_need_a_word(
    project: Path, lopd: Lopd, foreign: tuple[str, ...]
) -> None:
    change_manifest(project.parent / "demonstrations", lineage={})
    own = (foreign[0], foreign[2])
    lopd("run", project, *own).refused("it is not recorded whether teacher")
    assert (
        "wrong" not in lopd("check", project, *own, "sft.declared_teacher=teacher").succeeded().out
    )
    lopd("run", project, *own, "sft.declared_teacher=absent").refused(
        "absent: there is no config.json"
    )


def test_damaged_demonstrations_from_elsewhere(
    project: Path, lopd: Lopd, started: StandIns, foreign: tuple[str, ...]
) -> None:
    flip_bit(project.parent / "demonstrations" / "shard-00002.parquet")
    lopd("run", project, foreign[0], foreign[2]).refused(
        "demonstrations/shard-00002.parquet: the file was truncated or changed"
    )
    change_manifest(project.parent / "demonstrations", complete=False)
    lopd("run", project, foreign[0], foreign[2]).refused(
        "there are 24 demonstrations, and the artifact is not complete"
    )
    assert not started.started


def test_another_tokenizer_is_refused(project: Path, lopd: Lopd, started: StandIns) -> None:
    path = project.parent / "student" / "tokenizer.json"
    path.write_text(path.read_text().replace("\n", "\n\n", 1) + "\n")
    for verb in ("run", "score"):
        lopd(verb, project).refused(
            "tokenizer of the student",
            "differs from the tokenizer of the teacher",
            "limit: the same sha256",
            "the same tokenizer.json",
        )
    assert not started.started


# ---- servers ----


def test_what_is_published_before_a_server_dies_stays(
    project: Path, lopd: Lopd, started: StandIns
) -> None:
    before = contents(project.parent / "run" / "rollout", "*.parquet")
    shutil.rmtree(project.parent / "run" / "rollout")
    death = EngineError(
        "the student server died; its log ends: Killed",
        where="sglang-student.log",
        remedy="read the log",
    )
    started.engine.fail_after = (19, death)  # two shards of eight, and three responses
    lopd("run", project).refused("sglang-student.log: the student server died")
    published = contents(project.parent / "run" / "rollout", "*.parquet")
    assert sorted(published) == ["shard-00000.parquet", "shard-00001.parquet"]
    assert states(lopd, project)["rollout"] == "partial"
    started.engine.fail_after = None
    started.engine.answered = 0
    lopd("run", project).succeeded()
    assert started.engine.answered == 8, "only the shard that was missing"
    assert contents(project.parent / "run" / "rollout", "*.parquet") == before


# ---- the run directory ----


def test_a_run_directory_in_use(project: Path, lopd: Lopd, started: StandIns) -> None:
    lock = project.parent / "run" / ".lock"
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("4711\n")
        held.flush()
        for verb in ("run", "sft"):
            lopd(verb, project).refused(
                f"{lock.parent}: in use by process 4711",
                "remedy: wait until that process ends, or set run.dir to another folder",
            )
        assert states(lopd, project)["sft"] == "done", "looking is allowed"
    lopd("run", project).succeeded()
    assert not started.started


def test_an_export_that_would_replace_something_foreign(project: Path, lopd: Lopd) -> None:
    thesis = project.parent / "my folder" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    lopd("export", project, "export.dir='my folder'").refused(
        "my folder: the folder has no lopd.json, so lopd did not make its files",
        "set export.dir to another folder",
    )
    assert thesis.read_text() == "mine"
    target = project.parent / "exported"
    for _ in ("made", "replaced"):
        lopd("export", project, "export.dir=exported").succeeded()
        assert (target / "model.safetensors").is_file()
        assert (target / "lopd.json").is_file()
        (project.parent / "run" / "export" / "manifest.json").unlink()


def test_the_folder_of_an_export_matters(project: Path, lopd: Lopd) -> None:
    """Asked to export elsewhere, it does, though everything else is as it was; and a copy that was
    removed is noticed.
    """
    lopd("run", project, "export.dir=one").succeeded()
    lopd("run", project, "export.dir=two").succeeded()
    assert (project.parent / "two" / "model.safetensors").is_file()
    shutil.rmtree(project.parent / "two")
    lopd("run", project, "export.dir=two").refused(
        "two/README.md: the file is missing", "remedy: remove the folder ", "run stage export again"
    )


class Tmpfs:
    """A small disk of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder],
            capture_output=True,
            check=False,
        )
        if mounted.returncode != 0:
            pytest.skip(f"mounting is refused here: {mounted.stderr.decode().strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Tmpfs]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = Tmpfs(tmp_path / "disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk.folder], check=True)


@pytest.fixture
def blind_to_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of free space says yes: the disk fills up later."""
    from lopd import checks

    monkeypatch.setattr(checks, "disk", lambda _: iter(()))
    monkeypatch.setitem(checks.CHECKS, "disk", (checks.disk, STAGES))


def test_a_disk_that_is_full_from_the_start(
    project: Path, lopd: Lopd, small_disk: Tmpfs, started: StandIns
) -> None:
    lopd("run", project, f"run.dir={small_disk.folder}/run").refused(
        "MiB free; limit: at least about",
        "delete files on this disk, or set run.dir",
    )
    assert not started.started
    assert list(small_disk.folder.iterdir()) == []


@pytest.mark.usefixtures("blind_to_room")
def test_a_disk_that_fills_up_while_publishing(
    project: Path, lopd: Lopd, small_disk: Tmpfs, started: StandIns
) -> None:
    """Whatever is the first that finds no room: one line; and with room the same command ends with
    the result of a run that never met a full disk.
    """
    reference = project.parent / "reference"
    sizes = (
        "prompts.sft.num_prompts=512",
        "demonstrate.shard_size=64",
        "prompts.opd.num_prompts=512",
        "rollout.shard_size=64",
    )
    lopd("run", project, f"run.dir={reference}", *sizes).succeeded()
    more = (f"run.dir={small_disk.folder}/run", *sizes)
    kept: dict[str, str] = {}
    stops = []
    for kibibytes in (64, 128, 4 * 1024, 10 * 1024, 16 * 1024, 22 * 1024):
        small_disk.remount(f"size={kibibytes}k")
        result = lopd("run", project, *more)
        if result.code == 0:
            break
        stops.append(result.refused("no space left on", "the same command again"))
        found = contents(small_disk.folder / "run")
        assert not [name for name in found if name.endswith((".partial", ".copying"))], (
            "what did not fit leaves nothing half written"
        )
        published = {
            name: digest
            for name, digest in found.items()
            if name.endswith((".parquet", ".safetensors"))
        }
        assert {name: published.get(name) for name in kept} == kept, (
            "what was published stays as it is"
        )
        kept = published
    small_disk.remount("size=64m")
    lopd("run", project, *more).succeeded()
    assert len(stops) >= 3, stops
    for stage in STAGES[:-1]:  # the exported card names the run directory
        assert (
            read_manifest(small_disk.folder / "run" / stage).fingerprint
            == read_manifest(reference / stage).fingerprint
        ), stage


@pytest.mark.usefixtures("blind_to_room")
def test_a_disk_that_cannot_be_written(
    project: Path, lopd: Lopd, small_disk: Tmpfs, started: StandIns
) -> None:
    small_disk.remount("size=64m")
    run_dir = small_disk.folder / "run"
    shutil.copytree(project.parent / "run", run_dir)
    before = contents(run_dir)
    small_disk.remount("ro")
    for verb in ("run", "sft"):
        lopd(verb, project, f"run.dir={run_dir}").refused(
            "run.dir cannot be written", "set run.dir to another folder"
        )
    assert set(states(lopd, project, f"run.dir={run_dir}").values()) == {"done"}, (
        "it can still be looked at"
    )
    assert contents(run_dir) == before
    assert not started.started
