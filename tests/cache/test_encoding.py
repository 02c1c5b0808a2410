"""Log-probabilities in the cache: 32 bits lose nothing, 16 bits lose what the manifest says, and
row groups are small enough to read one response.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd import cache
from lopd.artifacts import read_manifest
from lopd.errors import ArtifactError
from lopd.records import Response, float32, int32
from tests.cache.rollouts import publish_cache, scores_of, some_responses


def columns(folder: Path) -> dict[str, np.ndarray]:
    rows = list(cache.read_rows(folder))
    return {
        "token_ids": np.concatenate([response.token_ids for response, _ in rows]),
        "sampling_logprobs": np.concatenate([response.sampling_logprobs for response, _ in rows]),
        "teacher_logprobs": np.concatenate([scores for _, scores in rows if scores is not None]),
    }


def test_32_bits_are_lossless_and_say_so(tmp_path: Path) -> None:
    responses = some_responses(40)
    manifest = publish_cache(tmp_path / "a", responses)
    found = columns(tmp_path / "a")
    np.testing.assert_array_equal(
        found["sampling_logprobs"],
        np.concatenate([response.sampling_logprobs for response in responses]),
    )
    assert manifest.extra["logprob_loss"] is None


def test_16_bits_lose_exactly_what_the_manifest_says(tmp_path: Path) -> None:
    responses = some_responses(40)
    exact, short = (tmp_path / name for name in ("exact", "short"))
    publish_cache(exact, responses)
    loss = publish_cache(short, responses, logprob_bits=16).extra["logprob_loss"]
    before = columns(exact)
    after = columns(short)
    np.testing.assert_array_equal(before["token_ids"], after["token_ids"])
    changes = np.concatenate(
        [
            np.abs(before[name].astype(np.float64) - after[name])
            for name in ("sampling_logprobs", "teacher_logprobs")
        ]
    )
    assert after["teacher_logprobs"].dtype == np.float32
    assert changes.max() > 0, "the control: something was lost"
    assert loss["max_abs"] == pytest.approx(changes.max())
    assert loss["mean_abs"] == pytest.approx(changes.mean())
    largest = max(np.abs(before[name]).max() for name in ("sampling_logprobs", "teacher_logprobs"))
    assert changes.max() <= largest / 2048, "one part in 2,048"
    assert pq.read_schema(short / "shard-00000.parquet").field("teacher_logprobs").type == pa.list_(
        pa.float16()
    )


def test_16_bits_halve_the_log_probabilities(tmp_path: Path) -> None:
    responses = some_responses(400)
    publish_cache(tmp_path / "exact", responses, shard_size=400)
    publish_cache(tmp_path / "short", responses, shard_size=400, logprob_bits=16)
    exact, short = (cache.column_bytes(tmp_path / name) for name in ("exact", "short"))
    assert short["teacher_logprobs"] < 0.6 * exact["teacher_logprobs"]
    assert short["token_ids"] == exact["token_ids"]
    for name, sizes in (("exact", exact), ("short", short)):
        assert sum(sizes.values()) == sum(
            path.stat().st_size for path in (tmp_path / name).glob("*.parquet")
        )


def test_16_bits_refuse_what_they_cannot_hold() -> None:
    response = Response("p", 0, int32([1]), int32([2]), float32([-7e4]), "stop", "0")
    with pytest.raises(ArtifactError, match=r"-70000.*float16.*logprob_bits = 32"):
        cache.to_table([response], scores_of([response], [[-1.0]]), logprob_bits=16)


def test_no_rows_in_16_bits() -> None:
    assert cache.to_table([], [], logprob_bits=16).num_rows == 0


def test_a_row_group_holds_about_16384_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    long = [
        Response(
            f"p{index}",
            0,
            int32([1]),
            int32(rng.integers(0, 9, 5000)),
            float32(np.zeros(5000)),
            "length",
            "0",
        )
        for index in range(40)
    ]
    publish_cache(tmp_path / "a", long, [np.zeros(5000)] * 40, shard_size=40)
    metadata = pq.read_metadata(tmp_path / "a" / "shard-00000.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [
        3
    ] * 13 + [1]
    assert read_manifest(tmp_path / "a").rows == 40
