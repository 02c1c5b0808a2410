"""The data that crosses a boundary: frozen, slotted, lengths checked when built.

Conventions: ``*_logprobs[t]`` is the natural-log probability of ``token_ids[t]`` given all before
it, at temperature 1. Token ids are the truth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]
Int16s: TypeAlias = NDArray[np.int16]
Bools: TypeAlias = NDArray[np.bool_]
FinishReason: TypeAlias = Literal["stop", "length", "abort"]
Key: TypeAlias = tuple[str, int]  # (prompt_id, sample_index): names one response in a run

FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


def int32(values: Sequence[int] | NDArray[Any]) -> Ints:
    """Token ids as int32 [N]; ValueError for anything that does not fit."""
    array = np.asarray(values)
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"token ids must lie in 0..2^31-1, got {array.min()}..{array.max()}")
    return array.astype(np.int32, casting="unsafe").reshape(-1)


def float32(values: Sequence[float] | NDArray[Any]) -> Floats:
    """Log-probabilities as float32 [N]."""
    return np.asarray(values, dtype=np.float32).reshape(-1)


def token_hash(prompt_ids: Ints, token_ids: Ints) -> str:
    """16 hex digits that name a token sequence and its split into prompt and response."""
    digest = hashlib.sha256(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(token_ids, dtype="<i4").tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as chat messages. answer: what the verifier of its domain compares with."""

    prompt_id: str
    messages: tuple[Mapping[str, str], ...]
    domain: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response. The end token, where it was sampled, is the last of token_ids; a
    truncated response has none.

    sampling_logprobs f32[R]: by the policy that sampled, at temperature 1. weight_version: of that
    policy.
    loss_mask bool[R]: tokens that SFT learns from; None means all (sampled responses); written
    demonstrations may mask some.
    routed_experts i16[P + R - 1, layers, k]: the experts that the sampler chose at each position,
    for replay in training.
    """

    prompt_id: str
    sample_index: int
    prompt_ids: Ints  # [P]
    token_ids: Ints  # [R]
    sampling_logprobs: Floats  # [R]
    finish_reason: FinishReason
    weight_version: str
    loss_mask: Bools | None = None  # [R]
    routed_experts: Int16s | None = None  # [P + R - 1, layers, k]

    def __post_init__(self) -> None:
        if len(self.sampling_logprobs) != len(self.token_ids):
            raise ValueError(
                f"response {self.key}: {len(self.sampling_logprobs)} log-probabilities for {len(self.token_ids)} tokens"
            )
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(
                f"response {self.key}: finish_reason {self.finish_reason!r} is none of {FINISH_REASONS}"
            )
        if self.loss_mask is not None and len(self.loss_mask) != len(self.token_ids):
            raise ValueError(
                f"response {self.key}: loss_mask of {len(self.loss_mask)} for {len(self.token_ids)} tokens"
            )
        positions = len(self.prompt_ids) + len(self.token_ids) - 1
        if self.routed_experts is not None and (
            self.routed_experts.ndim != 3 or len(self.routed_experts) != positions
        ):
            raise ValueError(
                f"response {self.key}: routed_experts of shape {self.routed_experts.shape} for {positions} positions"
            )

    @property
    def key(self) -> Key:
        return (self.prompt_id, self.sample_index)


TAIL_FLOOR = (
    1e-6  # least probability of a tail: K float32 probabilities may add up to a little more than 1
)


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's K likeliest tokens where each response token was sampled, the likeliest first,
    at temperature 1.
    """

    ids: Ints  # [R, K]
    logprobs: Floats  # [R, K]
    tail_logprob: Floats  # [R], of all other tokens together; at least log TAIL_FLOOR

    def __post_init__(self) -> None:
        if (
            self.ids.ndim != 2
            or self.ids.shape != self.logprobs.shape
            or self.tail_logprob.shape != self.ids.shape[:1]
        ):
            raise ValueError(
                f"top-K: ids {self.ids.shape}, log-probabilities {self.logprobs.shape}, tails {self.tail_logprob.shape}"
            )


def top_k_of(ids: NDArray[Any], logprobs: NDArray[Any]) -> TopK:
    """From ids and log-probabilities [R, K] alone; the tail is what is missing to 1."""
    outside = 1.0 - np.exp(np.asarray(logprobs, dtype=np.float64)).sum(-1)
    return TopK(
        np.asarray(ids, dtype=np.int32),
        np.asarray(logprobs, dtype=np.float32),
        float32(np.log(np.maximum(outside, TAIL_FLOOR))),
    )


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """What the teacher says of one response, at temperature 1: the log-probability of every token,
    and more where it was asked for.

    token_hash ties it to the exact ids. teacher: fingerprint of the teacher's weights, where a
    cache has several.
    """

    prompt_id: str
    sample_index: int
    token_hash: str
    teacher_logprobs: Floats  # [R]
    top: TopK | None = None
    entropy: Floats | None = None  # [R], of the teacher's distribution, in nats
    teacher: str = ""

    def __post_init__(self) -> None:
        for name, column in (
            ("top-K rows", None if self.top is None else self.top.ids),
            ("entropies", self.entropy),
        ):
            if column is not None and len(column) != len(self.teacher_logprobs):
                raise ValueError(
                    f"scores of {self.key}: {len(column)} {name} for {len(self.teacher_logprobs)} tokens"
                )

    @property
    def key(self) -> Key:
        return (self.prompt_id, self.sample_index)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the trainer learns from: prompt and response in one row. Log-probabilities are 0 on the
    prompt.
    """

    token_ids: Ints  # [L]
    loss_mask: Bools  # [L], True where the token carries loss (never the first)
    sampling_logprobs: Floats | None = None  # [L]
    teacher_logprobs: Floats | None = None  # [L]
    key: Key | None = None  # of the response, for messages
    truncated: bool = False  # cut off before an end token
    teacher_top: TopK | None = None  # [L, K]
    teacher_index: int | None = None  # which of several teachers scored it

    def __post_init__(self) -> None:
        if self.teacher_top is not None and len(self.teacher_top.ids) != len(self.token_ids):
            raise ValueError(
                f"sample: top-K of {len(self.teacher_top.ids)} for {len(self.token_ids)} tokens"
            )
        for name in ("loss_mask", "sampling_logprobs", "teacher_logprobs"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.token_ids):
                raise ValueError(
                    f"sample: {name} has {len(column)} entries for {len(self.token_ids)} tokens"
                )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Packed sequences, already shifted: position t predicts labels[t]; mask and log-probabilities
    belong to labels[t].

    cu_seqlens i32[S+1]: sequence s occupies cu_seqlens[s]..cu_seqlens[s+1]; the first num_sequences
    of them are samples, one more may be padding.
    """

    token_ids: NDArray[np.int64]  # [T]
    labels: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T]
    loss_mask: Bools  # [T]
    cu_seqlens: Ints  # [S+1]
    max_seqlen: int
    num_sequences: int
    teacher_logprobs: Floats | None = None  # [T]
    sampling_logprobs: Floats | None = None  # [T]
    keys: tuple[Key, ...] = ()  # of the responses in it, for messages
    truncated: Bools | None = None  # [S], sequences that were cut off before an end token
    teacher_top: TopK | None = None  # [T, K]
    teacher_index: NDArray[np.int64] | None = (
        None  # [S], which of several teachers scored the sequence
    )

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        for name in (
            "labels",
            "position_ids",
            "loss_mask",
            "teacher_logprobs",
            "sampling_logprobs",
        ):
            column = getattr(self, name)
            if column is not None and len(column) != length:
                raise ValueError(
                    f"microbatch: {name} has {len(column)} entries for {length} tokens"
                )
        if self.teacher_top is not None and len(self.teacher_top.ids) != length:
            raise ValueError(
                f"microbatch: top-K of {len(self.teacher_top.ids)} for {length} tokens"
            )
        if len(self.cu_seqlens) < 2 or self.cu_seqlens[0] != 0 or self.cu_seqlens[-1] != length:
            raise ValueError(
                f"microbatch: cu_seqlens {self.cu_seqlens.tolist()[:3]}.. does not cover {length} tokens"
            )


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One published file of an artifact."""

    name: str
    rows: int
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A checkpoint by content: sha256 of weights (all safetensors and the config), of the
    tokenizer, of the chat template.
    """

    path: str
    weights: str
    tokenizer: str
    template: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is, from what it was made, and by whom. See lopd.artifacts for reading and
    writing.
    """

    kind: str
    schema_version: int
    complete: bool
    inputs: Mapping[str, Any]  # every config key and parent fingerprint that the content depends on
    parents: Mapping[str, str]  # parent artifact's kind -> fingerprint
    models: Mapping[str, ModelIdentity]
    sampling: Mapping[str, Any]
    lineage: Mapping[
        str, Any
    ]  # which teacher made the demonstrations behind this; overrides in force
    rows: int
    shards: tuple[ShardInfo, ...]
    versions: Mapping[str, str]
    fingerprint: str = ""
    extra: Mapping[str, Any] = field(
        default_factory=dict
    )  # figures of the stage: steps, losses, seconds
