"""The teacher's own prompt and the teacher's own base: what the score stage asks, and keeps."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from lopd import pipeline
from lopd.artifacts import read_manifest
from lopd.cache.checks import check_cache
from lopd.cache.merging import merge
from lopd.cache.reader import CacheReader
from lopd.cache.splitting import split
from lopd.checks.combinations import refresh_problems
from lopd.checks.lineage import teachers as check_teachers
from lopd.config import Config, load_config
from lopd.errors import ConfigError, ConsistencyError, DataError
from lopd.objective import Delta, Distillation, Lightning
from lopd.records import Prompt, TeacherScores, float32
from lopd.stages.context import StageContext
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import distillation_objective, load_samples
from lopd.tasks.teacher_prompt import check_template, teacher_prompts
from sglang_rollout.requests.scoring import ScoreRequest
from tests.models import write_qwen3_moe
from tests.stand_ins import Engine, StandIns, write_project, write_prompts

TO_SCORE = ("demonstrate", "sft", "rollout", "score")
# Only characters that the tiny tokenizer has.
TEMPLATE = "{prompt} {answer} {answer}"


@dataclass
class Recording(Engine):
    """Scores by the number of prompt tokens, and less by ``less``; remembers what it was asked."""

    less: float = 0.0
    asked: list[ScoreRequest] = field(default_factory=list)

    def score(self, requests: Iterable[ScoreRequest], *, top_k: int = 0) -> Iterator[TeacherScores]:
        seen = []
        for request in requests:
            seen.append(request)
            self.asked.append(request)
            (scores,) = super().score([request], top_k=top_k)
            value = -0.001 * len(request.prompt_ids) - self.less
            logprobs = float32(np.full(len(request.token_ids), value))
            yield replace(scores, teacher_logprobs=logprobs)


@dataclass
class Servers(StandIns):
    """The base is served by another engine than the teacher."""

    engine: Recording = field(default_factory=Recording)
    base: Recording = field(default_factory=lambda: Recording(less=0.5))

    @contextlib.contextmanager
    def serve(self, _: StageContext, role: str, model: Path) -> Iterator[Engine]:
        self.served.append(f"{role} {model.name}")
        yield self.base if model.name == "base" else self.engine


@dataclass
class Project:
    folder: Path
    file: Path
    servers: Servers

    def load(self, *overrides: str) -> Config:
        return load_config(self.file, ["rollout.shard_size=10", *overrides])

    def score(self, *overrides: str) -> Path:
        config = self.load(*overrides)
        pipeline.run(config, TO_SCORE)
        return config.run.dir / "score"

    def job(self, cache: Path, *overrides: str) -> TrainingJob:
        config = self.load(*overrides)
        student = config.models.student
        return TrainingJob("distill", config, self.folder / "d", cache, student, "checkpoint", 1, 0)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    servers = Servers()
    servers.install(monkeypatch)
    made = Project(tmp_path, write_project(tmp_path), servers)
    base = shutil.copytree(tmp_path / "teacher", tmp_path / "base")
    shutil.copy(write_qwen3_moe(tmp_path / "w") / "model.safetensors", base)
    return made


# ---- what the teacher sees ----


def test_the_teacher_sees_more_and_the_response_stays_as_it_is(project: Project) -> None:
    plain = project.score()
    before = [*CacheReader(plain).scored_rows()]
    asked_before = {request.key: request for request in project.servers.engine.asked}
    project.servers.engine.asked.clear()
    served = list(project.servers.served)
    cache = project.score(f"score.teacher_prompt={TEMPLATE!r}")
    assert project.servers.served == [*served, "teacher teacher"], "only the score stage ran again"
    rows = [*CacheReader(cache).scored_rows()]
    for (response, scores), (old, old_scores) in zip(rows, before, strict=True):
        request = next(one for one in project.servers.engine.asked if one.key == response.key)
        # What the student saw and wrote is untouched, and the cache ties the scores to it.
        assert np.array_equal(response.prompt_ids, old.prompt_ids)
        assert np.array_equal(response.token_ids, old.token_ids)
        assert np.array_equal(request.token_ids, old.token_ids)
        assert np.array_equal(asked_before[response.key].prompt_ids, old.prompt_ids)
        # " 42 42" has six tokens, all before the end of the user's turn.
        assert len(request.prompt_ids) == len(old.prompt_ids) + 6
        assert scores is not None
        assert old_scores is not None
        close = np.allclose(scores.teacher_logprobs, old_scores.teacher_logprobs - 0.006)
        assert close, "the values are those after the teacher's prompt"
    manifest = read_manifest(cache)
    assert manifest.lineage["teacher_prompt"] == TEMPLATE
    assert manifest.lineage["consistent"] is True
    assert manifest.inputs["score.teacher_prompt"] == TEMPLATE
    assert manifest.inputs["prompts.opd.seed"] == 2, "the prompts decide the scores now"
    assert not len(check_cache(cache)[0])


def test_the_teacher_may_be_the_student_itself(project: Project) -> None:
    student = project.folder / "student"
    cache = project.score(
        f"models.teacher={student}",
        f"sft.checkpoint={student}",
        f"sft.declared_teacher={student}",
        f"score.teacher_prompt={TEMPLATE!r}",
        f"run.dir={project.folder / 'self'}",
    )
    lineage = read_manifest(cache).lineage
    assert (lineage["evidence"], lineage["consistent"]) == ("declared", True)
    assert lineage["teacher_prompt"] == TEMPLATE


def test_a_hint_comes_from_a_column_of_the_file(project: Project) -> None:
    rows = [{"prompt_id": f"p{i}", "question": f"{i}+1", "why": f"{i}*9"} for i in range(24)]
    file = write_prompts(project.folder / "opd.jsonl", rows)
    given = f"prompts.opd={{file='{file}', fields={{hint='why', question='question'}}}}"
    cache = project.score(given, "score.teacher_prompt='{hint}, {prompt}'")
    sizes = {one.key: len(one.prompt_ids) for one in project.servers.engine.asked}
    for response, _ in CacheReader(cache).rows():
        number = response.prompt_id[1:]
        assert sizes[response.key] == len(response.prompt_ids) + len(f"{number}*9, ")
    project.servers.engine.asked.clear()
    with pytest.raises(DataError, match=r"prompt 'p0' has no answer, which score\.teacher_prompt"):
        project.score(given, "score.teacher_prompt='{answer} {prompt}'")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{answer}", "does not contain {prompt}"),
        ("{prompt}", "adds nothing to the prompt"),
        ("{prompt} {hnt}", "{hnt} is no field"),
    ],
)
def test_templates_that_cannot_be_meant(template: str, expected: str) -> None:
    with pytest.raises(ConfigError, match="remedy") as caught:
        check_template(template)
    assert expected in str(caught.value)


def test_a_template_is_filled_in_once_and_around_the_last_message() -> None:
    system = {"role": "system", "content": "{prompt}"}
    user = {"role": "user", "content": r"\frac{a}{b} {answer}"}
    prompt = Prompt("p", (system, user), "math", answer="{hint}", hint="h")
    (asked,) = teacher_prompts([prompt], r"\boxed{x} {hint}: {prompt} = {answer}")
    assert asked.messages[0] == system
    assert asked.messages[1]["content"] == r"\boxed{x} h: \frac{a}{b} {answer} = {hint}"
    assert (asked.prompt_id, prompt.messages[1]) == ("p", user)


# ---- the teacher's own base ----


def test_the_base_scores_too_and_its_values_are_one_more_column(project: Project) -> None:
    base = f"models.teacher_base={project.folder / 'base'}"
    cache = project.score(base)
    assert project.servers.served[-2:] == ["teacher base", "teacher teacher"]
    for _, scores in CacheReader(cache).scored_rows():
        assert scores is not None
        assert scores.base_logprobs is not None
        assert np.allclose(scores.base_logprobs, scores.teacher_logprobs - 0.5)
    manifest = read_manifest(cache)
    assert manifest.models["base"].path == str(project.folder / "base")
    assert manifest.inputs["models.teacher_base"] == manifest.models["base"].weights
    assert not len(check_cache(cache)[0])
    delta = project.job(cache, base, "distill.objective.advantage=delta")
    assert distillation_objective(delta) == Distillation(Lightning(), shifts=(Delta(),))
    assert load_samples(delta)[0].base_logprobs is not None
    assert load_samples(project.job(cache, base))[0].base_logprobs is None, "not even decoded"


def test_a_killed_score_stage_keeps_what_the_base_has_scored(project: Project) -> None:
    base = f"models.teacher_base={project.folder / 'base'}"
    project.servers.engine.fail_after = (24 * 2 + 15, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        project.score(base)
    assert len(project.servers.base.asked) == 24
    project.servers.engine.fail_after = None
    cache = project.score(base)
    assert len(project.servers.base.asked) == 24, "nothing was scored by the base again"
    assert all(
        one is not None and one.base_logprobs is not None
        for _, one in CacheReader(cache).scored_rows()
    )


def test_bad_bases_are_refused(project: Project) -> None:
    teacher = project.folder / "teacher"
    with pytest.raises(ConfigError, match="their difference is 0"):
        project.score(f"models.teacher_base={teacher}")
    gone = project.load("models.teacher_base=nowhere")
    with pytest.raises(ConfigError, match=r"models\.teacher_base: no such folder"):
        [*check_teachers(gone)]
    base = f"models.teacher_base={project.folder / 'base'}"
    both = project.load(base, "distill.refresh.every=1")
    assert "a refresh is scored by the teacher alone" in str([*refresh_problems(both)])
    cache = project.score()
    with pytest.raises(ConfigError, match="the cache has no column teacher_base_logprobs"):
        distillation_objective(project.job(cache, "distill.objective.advantage=delta"))


def test_caches_of_other_prompts_or_bases_are_not_merged(project: Project) -> None:
    split(project.score(), project.folder / "plain", 2)
    split(project.score(f"score.teacher_prompt={TEMPLATE!r}"), project.folder / "hinted", 2)
    parts = [project.folder / "plain" / "part-00", project.folder / "hinted" / "part-01"]
    with pytest.raises(ConsistencyError, match="the prompt of the teacher is not that of"):
        merge(parts, project.folder / "merged")
