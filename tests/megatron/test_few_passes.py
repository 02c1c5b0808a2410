"""What a CPU computes with fewer passes over memory: values and gradients are upstream's, and what
is computed in another way than by default still goes through upstream's own functions.
"""

from __future__ import annotations

import pytest

from tests.limits import apart, within
from tests.megatron.few_passes_cases import one_rank, two_ranks
from tests.megatron.launch import run_ranks
from tests.models import write_qwen3_moe

# Relative to the largest entry of a tensor, in float32.
LIMIT = 1e-5
SAME = (
    "experts",
    "permutation",
    "chunks, turned",
    "rotation",
    "rotation, again",
    "rotation, other table",
    "rotation, other factor",
    "norm",
    "product",
    "linear",
)
# Left to upstream's own functions, so that not a bit is different.
LEFT = (
    "experts, watched",
    "experts, 16 bits",
    "permutation, dropped",
    "chunks",
    "rotation, packed",
    "rotation, part",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = write_qwen3_moe(tmp_path_factory.mktemp("few_passes") / "moe")
    [figures] = run_ranks(one_rank, 1, model=str(folder))
    return dict(figures)


@pytest.mark.parametrize("name", SAME)
def test_values_and_gradients_are_those_of_upstream(name: str, found: dict[str, float]) -> None:
    within(found[name], LIMIT)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plain_goes_through_upstream(name: str, found: dict[str, float]) -> None:
    assert found[name] == 0.0


@pytest.mark.parametrize("part", ["experts", "permutation", "rotation", "norm", "linear"])
def test_another_computation_would_be_noticed(part: str, found: dict[str, float]) -> None:
    apart(found[f"{part}, control"], 1e-2)


def test_it_is_used(found: dict[str, float]) -> None:
    """Chunks in order are not copied, the norm is ours, and a watched layer is called."""
    assert found["chunks stay"] == found["norm is used"] == found["calls seen"] == 1.0


def test_a_reduce_scatter_is_the_sum_over_ranks() -> None:
    """To the last bit: the terms of two ranks have one order."""
    assert run_ranks(two_ranks, 2) == [0.0, 0.0]
