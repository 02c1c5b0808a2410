"""A disk slower than a collective may last does not fail the last act of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.launch import run_ranks
from tests.megatron.slow_disk_cases import write_slowly
from tests.models import write_qwen3_moe


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("slow-disk")
    model = str(write_qwen3_moe(folder / "model"))
    return run_ranks(write_slowly, 2, model=model, folder=str(folder))


def test_the_other_ranks_wait_for_the_one_that_writes(ranks: list[dict[str, Any]]) -> None:
    assert [rank["waited"] for rank in ranks] == ["published", "published"]
    assert ranks[1]["control"] == "the other rank was given up"


def test_a_full_disk_is_one_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert all("cannot be written (no space)" in rank["full"] for rank in ranks)


def test_what_was_published_is_whole(
    ranks: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folders: list[Path] = sorted(tmp_path_factory.getbasetemp().glob("slow-disk*/slow"))
    assert [path.name for path in folders[-1].glob("*.safetensors")] == ["model.safetensors"]
