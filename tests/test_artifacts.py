"""Artifacts and their rows: published whole or not at all, resumed at the first missing shard,
damage noticed.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_model, read_manifest, sha256_file, verify
from lopd.errors import ArtifactError
from lopd.records import Manifest, Response, TeacherScores, float32, int32, token_hash
from lopd.stages.domains import Part, PartWriter


def some_responses(count: int, seed: int = 0) -> list[Response]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, count)
    return [
        Response(
            prompt_id=f"p{index}",
            sample_index=index % 3,
            prompt_ids=int32(rng.integers(0, 32, 27)),
            token_ids=int32(rng.integers(0, 32, length)),
            sampling_logprobs=float32(-rng.exponential(0.3, length)),
            finish_reason="stop" if index % 5 else "length",
            weight_version="v1",
        )
        for index, length in enumerate(lengths)
    ]


def published(folder: Path, responses: list[Response], shard_size: int = 16) -> Path:
    cache.write_responses(
        folder, responses, kind="rollouts", inputs={"seed": 1}, shard_size=shard_size
    )
    return folder


def test_rows_come_back_bit_for_bit(tmp_path: Path) -> None:
    responses = some_responses(50)
    folder = published(tmp_path / "a", responses)
    for written, (read, scores) in zip(responses, cache.read_rows(folder), strict=True):
        assert scores is None
        assert read.key == written.key
        assert (read.finish_reason, read.weight_version) == (
            written.finish_reason,
            written.weight_version,
        )
        for name in ("prompt_ids", "token_ids", "sampling_logprobs"):
            one = getattr(written, name)
            other = getattr(read, name)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_floats_are_byte_stream_split_and_ids_32_bit(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder = published(tmp_path / "a", some_responses(16))
    columns = {
        group.path_in_schema: group
        for group in (
            pq.read_metadata(folder / "shard-00000.parquet").row_group(0).column(index)
            for index in range(7)
        )
    }
    assert "BYTE_STREAM_SPLIT" in columns["sampling_logprobs.list.element"].encodings
    assert columns["token_ids.list.element"].physical_type == "INT32"
    assert {group.compression for group in columns.values()} == {"ZSTD"}


def test_a_resumed_writer_publishes_the_same_files(tmp_path: Path) -> None:
    responses = some_responses(48)
    whole = published(tmp_path / "whole", responses)
    inputs = {"seed": 1}
    first = ArtifactWriter(tmp_path / "halved", kind="rollouts", inputs=inputs)
    # The process dies after this: no manifest lists the shard.
    first.publish_shard(1, cache.to_table(responses[16:32]))
    (tmp_path / "halved" / "shard-00002.parquet.partial").write_bytes(b"half a file")
    second = ArtifactWriter(tmp_path / "halved", kind="rollouts", inputs=inputs)
    assert second.published == {1}
    for index in (0, 2):
        second.publish_shard(index, cache.to_table(responses[index * 16 : index * 16 + 16]))
    manifest = second.finish()
    assert manifest.fingerprint == read_manifest(whole).fingerprint
    assert [sha256_file(path) for path in sorted(whole.glob("*.parquet"))] == [
        sha256_file(path) for path in sorted((tmp_path / "halved").glob("*.parquet"))
    ]
    assert not list((tmp_path / "halved").glob("*.partial"))


class CountedSet(set[int]):
    """Counts how many of its elements are looked at."""

    looked_at = 0

    def __contains__(self, index: object) -> bool:
        CountedSet.looked_at += 1
        return super().__contains__(index)

    def __iter__(self) -> Iterator[int]:
        CountedSet.looked_at += len(self)
        return super().__iter__()


def test_missing_looks_at_each_index_once(tmp_path: Path) -> None:
    """12,000 shards took 21 s of a processor while their list was made anew for each index."""
    whole = ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={"seed": 1})
    count = 12_000
    published = range(0, count, 3)
    whole._published = CountedSet(published)
    part = PartWriter(whole, Part("math", (), first=6000, num_shards=3000))
    for writer, expected in ((whole, count), (part, 3000)):
        CountedSet.looked_at = 0
        missing = writer.missing(expected)
        assert len(missing) == expected * 2 // 3
        assert CountedSet.looked_at == expected
    # The control: the whole set for each index, as it was.
    CountedSet.looked_at = 0
    wanted = [index for index in range(30) if index not in frozenset(iter(whole._published))]
    assert wanted == whole.missing(30)
    assert CountedSet.looked_at > 30 * len(published)


def test_publishing_a_shard_looks_at_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is put together once, when the artifact is complete."""
    made: list[int] = []
    real = ArtifactWriter._with_shards

    def with_shards(self: ArtifactWriter) -> Manifest:
        made.append(len(self._shards))
        return real(self)

    monkeypatch.setattr(ArtifactWriter, "_with_shards", with_shards)
    writer = ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={"seed": 1})
    for index in (1, 0, 2):
        writer.publish_shard(index, cache.to_table(some_responses(4)))
        assert writer.is_published(index)
    assert made == []
    assert writer.missing(4) == [3]
    manifest = writer.finish()
    assert made == [3]
    assert [shard.name for shard in manifest.shards] == [
        f"shard-{index:05d}.parquet" for index in range(3)
    ]


def test_another_input_is_refused(tmp_path: Path) -> None:
    ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={"seed": 1})
    with pytest.raises(ArtifactError, match="other inputs"):
        ArtifactWriter(tmp_path / "a", kind="rollouts", inputs={"seed": 2})


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "missing"])
def test_damage_is_noticed_and_named(tmp_path: Path, damage: str) -> None:
    folder = published(tmp_path / "a", some_responses(40))
    shard = folder / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[:-20])
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    for reading in (
        lambda: list(cache.read_rows(folder)),
        lambda: verify(folder, read_manifest(folder)),
    ):
        with pytest.raises(ArtifactError, match=r"shard-00001\.parquet.*remedy"):
            reading()


def test_undamaged_files_verify(tmp_path: Path) -> None:
    folder = published(tmp_path / "a", some_responses(40))
    verify(folder, read_manifest(folder))


def test_newer_schema_and_broken_manifest(tmp_path: Path) -> None:
    folder = published(tmp_path / "a", some_responses(3))
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "schema_version": 99}))
    with pytest.raises(ArtifactError, match=r"schema version 99.*newer lopd"):
        read_manifest(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(folder)


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    responses = some_responses(4)
    folder = published(tmp_path / "a", [*responses, responses[2]])
    with pytest.raises(ArtifactError, match=r"\('p2', 2\) occurs twice"):
        list(cache.read_rows(folder))


def test_scores_of_other_tokens_are_refused() -> None:
    response = some_responses(1)[0]
    good = TeacherScores(
        response.prompt_id,
        response.sample_index,
        token_hash(response.prompt_ids, response.token_ids),
        response.sampling_logprobs,
    )
    assert cache.to_table([response], [good]).num_rows == 1
    other = TeacherScores(
        response.prompt_id,
        response.sample_index,
        token_hash(response.prompt_ids, response.token_ids[::-1]),
        response.sampling_logprobs,
    )
    with pytest.raises(ArtifactError, match="do not belong"):
        cache.to_table([response], [other])


def test_missing_column_is_named() -> None:
    table = cache.to_table(some_responses(2)).drop_columns(["finish_reason"])
    assert isinstance(table, pa.Table)
    with pytest.raises(ArtifactError, match="finish_reason"):
        list(cache.from_table(table))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB that a test can fill."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_disk_full_loses_nothing_that_was_published(small_disk: Path) -> None:
    rng = np.random.default_rng(0)
    responses = [
        Response(
            f"p{index}",
            0,
            int32([1, 2]),
            int32(rng.integers(0, 2**31 - 1, 20000)),
            float32(rng.normal(size=20000)),
            "stop",
            "0",
        )
        for index in range(8)
    ]
    writer = ArtifactWriter(small_disk / "a", kind="rollouts", inputs={})
    tables = [cache.to_table([response]) for response in responses]

    def publish_all() -> None:
        for index, table in enumerate(tables):
            writer.publish_shard(index, table)

    with pytest.raises(ArtifactError, match=r"no space left.*same command again"):
        publish_all()
    kept = sorted(writer.published)
    assert kept
    assert len(kept) < 8
    assert not list((small_disk / "a").glob("*.partial"))
    again = ArtifactWriter(small_disk / "a", kind="rollouts", inputs={})
    assert sorted(again.published) == kept


def test_identity_is_of_content_not_of_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            json.dumps({"model_type": "x", "transformers_version": name})
        )
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "tokenizer.json").write_text("{}")
    one = identify_model(tmp_path / "one")
    two = identify_model(tmp_path / "two")
    assert (one.weights, one.tokenizer) == (two.weights, two.tokenizer)
    (tmp_path / "two" / "model.safetensors").write_bytes(b"other weights")
    assert identify_model(tmp_path / "two").weights != one.weights
