"""lopd cache judge: verdicts made once, beside a cache, and what a distillation does with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from lopd import pipeline
from lopd.artifacts import ArtifactWriter, identify_tokenizer, read_manifest
from lopd.cache import to_table
from lopd.cache.reader import CacheReader
from lopd.cache.splitting import split
from lopd.cache.verdicts import right_of, rows_that_the_teacher_solves
from lopd.checks.lineage import verdicts as check_verdicts
from lopd.config import Config, load_config
from lopd.errors import ConfigError, DataError, LopdError
from lopd.objective import Distillation, DropWrong, Lightning, objective_from_config
from lopd.records import Response, TeacherScores, float32, int32, token_hash
from lopd.stages import judge as judging
from lopd.stages.context import StageContext
from lopd.stages.judge import judge
from lopd.stages.rollout import STAGE
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import distillation_objective, kept_rows, load_samples
from lopd.tasks.tokenizer import load_tokenizer
from tests.stand_ins import StandIns, command, write_project

END = 2


def answers(config: Config, wrong: Callable[[int, int], bool], samples: int = 2) -> list[Response]:
    """Responses to the OPD prompts; ``wrong`` says which have another answer."""
    tokenizer = load_tokenizer(config.models.student)
    prompts, ids = StageContext(config, STAGE).prompts("opd")
    found = []
    for number, (prompt, prompt_ids) in enumerate(zip(prompts, ids, strict=True)):
        for index in range(samples):
            right = int(prompt.answer or "")
            given = (right + 1) % 100 if wrong(number, index) else right
            text = f"<think>\n{'1' * index}\n</think>\n{given:02d}"
            tokens = int32([*tokenizer.encode(text, add_special_tokens=False), END])
            logprobs = float32([-0.5] * len(tokens))
            found.append(
                Response(prompt.prompt_id, index, prompt_ids, tokens, logprobs, "stop", "v1")
            )
    return found


def publish(folder: Path, config: Config, responses: Sequence[Response]) -> Path:
    identity = identify_tokenizer(config.models.student)
    writer = ArtifactWriter(
        folder, kind="teacher_cache", inputs={"of": folder.name}, models={"teacher": identity}
    )
    for index, start in enumerate(range(0, len(responses), 10)):
        rows = responses[start : start + 10]
        scores = [
            TeacherScores(
                one.prompt_id,
                one.sample_index,
                token_hash(one.prompt_ids, one.token_ids),
                float32([-0.4] * len(one.token_ids)),
            )
            for one in rows
        ]
        writer.publish_shard(index, to_table(rows, scores))
    writer.finish()
    return folder


@dataclass
class Project:
    """A configuration, and a cache in which every third prompt's second answer is wrong."""

    folder: Path
    file: Path
    config: Config
    cache: Path

    def load(self, *overrides: str) -> Config:
        return load_config(self.file, [*overrides])

    def job(self, *overrides: str) -> TrainingJob:
        config = self.load(*overrides)
        student = config.models.student
        return TrainingJob(
            "distill", config, self.folder / "d", self.cache, student, "checkpoint", 1, 0
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    file = write_project(tmp_path)
    config = load_config(file, [])
    responses = answers(config, lambda number, index: number % 3 == 0 and index == 1)
    return Project(tmp_path, file, config, publish(tmp_path / "cache", config, responses))


def test_verdicts_are_made_once_and_say_by_whom(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lopd = command(monkeypatch, capsys)
    out = project.folder / "verdicts"
    result = lopd("cache", "judge", project.cache, project.file, "--out", out)
    assert result.code == 0, result
    assert "40 of 48 responses right by register_arithmetic; 0 of 24 prompts" in result.out
    manifest = read_manifest(out)
    assert manifest.kind == "verdicts"
    assert manifest.parents == {"teacher_cache": read_manifest(project.cache).fingerprint}
    assert manifest.extra["verifier"] == {"name": "register_arithmetic", "options": {}}
    assert manifest.extra["reasons"] == {"wrong answer": 8}
    right = right_of(CacheReader(project.cache), out)
    assert right.tolist() == [not (row % 2 and (row // 2) % 3 == 0) for row in range(48)]
    for verb in ("verify", "inspect"):
        lopd("cache", verb, out).refused("is of kind verdicts and has no responses")
    assert lopd("cache", "judge", project.cache, project.file, "--out", out, "--json").code == 0


def test_a_killed_command_continues_at_the_missing_shards(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judge(project.config, project.cache, project.folder / "whole", "opd")
    judged: list[int] = []
    real = judging._table_of

    def table_of(responses: list[Response], verdicts: list[object]) -> object:
        judged.append(len(responses))
        if len(judged) == 3:
            raise KeyboardInterrupt
        return real(responses, verdicts)  # type: ignore[arg-type]

    monkeypatch.setattr(judging, "_table_of", table_of)
    out = project.folder / "killed"
    with pytest.raises(KeyboardInterrupt):
        judge(project.config, project.cache, out, "opd")
    with pytest.raises(LopdError, match="not complete"):
        right_of(CacheReader(project.cache), out)
    manifest = judge(project.config, project.cache, out, "opd")
    assert judged == [10, 10, 10, 10, 10, 8], "two shards were kept, the third was judged again"
    assert manifest.fingerprint == whole.fingerprint


def test_verdicts_belong_to_tokens_and_are_found_in_derived_caches(project: Project) -> None:
    out = project.folder / "verdicts"
    judge(project.config, project.cache, out, "opd")
    split(project.cache, project.folder / "parts", 2)
    part = CacheReader(project.folder / "parts" / "part-00")
    assert 0 < len(right_of(part, out)) < 48
    others = answers(project.config, lambda number, index: True)
    other = publish(project.folder / "other", project.config, others)
    with pytest.raises(DataError, match="40 of 48 responses have no verdict there, for example"):
        right_of(CacheReader(other), out)


def test_samples_and_the_objective_get_the_verdicts(project: Project) -> None:
    out = project.folder / "verdicts"
    judge(project.config, project.cache, out, "opd")
    job = project.job(f"distill.verdicts={out}", "distill.objective.wrong=drop")
    assert [sample.right for sample in load_samples(job)].count(False) == 8
    assert distillation_objective(job) == Distillation(Lightning(), (DropWrong(),))
    assert load_samples(project.job())[0].right is None
    assert "40 of 48 responses right" in str([*check_verdicts(job.config)])
    context = StageContext(job.config, pipeline.stage_named("distill"))
    assert context.inputs["distill.verdicts"] == read_manifest(out).fingerprint


def test_prompts_that_the_teacher_fails_are_left_out(project: Project) -> None:
    demonstrations = answers(project.config, lambda number, _: number % 4 == 0, samples=1)
    made = publish(project.folder / "demonstrations", project.config, demonstrations)
    out = project.folder / "teacher_verdicts"
    manifest = judge(project.config, made, out, "opd")
    assert manifest.extra["prompts_never_right"] == 6
    job = project.job(f"distill.teacher_verdicts={out}")
    samples = load_samples(job)
    failed = {one.prompt_id for number, one in enumerate(demonstrations) if number % 4 == 0}
    assert len(samples) == 36
    assert not failed & {sample.key[0] for sample in samples if sample.key is not None}
    assert samples[0].key == CacheReader(project.cache)[2][0].key
    assert len(load_samples(project.job())) == 48
    assert len(kept_rows(CacheReader(project.cache), job)) == 36
    assert len(rows_that_the_teacher_solves(CacheReader(project.cache), out, 1.0)) == 36


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["distill.objective.wrong=drop"], "it needs right: make verdicts of the cache"),
        (["distill.verdicts=v"], "no knob of the objective reads a verdict"),
        (["distill.teacher_right_share=0.9"], "no effect without teacher_verdicts"),
        (
            ["distill.teacher_verdicts=v", "distill.refresh.every=1"],
            "nobody has judged the fresh responses",
        ),
        (
            [
                "distill.verdicts=v",
                "distill.objective.wrong=drop",
                "distill.objective.wrong_weight=0.5",
            ],
            "wrong_weight has nothing left to weight",
        ),
    ],
)
def test_knobs_that_mean_nothing_are_refused(
    project: Project, overrides: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match="remedy") as caught:
        objective_from_config(project.load(*overrides).distill)
    assert expected in str(caught.value)


def test_bad_input_is_one_line(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lopd = command(monkeypatch, capsys)
    out = project.folder / "verdicts"

    def refused(*words: str) -> str:
        result = lopd("cache", "judge", project.cache, project.file, "--out", out, *words)
        return result.refused()

    assert "is not in this prompt set" in refused("--prompts", "sft")
    assert "there is no prompt set 'x'" in refused("--prompts", "x")
    assert "task open_ended has no verifier" in refused("task.name=open_ended")
    student = shutil.copytree(project.config.models.student, project.folder / "other_student")
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    (student / "tokenizer.json").write_text(json.dumps({**tokenizer, "version": "2.0"}))
    assert "the student of the configuration has another one" in refused(
        f"models.student={student}"
    )
    with pytest.raises(LopdError, match="exactly verdicts"):
        right_of(CacheReader(project.cache), project.cache)


def test_too_few_prompts_are_left_for_a_step(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent process refuses it before ranks are started."""
    StandIns().install(monkeypatch)
    pipeline.run(project.config, ("demonstrate", "sft", "rollout", "score"))
    # The stand-in answers at random, so it fails every prompt.
    score = project.config.run.dir / "score"
    out = project.folder / "verdicts"
    judge(project.config, score, out, "opd")
    config = project.load(f"distill.teacher_verdicts={out}")
    with pytest.raises(DataError, match="the teacher solves none of the prompts"):
        pipeline.run(config, ("distill",))
