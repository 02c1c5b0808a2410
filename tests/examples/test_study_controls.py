"""Claims 6 and 8 of the study: their commands, their altered caches, and their judgements."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from examples.study import altered_caches, altered_responses, claim_6, claim_8, outcomes
from examples.study.altered_caches import NEVER, Alteration, alter
from examples.study.arms import HABIT_LIGHTNING, HABIT_SFT, HABIT_TOP_K, Arm, Place
from examples.study.figures import Figures, MissingFigures
from lopd.artifacts import ArtifactWriter, read_manifest
from lopd.artifacts.lineage import check_given_cache
from lopd.cache import to_table
from lopd.cache.checks import check_cache
from lopd.cache.reader import CacheReader
from lopd.config import load_config
from lopd.errors import ConsistencyError, LopdError
from lopd.records import ModelIdentity, Response, TeacherScores, token_hash
from lopd.stages.context import StageContext
from lopd.stages.rollout import STAGE as ROLLOUT
from lopd.tasks.tokenizer import load_tokenizer
from tests.cache.rollouts import END, TEACHER, VOCABULARY, full_scores, some_responses

STUDENT = ModelIdentity("student", "4" * 64, "2" * 64, "3" * 64)
Rows = list[tuple[Response, TeacherScores]]
ARMS = (*claim_6.ARMS, *claim_8.ARMS)


def publish(folder: Path, *, k: int = 8, num: int = 12) -> Path:
    """A teacher's cache with all columns, in shards of five rows."""
    responses, scores = full_scores(some_responses(num), k=k)
    lineage = {"sft_teacher": TEACHER.weights, "score_teacher": TEACHER.weights, "consistent": True}
    models = {"teacher": TEACHER, "student": STUDENT}
    writer = ArtifactWriter(
        folder, kind="teacher_cache", inputs={"k": k}, models=models, lineage=lineage
    )
    for index, start in enumerate(range(0, num, 5)):
        rows = slice(start, start + 5)
        writer.publish_shard(index, to_table(responses[rows], scores[rows]))
    writer.finish(vocab_size=VOCABULARY, end_token_ids=[END], logprob_bits=32)
    return folder


def read(folder: Path) -> Rows:
    rows = [*CacheReader(folder).scored_rows()]
    return [(response, scores) for response, scores in rows if scores is not None]


def altered(tmp_path: Path, alteration: Alteration, *, k: int = 8) -> tuple[Rows, Rows]:
    """Return the rows before and after, and check what holds of every altered cache."""
    source = publish(tmp_path / "source", k=k)
    before = read_manifest(source)
    manifest = alter(source, tmp_path / "out", alteration)
    findings, _ = check_cache(tmp_path / "out")
    assert [*findings] == []
    assert read_manifest(source) == before
    assert manifest.parents == {"teacher_cache": before.fingerprint}
    assert manifest.models["student"] == STUDENT
    assert manifest.lineage["altered"] == alteration.what
    # Without the override no training takes it for what it was made from.
    with pytest.raises(ConsistencyError):
        check_given_cache(manifest, tmp_path / "out", STUDENT, allow_foreign=False)
    lineage = check_given_cache(manifest, tmp_path / "out", STUDENT, allow_foreign=True)
    assert lineage["allow_foreign_cache"]
    again = alter(source, tmp_path / "out", alteration)
    assert again.fingerprint == manifest.fingerprint
    return read(source), read(tmp_path / "out")


def same(one: object, other: object, *, but: Sequence[str]) -> None:
    """Check that two records agree in every field but the named ones, which differ."""
    for field in dataclasses.fields(one):  # type: ignore[arg-type]
        left, right = (_plain(getattr(record, field.name)) for record in (one, other))
        assert (left == right) == (field.name not in but), field.name


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_only_the_end_token_is_lost(tmp_path: Path) -> None:
    before, after = altered(tmp_path, altered_caches.without_end())
    assert len(before) == len(after)
    finished = 0
    for (response, scores), (cut, cut_scores) in zip(before, after, strict=True):
        if response.finish_reason == "length":
            same(response, cut, but=())
            same(scores, cut_scores, but=())
            continue
        finished += 1
        assert response.token_ids[-1] == END
        assert cut.token_ids.tolist() == response.token_ids[:-1].tolist()
        # What is put back is what was there.
        num = len(cut.token_ids)
        assert cut_scores.token_hash == token_hash(cut.prompt_ids, cut.token_ids)
        shorter, shorter_scores = altered_caches.cut(response, scores, num)
        same(shorter, cut, but=())
        same(shorter_scores, cut_scores, but=())
        for name in ("sampling_logprobs", "routed_experts"):
            whole, part = getattr(response, name), getattr(cut, name)
            assert np.array_equal(whole[: len(part)], part)
            assert len(whole) == len(part) + 1
        assert scores.top is not None
        assert cut_scores.top is not None
        assert np.array_equal(scores.top.ids[:num], cut_scores.top.ids)
        assert np.array_equal(scores.teacher_logprobs[:num], cut_scores.teacher_logprobs)
    assert 0 < finished < len(before)
    assert read_manifest(tmp_path / "out").models["teacher"] == TEACHER


def test_a_mismatched_teacher_is_its_power_divided_by_the_sum(tmp_path: Path) -> None:
    """With a top-31 of 32 tokens the whole distribution is known, and nothing is approximated."""
    before, after = altered(tmp_path, altered_caches.mismatched(0.8, VOCABULARY), k=31)
    for (response, scores), (kept, changed) in zip(before, after, strict=True):
        same(response, kept, but=())
        same(scores, changed, but=("teacher_logprobs", "top", "entropy"))
        assert scores.top is not None
        whole = np.concatenate([scores.top.logprobs, scores.top.tail_logprob[:, None]], axis=1)
        powers = np.exp(0.8 * whole.astype(np.float64))
        expected = 0.8 * scores.teacher_logprobs - np.log(powers.sum(1))
        assert np.allclose(changed.teacher_logprobs, expected, atol=1e-4)
        assert changed.top is not None
        assert np.allclose(np.exp(changed.top.logprobs), powers[:, :31] / powers.sum(1)[:, None])
    assert read_manifest(tmp_path / "out").extra["altered"]["largest_error"] == 0
    assert "teacher" not in read_manifest(tmp_path / "out").models


def test_at_temperature_one_nothing_is_mismatched() -> None:
    responses, scores = full_scores(some_responses(3), k=8)
    alteration = altered_caches.mismatched(1.0, VOCABULARY)
    for response, one in zip(responses, scores, strict=True):
        row = alteration.of_row(response, one)
        assert row is not None
        assert np.allclose(row[1].teacher_logprobs, one.teacher_logprobs, atol=1e-5)
    # And what is approximated elsewhere is told: 24 tokens share a tail.
    assert altered_caches.mismatched(0.8, VOCABULARY).error_of is not None
    error_of = altered_caches.mismatched(0.8, VOCABULARY).error_of
    assert error_of is not None
    assert 0.01 < max(map(error_of, scores)) < 1


def names_given(before: Rows, after: Rows) -> list[set[tuple[int, int]]]:
    """At each token, the pairs of old and new id of the top-K. Also checks what must stay."""
    pairs = []
    for (response, scores), (kept, renamed) in zip(before, after, strict=True):
        same(response, kept, but=())
        same(scores, renamed, but=("teacher_logprobs", "top"))
        old, new = scores.top, renamed.top
        assert old is not None
        assert new is not None
        # The same probabilities, and so the same entropy.
        assert np.array_equal(old.logprobs, new.logprobs)
        assert np.array_equal(old.tail_logprob, new.tail_logprob)
        for place, token in enumerate(response.token_ids.tolist()):
            ids = new.ids[place].tolist()
            value = renamed.teacher_logprobs[place]
            if token in ids:
                assert value == new.logprobs[place][ids.index(token)]
            elif value != scores.teacher_logprobs[place]:
                assert np.isclose(value, new.tail_logprob[place] - np.log(VOCABULARY - len(ids)))
            pairs.append({*zip(old.ids[place].tolist(), ids, strict=True)})
    return pairs


def is_a_function(pairs: Sequence[set[tuple[int, int]]]) -> bool:
    every = set.union(*pairs)
    return len({old for old, _ in every}) == len(every) == len({new for _, new in every})


def test_a_silent_teacher_has_new_names_at_each_token(tmp_path: Path) -> None:
    before, after = altered(tmp_path, altered_caches.silent(2, VOCABULARY))
    pairs = names_given(before, after)
    assert not is_a_function(pairs)
    # Old and new names are independent: one of 32 tokens keeps its name.
    kept = [old == new for of_token in pairs for old, new in of_token]
    assert abs(np.mean(kept) - 1 / 32) < 4 * np.sqrt(1 / 32 / len(kept))
    # The sampled token gets the mean of the distribution and no more.
    figures = read_manifest(tmp_path / "out").extra["altered"]
    assert figures["mean_advantage"] < -1


def test_a_shuffled_teacher_has_the_same_new_names_everywhere(tmp_path: Path) -> None:
    before, after = altered(tmp_path, altered_caches.shuffled(2, VOCABULARY))
    pairs = names_given(before, after)
    assert is_a_function(pairs)
    assert any(old != new for of_token in pairs for old, new in of_token)
    (tmp_path / "other").mkdir()
    _, other = altered(tmp_path / "other", altered_caches.shuffled(3, VOCABULARY))
    assert names_given(before, other) != pairs


def test_only_unlikely_tokens_are_pushed_down_by_a_fixed_advantage(tmp_path: Path) -> None:
    before, after = altered(tmp_path, altered_caches.pushed_down(0.7))
    pushed = 0
    for (response, scores), (masked, bare) in zip(before, after, strict=True):
        same(response, masked, but=("loss_mask",))
        assert masked.loss_mask is not None
        assert np.array_equal(masked.loss_mask, np.exp(response.sampling_logprobs) < 0.7)
        assert bare.top is None
        assert scores.token_hash == bare.token_hash
        advantage = bare.teacher_logprobs - response.sampling_logprobs
        # By the clip it is the same however far the student moves.
        for moved in (-50.0, 0.0):
            clipped = np.clip(advantage - moved, -1, 1)[masked.loss_mask]
            assert np.array_equal(clipped, np.full(len(clipped), -1.0))
        pushed += int(masked.loss_mask.sum())
        assert set(bare.teacher_logprobs[masked.loss_mask].tolist()) <= {NEVER}
    figures = read_manifest(tmp_path / "out").extra["altered"]
    assert figures["loss_tokens"] == pushed
    assert 0 < pushed < figures["tokens"]


def test_a_cache_without_a_top_k_is_refused(tmp_path: Path) -> None:
    responses, scores = full_scores(some_responses(4))
    bare = [dataclasses.replace(one, top=None) for one in scores]
    writer = ArtifactWriter(tmp_path / "bare", kind="teacher_cache", inputs={})
    writer.publish_shard(0, to_table(responses, bare))
    writer.finish(vocab_size=VOCABULARY)
    with pytest.raises(LopdError, match="cannot be altered"):
        altered_caches.main(["silent", str(tmp_path / "bare"), str(tmp_path / "out")])


def rollouts(tmp_path: Path, overrides: Sequence[str]) -> tuple[Path, int]:
    """Rollouts of the example, of which every third is wrong; and how many are right."""
    config = load_config(HABIT_SFT.setting.config, [*overrides, f"run.dir={tmp_path / 'run'}"])
    tokenizer = load_tokenizer(config.models.student)
    prompts, ids = StageContext(config, ROLLOUT).prompts("opd")
    responses = []
    for number, (prompt, prompt_ids) in enumerate(zip(prompts, ids, strict=True)):
        value = (int(prompt.answer or "") + (number % 3 == 0)) % 100
        text = f"<think>\n</think>\n{value:02d}<|im_end|>"
        tokens = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        logprobs = np.full(len(tokens), -0.5, np.float32)
        responses.append(Response(prompt.prompt_id, 0, prompt_ids, tokens, logprobs, "stop", "v1"))
    writer = ArtifactWriter(tmp_path / "rollout", kind="rollouts", inputs={})
    for index, start in enumerate(range(0, len(responses), 4)):
        writer.publish_shard(index, to_table(responses[start : start + 4]))
    writer.finish()
    return tmp_path / "rollout", sum(number % 3 != 0 for number in range(len(responses)))


def test_right_responses_become_demonstrations(tmp_path: Path) -> None:
    overrides = [*HABIT_SFT.setting.overrides(2), "prompts.opd.num_prompts=10"]
    source, num_right = rollouts(tmp_path, overrides)
    out = tmp_path / "arm" / "altered"
    config = str(HABIT_SFT.setting.config)
    for _ in range(2):
        altered_responses.main(["accepted", str(source), str(out), config, *overrides])
    manifest = read_manifest(out)
    assert manifest.kind == "demonstrations"
    assert manifest.extra["altered"] == {"rows": 10, "right": num_right}
    # Nobody takes them for a teacher's.
    assert manifest.lineage["sft_teacher"] == ""
    rows = [response for response, _ in CacheReader(source).rows()]
    kept = [response for response, _ in CacheReader(out).rows()]
    wanted = [response for number, response in enumerate(rows) if number % 3]
    for one, other in zip(wanted, kept, strict=True):
        same(one, other, but=())


def test_tokenising_the_text_again_changes_what_is_no_longer_one_token(tmp_path: Path) -> None:
    overrides = [*HABIT_SFT.setting.overrides(2), "prompts.opd.num_prompts=10"]
    source, _ = rollouts(tmp_path, overrides)
    student = load_config(HABIT_SFT.setting.config, overrides).models.student
    counts = altered_responses.retokenised(source, student)
    assert counts == {"responses": 10, "changed": 0, "with_end": 10, "added_think": 0}


def test_ids_that_text_does_not_give_back_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that reads two digits as one token, as large ones may."""
    overrides = [*HABIT_SFT.setting.overrides(2), "prompts.opd.num_prompts=10"]
    source, _ = rollouts(tmp_path, overrides)
    real = load_tokenizer(load_config(HABIT_SFT.setting.config, overrides).models.student)

    class Merging:
        decode = real.decode

        def encode(self, text: str, **options: Any) -> list[int]:
            return [*real.encode(text, **options)][:-1]

    monkeypatch.setattr(altered_responses, "load_tokenizer", lambda folder: Merging())
    assert altered_responses.retokenised(source, tmp_path)["changed"] == 10


def test_every_arm_has_commands_that_are_accepted(tmp_path: Path) -> None:
    assert len({arm.name for arm in ARMS}) == len(ARMS) <= 11
    modules: Mapping[str, ModuleType] = {
        name: importlib.import_module(f"examples.study.{name}")
        for name in ("altered_caches", "altered_responses")
    }
    for arm in ARMS:
        place = Place(3, tmp_path / arm.name, tmp_path)
        for kind, verb, *arguments in arm.commands(place):
            if kind == "python":
                modules[verb].parser().parse_args(arguments)
                # A verb refuses a folder with files that no run made, and copies make it one.
                assert arm.copied
                continue
            config = load_config(
                arm.setting.config,
                [f"run.dir={place.run}", *arm.setting.overrides(3), *arguments],
            )
            assert config.run.seed in (3, 103)
            if verb == "distill":
                assert config.distill.optimizer.lr == 1e-4
                assert (config.distill.num_steps, config.distill.batch_size) == (16, 64)
                is_top_k = arm is claim_8.SILENT_TOP_K
                assert (config.distill.objective.loss != "lightning") == is_top_k
            if verb == "sft":
                assert config.sft.num_steps * config.sft.batch_size == 16 * 64


def figures(
    clipped: float = 0.001, **arms: tuple[tuple[float, float], tuple[float, float], float]
) -> Figures:
    """Made-up figures of five seeds: (mean and spread of greedy, of T=1; the reverse KL)."""
    noise = (-1.0, -0.5, 0.0, 0.5, 1.0)
    seeds = (2, 3, 4, 5, 6)
    values: dict[str, dict[str, dict[int, float]]] = {}
    for name, (greedy, sampled, divergence) in arms.items():
        metrics = {"greedy": greedy, "sampled": sampled, "reverse_kl": (divergence, 1e-5)}
        values[name] = {
            metric: {seed: mean + spread * one for seed, one in zip(seeds, noise, strict=True)}
            for metric, (mean, spread) in metrics.items()
        }
    steps = {
        HABIT_LIGHTNING.name: {"clipped_share": {seed: [(1, 0.0), (2, clipped)] for seed in seeds}}
    }
    return Figures(values, steps)


SHARP = ((0.95, 0.001), (0.93, 0.001), 0.005)
EQUAL = ((0.9505, 0.004), (0.931, 0.004), 0.005)
WORSE = ((0.90, 0.004), (0.85, 0.004), 0.02)
NOISY = ((0.95, 0.06), (0.92, 0.06), 0.005)
METHODS = {HABIT_SFT.name: WORSE, HABIT_LIGHTNING.name: SHARP, HABIT_TOP_K.name: SHARP}


def of_all(arms: Sequence[Arm], like: Any) -> dict[str, Any]:
    return {**METHODS, **{arm.name: like for arm in arms}}


@pytest.mark.parametrize(
    ("like", "one", "answer"),
    [
        (WORSE, WORSE, "holds"),
        (WORSE, EQUAL, "does not hold"),
        (WORSE, NOISY, "open"),
        (NOISY, NOISY, "open"),
    ],
)
def test_claim_6_has_each_answer(like: Any, one: Any, answer: str) -> None:
    made = of_all(claim_6.ARMS, like) | {claim_6.NO_END.name: one}
    verdict = claim_6.judge(figures(**made))
    assert verdict.answer == answer
    sentence = next(one for one in verdict.summary.split(". ") if "the end token is lost" in one)
    words = {WORSE: "Shown to cost something", EQUAL: "No difference larger", NOISY: "Open"}
    assert sentence.startswith(words[one])


def test_claim_6_is_not_whole_without_an_arm_but_that_of_a_clip_that_never_acts() -> None:
    made = of_all(claim_6.ARMS, WORSE)
    del made[claim_6.UNCLIPPED.name]
    assert claim_6.judge(figures(**made)).answer == "open"
    assert "Not measured: no clip." in claim_6.judge(figures(**made)).summary
    verdict = claim_6.judge(figures(clipped=0.0, **made))
    assert verdict.answer == "holds"
    assert any("is the same run" in text for text in verdict.details)
    with pytest.raises(MissingFigures):
        claim_6.judge(figures(**METHODS))


@pytest.mark.parametrize(
    ("like", "one", "answer", "first"),
    [
        (WORSE, WORSE, "holds", "No control is shown to match"),
        (
            WORSE,
            EQUAL,
            "does not hold",
            "A control matches the method within 2 points, or is above it: SFT gone on",
        ),
        (WORSE, NOISY, "open", "No control is shown to match"),
    ],
)
def test_claim_8_has_each_answer_and_says_a_match_first(
    like: Any, one: Any, answer: str, first: str
) -> None:
    made = of_all(claim_8.ARMS, like) | {claim_8.MORE_SFT.name: one}
    verdict = claim_8.judge(figures(**made))
    assert verdict.answer == answer
    assert verdict.summary.startswith(first)
    rows = [text for text in verdict.details if "| outcome |" in text]
    assert len(rows) == 2, "against the paper's loss and against the top-8 loss"


def test_claim_8_does_not_hold_to_the_end_while_a_control_is_missing() -> None:
    made = of_all(claim_8.ARMS, WORSE)
    del made[claim_8.SILENT.name]
    verdict = claim_8.judge(figures(**made))
    assert verdict.answer == "open"
    assert f"Not measured: {claim_8.SILENT.title}." in verdict.summary
    with pytest.raises(MissingFigures):
        claim_8.judge(figures(**METHODS))


def test_a_difference_within_the_margin_is_told_from_none() -> None:
    """A point below in every seed: shown to be lower, and still a match within 2 points."""
    made = figures(**METHODS, little=((0.94, 0.001), (0.92, 0.001), 0.005))
    assert outcomes.matches(made, "little", HABIT_LIGHTNING.name) == "matches"
    assert outcomes.changes(made, "little", HABIT_LIGHTNING.name) == "harm"
    wide = figures(**METHODS, wide=((0.90, 0.001), (0.95, 0.001), 0.005))
    assert outcomes.matches(wide, "wide", HABIT_LIGHTNING.name) == "below"
    assert outcomes.changes(wide, "wide", HABIT_LIGHTNING.name) == "mixed"
