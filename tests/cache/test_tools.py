"""Caches made from caches: nothing lost or doubled, nothing mixed that must not be, and what the
reference code's format lacks is said.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd import cache
from lopd.artifacts import read_manifest
from lopd.cache.checks import check_cache
from lopd.cache.merging import merge
from lopd.cache.reference_export import export_reference
from lopd.cache.reference_import import IMPORT_LACKS, import_reference
from lopd.cache.splitting import split
from lopd.cache.teachers import own_teachers
from lopd.errors import ArtifactError, ConsistencyError, DataError, LopdError
from tests.cache.rollouts import SAMPLING, TEACHER, TINY_TEACHER, publish_cache, some_responses

OTHER_TEACHER = dataclasses.replace(TEACHER, path="teachers/two", weights="9" * 64)


def contents(folder: Path) -> dict[tuple[str, int], tuple[bytes, bytes, bytes]]:
    rows = {}
    for response, scores in cache.read_rows(folder):
        assert scores is not None
        rows[response.key] = (
            response.token_ids.tobytes(),
            response.sampling_logprobs.tobytes(),
            scores.tobytes(),
        )
    return rows


def sound(folder: Path) -> bool:
    return len(check_cache(folder)[0]) == 0


# ---- split and merge ----


def test_split_and_merged_again_is_the_same(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(120, samples_per_prompt=3))
    parts = split(tmp_path / "a", tmp_path / "parts", 3)
    folders = [tmp_path / "parts" / f"part-{part:02d}" for part in range(3)]
    assert sum(manifest.rows for manifest in parts) == 120
    prompts = [{key[0] for key in contents(folder)} for folder in folders]
    assert all(prompts), "no part is empty"
    assert len(set.union(*prompts)) == sum(len(part) for part in prompts), "no prompt in two parts"
    merged = merge(folders, tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(tmp_path / "a")
    assert merged.models["teacher"] == TEACHER
    assert merged.lineage["consistent"] is True
    assert merged.extra["vocab_size"] == 32
    assert all(sound(folder) for folder in (*folders, tmp_path / "whole"))


def test_a_split_that_cannot_be(tmp_path: Path) -> None:
    source = tmp_path / "a"
    publish_cache(source, some_responses(6))
    manifest = read_manifest(source)
    for out, parts, message in (
        (tmp_path / "parts", 7, "7 parts; limit: at most 6, the number of responses in the cache"),
        (source, 2, "inside the cache"),
        (source / "b", 2, "inside"),
    ):
        with pytest.raises(LopdError, match=message):
            split(source, out, parts)
    with pytest.raises(LopdError, match=r"no manifest\.json in this folder; remedy: run the stage"):
        split(source / "manifest.json", tmp_path / "parts", 2)
    assert not (tmp_path / "parts").exists()
    assert read_manifest(source) == manifest, "the cache is as it was"


def test_merging_again_goes_on_and_gives_the_same_fingerprint(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(20))
    publish_cache(tmp_path / "b", some_responses(20, seed=1, prefix="q"))
    first = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c").fingerprint == first.fingerprint
    assert merge([tmp_path / "b", tmp_path / "a"], tmp_path / "d").fingerprint != first.fingerprint


def test_duplicate_keys_are_named(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(20))
    publish_cache(tmp_path / "b", some_responses(3, seed=1))
    with pytest.raises(ArtifactError, match=r"3 responses are in more than one.*p0/0, p1/0, p2/0"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("knob", "value"), [("temperature", 0.8), ("top_p", 0.95)])
def test_mixed_temperatures(tmp_path: Path, knob: str, value: float) -> None:
    publish_cache(tmp_path / "a", some_responses(5))
    publish_cache(tmp_path / "b", some_responses(5, prefix="q"), sampling={**SAMPLING, knob: value})
    with pytest.raises(ArtifactError, match=rf"{knob} {value} against 1\.0"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_mixed_teachers_need_a_column(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(5))
    publish_cache(tmp_path / "b", some_responses(5, prefix="q"), teacher=OTHER_TEACHER)
    with pytest.raises(ConsistencyError, match=r"teachers/two.*teachers/one.*--teacher-column"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    manifest = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", teacher_column=True)
    teachers = (
        pa.concat_tables(
            [pq.read_table(path) for path in sorted((tmp_path / "c").glob("*.parquet"))]
        )
        .column("teacher")
        .to_pylist()
    )
    assert teachers == [TEACHER.weights] * 5 + [OTHER_TEACHER.weights] * 5
    assert {identity.weights for identity in manifest.models.values()} == set(teachers)
    assert set(manifest.lineage["by_teacher"]) == set(teachers)
    assert sound(tmp_path / "c")


def test_what_is_known_of_teachers_outlives_a_second_merge(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(5))
    publish_cache(tmp_path / "b", some_responses(5, prefix="q"), teacher=OTHER_TEACHER)
    publish_cache(tmp_path / "d", some_responses(5, prefix="r"))
    once = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", teacher_column=True)
    twice = merge([tmp_path / "c", tmp_path / "d"], tmp_path / "e", teacher_column=True)
    assert set(once.lineage["by_teacher"]) == {TEACHER.weights, OTHER_TEACHER.weights}
    assert twice.lineage == once.lineage
    assert own_teachers(twice) == own_teachers(once)
    assert sound(tmp_path / "e")


def test_mixed_students(tmp_path: Path) -> None:
    one, other = (
        dataclasses.replace(TEACHER, path=f"runs/{name}/sft/model", weights=name * 64)
        for name in "ab"
    )
    for name, prefix, student in (
        ("a", "p", one),
        ("b", "q", other),
        ("c", "r", one),
        ("d", "s", None),
    ):
        publish_cache(tmp_path / name, some_responses(5, prefix=prefix), student=student)
    with pytest.raises(ConsistencyError, match="student runs/b/sft/model"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "x")
    assert merge([tmp_path / "a", tmp_path / "c"], tmp_path / "y").models["student"] == one
    assert "student" not in merge([tmp_path / "a", tmp_path / "d"], tmp_path / "z").models, (
        "of one of them nobody knows"
    )


def test_mixed_tokenizers(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(5))
    publish_cache(
        tmp_path / "b",
        some_responses(5, prefix="q"),
        teacher=dataclasses.replace(TEACHER, tokenizer="other"),
    )
    with pytest.raises(DataError, match="tokenizers differ"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_mixed_number_formats(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(5))
    publish_cache(tmp_path / "b", some_responses(5, prefix="q"), logprob_bits=16)
    with pytest.raises(ArtifactError, match="halffloat"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


# ---- the reference code's parquet ----


def reference_rows() -> list[dict[str, object]]:
    prompts = [
        "<|im_start|>user\n01+02=?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n09-02=?<|im_end|>\n<|im_start|>assistant\n",
    ]
    tokens = [[8, 9, 10, 11], [9, 9, 10]]
    logprobs = [[-0.5, -0.25, -0.125, -1.0], [-0.75, -0.5, -2.0]]
    return [
        {
            "prompt": prompt,
            "label": "0",
            "metadata": {
                "is_lightning_opd": True,
                "response_tokens": ids,
                "loss_mask": [1] * len(ids),
                "response": "text",
                "teacher_log_probs": values,
            },
        }
        for prompt, ids, values in [
            *zip(prompts, tokens, logprobs, strict=True),
            (prompts[0], [8, 8], [-1.0, -1.5]),
        ]
    ]


def write_reference(path: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_import_says_what_is_lacking(tmp_path: Path) -> None:
    file = write_reference(tmp_path / "x.parquet", reference_rows())
    manifest = import_reference(file, tmp_path / "a", TINY_TEACHER)
    assert manifest.extra["lacks"] == list(IMPORT_LACKS)
    assert manifest.lineage["evidence"] == "unknown"
    assert manifest.lineage["consistent"] is False
    assert sound(tmp_path / "a")
    table = pq.read_table(tmp_path / "a" / "shard-00000.parquet")
    assert table.column("token_ids").to_pylist() == [[8, 9, 10, 11], [9, 9, 10], [8, 8]]
    assert table.column("teacher_logprobs").to_pylist() == [
        [-0.5, -0.25, -0.125, -1.0],
        [-0.75, -0.5, -2.0],
        [-1.0, -1.5],
    ]
    assert "sampling_logprobs" not in table.column_names, "nothing is invented"
    ids = table.column("prompt_id").to_pylist()
    assert (ids[0] == ids[2], ids[0] == ids[1]) == (True, False), (
        "responses to one prompt are told apart by sample_index"
    )
    assert table.column("sample_index").to_pylist() == [0, 0, 1]
    with pytest.raises(ArtifactError, match=r"sampling_logprobs.*missing"):
        list(cache.read_rows(tmp_path / "a"))


def test_import_refuses_what_cannot_be_used(tmp_path: Path) -> None:
    rows = reference_rows()
    rows[1]["metadata"]["teacher_log_probs"].append(-1.0)  # type: ignore[index]
    with pytest.raises(DataError, match="row 1 has 4 teacher_log_probs for 3 response_tokens"):
        import_reference(
            write_reference(tmp_path / "x.parquet", rows), tmp_path / "a", TINY_TEACHER
        )
    rows = reference_rows()
    rows[0]["metadata"]["teacher_log_probs"][2] = 0.5  # type: ignore[index]
    with pytest.raises(DataError, match="values above 0 in teacher_logprobs"):
        import_reference(
            write_reference(tmp_path / "y.parquet", rows), tmp_path / "b", TINY_TEACHER
        )
    rows = reference_rows()
    for row in rows:
        del row["metadata"]["teacher_log_probs"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="intermediate file"):
        import_reference(
            write_reference(tmp_path / "z.parquet", rows), tmp_path / "c", TINY_TEACHER
        )
    (tmp_path / "no.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        import_reference(tmp_path / "no.parquet", tmp_path / "d", TINY_TEACHER)


def test_export_is_what_import_reads(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(40))
    about = export_reference(tmp_path / "a", tmp_path / "x.parquet", TINY_TEACHER)
    assert about["rows"] == 40
    with pytest.raises(ArtifactError, match="exists already"):
        export_reference(tmp_path / "a", tmp_path / "x.parquet", TINY_TEACHER)
    manifest = import_reference(tmp_path / "x.parquet", tmp_path / "b", TINY_TEACHER)
    before = {values[0]: values[2] for values in contents(tmp_path / "a").values()}
    after = (
        pq.read_table(tmp_path / "b" / "shard-00000.parquet")
        .select(["token_ids", "teacher_logprobs"])
        .to_pylist()
    )
    assert {
        np.array(row["token_ids"], np.int32).tobytes(): np.array(
            row["teacher_logprobs"], np.float32
        ).tobytes()
        for row in after
    } == before
    assert any("8 of 40" in reason for reason in manifest.extra["lacks"]), (
        "the truncated responses have no end token"
    )


def test_export_needs_a_tokenizer_and_scores(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(4))
    with pytest.raises(DataError, match="--tokenizer"):
        export_reference(tmp_path / "a", tmp_path / "x.parquet")
    cache.write_responses(tmp_path / "b", some_responses(4), kind="rollouts", inputs={})
    with pytest.raises(ArtifactError, match="no teacher log-probabilities"):
        export_reference(tmp_path / "b", tmp_path / "x.parquet", TINY_TEACHER)
    assert read_manifest(tmp_path / "b").complete
