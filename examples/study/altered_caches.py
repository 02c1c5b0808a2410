"""Caches in which one thing is altered: what the reference code does otherwise, and controls.

    python -m examples.study.altered_caches no_end SOURCE OUT
    python -m examples.study.altered_caches mismatched SOURCE OUT --temperature 0.8
    python -m examples.study.altered_caches silent SOURCE OUT --seed 2
    python -m examples.study.altered_caches shuffled SOURCE OUT --seed 2
    python -m examples.study.altered_caches pushed_down SOURCE OUT --below 0.5

SOURCE is a teacher's cache with a top-K. OUT is an artifact of its own, with the source as parent.
Its manifest says what was altered, and no longer that the teacher of the demonstrations gave the
scores. So distill takes it with ``distill.allow_foreign_cache = true`` alone, and records that. The
same command goes on after a kill. altered_responses.py has what is about responses alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lopd import cache
from lopd.artifacts import ArtifactWriter, publish_json, read_complete, read_shard
from lopd.cache.checks import require_sound, vocabulary
from lopd.cache.table import TEACHER_CACHE
from lopd.errors import ArtifactError
from lopd.records import (
    Floats,
    Manifest,
    Response,
    TeacherScores,
    TopK,
    float32,
    token_hash,
    top_k_of,
)

Row: TypeAlias = tuple[Response, TeacherScores]
# A teacher's log-probability that is below every clip: the advantage is minus the clip, always.
NEVER = -1000.0
# The clip of the paper, for the figures of a manifest.
PAPER_CLIP = 10.0
# What stays true of every altered cache. Values are always written with 32 bits.
_CARRIED = ("vocab_size", "end_token_ids", "top_k")


@dataclass(frozen=True)
class Alteration:
    """One thing that is altered in every row of a cache."""

    # The name of its command.
    name: str
    # The same in words, for the manifest.
    what: str
    # Returns the altered row; None leaves the row out.
    of_row: Callable[[Response, TeacherScores], Row | None]
    # What else decides the content.
    settings: Mapping[str, Any] = field(default_factory=dict)
    # The largest error of an approximation in a row, in nats; None: nothing is approximated.
    error_of: Callable[[TeacherScores], float] | None = None
    # Whether another than the teacher of the source gives the scores.
    replaces_teacher: bool = False


@dataclass
class _Effect:
    """Figures of an altered cache over the tokens that carry loss, before any update."""

    rows_left_out: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    advantage: float = 0.0
    num_beyond_clip: int = 0
    largest_error: float = 0.0

    def add(self, response: Response, scores: TeacherScores) -> None:
        """Count the tokens of an altered row."""
        mask = _mask_of(response)
        advantage = (scores.teacher_logprobs - response.sampling_logprobs)[mask]
        self.num_tokens += len(mask)
        self.num_loss_tokens += int(mask.sum())
        self.advantage += float(advantage.sum(dtype=np.float64))
        self.num_beyond_clip += int((np.abs(advantage) > PAPER_CLIP).sum())

    def as_json(self) -> dict[str, Any]:
        count = max(1, self.num_loss_tokens)
        return {
            "rows_left_out": self.rows_left_out,
            "tokens": self.num_tokens,
            "loss_tokens": self.num_loss_tokens,
            "mean_advantage": self.advantage / count,
            "share_beyond_10": self.num_beyond_clip / count,
            "largest_error": self.largest_error,
        }


def alter(source: Path, out: Path, alteration: Alteration) -> Manifest:
    """Publish a cache that differs from its source by one alteration.

    ``extra.altered`` of its manifest has the figures of what it then holds.

    Args:
        source: A sound cache of one teacher, with its top-K.
        out: The folder of the altered cache.
        alteration: What is altered.

    Raises:
        ArtifactError: The source is no cache of a teacher with its top-K.
        LopdError: The source is not sound.
    """
    manifest = read_complete(source)
    _check_source(source, manifest)
    models = dict(manifest.models)
    lineage = {**manifest.lineage, "consistent": False, "altered": alteration.what}
    if alteration.replaces_teacher:
        # Nobody must take the scores for those of a model.
        models = {role: one for role, one in models.items() if not role.startswith("teacher")}
        lineage["score_teacher"] = ""
    writer = ArtifactWriter(
        out,
        kind=TEACHER_CACHE,
        inputs={"altered": alteration.name, **alteration.settings},
        parents={manifest.kind: manifest.fingerprint},
        models=models,
        sampling=manifest.sampling,
        lineage=lineage,
    )
    effect = _Effect()
    for index, shard in enumerate(manifest.shards):
        rows: list[Row] = []
        for response, scores in cache.scored_rows(read_shard(source, shard), str(source)):
            assert scores is not None, "a cache of a teacher has scores"
            row = alteration.of_row(response, scores)
            if row is None:
                effect.rows_left_out += 1
                continue
            rows.append(row)
            effect.add(*row)
            if alteration.error_of is not None:
                effect.largest_error = max(effect.largest_error, alteration.error_of(scores))
        # The figures are of all shards, those of a killed call included.
        if not writer.is_published(index):
            writer.publish_shard(index, cache.to_table([r for r, _ in rows], [s for _, s in rows]))
    carried = {name: manifest.extra[name] for name in _CARRIED if name in manifest.extra}
    return writer.finish(**carried, logprob_bits=32, logprob_loss=None, altered=effect.as_json())


def _check_source(source: Path, manifest: Manifest) -> None:
    has_top = "teacher_top_ids" in read_shard(source, manifest.shards[0]).column_names
    if manifest.kind != TEACHER_CACHE or not has_top or vocabulary(manifest) is None:
        raise ArtifactError(
            f"this artifact of kind {manifest.kind} cannot be altered",
            where=str(source),
            limit=f"a {TEACHER_CACHE} with the teacher's top-K and a known vocabulary",
            remedy="give the cache of a score stage with score.top_k above 0",
        )
    require_sound(source)


def without_end() -> Alteration:
    """The end token is lost, as where the decoded text of a response is tokenised again.

    With it goes the finish reason. A response that is its end token alone is left out.
    """

    def of_row(response: Response, scores: TeacherScores) -> Row | None:
        if response.finish_reason != "stop":
            return response, scores
        if len(response.token_ids) == 1:
            return None
        # Whether such a response was cut off, nothing says any more. An import says "length" too.
        return cut(response, scores, len(response.token_ids) - 1)

    return Alteration("no_end", "the end token of each finished response was removed", of_row)


def cut(response: Response, scores: TeacherScores, length: int) -> Row:
    """Return the first tokens of a response and their scores."""
    mask = response.loss_mask
    routed = response.routed_experts
    shorter = replace(
        response,
        token_ids=response.token_ids[:length],
        sampling_logprobs=response.sampling_logprobs[:length],
        finish_reason="length",
        loss_mask=None if mask is None else mask[:length],
        routed_experts=None if routed is None else routed[: len(response.prompt_ids) + length - 1],
    )
    top = scores.top
    if top is not None:
        top = TopK(top.ids[:length], top.logprobs[:length], top.tail_logprob[:length])
    return shorter, replace(
        scores,
        # Of the tokens that are left: the hash ties scores to them.
        token_hash=token_hash(shorter.prompt_ids, shorter.token_ids),
        teacher_logprobs=scores.teacher_logprobs[:length],
        top=top,
        entropy=None if scores.entropy is None else scores.entropy[:length],
        base_logprobs=None if scores.base_logprobs is None else scores.base_logprobs[:length],
    )


def mismatched(temperature: float, vocab_size: int) -> Alteration:
    """The teacher is flattened so far that the student comes to rest where a mismatch leads it.

    That code divides the student's logits by the temperature tau of the rollouts and leaves the
    teacher's as they are. Such a student rests where log pi = tau log pi_T + const. This is also
    where a student rests whose teacher is pi_T^tau / Z at equal temperatures, and that teacher can
    be written into a cache. The path to this point is not the same.
    """

    def of_row(response: Response, scores: TeacherScores) -> Row:
        top = _top_of(scores)
        log_z = _log_normaliser(top, temperature, vocab_size)
        flattened = top_k_of(top.ids, temperature * top.logprobs - log_z[:, None])
        values = float32(np.minimum(0.0, temperature * scores.teacher_logprobs - log_z))
        return response, replace(scores, teacher_logprobs=values, top=flattened, entropy=None)

    def error_of(scores: TeacherScores) -> float:
        # One token may have all of the tail in truth. This is the other end of what can be.
        top = _top_of(scores)
        one = _log_normaliser(top, temperature, top.ids.shape[1] + 1)
        return float(np.abs(_log_normaliser(top, temperature, vocab_size) - one).max())

    return Alteration(
        "mismatched",
        f"the teacher is the one of the scores to the power of {temperature}",
        of_row,
        settings={"temperature": temperature, "vocab_size": vocab_size},
        error_of=error_of,
        replaces_teacher=True,
    )


def _log_normaliser(top: TopK, temperature: float, vocab_size: int) -> Floats:
    """Return the log of the sum of p^temperature over the vocabulary, [R].

    The tokens outside of the top-K share the tail in equal parts.
    """
    outside = vocab_size - top.ids.shape[1]
    each = top.tail_logprob.astype(np.float64) - np.log(outside)
    powers = np.exp(temperature * top.logprobs.astype(np.float64)).sum(1)
    summed: Floats = np.log(powers + outside * np.exp(temperature * each))
    return summed


def silent(seed: int, vocab_size: int) -> Alteration:
    """The teacher says nothing: at each token another random order decides which ids it means.

    Its probabilities, and so its entropy, are those of the teacher at the same place.
    """

    def of_row(response: Response, scores: TeacherScores) -> Row:
        # By content, so that a row has its draws wherever it lies.
        rng = np.random.default_rng([seed, int(scores.token_hash, 16)])
        # Ranks of random numbers, whose algorithm no numpy changes.
        orders = rng.random((len(response.token_ids), vocab_size)).argsort(axis=1, kind="stable")
        return response, _renamed(response, scores, orders)

    return Alteration(
        "silent",
        "the teacher's probabilities belong to other tokens, drawn anew at each token",
        of_row,
        settings={"seed": seed, "vocab_size": vocab_size},
        replaces_teacher=True,
    )


def shuffled(seed: int, vocab_size: int) -> Alteration:
    """The teacher's tokens are shuffled: one random order, everywhere the same.

    Unlike a silent teacher it is a consistent one, of a language that the task does not have.
    """
    order = np.random.default_rng(seed).random(vocab_size).argsort(kind="stable")

    def of_row(response: Response, scores: TeacherScores) -> Row:
        orders = np.broadcast_to(order, (len(response.token_ids), vocab_size))
        return response, _renamed(response, scores, orders)

    return Alteration(
        "shuffled",
        "the teacher's probabilities belong to other tokens, the same everywhere",
        of_row,
        settings={"seed": seed, "vocab_size": vocab_size},
        replaces_teacher=True,
    )


def _renamed(response: Response, scores: TeacherScores, orders: NDArray[np.int64]) -> TeacherScores:
    """Return the scores of a teacher that gives token orders[t, v] what it gave v.

    Args:
        response: The response, of R tokens.
        scores: The teacher's scores.
        orders: A permutation of the vocabulary for each token, [R, V].
    """
    top = _top_of(scores)
    outside = orders.shape[1] - top.ids.shape[1]
    sampled = response.token_ids[:, None].astype(np.int64)
    # The token whose probability the sampled one gets, [R, 1].
    origin = np.take_along_axis(np.argsort(orders, axis=1), sampled, axis=1)
    is_origin = top.ids == origin
    # Of tokens outside of the top-K only the sum is known. They share it in equal parts.
    values = np.where(
        is_origin.any(1),
        np.where(is_origin, top.logprobs, 0.0).sum(1),
        top.tail_logprob - np.log(outside),
    )
    # A token that keeps its own probability has the one that is on record.
    values = np.where(origin[:, 0] == sampled[:, 0], scores.teacher_logprobs, values)
    ids = np.take_along_axis(orders, top.ids.astype(np.int64), axis=1).astype(np.int32)
    renamed = TopK(ids, top.logprobs, top.tail_logprob)
    return replace(scores, teacher_logprobs=float32(values), top=renamed)


def pushed_down(below: float) -> Alteration:
    """No teacher: tokens that the student found unlikely get one fixed negative advantage.

    A teacher's log-probability below every clip makes the advantage minus
    ``distill.advantage_clip``, whatever the student does. All other tokens carry no loss.

    Args:
        below: A token is unlikely if the policy of the rollouts gave it less than this probability.
    """

    def of_row(response: Response, scores: TeacherScores) -> Row:
        mask = _mask_of(response) & (response.sampling_logprobs < np.log(below))
        values = float32(np.where(mask, NEVER, 0.0))
        # The top-K are of a teacher, and there is none.
        bare = replace(scores, teacher_logprobs=values, top=None, entropy=None, base_logprobs=None)
        return replace(response, loss_mask=mask), bare

    return Alteration(
        "pushed_down",
        f"no teacher: tokens with a probability below {below} at sampling are pushed down",
        of_row,
        settings={"below": below},
        replaces_teacher=True,
    )


def _mask_of(response: Response) -> NDArray[np.bool_]:
    mask = response.loss_mask
    return np.ones(len(response.token_ids), bool) if mask is None else mask


def _top_of(scores: TeacherScores) -> TopK:
    assert scores.top is not None, "the source was checked for its top-K"
    return scores.top


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("no_end", "mismatched", "silent", "shuffled", "pushed_down")
    made.add_argument("alteration", choices=names)
    made.add_argument("source", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--temperature", type=float, default=0.8)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--below", type=float, default=0.5)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    vocab_size = vocabulary(read_complete(options.source)) or 0
    alterations = {
        "no_end": without_end,
        "mismatched": lambda: mismatched(options.temperature, vocab_size),
        "silent": lambda: silent(options.seed, vocab_size),
        "shuffled": lambda: shuffled(options.seed, vocab_size),
        "pushed_down": lambda: pushed_down(options.below),
    }
    manifest = alter(options.source, options.out, alterations[options.alteration]())
    # Beside the cache, for the page.
    publish_json(options.out.with_suffix(".json"), manifest.extra["altered"])
    print(f"{options.out}: {manifest.rows} responses; {manifest.lineage['altered']}")


if __name__ == "__main__":
    main()
