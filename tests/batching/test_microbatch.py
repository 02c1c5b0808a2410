"""Responses to samples to packed microbatches: the shift by one, borders of sequences, padding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopd.batching import build_microbatch, make_sample
from lopd.errors import DataError
from lopd.records import Response, Sample, float32
from tests.limits import close
from tests.objective.dense import random_samples


def response(prompt: list[int], tokens: list[int], loss_mask: list[bool] | None = None) -> Response:
    """sampling_logprobs are -0.1 times the token, so that a value tells whose it is."""
    return Response(
        prompt_id="p0",
        sample_index=0,
        prompt_ids=np.array(prompt, dtype=np.int32),
        token_ids=np.array(tokens, dtype=np.int32),
        sampling_logprobs=np.array(tokens, dtype=np.float32) * np.float32(-0.1),
        finish_reason="stop",
        weight_version="1",
        loss_mask=None if loss_mask is None else np.array(loss_mask),
    )


class TestMakeSample:
    def test_loss_on_every_response_token_and_none_of_the_prompt(self) -> None:
        sample = make_sample(
            response([11, 12], [21, 22, 2]), np.array([-1.0, -2.0, -3.0], dtype=np.float32)
        )
        assert sample.token_ids.tolist() == [11, 12, 21, 22, 2]
        assert sample.loss_mask.tolist() == [False, False, True, True, True], (
            "the end token (2) carries loss"
        )
        assert sample.teacher_logprobs is not None
        assert sample.teacher_logprobs.tolist() == [0, 0, -1, -2, -3]
        assert sample.sampling_logprobs is not None
        close(sample.sampling_logprobs, [0, 0, -2.1, -2.2, -0.2], rel=1e-6)

    def test_respects_the_responses_own_mask(self) -> None:
        sample = make_sample(response([11], [21, 22, 23], [True, False, True]))
        assert sample.loss_mask.tolist() == [False, True, False, True]
        assert sample.teacher_logprobs is None

    def test_the_first_token_never_carries_loss(self) -> None:
        assert make_sample(response([], [21, 22])).loss_mask.tolist() == [False, True]

    def test_scores_of_another_response_are_refused(self) -> None:
        with pytest.raises(
            DataError,
            match=r"response \('p0', 0\): there are 2 teacher log\-probabilities for 3 tokens",
        ):
            make_sample(response([11], [21, 22, 23]), np.zeros(2, dtype=np.float32))


class TestBuildMicrobatch:
    def test_two_sequences_and_padding_written_out(self) -> None:
        first = make_sample(response([11, 12], [21, 22]), np.array([-1.0, -2.0], dtype=np.float32))
        second = make_sample(response([13], [23, 24]), np.array([-3.0, -4.0], dtype=np.float32))
        microbatch = build_microbatch([first, second], pad_multiple=4)
        assert microbatch.token_ids.tolist() == [11, 12, 21, 22, 13, 23, 24, 0]
        assert microbatch.labels.tolist() == [12, 21, 22, 0, 23, 24, 0, 0]
        assert microbatch.loss_mask.tolist() == [False, True, True, False, True, True, False, False]
        assert microbatch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
        assert microbatch.cu_seqlens.tolist() == [0, 4, 7, 8]
        assert (microbatch.num_sequences, microbatch.max_seqlen) == (2, 4)
        assert microbatch.teacher_logprobs is not None
        assert microbatch.teacher_logprobs.tolist() == [0, -1, -2, 0, -3, -4, 0, 0]

    def test_types_are_those_of_the_record(self) -> None:
        microbatch = build_microbatch(random_samples([5, 9]), pad_multiple=4)
        assert microbatch.teacher_logprobs is not None
        assert microbatch.sampling_logprobs is not None
        dtypes = {
            name: getattr(microbatch, name).dtype.name
            for name in ("token_ids", "labels", "position_ids", "loss_mask", "cu_seqlens")
        }
        assert dtypes == {
            "token_ids": "int64",
            "labels": "int64",
            "position_ids": "int64",
            "loss_mask": "bool",
            "cu_seqlens": "int32",
        }
        assert microbatch.teacher_logprobs.dtype == microbatch.sampling_logprobs.dtype == np.float32

    @given(
        st.lists(st.integers(1, 20), min_size=1, max_size=8),
        st.sampled_from([1, 2, 8]),
        st.integers(0, 99),
    )
    def test_every_label_is_the_next_token_of_its_own_sequence(
        self, lengths: list[int], pad_multiple: int, seed: int
    ) -> None:
        samples = random_samples(lengths, seed=seed)
        microbatch = build_microbatch(samples, pad_multiple)
        assert len(microbatch.token_ids) % pad_multiple == 0
        assert microbatch.teacher_logprobs is not None
        assert microbatch.sampling_logprobs is not None
        for start, sample in zip(
            microbatch.cu_seqlens[: microbatch.num_sequences], samples, strict=True
        ):
            here = slice(start, start + len(sample) - 1)
            after = slice(1, None)
            np.testing.assert_array_equal(
                microbatch.token_ids[start : start + len(sample)], sample.token_ids
            )
            np.testing.assert_array_equal(microbatch.labels[here], sample.token_ids[after])
            np.testing.assert_array_equal(microbatch.loss_mask[here], sample.loss_mask[after])
            np.testing.assert_array_equal(
                microbatch.teacher_logprobs[here], np.asarray(sample.teacher_logprobs)[after]
            )
            np.testing.assert_array_equal(
                microbatch.sampling_logprobs[here], np.asarray(sample.sampling_logprobs)[after]
            )
            last = start + len(sample) - 1
            assert (
                microbatch.labels[last],
                microbatch.loss_mask[last],
                microbatch.teacher_logprobs[last],
            ) == (0, False, 0.0)
        assert microbatch.loss_mask.sum() == sum(sample.loss_mask[1:].sum() for sample in samples)

    def test_a_microbatch_knows_its_responses_by_key(self) -> None:
        named = make_sample(response([1], [2, 3]), float32([-1.0, -1.0]))
        unnamed = random_samples([4])[0]
        assert build_microbatch([named, unnamed], pad_multiple=8).keys == (("p0", 0),)

    def test_no_padding_where_none_is_needed(self) -> None:
        microbatch = build_microbatch(random_samples([3, 5]), pad_multiple=8)
        assert microbatch.cu_seqlens.tolist() == [0, 3, 8]

    def test_no_samples_give_padding_alone(self) -> None:
        microbatch = build_microbatch([], pad_multiple=4)
        assert microbatch.cu_seqlens.tolist() == [0, 4]
        assert (microbatch.num_sequences, microbatch.max_seqlen) == (0, 4)
        assert not microbatch.loss_mask.any()
        assert microbatch.teacher_logprobs is not None

    def test_log_probabilities_are_for_all_or_for_none(self) -> None:
        with_scores = random_samples([4])[0]
        without = Sample(with_scores.token_ids, with_scores.loss_mask)
        assert build_microbatch([without, without]).teacher_logprobs is None
        with pytest.raises(
            DataError, match="only 1 of 2 samples of a microbatch have teacher_logprobs"
        ):
            build_microbatch([with_scores, without])


class TestRoutedExperts:
    def routed(self, prompt: list[int], tokens: list[int], *, layers: int = 1) -> Response:
        positions = len(prompt) + len(tokens) - 1
        experts = np.arange(positions * layers * 2, dtype=np.int16).reshape(positions, layers, 2)
        return dataclasses.replace(response(prompt, tokens), routed_experts=experts)

    def test_they_belong_to_tokens_and_are_not_shifted(self) -> None:
        samples = [make_sample(self.routed([11, 12], [21, 2])), make_sample(self.routed([11], [2]))]
        packed = build_microbatch(samples, 4)
        assert packed.routed_experts is not None
        # Three rows and one that does not matter, one row and one that does not, and padding.
        assert packed.routed_experts[:, 0].tolist() == [
            *([0, 1], [2, 3], [4, 5], [0, 1]),
            *([0, 1], [0, 1]),
            *([0, 1], [0, 1]),
        ]
        assert build_microbatch([make_sample(response([11], [2]))]).routed_experts is None

    def test_some_samples_without_them_are_refused(self) -> None:
        mixed = [make_sample(self.routed([11], [2])), make_sample(response([11], [2]))]
        with pytest.raises(DataError, match="only 1 of 2 samples of a microbatch have routed_exp"):
            build_microbatch(mixed)

    def test_those_of_two_models_are_refused(self) -> None:
        mixed = [make_sample(self.routed([11], [2], layers=layers)) for layers in (1, 2)]
        with pytest.raises(DataError, match="routed experts of several shapes"):
            build_microbatch(mixed)
