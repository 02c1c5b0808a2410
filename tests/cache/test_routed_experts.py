"""The sampler's experts from a cache to the trainer, and what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.cache.checks import check_cache
from lopd.errors import ArtifactError, DataError, LopdError
from lopd.records import Response, Sample
from lopd.stages import training_data
from lopd.stages.training_data import CachedSamples, load_samples
from tests.cache.rollouts import (
    END,
    VOCABULARY,
    full_scores,
    publish_cache,
    some_experts,
    some_responses,
)
from tests.cache.test_training_data import job

REPLAY = ("rollout.routed_experts=true", "distill.routing_replay=true")


def publish(folder: Path, responses: list[Response]) -> Path:
    """A cache whose rows have these responses' experts."""
    _, scores = full_scores(some_responses(len(responses)))
    plain = [replace(score, top=None, entropy=None, teacher="") for score in scores]
    writer = ArtifactWriter(folder, kind="teacher_cache", inputs={})
    writer.publish_shard(0, cache.to_table(responses, plain))
    writer.finish(vocab_size=VOCABULARY, end_token_ids=[END])
    return folder


def distinct(responses: list[Response], num_experts: int = 8) -> list[Response]:
    """3 layers, 2 different experts of 8, as the example's student has them."""
    rng = np.random.default_rng(5)
    return [
        replace(response, routed_experts=some_experts(response, rng, num_experts))
        for response in responses
    ]


def findings(folder: Path) -> list[str]:
    return [str(finding) for finding in check_cache(folder)[0]]


@pytest.mark.parametrize("memory", [1, 10**6])
def test_the_experts_come_to_the_trainer_where_they_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(training_data, "MEMORY_TOKENS", memory)
    responses = distinct(some_responses(20))
    data = publish(tmp_path / "a", responses)
    assert findings(data) == []
    plain = load_samples(job(tmp_path, data))
    assert all(sample.routed_experts is None for sample in plain)
    samples = load_samples(job(tmp_path, data, *REPLAY))
    assert isinstance(samples, CachedSamples) == (memory == 1)
    for sample, response in zip([*samples], responses, strict=True):
        assert isinstance(sample, Sample)
        assert sample.routed_experts is not None
        assert len(sample.routed_experts) == len(sample.token_ids)
        np.testing.assert_array_equal(sample.routed_experts[:-1], response.routed_experts)


def test_fewer_samples_are_held_with_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = publish(tmp_path / "a", distinct(some_responses(20)))
    tokens = sum(len(response.token_ids) for response in some_responses(20))
    # 25 bytes of a token, and 2 x 3 x 2 of its experts.
    monkeypatch.setattr(training_data, "MEMORY_TOKENS", tokens + 10)
    assert isinstance(load_samples(job(tmp_path, data)), list)
    assert isinstance(load_samples(job(tmp_path, data, *REPLAY)), CachedSamples)
    monkeypatch.setattr(training_data, "MEMORY_TOKENS", 2 * tokens)
    assert isinstance(load_samples(job(tmp_path, data, *REPLAY)), list)


def refused(tmp_path: Path, data: Path, error: type[LopdError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load_samples(job(tmp_path, data, *REPLAY))
    assert "\n" not in str(caught.value)


def test_a_cache_without_experts(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(10))
    refused(tmp_path, tmp_path / "a", DataError, "the responses have no column routed_experts")


def test_experts_of_another_model(tmp_path: Path) -> None:
    wide = [
        replace(response, routed_experts=np.repeat(response.routed_experts, 2, axis=1))
        for response in distinct(some_responses(10))
        if response.routed_experts is not None
    ]
    refused(
        tmp_path,
        publish(tmp_path / "a", wide),
        DataError,
        "the routed experts are of 6 layers with 2 experts per token",
    )


def test_an_expert_that_the_student_does_not_have(tmp_path: Path) -> None:
    data = publish(tmp_path / "a", distinct(some_responses(10), num_experts=11))
    refused(tmp_path, data, DataError, r"was routed to the expert (8|9|10); .*at most 7")


def with_column(data: Path, change: str) -> Path:
    """Damages the column behind the manifest's back, as another program might write it."""
    path = data / "shard-00000.parquet"
    table = pq.read_table(path)
    column = table.column("routed_experts").to_pylist()
    metadata = dict(table.schema.metadata)
    if change == "short":
        column[3] = column[3][:-1]
    elif change == "twice":
        column[3][1] = column[3][0]
    elif change == "negative":
        column[3][0] = -1
    elif change == "no shape":
        del metadata[b"lopd.routed_experts"]
    index = table.column_names.index("routed_experts")
    kind = table.schema.field("routed_experts").type
    table = table.set_column(index, "routed_experts", pa.array(column, kind))
    writer = ArtifactWriter(data.with_name(change), kind="teacher_cache", inputs={})
    writer.publish_shard(0, table.replace_schema_metadata(metadata))
    writer.finish(vocab_size=VOCABULARY, end_token_ids=[END])
    return data.with_name(change)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ("short", "routed_experts are not 3 x 2 for each position but the last"),
        ("twice", "one expert twice in a choice of routed_experts"),
        ("negative", "routed_experts below 0"),
        ("no shape", "routed_experts without the metadata lopd.routed_experts"),
    ],
)
def test_verify_names_what_no_router_can_have_chosen(
    tmp_path: Path, change: str, finding: str
) -> None:
    data = with_column(publish(tmp_path / "a", distinct(some_responses(10))), change)
    found = findings(data)
    assert any(finding in one for one in found), found
    # That none is found in the unchanged cache is tested above.
    if change != "no shape":
        assert all("p3" in one for one in found), found


def test_a_damaged_column_is_one_line_for_a_training(tmp_path: Path) -> None:
    data = publish(tmp_path / "a", distinct(some_responses(10)))
    short = with_column(data, "short")
    refused(tmp_path, short, ArtifactError, r"response \('p3', 0\) has \d+ routed experts, which")
    refused(tmp_path, with_column(data, "negative"), DataError, "was routed to the expert -1")
    shapeless = with_column(data, "no shape")
    refused(tmp_path, shapeless, DataError, "the routed experts are of 0 layers")
