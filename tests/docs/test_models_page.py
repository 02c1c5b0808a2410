"""docs/models.md says what the code supports: its families and their parts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import LopdError
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.families import FAMILIES
from tests.megatron.test_architecture import QWEN3_MOE

PAGE = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text()


def table_under(heading: str) -> list[list[str]]:
    """Return the rows of the first table behind a text, without its head and with its marks."""
    lines = PAGE.partition(heading)[2].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def read(folder: Path, family: str, **fields: Any) -> Any:
    """Read a config.json of a family that is supported but for these fields."""
    # Everything that one of the families needs; none of them minds the others' fields.
    about = {key: value for key, value in QWEN3_MOE.items() if key != "attention_bias"}
    (folder / "config.json").write_text(json.dumps({**about, "model_type": family, **fields}))
    return read_architecture(folder)


FAMILY_ROWS = table_under("# Supported models")
REFUSED = [
    (family, row[1].strip("`"))
    for row in table_under("## What is refused")
    for family in (
        sorted(FAMILIES)
        if row[0] == "all"
        else ["qwen3"]
        if row[0] == "any other"
        else [name.strip(" `") for name in row[0].split(",")]
    )
]


def test_the_families_are_those_of_the_code(tmp_path: Path) -> None:
    assert [row[0].strip("`") for row in FAMILY_ROWS] == sorted(FAMILIES)
    for row in FAMILY_ROWS:
        arch = read(tmp_path, row[0].strip("`"))
        parts = (arch.qk_norm, arch.qkv_bias, arch.num_experts > 0)
        assert row[2:] == ["yes" if part else "no" for part in parts], row[0]


@pytest.mark.parametrize(("family", "text"), REFUSED)
def test_what_the_page_calls_refused_is_refused(tmp_path: Path, family: str, text: str) -> None:
    fields = json.loads(f"{{{text}}}")
    (name,) = fields
    # The control: without the field the same file is read.
    assert read(tmp_path, family).family == family
    with pytest.raises(LopdError) as caught:
        read(tmp_path, family if name != "model_type" else "", **fields)
    # By the name of the field, or of the field inside of the scaling.
    inner = fields[name]
    names = [name, *(inner if isinstance(inner, dict) else []), "rope scaling", "num_attention"]
    assert any(one in str(caught.value) for one in names), str(caught.value)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_family_may_have(tmp_path: Path, family: str) -> None:
    assert read(tmp_path, family, tie_word_embeddings=True).tied_embeddings
    assert read(tmp_path, family, num_key_value_heads=32).num_kv_heads == 32
    assert read(tmp_path, family, head_dim=None).head_dim == 64
    assert read(tmp_path, family, vocab_size=151).padded_vocab_size == 152
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(tmp_path, family, rope_scaling=yarn).yarn.factor == 4.0
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert read(tmp_path, family, rope_scaling=llama3).rope_factor == 8.0
