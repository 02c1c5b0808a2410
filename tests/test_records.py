"""The examples in the docstrings of lopd/records.py and lopd/manifests.py are true."""

from __future__ import annotations

import dataclasses
import doctest
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lopd import manifests, records
from lopd.batching.microbatch import build_microbatch, make_sample
from lopd.records import Microbatch, Response, Sample, TeacherScores

MODULES = (records.__name__, manifests.__name__)


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder()
    found = [*finder.find(records), *finder.find(manifests)]
    return (one for one in found if one.examples)


def evaluate(name: str) -> dict[str, Any]:
    """Run one record's example and return the names that it defines."""
    (example,) = (found for found in examples() if found.name == f"lopd.records.{name}")
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    return example.globs


def test_every_record_has_an_example() -> None:
    public = {
        name
        for name, value in vars(records).items()
        if dataclasses.is_dataclass(value) and value.__module__ in MODULES
    }
    assert len(public) == 9
    assert public <= {found.name.rpartition(".")[2] for found in examples()}


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_examples_are_true(example: doctest.DocTest) -> None:
    outcome = doctest.DocTestRunner().run(example)
    assert outcome.failed == 0
    assert outcome.attempted > 0


def test_a_wrong_example_is_noticed() -> None:
    parser = doctest.DocTestParser()
    wrong = parser.get_doctest(">>> 1 + 2\n4\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda _: None).failed == 1


def test_the_examples_follow_one_response() -> None:
    """The sample and the microbatch are what the batching makes of the response and its scores."""
    response: Response = evaluate("Response")["response"]
    scores: TeacherScores = evaluate("TeacherScores")["scores"]
    shown: Sample = evaluate("Sample")["sample"]
    made = make_sample(response, scores)
    for name in ("token_ids", "loss_mask", "teacher_logprobs"):
        np.testing.assert_array_equal(getattr(made, name), getattr(shown, name))
    assert made.key == shown.key

    short = Sample(
        token_ids=records.int32([11, 40, 2]),
        loss_mask=np.array([False, False, True]),
        teacher_logprobs=records.float32([0, 0, -0.301]),
    )
    batch: Microbatch = evaluate("Microbatch")["batch"]
    packed = build_microbatch([shown, short])
    columns = ("token_ids", "labels", "position_ids", "loss_mask", "cu_seqlens", "teacher_logprobs")
    for name in columns:
        np.testing.assert_array_equal(getattr(packed, name), getattr(batch, name))
    assert (packed.max_seqlen, packed.num_sequences) == (batch.max_seqlen, batch.num_sequences)
