"""The records that one part of the system hands to another.

Every record is frozen and slotted. It checks itself when it is built: a column that does not fit
the tokens is a ValueError.

``*_logprobs[t]`` is the log-probability of ``token_ids[t]``, given all tokens before it. It is a
natural logarithm at temperature 1. Token ids are the truth: text is derived from them and is never
tokenised back.

The examples below follow one response: the model answers "3" to "What is 1 + 2?". In them token 18
is "3" and token 2 ends a response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lopd.manifests import Manifest as Manifest
from lopd.manifests import ModelIdentity as ModelIdentity
from lopd.manifests import ShardInfo as ShardInfo

# The arrays of the records. Token ids are int32 and log-probabilities float32: half the bytes of
# what Python and numpy choose by themselves, for every token of a run.
Ints: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]
Int16s: TypeAlias = NDArray[np.int16]
Int8s: TypeAlias = NDArray[np.int8]
# One byte per token. True is a token that carries loss.
Bools: TypeAlias = NDArray[np.bool_]
FinishReason: TypeAlias = Literal["stop", "length", "abort"]
# (prompt_id, sample_index), which names one response of a run.
Key: TypeAlias = tuple[str, int]

# The same values at runtime, for the check of what a server or a file says.
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")
# The least probability that all tokens outside the top-K have together. K probabilities in float32
# may add up to slightly more than 1, and the logarithm of what is left must stay finite.
TAIL_FLOOR = 1e-6


def int32(values: Sequence[int] | NDArray[Any]) -> Ints:
    """Return token ids as int32 [N]. Raises ValueError if one of them does not fit."""
    array = np.asarray(values)
    # numpy would wrap a value that is too large around, and the id would name another token.
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"token ids must be in 0..2^31-1, got {array.min()}..{array.max()}")
    return array.astype(np.int32, casting="unsafe").reshape(-1)


def float32(values: Sequence[float] | NDArray[Any]) -> Floats:
    """Return log-probabilities as float32 [N]."""
    return np.asarray(values, dtype=np.float32).reshape(-1)


def token_hash(prompt_ids: Ints, token_ids: Ints) -> str:
    """Return 16 hexadecimal digits that name a prompt together with its response."""
    # The length of the prompt comes first. Without it, a token moved from the prompt to the
    # response would not change the hash. The byte order is fixed, so every machine agrees.
    digest = hashlib.sha256(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(token_ids, dtype="<i4").tobytes())
    return digest.hexdigest()[:16]


def _check_lengths(owner: str, record: object, names: Sequence[str], num_tokens: int) -> None:
    """Raise ValueError if a column that is there has another length than the tokens."""
    for name in names:
        value = getattr(record, name)
        # A top-K has three columns and has checked by itself that they fit each other.
        column = value.ids if isinstance(value, TopK) else value
        if column is not None and len(column) != num_tokens:
            raise ValueError(f"{owner}: {name} has {len(column)} entries for {num_tokens} tokens")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question to the model, as chat messages.

    Attributes:
        domain: The task that verifies the answers, for example "math".
        answer: The value that the verifier of the domain compares an answer with.
        hint: What the teacher alone may see (score.teacher_prompt).

    Example:
        >>> question = {"role": "user", "content": "What is 1 + 2?"}
        >>> Prompt("sum-7", (question,), domain="math", answer="3").answer
        '3'
    """

    prompt_id: str
    messages: tuple[Mapping[str, str], ...]
    domain: str
    answer: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One response that a policy sampled. P is the prompt's length and R the response's.

    Attributes:
        token_ids: The tokens exactly as sampled. If the end token was sampled, it is the last one.
            A truncated response has no end token. Of an agent's response, they are all turns, with
            what a tool wrote between them.
        sampling_logprobs: By the policy that sampled, at temperature 1 even if the tokens were
            drawn at another temperature.
        finish_reason: "stop" if the response ended by itself, "length" if it was cut at the length
            limit, "abort" if it was cut otherwise, as by a limit of turns.
        weight_version: The version of the weights that sampled.
        loss_mask: True for each token that is learnt from. None means all tokens, as in sampled
            responses of one turn. Where it is False, the log-probabilities say nothing.
        routed_experts: The experts that the policy chose at each position, for replay in training.

    Example:
        The policy gave "3" a probability of 0.70 and the end token one of 0.95.

        >>> response = Response(
        ...     prompt_id="sum-7",
        ...     sample_index=0,
        ...     prompt_ids=int32([11, 25, 40]),
        ...     token_ids=int32([18, 2]),
        ...     sampling_logprobs=float32([-0.357, -0.051]),
        ...     finish_reason="stop",
        ...     weight_version="sft-3000",
        ... )
        >>> response.key
        ('sum-7', 0)
        >>> np.exp(response.sampling_logprobs).round(2)
        array([0.7 , 0.95], dtype=float32)
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
        # The key comes first in the message: a run has millions of responses, and the user has to
        # find this one.
        owner = f"response {self.key}"
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(
                f"{owner}: finish_reason {self.finish_reason!r} is not one of {FINISH_REASONS}"
            )
        _check_lengths(owner, self, ("sampling_logprobs", "loss_mask"), len(self.token_ids))
        # Nothing is predicted from the last token, so the sampler never routes it.
        positions = len(self.prompt_ids) + len(self.token_ids) - 1
        routed = self.routed_experts
        if routed is not None and (routed.ndim != 3 or len(routed) != positions):
            raise ValueError(
                f"{owner}: routed_experts has shape {routed.shape} for {positions} positions"
            )

    @property
    def key(self) -> Key:
        return (self.prompt_id, self.sample_index)


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's K likeliest tokens at each response token, the likeliest first.

    Attributes:
        logprobs: At temperature 1, over the whole vocabulary.
        tail_logprob: The log-probability of all other tokens together. It is at least
            log(TAIL_FLOOR).

    Example:
        The first token had two likely values, with probabilities 0.90 and 0.06. All other tokens
        share the remaining 0.04.

        >>> top = top_k_of([[18, 19], [2, 5]], [[-0.105, -2.813], [-0.020, -4.605]])
        >>> top.ids[0].tolist()
        [18, 19]
        >>> np.exp(top.tail_logprob).round(2)
        array([0.04, 0.01], dtype=float32)
    """

    ids: Ints  # [R, K]
    logprobs: Floats  # [R, K]
    tail_logprob: Floats  # [R]

    def __post_init__(self) -> None:
        # Each row of ids has its row of values and its one tail.
        shape = self.ids.shape
        tail_shape = self.tail_logprob.shape
        if len(shape) != 2 or self.logprobs.shape != shape or tail_shape != shape[:1]:
            raise ValueError(
                f"top-K: ids have shape {shape}, log-probabilities {self.logprobs.shape}, "
                f"and tails {tail_shape}"
            )


def top_k_of(
    ids: Sequence[Sequence[int]] | NDArray[Any], logprobs: Sequence[Sequence[float]] | NDArray[Any]
) -> TopK:
    """Return the top-K of ids and log-probabilities [R, K]. The tail is what is missing to 1."""
    # In float64, because the difference to 1 of many nearly full sums would lose all its digits.
    outside = 1.0 - np.exp(np.asarray(logprobs, dtype=np.float64)).sum(-1)
    return TopK(
        # A server may answer with float64 and int64. The record has the types of the file.
        np.asarray(ids, dtype=np.int32),
        np.asarray(logprobs, dtype=np.float32),
        float32(np.log(np.maximum(outside, TAIL_FLOOR))),
    )


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """The teacher's log-probability of every token of one response, at temperature 1.

    Attributes:
        token_hash: Ties the scores to the exact ids that were scored (see token_hash()).
        top: The teacher's likeliest tokens, if the run asked for them.
        entropy: The entropy of the teacher's distribution in nats, if the run asked for it.
        base_logprobs: The log-probability of every token by the teacher's own base, if the run
            asked for it.
        teacher: The fingerprint of the teacher's weights in a cache with several teachers.
        alignment: What became of each token where the teacher has another tokenizer. It is 0 where
            the teacher's log-probability could be brought over (lopd.tasks.cross_tokenizer).

    Example:
        The teacher gives "3" a probability of 0.90. The student gave it 0.70, so the first
        advantage is log 0.90 - log 0.70 = 0.25.

        >>> scores = TeacherScores(
        ...     prompt_id="sum-7",
        ...     sample_index=0,
        ...     token_hash=token_hash(int32([11, 25, 40]), int32([18, 2])),
        ...     teacher_logprobs=float32([-0.105, -0.020]),
        ... )
        >>> (scores.teacher_logprobs - float32([-0.357, -0.051])).round(2)
        array([0.25, 0.03], dtype=float32)
    """

    prompt_id: str
    sample_index: int
    token_hash: str
    teacher_logprobs: Floats  # [R]
    top: TopK | None = None
    entropy: Floats | None = None  # [R]
    teacher: str = ""
    base_logprobs: Floats | None = None  # [R]
    alignment: Int8s | None = None  # [R]

    def __post_init__(self) -> None:
        num_tokens = len(self.teacher_logprobs)
        columns = ("top", "entropy", "base_logprobs", "alignment")
        _check_lengths(f"scores of {self.key}", self, columns, num_tokens)

    @property
    def key(self) -> Key:
        return (self.prompt_id, self.sample_index)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its response in one row [L], as the trainer learns from it. L is P + R.

    Log-probabilities are 0 on the prompt.

    Attributes:
        loss_mask: True where the token carries loss. The first token never does, because no token
            stands before it.
        truncated: True if the response was cut off before an end token.
        teacher_index: The number of the teacher that scored it, if there are several.
        right: Whether a verifier found its answer right, if it was judged.
        base_logprobs: By the teacher's own base, if the cache has them.
        routed_experts: The experts that the sampler chose at each position, for replay. The last
            position, which it has not routed, has any distinct ones.

    Example:
        >>> sample = Sample(
        ...     token_ids=int32([11, 25, 40, 18, 2]),
        ...     loss_mask=np.array([False, False, False, True, True]),
        ...     teacher_logprobs=float32([0, 0, 0, -0.105, -0.020]),
        ...     key=("sum-7", 0),
        ... )
        >>> len(sample), int(sample.loss_mask.sum())
        (5, 2)
    """

    token_ids: Ints  # [L]
    loss_mask: Bools  # [L]
    sampling_logprobs: Floats | None = None  # [L]
    teacher_logprobs: Floats | None = None  # [L]
    key: Key | None = None  # of the response, for messages
    truncated: bool = False
    teacher_top: TopK | None = None  # [L, K]
    teacher_index: int | None = None
    right: bool | None = None
    base_logprobs: Floats | None = None  # [L]
    routed_experts: Int16s | None = None  # [L, layers, k]

    def __post_init__(self) -> None:
        logprobs = ("sampling_logprobs", "teacher_logprobs", "base_logprobs")
        columns = ("loss_mask", *logprobs, "teacher_top", "routed_experts")
        _check_lengths("sample", self, columns, len(self))

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Several samples packed end to end [T] and shifted by one.

    Position t predicts labels[t]. The mask and the log-probabilities at t belong to labels[t]. The
    last position of a sequence predicts nothing: its label is 0 and its mask is False.

    Attributes:
        cu_seqlens: Sequence s occupies the positions cu_seqlens[s] to cu_seqlens[s + 1]. S is the
            number of sequences.
        max_seqlen: The length of the longest sequence in tokens.
        num_sequences: How many sequences are samples. One more may follow, which is padding.
        truncated: True for each sequence that was cut off before an end token.
        teacher_index: The number of the teacher that scored each sequence, if there are several.
        right: True for each sequence whose answer a verifier found right, if they were judged.
        base_logprobs: By the teacher's own base, if the cache has them.
        routed_experts: The experts that each position is to be routed to. These belong to
            token_ids and are not shifted.

    Example:
        The sample above is packed together with a shorter one, [11, 40, 2], whose response is only
        the end token.

        >>> batch = Microbatch(
        ...     token_ids=np.array([11, 25, 40, 18, 2, 11, 40, 2]),
        ...     labels=np.array([25, 40, 18, 2, 0, 40, 2, 0]),
        ...     position_ids=np.array([0, 1, 2, 3, 4, 0, 1, 2]),
        ...     loss_mask=np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=np.bool_),
        ...     cu_seqlens=int32([0, 5, 8]),
        ...     max_seqlen=5,
        ...     num_sequences=2,
        ...     teacher_logprobs=float32([0, 0, -0.105, -0.020, 0, 0, -0.301, 0]),
        ... )
        >>> batch.labels[batch.loss_mask].tolist()
        [18, 2, 2]
    """

    token_ids: NDArray[np.int64]  # [T]
    labels: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T]
    loss_mask: Bools  # [T]
    cu_seqlens: Ints  # [S + 1]
    max_seqlen: int
    num_sequences: int
    teacher_logprobs: Floats | None = None  # [T]
    sampling_logprobs: Floats | None = None  # [T]
    keys: tuple[Key, ...] = ()  # of the responses, for messages
    truncated: Bools | None = None  # [S]
    teacher_top: TopK | None = None  # [T, K]
    teacher_index: NDArray[np.int64] | None = None  # [S]
    right: Bools | None = None  # [S]
    base_logprobs: Floats | None = None  # [T]
    routed_experts: Int16s | None = None  # [T, layers, k]

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        logprobs = ("teacher_logprobs", "sampling_logprobs", "base_logprobs", "teacher_top")
        columns = ("labels", "position_ids", "loss_mask", *logprobs, "routed_experts")
        _check_lengths("microbatch", self, columns, length)
        # The attention kernels read these bounds without a check: a wrong one would let tokens of
        # one sample attend to those of another.
        bounds = self.cu_seqlens
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length:
            raise ValueError(
                f"microbatch: cu_seqlens {bounds.tolist()[:3]}.. does not cover {length} tokens"
            )
