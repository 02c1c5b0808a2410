"""lopd cache verify: each thing that can be wrong with a cache is found, of the right kind, with
the responses named; a sound cache has no finding.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_manifest
from lopd.cache.checks import check_cache
from lopd.records import Response
from tests.cache.rollouts import (
    END,
    SAMPLING,
    TEACHER,
    VOCABULARY,
    publish_cache,
    scores_of,
    some_responses,
)


def found(folder: Path, **options: int) -> dict[str, list[str]]:
    return {finding.kind: finding.named for finding in check_cache(folder, **options)[0]}


def publish_table(folder: Path, table: pa.Table) -> Path:
    """A cache whose only shard is this table, as a careless writer would publish it."""
    writer = ArtifactWriter(
        folder, kind="teacher_cache", inputs={}, models={"teacher": TEACHER}, sampling=SAMPLING
    )
    writer.publish_shard(0, table)
    writer.finish(vocab_size=VOCABULARY, end_token_ids=[END])
    return folder


def sound_table(responses: list[Response]) -> pa.Table:
    return cache.to_table(
        responses, scores_of(responses, [response.sampling_logprobs for response in responses])
    )


def test_a_sound_cache_has_no_finding(tmp_path: Path) -> None:
    for bits in (32, 16):
        publish_cache(tmp_path / str(bits), some_responses(40), logprob_bits=bits)
        findings, figures = check_cache(tmp_path / str(bits))
        assert [str(finding) for finding in findings] == []
        assert (figures["rows"], figures["vocab_size"], figures["shards"]) == (40, VOCABULARY, 3)


@pytest.mark.parametrize("column", ["teacher_logprobs", "sampling_logprobs"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [("NaN", math.nan), ("infinite", -math.inf), ("infinite", math.inf), ("positive", 0.01)],
)
def test_impossible_log_probabilities(tmp_path: Path, column: str, kind: str, value: float) -> None:
    responses = some_responses(20)
    logprobs = [response.sampling_logprobs.copy() for response in responses]
    (
        logprobs
        if column == "teacher_logprobs"
        else [response.sampling_logprobs for response in responses]
    )[3][2] = value
    publish_cache(tmp_path / "a", responses, logprobs)
    assert found(tmp_path / "a") == {f"{kind} {column}": ["p3/0"]}


def test_null_is_no_log_probability(tmp_path: Path) -> None:
    table = sound_table(some_responses(4))
    rows = table.column("teacher_logprobs").to_pylist()
    rows[1][0] = None
    table = table.set_column(
        table.column_names.index("teacher_logprobs"),
        "teacher_logprobs",
        pa.array(rows, pa.list_(pa.float32())),
    )
    assert found(publish_table(tmp_path / "a", table)) == {"NaN teacher_logprobs": ["p1/0"]}


def test_a_uniform_teacher(tmp_path: Path) -> None:
    responses = some_responses(20)
    logprobs = [response.sampling_logprobs for response in responses]
    flat = [
        -math.log(VOCABULARY) + np.random.default_rng(0).normal(0, 1e-4, len(row))
        if index in (4, 9)
        else row
        for index, row in enumerate(logprobs)
    ]
    publish_cache(tmp_path / "a", responses, flat)
    assert found(tmp_path / "a") == {"uniform teacher": ["p4/0", "p9/0"]}
    assert found(tmp_path / "a", vocab_size=VOCABULARY + 1) == {}, (
        "the control: these values are uniform for one vocabulary only"
    )


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    responses = some_responses(20)
    responses[5].token_ids[0] = VOCABULARY
    responses[6].prompt_ids[0] = VOCABULARY + 7
    publish_cache(tmp_path / "a", responses)
    assert found(tmp_path / "a") == {"prompt_ids outside": ["p6/0"], "token_ids outside": ["p5/0"]}
    assert found(tmp_path / "a", vocab_size=VOCABULARY + 8) == {}


def test_lists_of_other_lengths(tmp_path: Path) -> None:
    table = sound_table(some_responses(6))
    for column in ("teacher_logprobs", "sampling_logprobs"):
        rows = table.column(column).to_pylist()
        rows[2] = rows[2][:-1]
        shorter = table.set_column(
            table.column_names.index(column), column, pa.array(rows, pa.list_(pa.float32()))
        )
        assert found(publish_table(tmp_path / column, shorter)) == {f"length of {column}": ["p2/0"]}


def test_duplicate_keys_also_across_shards(tmp_path: Path) -> None:
    responses = some_responses(20)
    publish_cache(tmp_path / "a", [*responses, responses[2]])
    assert found(tmp_path / "a") == {"duplicate key": ["p2/0"]}


def test_many_are_counted_and_the_first_named(tmp_path: Path) -> None:
    responses = some_responses(20)
    publish_cache(
        tmp_path / "a", responses, [np.full(len(response.token_ids), 0.5) for response in responses]
    )
    (finding,) = check_cache(tmp_path / "a")[0]
    assert (finding.count, finding.named) == (20, ["p0/0", "p1/0", "p2/0", "p3/0", "p4/0"])
    assert "and 15 more" in str(finding)


def test_shards_of_another_run(tmp_path: Path) -> None:
    one = tmp_path / "one"
    other = tmp_path / "other"
    publish_cache(one, some_responses(32))
    publish_cache(other, some_responses(32, seed=1, prefix="q"), inputs={"run.seed": 2})
    shutil.copy(other / "shard-00001.parquet", one / "shard-00001.parquet")
    assert list(found(one)) == ["damaged"], "the checksum tells"
    manifest = json.loads((one / "manifest.json").read_text())
    manifest["shards"][1] = dataclasses.asdict(read_manifest(other).shards[1])
    (one / "manifest.json").write_text(json.dumps(manifest))
    assert found(one) == {"another run": ["shard-00001.parquet"]}, (
        "and where the manifest was mended by hand, the shard does"
    )


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
        (lambda path: path.unlink(), "damaged"),
        (
            lambda path: path.with_name("shard-00007.parquet").write_bytes(path.read_bytes()),
            "foreign file",
        ),
    ],
    ids=["truncated", "missing", "one too many"],
)
def test_files(tmp_path: Path, damage: Callable[[Path], object], kind: str) -> None:
    publish_cache(tmp_path / "a", some_responses(40))
    damage(tmp_path / "a" / "shard-00001.parquet")
    assert list(found(tmp_path / "a")) == [kind]


def test_incomplete(tmp_path: Path) -> None:
    ArtifactWriter(tmp_path / "a", kind="teacher_cache", inputs={}).publish_shard(
        0, sound_table(some_responses(3))
    )
    assert list(found(tmp_path / "a")) == ["incomplete"]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    publish_table(tmp_path / "a", sound_table(some_responses(4)).drop_columns(["finish_reason"]))
    assert list(found(tmp_path / "a")) == ["missing column"]
