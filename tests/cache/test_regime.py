"""Which regime a cache is in, from its columns alone, and what is recommended for it.

Each regime is a made cache. Caches of both kinds have as many tokens beyond 3 nats and differ in
their depth alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_model, read_manifest
from lopd.cache.recommendation import (
    LEAST_EXCLUDED,
    LEAST_TOKENS,
    SHARP_SHARE,
    goes_against,
    recommend,
    regime_json,
    told,
)
from lopd.cache.regime import RegimeFigures, evenly_spaced, measure_regime
from lopd.cache.statistics import inspect_cache
from lopd.config import DistillSection
from lopd.errors import ArtifactError
from lopd.objective import objective_from_config
from lopd.objective.registry import AVAILABLE, TOP_K
from lopd.records import Response, TeacherScores, float32
from lopd.stages import distill
from tests.cache.rollouts import (
    END,
    SAMPLING,
    TINY_TEACHER,
    VOCABULARY,
    full_scores,
    regime_of,
    some_responses,
)
from tests.stand_ins import Result, StandIns, command, write_project

# One token in 100 is far from its teacher.
ONE_IN = 100
SOFT = -6.0
SHARP = -20.0


def advantages(responses: list[Response], depth: float) -> list[Any]:
    """A of each token: near 0, and of one token in a hundred its depth, in nats."""
    rng = np.random.default_rng(3)
    found = []
    count = 0
    for response in responses:
        values = rng.normal(0, 0.1, len(response.token_ids))
        for index in range(len(values)):
            count += 1
            if count % ONE_IN == 0:
                values[index] = depth
        found.append(values)
    return found


def rows_of(depth: float, count: int = 150) -> list[tuple[Response, TeacherScores]]:
    """Responses whose scores have a top-K and these advantages."""
    responses, scores = full_scores(some_responses(count), k=4)
    # One teacher, so that no row names its own.
    return [
        (one, replace(of, teacher="", teacher_logprobs=_near(one, values)))
        for one, of, values in zip(responses, scores, advantages(responses, depth), strict=True)
    ]


def _near(response: Response, values: Any) -> Any:
    # Not above 0, where a log-probability cannot be.
    return float32(np.minimum(0, response.sampling_logprobs + values))


def publish(folder: Path, rows: list[Any], *, drop: tuple[str, ...] = (), shards: int = 5) -> Path:
    responses, scores = (list(column) for column in zip(*rows, strict=True))
    # Its tokenizer is that of the student of tests.stand_ins.
    models = {"teacher": identify_model(TINY_TEACHER)}
    writer = ArtifactWriter(
        folder, kind="teacher_cache", inputs={}, models=models, sampling=SAMPLING
    )
    size = -(-len(rows) // shards)
    for index in range(shards):
        part = slice(index * size, (index + 1) * size)
        table = cache.to_table(responses[part], scores[part])
        writer.publish_shard(index, table.drop_columns(list(drop)))
    writer.finish(vocab_size=VOCABULARY, end_token_ids=[END])
    return folder


NO_TOP_K = ("teacher_top_ids", "teacher_top_logprobs", "teacher_tail_logprob")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    found = {}
    for name, depth in (("soft", SOFT), ("sharp", SHARP)):
        found[name] = publish(folder / name, rows_of(depth))
        found[f"{name} sampled"] = publish(folder / f"{name}_s", rows_of(depth), drop=NO_TOP_K)
    return found


def measured(folder: Path) -> RegimeFigures:
    found = measure_regime(folder)
    assert found is not None
    return found


def test_the_figures_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    rows = rows_of(SHARP)
    found = measured(publish(tmp_path / "a", rows))
    advantage = []
    covered = []
    entropies = []
    for response, scores in rows:
        assert scores.top is not None
        assert scores.entropy is not None
        for place, token in enumerate(response.token_ids):
            sampled = float(response.sampling_logprobs[place])
            advantage.append(float(scores.teacher_logprobs[place]) - sampled)
            covered.append(token in scores.top.ids[place])
            entropies.append(scores.entropy[place])
    assert found.num_tokens == len(advantage)
    assert (found.num_shards, found.num_shards_in_cache) == (5, 5)
    assert found.mean_advantage == pytest.approx(np.mean(advantage))
    assert found.min_advantage == pytest.approx(min(advantage))
    assert found.far_share == pytest.approx(np.mean([abs(value) > 3 for value in advantage]))
    assert found.clipped_share == pytest.approx(np.mean([abs(value) > 10 for value in advantage]))
    assert found.top_k == 4
    assert found.top_k_coverage == pytest.approx(np.mean(covered))
    assert found.teacher_entropy == pytest.approx(np.mean(entropies), rel=1e-5)
    assert not found.entropy_is_bound


@pytest.mark.parametrize("k", [4, VOCABULARY])
def test_the_entropy_of_the_top_k_is_a_lower_bound(tmp_path: Path, k: int) -> None:
    rows = list(zip(*full_scores(some_responses(40), k=k), strict=True))
    exact = measured(publish(tmp_path / "a", rows)).teacher_entropy
    found = measured(publish(tmp_path / "b", rows, drop=("teacher_entropy",)))
    assert exact is not None
    assert found.teacher_entropy is not None
    assert found.entropy_is_bound
    # The control: the whole vocabulary has no rest, so the bound is the entropy itself.
    if k == VOCABULARY:
        assert found.teacher_entropy == pytest.approx(exact, abs=1e-4)
        assert found.top_k_coverage == 1.0
    else:
        assert 0.5 * exact < found.teacher_entropy < 0.95 * exact


def test_tokens_without_loss_are_not_counted(tmp_path: Path) -> None:
    rows = rows_of(SOFT)
    masked = []
    for response, scores in rows:
        mask = np.arange(len(response.token_ids)) % 2 == 0
        # What a tool wrote has no score. Such values would be a sharp teacher.
        logprobs = np.where(mask, scores.teacher_logprobs, -25.0)
        masked.append(
            (replace(response, loss_mask=mask), replace(scores, teacher_logprobs=float32(logprobs)))
        )
    found = measured(publish(tmp_path / "a", masked))
    assert found.min_advantage > -7
    assert found.num_tokens == sum(int(response.loss_mask.sum()) for response, _ in masked)
    # The control: without the mask they are counted.
    trap = [(replace(response, loss_mask=None), scores) for response, scores in masked]
    assert measured(publish(tmp_path / "b", trap)).clipped_share > 0.4


def test_the_depth_of_the_far_tokens_decides(caches: dict[str, Path]) -> None:
    soft, sharp = measured(caches["soft"]), measured(caches["sharp"])
    # As many are beyond 3 nats.
    assert soft.far_share == pytest.approx(sharp.far_share, abs=1e-3)
    assert soft.far_share > 0.005
    first, second = recommend(soft), recommend(sharp)
    assert first is not None
    assert second is not None
    assert (first.regime, second.regime) == ("soft teacher", "sharp teacher")


@pytest.mark.parametrize(
    ("num_far", "num_excluded", "regime"),
    [
        (50, LEAST_EXCLUDED, "sharp teacher"),
        # Just below the limit.
        (51, LEAST_EXCLUDED, "soft teacher"),
        # As large a share, and it may be chance.
        (30, LEAST_EXCLUDED - 1, "soft teacher"),
        # Many of all tokens, and few of those that are far.
        (5000, 250, "soft teacher"),
        (0, 0, "soft teacher"),
    ],
)
def test_the_limit_is_a_share_of_the_far_tokens(
    num_far: int, num_excluded: int, regime: str
) -> None:
    figures = regime_of(num_far, num_excluded)
    assert SHARP_SHARE == 0.06
    assert LEAST_EXCLUDED == 3
    assert figures.num_excluded == num_excluded
    found = recommend(figures)
    assert found is not None
    assert found.regime == regime
    assert f"{num_excluded / max(1, num_far):.0%} of these beyond 10" in found.seen


@pytest.mark.parametrize(
    ("name", "loss", "cap"),
    [
        ("soft", "top_k_reverse_kl", None),
        ("soft sampled", "lightning", None),
        ("sharp", "top_k_reverse_kl", None),
        ("sharp sampled", "lightning", 1.0),
    ],
)
def test_what_is_recommended_can_be_configured_and_does_not_go_against_itself(
    caches: dict[str, Path], name: str, loss: str, cap: float | None
) -> None:
    figures = measured(caches[name])
    found = recommend(figures)
    assert found is not None
    assert (found.loss.value, found.importance_cap.value) == (loss, cap)
    section = section_of(loss=loss, importance_cap=cap, advantage_clip=found.advantage_clip.value)
    # Knobs that do not go together are refused here.
    objective_from_config(section, AVAILABLE | TOP_K if figures.top_k else AVAILABLE)
    assert not goes_against(found, section)
    has_top_k = loss == "top_k_reverse_kl"
    # Nothing is promised for the sampled token: it has done harm without a sign in the cache.
    assert (
        told(found, section).endswith("did no harm in any of three measured settings") == has_top_k
    )
    for advice in (found.loss, found.advantage_clip, found.importance_cap):
        assert advice.reason
        assert "\n" not in advice.reason


def section_of(
    *, advantage_clip: Any = 10.0, refresh: dict[str, Any] | None = None, **objective: Any
) -> DistillSection:
    return DistillSection.model_validate(
        {"objective": objective, "advantage_clip": advantage_clip, "refresh": refresh or {}}
    )


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"loss": "lightning"}, "against"),
        ({"loss": "lightning", "advantage_clip": 1.0}, "against"),
        ({"loss": "lightning", "importance_cap": 1.0}, "capped"),
        ({"loss": "top_k_reverse_kl"}, "suits"),
        ({"loss": "top_k_forward_kl"}, "not measured"),
        ({"loss": "lightning", "advantage": "delta"}, "not measured"),
        ({"loss": "lightning", "refresh": {"every": 1}}, "not measured"),
    ],
)
def test_only_what_did_harm_goes_against_it(
    caches: dict[str, Path], knobs: dict[str, Any], said: str
) -> None:
    sharp = recommend(measured(caches["sharp"]))
    soft = recommend(measured(caches["soft"]))
    assert sharp is not None
    assert soft is not None
    section = section_of(**knobs)
    assert goes_against(sharp, section) == (said == "against")
    words = {
        "against": "Nothing is changed (",
        "suits": "; the configured loss did no harm in any of three measured settings",
        "capped": "was shown in one such setting, and much in another one",
        "not measured": "; the configured loss was not measured there",
    }
    assert [name for name, text in words.items() if text in told(sharp, section)] == [said]
    # The control: the same loss with a soft teacher.
    assert not goes_against(soft, section)
    assert words["against"] not in told(soft, section)
    is_paper = section.objective.loss == "lightning" and section.objective.advantage == "teacher"
    assert ("in 1 of 7 measured settings with a soft teacher" in told(soft, section)) == is_paper


def test_little_coverage_is_said(caches: dict[str, Path]) -> None:
    figures = measured(caches["sharp"])
    texts = []
    for coverage in (0.5, 0.999):
        found = recommend(replace(figures, top_k_coverage=coverage))
        assert found is not None
        texts.append(found.loss.reason)
    assert "the top 4 hold only 50.0%" in texts[0]
    assert "hold only" not in texts[1]


def test_too_few_tokens_say_nothing(caches: dict[str, Path]) -> None:
    figures = measured(caches["sharp"])
    assert recommend(replace(figures, num_tokens=LEAST_TOKENS)) is not None
    assert recommend(replace(figures, num_tokens=LEAST_TOKENS - 1)) is None
    assert recommend(None) is None


def test_a_cache_without_one_of_the_two_has_no_figures(tmp_path: Path) -> None:
    for name in ("sampling_logprobs", "teacher_logprobs"):
        folder = publish(tmp_path / name, rows_of(SHARP, 20), drop=(name,))
        assert measure_regime(folder) is None
        assert inspect_cache(folder)["regime"] is None


def test_a_large_cache_is_measured_from_a_part(tmp_path: Path) -> None:
    rows = rows_of(SHARP, 300)
    folder = publish(tmp_path / "a", rows, shards=20)
    found = measure_regime(folder, most_shards=4)
    assert found is not None
    assert (found.num_shards, found.num_shards_in_cache) == (4, 20)
    assert found == measure_regime(folder, most_shards=4)
    # The others are not opened.
    names = [shard.name for shard in read_manifest(folder).shards]
    kept = evenly_spaced(names, 4)
    assert (kept[0], kept[-1]) == (names[0], names[-1])
    for name in set(names) - set(kept):
        (folder / name).unlink()
    assert found == measure_regime(folder, most_shards=4)
    # The control: one that is needed.
    (folder / kept[1]).unlink()
    with pytest.raises(ArtifactError, match=kept[1]):
        measure_regime(folder, most_shards=4)


def test_the_number_of_tokens_is_bounded(caches: dict[str, Path]) -> None:
    whole = measured(caches["sharp"])
    part = measure_regime(caches["sharp"], most_tokens=2500)
    assert part is not None
    # Each of five shards ends after the rows that pass its fifth: 16 rows have up to 960 tokens.
    assert 2500 <= part.num_tokens < 2500 + 5 * 960
    assert part.num_tokens < whole.num_tokens
    assert part.num_shards == 5


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a", rows_of(SHARP, 60), shards=1)
    path = folder / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    # In the middle of the pages of all columns, whatever their order: a stretch and not one bit.
    for index in range(len(content) // 8, len(content) // 2):
        content[index] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="the shard is damaged"):
        measure_regime(folder)


def test_inspect_measures_the_whole_cache(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lopd = command(monkeypatch, capsys)
    for name in ("soft", "sharp"):
        figures = json.loads(lopd("cache", "inspect", caches[name], "--json").succeeded().out)
        expected = regime_json(measured(caches[name]))
        assert expected is not None
        # Sums of another order.
        for key, value in expected.items():
            same = value if key == "recommendation" else pytest.approx(value)
            assert figures["regime"][key] == same, key
        shown = lopd("cache", "inspect", caches[name]).succeeded().out
        assert f"{name} teacher: " in shown
        assert "its top 4 hold" in shown
        for knob in ("loss", "advantage_clip", "importance_cap"):
            assert any(line.startswith(f"  {knob}  ") for line in shown.splitlines())
    # Rollouts have no scores, so nothing is said of them.
    rollouts = caches["soft"].parent / "rollouts"
    cache.write_responses(rollouts, some_responses(10), kind="rollouts", inputs={})
    assert "regime" not in lopd("cache", "inspect", rollouts).succeeded().out


def test_distill_says_it_and_trains_the_same(
    caches: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_project(tmp_path)
    StandIns().install(monkeypatch)
    lopd: Callable[..., Result] = command(monkeypatch, capsys)
    for verb in ("demonstrate", "sft"):
        lopd(verb, config).succeeded()
    folder = tmp_path / "run/distill"

    def distilled(name: str, *overrides: str) -> str:
        given = (f"distill.cache={caches[name]}", "distill.allow_foreign_cache=true")
        return lopd("distill", config, *given, *overrides).succeeded().out

    out = distilled("sharp")
    (line,) = [one for one in out.splitlines() if "sharp teacher" in one and "distill: " in one][:1]
    assert "WARNING: sharp teacher: " in line
    assert "In 6 of 8 measured settings with a sharp teacher the sampled token" in line
    assert 'safer is distill.objective.loss = "top_k_reverse_kl". Nothing is changed' in line
    assert "of 5 of 5 shards)" in line
    (warning,) = read_manifest(folder).extra["warnings"]
    assert warning.startswith("sharp teacher: ")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert any(note == f"WARNING: distill: {warning}" for note in summary["notes"])
    # Where it agrees, one line and no warning.
    for name, overrides, words in (
        ("soft", (), "in 1 of 7 measured settings with a soft teacher"),
        ("sharp", ("distill.objective.loss=top_k_reverse_kl",), "did no harm in any of three"),
        ("sharp sampled", ("distill.objective.importance_cap=1",), "and much in another one"),
    ):
        out = distilled(name, *overrides)
        assert words in out
        assert "WARNING" not in out
        assert read_manifest(folder).extra["warnings"] == []
    # The figures are no input of the stage: without them the artifact is the same.
    fingerprint = read_manifest(folder).fingerprint
    monkeypatch.setattr(distill, "measure_regime", lambda folder: None)
    (folder / "manifest.json").unlink()
    assert "sharp teacher" not in distilled("sharp sampled", "distill.objective.importance_cap=1")
    assert read_manifest(folder).fingerprint == fingerprint
