"""distill.cache: training learns from a cache of another making, if it is this student's and its
teacher is the right one, or was corrected for; or says so.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lopd import pipeline
from lopd.artifacts import ArtifactWriter, identify_model, read_manifest, read_shard
from lopd.cache import from_table, read_rows, to_table
from lopd.cache.merging import merge
from lopd.cache.reference_export import export_reference
from lopd.cache.reference_import import import_reference
from lopd.cache.residualise import residualise
from lopd.cache.splitting import split
from lopd.cache.style import Settings
from lopd.checks.combinations import refresh_problems
from lopd.checks.lineage import cache as check_given
from lopd.checks.lineage import checkpoint as check_checkpoint
from lopd.config import Config, load_config
from lopd.errors import ArtifactError, ConfigError, ConsistencyError, LopdError
from lopd.objective import Lightning
from lopd.records import Manifest
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import distillation_objective, load_samples
from tests.cache.rollouts import scores_of
from tests.stand_ins import TINY_MODELS, StandIns, write_project

TO_SCORE = ("demonstrate", "sft", "rollout", "score")
SHORT = ("demonstrate.shard_size=24", "rollout.shard_size=12")


@dataclass
class Project:
    """A run up to its cache, and ways to distil from others."""

    folder: Path
    config: Path
    servers: StandIns

    def load(self, *overrides: str) -> Config:
        return load_config(self.config, [*SHORT, *overrides])

    def run(self, stages: Sequence[str], *overrides: str) -> Config:
        config = self.load(*overrides)
        pipeline.run(config, stages)
        return config

    def distill(self, cache: Path, *overrides: str) -> Manifest:
        config = self.run(("distill",), f"distill.cache={cache}", *overrides)
        return read_manifest(config.run.dir / "distill")

    @property
    def score(self) -> Path:
        return self.folder / "run" / "score"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path, write_project(tmp_path), StandIns().install(monkeypatch))
    made.run(TO_SCORE)
    return made


def note_of(manifest: Manifest) -> str:
    return str(manifest.lineage["cache"]["note"])


def test_caches_made_from_this_runs_own(project: Project) -> None:
    parts = [project.folder / "parts" / f"part-0{part}" for part in range(2)]
    split(project.score, project.folder / "parts", 2)
    merge(parts, project.folder / "merged")
    residualise(project.score, project.folder / "residualised", Settings())
    for cache, expected in (
        (parts[0], "this student's responses, scored by the teacher of its demonstrations"),
        (
            project.folder / "merged",
            "this student's responses, scored by the teacher of its demonstrations",
        ),
        (project.folder / "residualised", "the teacher's own style, which is not foreign"),
    ):
        manifest = project.distill(cache)
        assert expected in note_of(manifest)
        assert set(manifest.parents) == {"sft"}
        assert manifest.inputs["distill.cache"] == read_manifest(cache).fingerprint
        assert manifest.lineage["consistent"] is True
        assert manifest.lineage["allow_foreign_cache"] is False
    processed = [
        read_manifest(path).extra["num_tokens"]
        for path in sorted((project.folder / "run" / "superseded").glob("distill-*"))
    ]
    assert len(set(processed)) == 2, (
        "the part, and the merged or the residualised, which have all rows: each was learnt from"
    )
    shutil.rmtree(project.score)
    shutil.rmtree(project.folder / "run" / "rollout")
    needed = {
        row["name"]
        for row in pipeline.status(project.load(f"distill.cache={project.folder / 'merged'}"))
    }
    assert not needed & {"rollout", "score"}, "a given cache needs neither"


def test_another_students_cache(project: Project) -> None:
    other = shutil.copytree(TINY_MODELS / "student", project.folder / "other_student")
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**about, "rms_norm_eps": 2e-6}))
    own = [f"models.student={other}", f"run.dir={project.folder / 'other_run'}"]
    project.run(("demonstrate", "sft"), *own)
    with pytest.raises(ConsistencyError, match="its responses were sampled by another student"):
        project.distill(project.score, *own)
    manifest = project.distill(project.score, *own, "distill.allow_foreign_cache=true")
    assert note_of(manifest).startswith("FOREIGN: its responses were sampled by another student")
    assert manifest.lineage["allow_foreign_cache"] is True
    summary = json.loads((project.folder / "other_run" / "summary.json").read_text())
    assert "FOREIGN" in summary["notes"][0]


@pytest.fixture
def foreign(project: Project) -> Path:
    """A cache of this student's responses that another teacher scored, by the recorded override."""
    other = shutil.copytree(TINY_MODELS / "teacher", project.folder / "other_teacher")
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**about, "rms_norm_eps": 2e-6}))
    own = (
        f"models.teacher={other}",
        f"run.dir={project.folder / 'foreign'}",
        f"sft.demonstrations={project.folder / 'run' / 'demonstrate'}",
    )
    project.run(("sft", "rollout"), *own)
    with pytest.raises(ConsistencyError):
        project.run(("score",), *own)
    project.run(("score",), *own, "score.allow_foreign_teacher=true")
    return project.folder / "foreign" / "score"


def test_a_foreign_teachers_cache_is_named_so_and_corrected_by_name(
    project: Project, foreign: Path
) -> None:
    manifest = project.distill(foreign)
    assert "scored by a foreign teacher" in note_of(manifest)
    assert "not corrected" in note_of(manifest)
    assert manifest.lineage["consistent"] is False
    residualise(foreign, project.folder / "corrected", Settings())
    manifest = project.distill(project.folder / "corrected")
    assert "corrected by cross-fitted residualisation for a foreign teacher's style" in note_of(
        manifest
    )
    assert manifest.lineage["consistent"] is False, (
        "that it is corrected does not make it the same teacher"
    )


def job_on(config: Config, data: Path) -> TrainingJob:
    return TrainingJob("distill", config, data, data, data, "checkpoint", 1, 0)


def test_an_imported_cache(project: Project) -> None:
    """It lacks who sampled, and how likely: refused by name; where allowed, the loss has what it
    needs and the weights have not.
    """
    export_reference(
        project.score, project.folder / "reference.parquet", project.folder / "teacher"
    )
    imported = project.folder / "imported"
    import_reference(project.folder / "reference.parquet", imported, project.folder / "student")
    with pytest.raises(
        ConsistencyError,
        match=(
            "it is not recorded which student sampled its responses; "
            "its scores are not shown to be by the teacher"
        ),
    ):
        project.run(("distill",), f"distill.cache={imported}")
    allowed = project.load(f"distill.cache={imported}", "distill.allow_foreign_cache=true")
    assert [sample.sampling_logprobs for sample in load_samples(job_on(allowed, imported))] == [
        None
    ] * 24
    assert isinstance(distillation_objective(job_on(allowed, imported)), Lightning)
    weighted = project.load(
        f"distill.cache={imported}",
        "distill.allow_foreign_cache=true",
        "distill.objective.importance_cap=2.0",
    )
    with pytest.raises(ConfigError, match="needs sampling_logprobs"):
        distillation_objective(job_on(weighted, imported))


def damage(project: Project, change: Callable[[np.ndarray], object]) -> Path:
    """The run's cache with values changed by a writer who makes all checksums right."""
    manifest = read_manifest(project.score)
    folder = project.folder / "damaged"
    rows = [
        (response, scores.copy())
        for response, scores in read_rows(project.score)
        if scores is not None
    ]
    change(rows[3][1])
    about = {
        "parents": manifest.parents,
        "models": manifest.models,
        "sampling": manifest.sampling,
        "lineage": manifest.lineage,
    }
    writer = ArtifactWriter(folder, kind=manifest.kind, inputs=manifest.inputs, **about)
    responses = [response for response, _ in rows]
    writer.publish_shard(
        0, to_table(responses, scores_of(responses, [scores for _, scores in rows]))
    )
    writer.finish(vocab_size=32, name=f"{responses[3].prompt_id}/0")
    return folder


def test_what_is_no_sound_cache_is_refused_before_training(project: Project) -> None:
    damaged = damage(project, lambda scores: scores.__setitem__(2, 0.5))
    with pytest.raises(
        LopdError,
        match=re.escape(
            f"values above 0 in teacher_logprobs: {read_manifest(damaged).extra['name']}"
        ),
    ):
        project.distill(damaged)
    with pytest.raises(
        ArtifactError,
        match="is of kind rollouts, but a finished cache is needed; limit: a complete",
    ):
        project.distill(project.folder / "run" / "rollout")
    assert not (project.folder / "run" / "distill" / "job.json").exists()


def test_lopd_check_compares_whose_it_is(project: Project, foreign: Path) -> None:
    assert list(check_given(project.load())) == []
    assert list(check_given(project.load(f"distill.cache={project.score}"))) == [
        "this student's responses, scored by the teacher of its demonstrations"
    ]
    before = project.load(f"distill.cache={project.score}", f"run.dir={project.folder / 'new'}")
    assert "whose they are is compared once" in str(next(check_given(before)))
    refreshed = project.load(f"distill.cache={project.score}", "distill.refresh.every=1")
    assert [problem.what for problem in refresh_problems(refreshed)] == [
        (
            "distill.refresh and distill.cache cannot be used together: fresh rollouts are "
            "added to those of the score stage"
        )
    ]
    assert list(refresh_problems(project.load(f"distill.cache={project.score}"))) == []


def test_rollouts_and_scores_say_whose_they_are(project: Project) -> None:
    student = identify_model(project.folder / "run" / "sft" / "model").weights
    for stage in ("rollout", "score"):
        assert read_manifest(project.folder / "run" / stage).models["student"].weights == student
    (shard, *_) = read_manifest(project.score).shards
    assert next(from_table(read_shard(project.score, shard)))[0].weight_version == "stand-in"


def test_a_checkpoint_from_elsewhere_has_a_declared_teacher(project: Project) -> None:
    """Nothing is trained, nothing demonstrated; who taught it is what the configuration says, and
    is recorded as said, not shown.
    """
    teacher = project.folder / "teacher"
    given = [
        f"sft.checkpoint={project.folder / 'student'}",
        f"run.dir={project.folder / 'taken'}",
        "evaluate.equal_compute_baseline=false",
    ]
    project.servers.trained.clear()
    config = project.run(TO_SCORE[1:], *given, f"sft.declared_teacher={teacher}")
    assert project.servers.trained == []
    sft = config.run.dir / "sft"
    assert (
        identify_model(sft / "model").weights == identify_model(project.folder / "student").weights
    )
    for stage in ("sft", "rollout", "score"):
        assert read_manifest(config.run.dir / stage).lineage["evidence"] == "declared"
    assert read_manifest(config.run.dir / "score").lineage["consistent"] is True
    assert "demonstrate" not in {row["name"] for row in pipeline.status(config)}
    assert list(check_checkpoint(config)) == [f"{project.folder / 'student'}, its teacher declared"]

    unknown = project.load(*given)
    for stage in TO_SCORE[1:3]:
        pipeline.run(unknown, (stage,))
    with pytest.raises(ConsistencyError, match="it is not recorded whether teacher"):
        pipeline.run(unknown, ("score",))
    with pytest.raises(ConsistencyError, match="it is not recorded whether teacher"):
        list(check_checkpoint(unknown))
    with pytest.raises(ConfigError, match="one of the two"):
        list(
            check_checkpoint(
                project.load(*given, f"sft.demonstrations={project.folder / 'run' / 'demonstrate'}")
            )
        )
    baseline = project.load(*given[:2], f"sft.declared_teacher={teacher}")
    assert isinstance(next(check_checkpoint(baseline)), ConfigError)
