"""Optional columns: what is written is read, in every way of reading; what contradicts itself is
found; derived caches keep or drop them on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_manifest
from lopd.cache.checks import check_cache
from lopd.cache.merging import merge
from lopd.cache.reader import CacheReader
from lopd.cache.residualise import residualise
from lopd.cache.splitting import split
from lopd.cache.statistics import inspect_cache
from lopd.cache.style import Settings
from lopd.errors import ArtifactError
from lopd.records import Response, TeacherScores
from tests.cache.rollouts import (
    END,
    SAMPLING,
    TEACHER,
    VOCABULARY,
    full_scores,
    publish_cache,
    some_responses,
)
from tests.limits import close

K = 4
Rows = list[tuple[Response, TeacherScores]]


def publish(folder: Path, table: pa.Table) -> Path:
    writer = ArtifactWriter(
        folder, kind="teacher_cache", inputs={}, models={"teacher": TEACHER}, sampling=SAMPLING
    )
    half = table.num_rows // 2
    writer.publish_shard(0, table.slice(0, half))
    writer.publish_shard(1, table.slice(half))
    writer.finish(vocab_size=VOCABULARY, end_token_ids=[END])
    return folder


@pytest.fixture
def rows() -> Rows:
    return list(zip(*full_scores(some_responses(30), K), strict=True))


def table_of(rows: Rows, bits: int = 32) -> pa.Table:
    columns: Any = (list(column) for column in zip(*rows, strict=True))
    return cache.to_table(*columns, logprob_bits=bits)


def assert_same(found: list[tuple[Response, TeacherScores | None]], rows: Rows) -> None:
    for (response, scores), (own_response, own_scores) in zip(found, rows, strict=True):
        assert scores is not None
        assert (response.key, scores.key, scores.token_hash, scores.teacher) == (
            own_response.key,
            own_scores.key,
            own_scores.token_hash,
            TEACHER.weights,
        )
        assert scores.top is not None
        assert own_scores.top is not None
        pairs = [
            (response.routed_experts, own_response.routed_experts),
            (scores.top.ids, own_scores.top.ids),
            (scores.top.logprobs, own_scores.top.logprobs),
            (scores.top.tail_logprob, own_scores.top.tail_logprob),
            (scores.entropy, own_scores.entropy),
            (scores.teacher_logprobs, own_scores.teacher_logprobs),
        ]
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)


def test_what_is_written_is_read_in_every_way(tmp_path: Path, rows: Rows) -> None:
    folder = publish(tmp_path / "a", table_of(rows))
    assert [str(finding) for finding in check_cache(folder)[0]] == []
    reader = CacheReader(folder)
    order = np.random.default_rng(0).permutation(len(rows))
    assert_same(list(reader.scored_rows()), rows)
    assert_same(reader.fetch_scored(order), [rows[index] for index in order])
    assert [response.key for response, _ in cache.read_rows(folder)] == [
        response.key for response, _ in rows
    ], "who does not ask for them is not disturbed"


def test_what_is_left_out_is_not_read(tmp_path: Path, rows: Rows) -> None:
    folder = publish(tmp_path / "a", table_of(rows))
    unread = {
        "routed_experts",
        "teacher_entropy",
        "teacher_top_ids",
        "teacher_top_logprobs",
        "teacher_tail_logprob",
    }
    reader = CacheReader(folder, leave_out=unread)
    for found in (list(reader.scored_rows()), reader.fetch_scored(np.arange(len(rows)))):
        for (response, scores), (own, own_scores) in zip(found, rows, strict=True):
            assert scores is not None
            assert (scores.top, scores.entropy, response.routed_experts) == (None, None, None)
            np.testing.assert_array_equal(scores.teacher_logprobs, own_scores.teacher_logprobs)
            assert response.key == own.key


def test_16_bits(tmp_path: Path, rows: Rows) -> None:
    folder = publish(tmp_path / "a", table_of(rows, 16))
    assert [str(finding) for finding in check_cache(folder)[0]] == []
    for (_, scores), (_, exact) in zip(CacheReader(folder).scored_rows(), rows, strict=True):
        assert scores is not None
        assert scores.top is not None
        assert exact.top is not None
        assert scores.top.logprobs.dtype == np.float32
        assert np.abs(scores.top.logprobs - exact.top.logprobs).max() < 0.01


def test_split_and_merged_they_stay_and_a_corrected_teacher_has_none(
    tmp_path: Path, rows: Rows
) -> None:
    folder = publish(tmp_path / "a", table_of(rows))
    parts = [tmp_path / "parts" / f"part-0{part}" for part in range(2)]
    split(folder, tmp_path / "parts", 2)
    merge(parts, tmp_path / "m")
    merged = sorted(CacheReader(tmp_path / "m").scored_rows(), key=lambda row: row[0].key)
    assert_same(merged, sorted(rows, key=lambda row: row[0].key))
    residualise(folder, tmp_path / "r", Settings())
    assert {"teacher_top_ids", "teacher_entropy"} & CacheReader(tmp_path / "r").columns == set(), (
        "they are of the teacher as it was"
    )
    assert "routed_experts" in CacheReader(tmp_path / "r").columns


def test_inspect_tells_of_them(tmp_path: Path, rows: Rows) -> None:
    about = inspect_cache(publish(tmp_path / "a", table_of(rows)))
    assert about["top_k"] == K
    tails = np.concatenate(
        [np.exp(scores.top.tail_logprob) for _, scores in rows if scores.top is not None]
    )
    close(about["teacher_tail"]["mean"], tails.mean(), rel=1e-5)
    entropies = np.concatenate([scores.entropy for _, scores in rows if scores.entropy is not None])
    close(about["teacher_entropy"]["mean"], entropies.mean(), rel=1e-5)
    publish_cache(tmp_path / "b", some_responses(4))
    assert (
        inspect_cache(tmp_path / "b")["top_k"],
        inspect_cache(tmp_path / "b")["teacher_tail"],
    ) == (0, None)


def changed(
    table: pa.Table, column: str, change: Callable[[list[list[float]]], object]
) -> pa.Table:
    values = table.column(column).to_pylist()
    change(values)
    return table.set_column(
        table.column_names.index(column), column, pa.array(values, table.schema.field(column).type)
    )


@pytest.mark.parametrize(
    ("column", "change", "kind"),
    [
        ("teacher_top_ids", lambda rows: rows[3].pop(), "length of teacher_top_ids"),
        (
            "teacher_top_ids",
            lambda rows: rows[3].__setitem__(0, VOCABULARY),
            "teacher_top_ids outside",
        ),
        ("teacher_top_ids", lambda rows: rows[3].__setitem__(0, rows[3][1]), "top-K twice"),
        ("teacher_top_logprobs", lambda rows: rows[3].__setitem__(1, 0.0), "top-K order"),
        (
            "teacher_top_logprobs",
            lambda rows: rows[3].__setitem__(slice(0, K), [-0.1] * K),
            "top-K mass",
        ),
        (
            "teacher_top_logprobs",
            lambda rows: rows[3].__setitem__(0, float("nan")),
            "NaN teacher_top_logprobs",
        ),
        (
            "teacher_tail_logprob",
            lambda rows: rows[3].__setitem__(0, 0.5),
            "positive teacher_tail_logprob",
        ),
        ("teacher_tail_logprob", lambda rows: rows[3].pop(), "length of teacher_tail_logprob"),
        ("teacher_entropy", lambda rows: rows[3].__setitem__(0, 9.0), "entropy"),
        ("teacher_entropy", lambda rows: rows[3].__setitem__(0, float("nan")), "entropy"),
        ("teacher", lambda rows: rows.__setitem__(3, "0" * 64), "unknown teacher"),
    ],
)
def test_what_cannot_be_is_found_with_the_response_named(
    tmp_path: Path, rows: Rows, column: str, change: Callable[..., object], kind: str
) -> None:
    folder = publish(tmp_path / "a", changed(table_of(rows), column, change))
    found = {finding.kind: finding.named for finding in check_cache(folder)[0]}
    assert "p3/0" in found[kind]
    assert len(found[kind]) == 1


def test_a_part_of_a_top_k_and_mixed_teachers_without_a_column(tmp_path: Path, rows: Rows) -> None:
    table = table_of(rows)
    assert [
        finding.kind
        for finding in check_cache(
            publish(tmp_path / "a", table.drop_columns(["teacher_tail_logprob"]))
        )[0]
    ] == ["missing column"]
    folder = publish(tmp_path / "b", table.drop_columns(["teacher"]))
    text = (folder / "manifest.json").read_text()
    second = (
        text[text.index('"teacher": {') : text.index("}", text.index('"teacher": {')) + 1]
        .replace("1" * 64, "5" * 64)
        .replace('"teacher"', '"teachers.math"')
    )
    (folder / "manifest.json").write_text(text.replace('"models": {', f'"models": {{{second},', 1))
    assert len(read_manifest(folder).models) == 2
    assert [finding.kind for finding in check_cache(folder)[0]] == ["mixed teachers"]


def test_scores_of_which_only_some_have_a_top_k(rows: Rows) -> None:
    plain = [
        TeacherScores(s.prompt_id, s.sample_index, s.token_hash, s.teacher_logprobs)
        for _, s in rows
    ]
    responses = [response for response, _ in rows]
    with pytest.raises(ArtifactError, match="only 15 of 30 scores have a top-K"):
        cache.to_table(responses, [*plain[:15], *(scores for _, scores in rows[15:])])
    assert "teacher_top_ids" not in cache.to_table(responses, plain).column_names
