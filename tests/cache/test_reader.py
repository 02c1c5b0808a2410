"""A cache by index: the rows that a stream gives, any order, each shard verified once and at its
first read, memory bounded.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.cache.reader import CacheReader
from lopd.errors import ArtifactError
from lopd.records import Response, float32, int32
from tests.cache.rollouts import publish_cache, some_responses


def same(one: tuple[Response, object], other: tuple[Response, object]) -> bool:
    return one[0].key == other[0].key and all(
        np.array_equal(a, b)
        for a, b in (
            (one[0].prompt_ids, other[0].prompt_ids),
            (one[0].token_ids, other[0].token_ids),
            (one[0].sampling_logprobs, other[0].sampling_logprobs),
            (one[1], other[1]),
        )
    )


@pytest.fixture
def long_cache(tmp_path: Path) -> Path:
    """Three shards of several row groups each."""
    rng = np.random.default_rng(0)
    responses = [
        Response(
            f"p{index}",
            0,
            int32([1, 2]),
            int32(rng.integers(0, 9, 3000 + index)),
            float32(-rng.random(3000 + index)),
            "length",
            "0",
        )
        for index in range(100)
    ]
    publish_cache(
        tmp_path / "a",
        responses,
        [response.sampling_logprobs / 2 for response in responses],
        shard_size=40,
    )
    return tmp_path / "a"


def test_every_index_gives_the_row_of_the_stream(long_cache: Path) -> None:
    expected = list(cache.read_rows(long_cache))
    reader = CacheReader(long_cache, kept_tokens=20_000)
    assert len(reader) == 100
    assert [len(shard.group_starts) for shard in map(reader._shard, range(3))] == [8, 8, 4]
    for index in np.random.default_rng(0).permutation(100):
        assert same(reader[int(index)], expected[index])
    assert same(reader[-1], expected[-1])
    order = np.random.default_rng(1).integers(0, 100, 57)
    assert all(
        same(row, expected[index]) for row, index in zip(reader.fetch(order), order, strict=True)
    )
    assert reader.fetch([]) == []
    assert all(same(one, other) for one, other in zip(reader.rows(), expected, strict=True))
    assert reader.num_tokens == sum(len(response.token_ids) for response, _ in expected)
    for beyond in (100, -101):
        with pytest.raises(IndexError, match="100 responses"):
            reader.fetch([0, beyond])


def test_lengths_are_of_prompt_and_response(long_cache: Path) -> None:
    np.testing.assert_array_equal(
        CacheReader(long_cache).lengths, [3002 + index for index in range(100)]
    )


def test_16_bits_and_rollouts_without_scores(tmp_path: Path) -> None:
    responses = some_responses(40)
    publish_cache(tmp_path / "a", responses, logprob_bits=16)
    _, scores = CacheReader(tmp_path / "a")[17]
    assert scores is not None
    assert scores.dtype == np.float32
    cache.write_responses(tmp_path / "b", responses, kind="rollouts", inputs={})
    assert CacheReader(tmp_path / "b")[17][1] is None


def test_a_damaged_shard_is_noticed_at_its_first_read_and_no_other(long_cache: Path) -> None:
    shard = long_cache / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    reader = CacheReader(long_cache)
    assert reader[0][0].prompt_id == "p0"
    assert reader[99][0].prompt_id == "p99"
    with pytest.raises(ArtifactError, match=r"shard-00001\.parquet.*checksum"):
        reader.fetch([0, 50])
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001\.parquet.*missing"):
        reader.fetch([50])


def test_each_shard_is_hashed_once(long_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lopd.cache import reader as module

    hashed: list[str] = []
    original = module.sha256_file
    monkeypatch.setattr(
        module, "sha256_file", lambda path: (hashed.append(path.name), original(path))[1]
    )
    reader = CacheReader(long_cache)
    for index in (0, 99, 0, 39, 99):
        _ = reader[index]
    assert hashed == ["shard-00000.parquet", "shard-00002.parquet"]


def test_few_shards_are_open_at_a_time_and_still_hashed_once(
    long_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lopd.cache import reader as module

    hashed: list[str] = []
    original = module.sha256_file
    monkeypatch.setattr(
        module, "sha256_file", lambda path: (hashed.append(path.name), original(path))[1]
    )
    monkeypatch.setattr(module, "_OPEN_SHARDS", 1)
    expected = list(cache.read_rows(long_cache))
    reader = CacheReader(long_cache, kept_tokens=1)
    for index in (0, 99, 50, 1, 98, 51):
        assert same(reader[index], expected[index])
        assert len(reader._open) == 1
    assert len(hashed) == 3


def test_what_is_kept_is_bounded(long_cache: Path) -> None:
    reader = CacheReader(long_cache, kept_tokens=20_000)
    kept = []
    for index in range(0, 100, 7):
        _ = reader[index]
        kept.append(sum(tokens for _, tokens in reader._groups.values()))
    assert max(kept) <= 20_000
    roomy = CacheReader(long_cache, kept_tokens=10**9)
    for index in range(0, 100, 7):
        _ = roomy[index]
    assert len(roomy._groups) == 15, "the control: without the bound all of it stays"


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={})
    with pytest.raises(ArtifactError, match="not complete"):
        CacheReader(tmp_path / "a")


def test_the_order_of_training_reads_every_response_once(long_cache: Path) -> None:
    from lopd.batching import ResponseOrder

    reader = CacheReader(long_cache)
    order = ResponseOrder(100, 20, seed=3)
    keys = [
        response.key
        for response, _ in itertools.chain.from_iterable(
            reader.fetch(order.batch_indices(step)) for step in range(5)
        )
    ]
    assert len(set(keys)) == 100
