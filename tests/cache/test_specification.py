"""docs/cache_format.md is true: its reader reads what we write, its writer writes what we read, and
its formulas give our fingerprints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lopd import cache
from lopd.artifacts import fingerprint, identify_model, read_manifest
from lopd.cache.checks import check_cache
from tests.cache.rollouts import TINY_TEACHER, publish_cache, some_responses

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "cache_format.md").read_text(
    encoding="utf-8"
)


def function(name: str) -> Callable[..., Any]:
    """A function out of the document's code blocks."""
    block = next(
        block
        for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
        if f"def {name}(" in block
    )
    names: dict[str, Any] = {}
    exec(compile(block, "docs/cache_format.md", "exec"), names)
    found = names[name]
    assert callable(found)
    return found


def named(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


@pytest.mark.parametrize("bits", [32, 16])
def test_the_reader_of_the_document_reads_our_caches(tmp_path: Path, bits: int) -> None:
    publish_cache(tmp_path / "a", some_responses(40), logprob_bits=bits)
    rows = list(function("read_cache")(tmp_path / "a"))
    assert len(rows) == 40
    for (prompt, tokens, teacher, sampling), (response, scores) in zip(
        rows, cache.read_rows(tmp_path / "a"), strict=True
    ):
        for one, other in (
            (prompt, response.prompt_ids),
            (tokens, response.token_ids),
            (teacher, scores),
            (sampling, response.sampling_logprobs),
        ):
            np.testing.assert_array_equal(one, other)


def test_the_reader_of_the_document_notices_damage(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(40))
    shard = tmp_path / "a" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is damaged"):
        list(function("read_cache")(tmp_path / "a"))


def test_we_read_what_the_writer_of_the_document_writes(tmp_path: Path) -> None:
    rows = [
        {
            "prompt_id": f"p{index}",
            "sample_index": 0,
            "prompt_ids": [1, 2],
            "token_ids": [3, 4, 5],
            "sampling_logprobs": [-0.5, -0.25, -1.0],
            "teacher_logprobs": [-1.0, -0.5, -0.125],
            "finish_reason": "stop",
            "weight_version": "7",
        }
        for index in range(3)
    ]
    function("write_cache")(tmp_path / "a", rows)
    findings, figures = check_cache(tmp_path / "a")
    assert [str(finding) for finding in findings] == []
    assert figures["tokens"] == 9
    manifest = read_manifest(tmp_path / "a")
    assert manifest.fingerprint == fingerprint(manifest)
    for row, (response, scores) in zip(rows, cache.read_rows(tmp_path / "a"), strict=True):
        assert scores is not None
        assert (response.prompt_id, response.token_ids.tolist(), scores.tolist()) == (
            row["prompt_id"],
            row["token_ids"],
            row["teacher_logprobs"],
        )


def test_fingerprints_are_as_the_document_says(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(40), inputs={"knob": "é", "list": [1, 2.5, None]})
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text(encoding="utf-8"))
    shards = [[shard["name"], shard["sha256"]] for shard in manifest["shards"]]
    assert manifest["fingerprint"] == named(
        [
            manifest["kind"],
            manifest["schema_version"],
            manifest["inputs"],
            manifest["parents"],
            shards,
        ]
    )
    origin = named([manifest["kind"], manifest["inputs"], manifest["parents"]])
    assert {
        pq.read_schema(path).metadata[b"lopd.origin"].decode()
        for path in (tmp_path / "a").glob("*.parquet")
    } == {origin}
    config = json.loads((TINY_TEACHER / "config.json").read_text(encoding="utf-8"))
    kept = {
        name: value
        for name, value in config.items()
        if name not in ("transformers_version", "_name_or_path")
    }
    files = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(TINY_TEACHER.glob("*.safetensors"))
    ]
    assert identify_model(TINY_TEACHER).weights == named([named(kept), *files])


def test_the_document_names_every_key_and_column(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(4))
    manifest = read_manifest(tmp_path / "a")
    columns = pq.read_schema(tmp_path / "a" / "shard-00000.parquet").names
    for name in (
        *(field.name for field in dataclasses.fields(manifest)),
        *columns,
        *manifest.extra,
    ):
        assert f"`{name}`" in DOCUMENT, name
