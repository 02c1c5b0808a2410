"""A teacher with another tokenizer, through the pipeline (score.tokenizer = "aligned").

The teacher of these runs numbers the same tokens otherwise, so every score has a known place.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd import pipeline
from lopd.artifacts import identify_tokenizer, read_manifest
from lopd.artifacts.lineage import check_given_cache
from lopd.cache import scored_rows, to_table
from lopd.cache.checks import check_cache
from lopd.cache.columns import ALIGNMENT
from lopd.cache.merging import merge
from lopd.cache.reader import CacheReader
from lopd.cache.residualise import residualise
from lopd.cache.row_checks import Findings, RowChecks
from lopd.cache.splitting import split
from lopd.cache.statistics import inspect_cache
from lopd.cache.style import Settings
from lopd.cache.token_alignment import Alignment
from lopd.checks.lineage import demonstrations as check_demonstrations
from lopd.config import load_config
from lopd.errors import ArtifactError, DataError
from lopd.records import Response, TeacherScores, float32, int32, token_hash
from lopd.stages.context import StageContext
from lopd.stages.conversation import speaker_of
from lopd.stages.judge import judge
from lopd.stages.score import STAGE
from lopd.stages.tokenizer_bridge import TokenizerBridge, alignment_figures
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import load_samples
from lopd.tasks.tokenizer import load_tokenizer
from sglang_rollout.requests.scoring import ScoreRequest
from tests.stand_ins import CONFIG, TINY_MODELS, Engine, Lopd, StandIns, command, write_project
from tests.two_tokenizers import renumber_tokens, write_two_tokenizers

TO_SCORE = ("demonstrate", "sft", "rollout", "score")


class ScoresById(Engine):
    """Scores a token by its own id, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[tuple[str, int], ScoreRequest] = {}

    def score(self, requests: Iterable[ScoreRequest], *, top_k: int = 0) -> Iterator[TeacherScores]:
        for request in requests:
            self.asked[request.key] = request
            yield TeacherScores(
                request.prompt_id,
                request.sample_index,
                token_hash(request.prompt_ids, request.token_ids),
                float32(-0.01 * request.token_ids - 0.001),
            )


@dataclasses.dataclass
class Project:
    folder: Path
    config: Path
    engine: ScoresById
    lopd: Lopd
    # The teacher's id of each of the student's.
    teacher_ids: dict[int, int]

    @property
    def score(self) -> Path:
        return self.folder / "run" / "score"

    def rows(self) -> list[tuple[Response, TeacherScores]]:
        found = [*CacheReader(self.score).scored_rows()]
        return [(response, scores) for response, scores in found if scores is not None]


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Project:
    config = write_two_tokenizers(tmp_path, CONFIG)
    engine = ScoresById()
    StandIns(engine).install(monkeypatch)
    shutil.copytree(TINY_MODELS / "teacher", tmp_path / "plain")
    moved = renumber_tokens(tmp_path / "plain")
    return Project(tmp_path, config, engine, command(monkeypatch, capsys), moved)


def test_scores_come_back_to_the_tokens_of_the_student(project: Project) -> None:
    project.lopd("score", project.config).refused("rollout")
    pipeline.run(load_config(project.config), TO_SCORE)
    rows = project.rows()
    assert len(rows) == 24
    for response, scores in rows:
        request = project.engine.asked[response.key]
        ids = response.token_ids.tolist()
        assert request.token_ids.tolist() == [project.teacher_ids[token] for token in ids]
        # The same text, each in the model's own template and tokens.
        prompt = response.prompt_ids.tolist()
        assert request.prompt_ids.tolist() == [project.teacher_ids[token] for token in prompt]
        assert request.prompt_ids.tolist() != prompt
        aligned = scores.alignment == Alignment.ALIGNED
        assert (response.loss_mask == aligned).all()
        expected = float32(-0.01 * request.token_ids - 0.001)
        assert scores.teacher_logprobs[aligned].tolist() == expected[aligned].tolist()
        # The control: the scores of a token further on are others.
        assert not np.allclose(scores.teacher_logprobs[aligned][:-1], expected[aligned][1:])
        # The stand-in's student samples the unknown ids 29 and so on, which are special tokens.
        assert aligned.sum() >= 10


def test_manifest_and_inspection_name_method_and_tokenizers(project: Project) -> None:
    pipeline.run(load_config(project.config), TO_SCORE)
    manifest = read_manifest(project.score)
    about = manifest.extra["token_alignment"]
    assert about == {
        "method": "byte_chunks_proportional",
        "teacher_tokenizer": identify_tokenizer(project.folder / "teacher").tokenizer,
        "student_tokenizer": identify_tokenizer(project.folder / "student").tokenizer,
    }
    assert about["teacher_tokenizer"] != about["student_tokenizer"]
    counts = manifest.extra["alignment_counts"]
    figures = inspect_cache(project.score)
    assert figures["alignment"] == counts
    assert counts["aligned"] == sum(int(response.loss_mask.sum()) for response, _ in project.rows())
    out = project.lopd("cache", "inspect", project.score).succeeded().out
    assert "byte_chunks_proportional" in out
    assert "tokens carry loss" in out
    # Of this stand-in's tokens about a third are special ones, all of which the teacher has.
    log = (project.score / "log.txt").read_text()
    assert "alignment: " in log
    assert "WARNING: many tokens" not in log
    assert not [*check_cache(project.score)[0]]
    # Parts of it, and what is joined of them, say the same.
    split(project.score, project.folder / "parts", 2)
    parts = [project.folder / "parts" / f"part-0{part}" for part in range(2)]
    merged = merge(parts, project.folder / "merged")
    assert merged.extra["token_alignment"] == about
    # What belongs to single tokens of one tokenizer is not done to it.
    with pytest.raises(ArtifactError, match="another tokenizer"):
        residualise(project.score, project.folder / "residualised", Settings())
    project.lopd("audit", project.score).refused("not in the teacher's own tokens")
    project.lopd("parity", project.config).refused("aligned")


def test_masked_tokens_are_no_perfect_agreement(project: Project) -> None:
    """Their 0.0 is no log-probability: neither a figure nor a loss sees it."""
    pipeline.run(load_config(project.config), TO_SCORE)
    rows = project.rows()
    spoilt = []
    for response, scores in rows:
        alignment = scores.alignment.copy()
        logprobs = scores.teacher_logprobs.copy()
        alignment[3] = Alignment.NOT_CANONICAL
        logprobs[3] = 0.0
        mask = alignment == Alignment.ALIGNED
        spoilt.append(
            (
                dataclasses.replace(response, loss_mask=mask),
                dataclasses.replace(scores, alignment=alignment, teacher_logprobs=logprobs),
            )
        )
    table = to_table([one for one, _ in spoilt], [one for _, one in spoilt])
    back = [*scored_rows(table)]
    assert all(scores.alignment[3] == Alignment.NOT_CANONICAL for _, scores in back)
    findings = Findings()
    RowChecks(findings, vocab_size=32, kind="teacher_cache").add(table, "shard")
    assert not [*findings]
    # The control: the same rows with loss on every token are refused.
    whole = [dataclasses.replace(one, loss_mask=np.ones_like(one.loss_mask)) for one, _ in spoilt]
    findings = Findings()
    careless = to_table(whole, [one for _, one in spoilt])
    RowChecks(findings, vocab_size=32, kind="teacher_cache").add(careless, "shard")
    assert [finding.kind for finding in findings] == ["unaligned loss"]
    assert next(iter(findings)).count == len(rows)
    figures = inspect_cache(project.score)
    num_aligned = sum(int(response.loss_mask.sum()) for response, _ in rows)
    histogram = figures["teacher_logprobs"]["histogram"]
    assert sum(histogram["counts"]) == num_aligned


def test_a_training_sees_the_mask(project: Project) -> None:
    config = load_config(project.config)
    pipeline.run(config, (*TO_SCORE, "distill"))
    job = TrainingJob(
        objective="distill",
        config=config,
        folder=project.folder / "training",
        data=project.score,
        initial=project.folder / "student",
        init="checkpoint",
        num_steps=1,
        order_seed=0,
    )
    samples = {sample.key: sample for sample in load_samples(job)}
    for response, _ in project.rows():
        mask = samples[response.key].loss_mask[len(response.prompt_ids) :]
        assert (mask == response.loss_mask).all()


def test_the_whole_run_is_in_the_students_tokens(project: Project) -> None:
    """The teacher's demonstrations and answers too: every artifact has one kind of ids."""
    project.lopd("run", project.config).succeeded()
    run = project.folder / "run"
    student = load_tokenizer(project.folder / "student")
    teacher = load_tokenizer(project.folder / "teacher")
    for folder in (run / "demonstrate", run / "evaluate" / "answers-teacher"):
        for response, _ in CacheReader(folder).scored_rows():
            text = student.decode(response.prompt_ids.tolist())
            assert text.endswith("<|im_start|>assistant\n")
            # The control: as the teacher's ids they mean something else.
            assert teacher.decode(response.prompt_ids.tolist()) != text
            assert response.token_ids[-1] == student.eos_token_id
            assert (response.sampling_logprobs == float32(-0.5)).all()
    shown = project.lopd("cache", "inspect", run / "demonstrate", "--sample", "1", "--json")
    (sample,) = json.loads(shown.succeeded().out)["sample"]
    assert sample["prompt"].startswith("<|im_start|>user\n")
    # Who asks the teacher himself asks it in its own tokens.
    config = load_config(project.config)
    assert speaker_of(run, "teacher", config).template_from == project.folder / "teacher"
    assert speaker_of(run, "base", config).template_from == project.folder / "student"
    counts = read_manifest(run / "score").extra["alignment_counts"]
    assert json.loads((run / "summary.json").read_text())["cache"]["alignment"] == counts
    evaluated = read_manifest(run / "evaluate").extra
    assert set(evaluated["reverse_kl"]) == {"base", "sft", "sft_longer", "distilled", "teacher"}
    assert all(np.isfinite(value["mean"]) for value in evaluated["reverse_kl"].values())
    # Nothing is done again, and no knob of the teacher's tokenizer is forgotten.
    before = project.engine.answered
    project.lopd("run", project.config).succeeded()
    assert project.engine.answered == before
    states = json.loads(project.lopd("status", project.config, "--json").succeeded().out)
    assert {row["state"] for row in states} == {"done"}


def test_an_aligned_cache_is_given_to_its_student_alone(project: Project) -> None:
    config = load_config(project.config)
    pipeline.run(config, TO_SCORE)
    manifest = read_manifest(project.score)
    sampler = manifest.models["student"]
    found = check_given_cache(manifest, project.score, sampler, allow_foreign=False)
    assert found["consistent"]
    # The control: a student with the teacher's tokenizer would read other text in these ids.
    other = dataclasses.replace(sampler, tokenizer=manifest.models["teacher"].tokenizer)
    with pytest.raises(DataError, match="tokenizer of the student"):
        check_given_cache(manifest, project.score, other, allow_foreign=True)
    # The demonstrations of this run are in its student's tokens, so another run may learn them.
    given = f"sft.demonstrations={project.folder / 'run' / 'demonstrate'}"
    lines = [*check_demonstrations(load_config(project.config, [given]))]
    assert lines[-1].startswith("24 from")
    with pytest.raises(DataError, match="tokenizer of the student"):
        [*check_demonstrations(load_config(project.config, [given, "models.student=teacher"]))]


def test_a_demonstration_that_is_too_long_in_the_students_tokens_is_cut(project: Project) -> None:
    config = load_config(project.config)
    pipeline.run(config, ("demonstrate",))
    folder = project.folder / "run" / "demonstrate"
    for response, _ in CacheReader(folder).scored_rows():
        ids = int32([project.teacher_ids[token] for token in response.token_ids.tolist()])
        sampled = dataclasses.replace(response, token_ids=ids, loss_mask=None)
        for length in (len(ids), 5):
            settings = config.sglang.model_copy(
                update={"context_length": len(response.prompt_ids) + length}
            )
            bridge = TokenizerBridge(
                config.model_copy(update={"sglang": settings}), [], thinking=True
            )
            found = bridge.in_student_tokens(sampled, response.prompt_ids)
            assert found.token_ids.tolist() == response.token_ids[:length].tolist()
            assert found.finish_reason == ("length" if length == 5 else "stop")
            assert found.loss_mask.all()


def test_a_prompt_of_the_teachers_own_is_in_the_teachers_tokens(project: Project) -> None:
    added = "score.teacher_prompt='{prompt} {answer}'"
    pipeline.run(load_config(project.config), TO_SCORE)
    plain = dict(project.engine.asked)
    pipeline.run(load_config(project.config, [added]), TO_SCORE)
    teacher = load_tokenizer(project.folder / "teacher")
    rows = project.rows()
    assert len(rows) == 24
    for response, scores in rows:
        before = plain[response.key]
        request = project.engine.asked[response.key]
        # The answer has two digits, before the end of the user's turn.
        seen = teacher.decode(request.prompt_ids.tolist())
        old = teacher.decode(before.prompt_ids.tolist())
        assert len(request.prompt_ids) == len(before.prompt_ids) + 3
        question, end = old.split("<|im_end|>", 1)
        assert seen.startswith(question)
        assert seen.endswith(end)
        # What the student saw and wrote stays, and so does where each token's score goes.
        prompt = response.prompt_ids.tolist()
        assert before.prompt_ids.tolist() == [project.teacher_ids[token] for token in prompt]
        assert request.token_ids.tolist() == before.token_ids.tolist()
        aligned = scores.alignment == Alignment.ALIGNED
        expected = float32(-0.01 * request.token_ids - 0.001)
        assert scores.teacher_logprobs[aligned].tolist() == expected[aligned].tolist()
    manifest = read_manifest(project.score)
    assert manifest.lineage["teacher_prompt"] == "{prompt} {answer}"
    assert manifest.inputs["score.teacher_prompt"] == "{prompt} {answer}"
    assert manifest.extra["token_alignment"]["method"] == "byte_chunks_proportional"


def test_verdicts_are_of_the_text_in_the_students_tokens(project: Project) -> None:
    config = load_config(project.config)
    pipeline.run(config, TO_SCORE)
    run = project.folder / "run"
    for stage, prompt_set in (("score", "opd"), ("demonstrate", "sft")):
        verdicts = judge(config, run / stage, project.folder / f"judged-{stage}", prompt_set)
        assert verdicts.rows == 24
    # The control: with the teacher's tokenizer the same ids are another text.
    other = load_config(project.config, ["models.student=teacher"])
    with pytest.raises(DataError, match="has another one"):
        judge(other, run / "score", project.folder / "wrong", "opd")


def test_a_killed_scoring_goes_on(project: Project) -> None:
    config = load_config(project.config)
    pipeline.run(config, TO_SCORE)
    whole = [scores.teacher_logprobs.tolist() for _, scores in project.rows()]
    counts = read_manifest(project.score).extra["alignment_counts"]
    manifest = json.loads((project.score / "manifest.json").read_text())
    (project.score / "shard-00001.parquet").unlink()
    unfinished = {**manifest, "complete": False, "shards": [], "rows": 0, "fingerprint": ""}
    (project.score / "manifest.json").write_text(json.dumps(unfinished))
    project.engine.asked.clear()
    pipeline.run(config, ("score",))
    assert len(project.engine.asked) == 8
    assert [scores.teacher_logprobs.tolist() for _, scores in project.rows()] == whole
    assert read_manifest(project.score).extra["alignment_counts"] == counts


def test_another_tokenizer_needs_the_knob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_project(tmp_path)
    lopd = command(monkeypatch, capsys)
    aligned = 'score.tokenizer="aligned"'
    own_template = 'models.chat_template="student"'
    one_tokenizer = lopd("run", config, aligned, own_template)
    one_tokenizer.refused("both models have one tokenizer", 'score.tokenizer="same"')
    renumber_tokens(tmp_path / "teacher")
    lopd("run", config).refused("differs", aligned)
    lopd("run", config, aligned).refused("models.chat_template")
    for knob in (
        "score.top_k=4",
        "score.entropy=true",
        'models.teachers={ math = "teacher" }',
        'models.teacher_base="student"',
    ):
        name = knob.partition("=")[0].strip()
        refused = f'{name} cannot be used with score.tokenizer = "aligned"'
        # A plan reads no weights, and says the same.
        for verb in ("check", "plan"):
            result = lopd(verb, config, aligned, own_template, knob)
            assert result.code == 2
            assert refused in " ".join(result.out.split())
        lopd("run", config, aligned, own_template, knob).refused(name)
    out = lopd("check", config, aligned, own_template).succeeded().out
    assert "by their bytes" in out
    assert "for the teacher and" in out
    # A teacher that cannot read the prompts is noticed before anything starts.
    (tmp_path / "teacher" / "chat_template.jinja").unlink()
    lopd("run", config, aligned, own_template).refused("no chat template")


def test_a_teacher_that_can_score_little_is_warned_of(project: Project) -> None:
    config = load_config(project.config)
    pipeline.run(config, TO_SCORE)
    context = StageContext(config, STAGE)
    response, scores = project.rows()[0]
    length = len(response.token_ids)
    for num_masked in (0, 1, length // 2):
        alignment = np.zeros(length, np.int8)
        alignment[:num_masked] = Alignment.SPECIAL
        marked = dataclasses.replace(scores, alignment=alignment)
        folder = project.folder / f"masked-{num_masked}"
        folder.mkdir()
        pq.write_table(to_table([response], [marked]), folder / "shard-00000.parquet")
        figures = alignment_figures(context, folder)
        assert figures["alignment_counts"]["special"] == num_masked
        assert ("warnings" in figures) == (num_masked > 1)
    assert "special tokens without a counterpart" in figures["warnings"][0]
    assert "WARNING: many tokens" in (project.score / "log.txt").read_text()


def test_a_column_of_another_length_is_refused(project: Project) -> None:
    pipeline.run(load_config(project.config), TO_SCORE)
    response, scores = project.rows()[0]
    with pytest.raises(ValueError, match="alignment has"):
        dataclasses.replace(scores, alignment=scores.alignment[:-1])
    table = to_table([response], [scores])
    short = pa.array([scores.alignment[:-1].tolist()], pa.list_(pa.int8()))
    spoilt = table.set_column(table.column_names.index(ALIGNMENT), ALIGNMENT, short)
    with pytest.raises(ArtifactError, match="alignment has"):
        [*scored_rows(spoilt)]
    findings = Findings()
    RowChecks(findings, vocab_size=32, kind="teacher_cache").add(spoilt, "shard")
    assert [finding.kind for finding in findings] == ["length of alignment"]
