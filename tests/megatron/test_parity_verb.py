"""``lopd parity``: figures of hand-made differences, and of a small run whose scores come from
transformers or from SGLang.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lopd.artifacts import ArtifactWriter, read_manifest
from lopd.audit.parity import agreement
from lopd.cache import to_table, write_responses
from lopd.cache.reader import CacheReader
from lopd.cli import app
from lopd.config import load_config
from lopd.errors import ConfigError
from lopd.records import Response, TeacherScores, token_hash
from lopd.report.parity_view import show_parity
from lopd.verbs.parity import compare
from tests.limits import apart, close, within
from tests.megatron.test_scorer import of_transformers, requests_of
from tests.models import write_qwen3_moe

EXAMPLE = Path(__file__).parents[2] / "examples/tiny_moe.toml"


def test_figures_of_differences_made_by_hand() -> None:
    first = np.full(100, -1.0, np.float32)
    second = first.copy()
    second[40] += 0.5
    second[41] -= 0.25
    found = agreement([(("a", 0), first, second), (("b", 1), first[:1], first[:1])])
    assert (found.num_responses, found.num_tokens) == (2, 101)
    assert found.mean == pytest.approx(0.75 / 101)
    assert found.bias == pytest.approx(0.25 / 101)
    assert (found.p50, found.largest) == (0.0, 0.5)
    assert found.p99 == pytest.approx(0.25)
    assert found.k3 == pytest.approx((math.expm1(0.5) - 0.5 + math.expm1(-0.25) + 0.25) / 101)
    assert found.worst[0] == (("a", 0), 40, 0.5)
    with pytest.raises(
        ValueError, match="has 100 log-probabilities in one table and 1 in the other"
    ):
        agreement([(("a", 0), first, first[:1])])
    with pytest.raises(ValueError, match="no tokens"):
        agreement([])


def test_k3_is_the_divergence_that_was_put_in() -> None:
    """Tokens drawn from one distribution, scored by it and by another: the mean over many is their
    KL.
    """
    generator = np.random.default_rng(0)
    first, second = (generator.dirichlet(np.ones(20)) for _ in range(2))
    tokens = generator.choice(20, 200_000, p=first)
    found = agreement(
        [
            (
                ("a", 0),
                np.log(first)[tokens].astype(np.float32),
                np.log(second)[tokens].astype(np.float32),
            )
        ]
    )
    assert found.k3 == pytest.approx(float((first * np.log(first / second)).sum()), rel=0.02)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with rollouts of 24 responses and their scores, both by transformers; teacher
    and student are beside it.
    """
    root = tmp_path_factory.mktemp("parity")
    teacher = write_qwen3_moe(root / "teacher", seed=1)
    student = write_qwen3_moe(root / "run/sft/model", seed=2)
    requests = requests_of(24)
    sampled = of_transformers(student, requests)
    scored = of_transformers(teacher, requests)
    responses = [
        Response(
            r.prompt_id,
            r.sample_index,
            r.prompt_ids,
            r.token_ids,
            sampled[r.key][0].numpy(),
            "stop",
            "sft",
        )
        for r in requests
    ]
    rollouts = write_responses(root / "run/rollout", responses, kind="rollouts", inputs={})
    writer = ArtifactWriter(
        root / "run/score",
        kind="teacher_cache",
        inputs={"score.engine": "sglang"},
        parents={"rollout": rollouts.fingerprint},
    )
    rows = [
        TeacherScores(*r.key, token_hash(r.prompt_ids, r.token_ids), scored[r.key][0].numpy())
        for r in responses
    ]
    writer.publish_shard(0, to_table(responses, rows))
    writer.finish()
    return root


def knobs(run: Path, teacher: Path) -> list[str]:
    one = [f"distill.parallel.{size}=1" for size in ("ranks", "tensor", "expert")]
    forward = [
        "score.forward.dtype=float32",
        "score.forward.timeout_s=500",
        "distill.dtype=float32",
        "distill.timeout_s=500",
        "sglang.dtype=float32",
    ]
    return [
        f"run.dir={run / 'run'}",
        f"models.teacher={teacher}",
        f"models.student={run / 'run/sft/model'}",
        *one,
        *forward,
    ]


def test_engines_of_the_same_weights_agree_and_a_perturbed_teacher_shows(
    run: Path, tmp_path: Path
) -> None:
    """The student's engines have the same weights; of the teacher's one has a weight matrix one
    percent larger.
    """
    before = sorted(path.name for path in (run / "run").iterdir())
    tensors = load_file(run / "teacher/model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.01
    (perturbed := tmp_path / "perturbed").mkdir()
    (perturbed / "config.json").write_bytes((run / "teacher/config.json").read_bytes())
    save_file(tensors, perturbed / "model.safetensors")
    result = CliRunner().invoke(
        app,
        ["parity", str(EXAMPLE), *knobs(run, perturbed), "--responses", "16", "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    teacher, student = json.loads(result.stdout).values()
    assert teacher["num_responses"] == student["num_responses"] == 16
    assert teacher["num_tokens"] == student["num_tokens"] > 100
    within(student["largest"], 1e-5, "largest")
    assert student["k3"] >= 0
    within(student["k3"], 1e-9, "k3")
    apart(teacher["mean"], 1e-4)
    assert teacher["k3"] > student["k3"]
    assert sorted(path.name for path in (run / "run").iterdir()) == before, (
        "parity writes nothing into a run"
    )


def test_the_score_stage_runs_on_megatron_and_keeps_entropies(run: Path, tmp_path: Path) -> None:
    """Three shards, of which one is there already: the others are scored. Log-probabilities and
    entropies are those of transformers.
    """
    from lopd.stages.context import StageContext
    from lopd.stages.score import STAGE

    (tmp_path / "run").mkdir()
    requests = requests_of(24)
    expected = of_transformers(run / "teacher", requests)
    responses = [response for response, _ in CacheReader(run / "run/rollout").rows()]
    write_responses(tmp_path / "run/rollout", responses, kind="rollouts", inputs={}, shard_size=8)
    forward = [
        "score.engine=megatron",
        # This engine has no top-K, which the example asks for.
        "score.top_k=0",
        "distill.objective.loss=lightning",
        "score.entropy=true",
        "score.forward.max_tokens_per_microbatch=256",
        "score.allow_foreign_teacher=true",
    ]
    config = load_config(
        EXAMPLE, [*knobs(run, run / "teacher"), *forward, f"run.dir={tmp_path / 'run'}"]
    )
    context = StageContext(config, STAGE)
    middle = responses[8:16]
    sizes = [len(response.token_ids) for response in middle]
    sevens, ones = ([np.full(size, value, np.float32) for size in sizes] for value in (-7, 1))
    hashes = [token_hash(response.prompt_ids, response.token_ids) for response in middle]
    columns = zip(middle, hashes, sevens, ones, strict=True)
    already = [
        TeacherScores(*response.key, hashed, seven, entropy=one)
        for response, hashed, seven, one in columns
    ]
    context.writer(lineage={}).publish_shard(1, to_table(middle, already))
    STAGE.run(context)
    rows = list(CacheReader(tmp_path / "run/score").scored_rows())
    assert [response.key for response, _ in rows] == [request.key for request in requests]
    for index, (response, scores) in enumerate(rows):
        assert scores is not None
        assert scores.entropy is not None
        if 8 <= index < 16:
            assert set(scores.teacher_logprobs.tolist()) == {-7.0}, (
                "a shard that was there was scored again"
            )
        else:
            logprobs, entropies = expected[response.key]
            close(scores.teacher_logprobs, logprobs, abs=1e-5, name="log-probabilities")
            close(scores.entropy, entropies, abs=1e-5, name="entropies")
    assert read_manifest(tmp_path / "run/score").complete
    assert not list((tmp_path / "run/score").glob("*.heartbeats"))


def test_the_table_is_whole_where_a_screen_is_80_columns_wide(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first = np.full(20_099, -1.0, np.float32)
    found = agreement(
        [
            (
                ("reg-27-06+23+44-03-24", 0),
                first,
                first + np.linspace(0, 0.01234, len(first), dtype=np.float32),
            )
        ]
    )
    show_parity({"teacher: SGLang and Megatron-Core": found, "student: rollout and trainer": found})
    shown = capsys.readouterr().out
    assert "…" not in shown
    for figure in ("20,099", f"{found.mean:.2e}", "1.23e-02", f"{found.k3:.2e}"):
        assert shown.count(figure) >= 2
    assert "largest at reg-27-06+23+44-03-24/0, token 20098" in shown


@pytest.mark.slow
def test_the_table(run: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["parity", str(EXAMPLE), *knobs(run, run / "teacher"), "--responses", "8"],
        catch_exceptions=False,
    )
    assert "k3 KL" in result.stdout
    assert "largest at p" in result.stdout


@pytest.mark.slow
def test_sglang_is_asked_where_the_cache_is_of_megatron(run: Path) -> None:
    manifest = run / "run/score/manifest.json"
    written = manifest.read_text()
    assert read_manifest(run / "run/score").complete
    manifest.write_text(written.replace('"sglang"', '"megatron"'))
    try:
        found = compare(load_config(EXAMPLE, knobs(run, run / "teacher")), num_responses=8, seed=0)
    finally:
        manifest.write_text(written)
    within(found["teacher: SGLang and Megatron-Core"].largest, 1e-4)


def test_several_teachers_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="parity compares one teacher"):
        compare(
            load_config(
                EXAMPLE, [*knobs(run, run / "teacher"), f"models.teachers.math={run / 'teacher'}"]
            ),
            num_responses=8,
            seed=0,
        )
