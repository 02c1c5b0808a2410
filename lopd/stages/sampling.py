"""Sampling and scoring into an artifact: each response published exactly once, in shards whose
members never change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_shard
from lopd.config import Sampling
from lopd.megatron.scoring.scorer import MegatronScorer
from lopd.records import Ints, Key, Manifest, Prompt, Response, TeacherScores
from lopd.report.console import progress
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest, request_seed
from sglang_rollout.requests.scoring import ScoreRequest

if TYPE_CHECKING:
    from lopd.stages.context import StageContext
    from sglang_rollout.requests.client import SGLangEngine

T = TypeVar("T")


def sampling_params(section: Sampling, models: Iterable[Path], **changes: Any) -> SamplingParams:
    """The engine's parameters from a config section; responses stop at the end tokens that any of
    the models' files name.

    Teacher and student both count: a base student's files may know only <|endoftext|>, though it
    has learnt to end as the teacher does.
    """
    return SamplingParams(
        temperature=changes.get("temperature", section.temperature),
        top_p=changes.get("top_p", section.top_p),
        top_k=changes.get("top_k", section.top_k),
        min_p=changes.get("min_p", section.min_p),
        max_new_tokens=section.max_new_tokens,
        stop_token_ids=end_token_ids(models),
    )


def end_token_ids(models: Iterable[Path]) -> tuple[int, ...]:
    """The ids that end a response, by the files of any of the models, ascending."""
    return tuple(
        sorted(
            {token for model in models for token in stop_token_ids(model, load_tokenizer(model))}
        )
    )


def sample_stage(
    context: StageContext,
    writer: ArtifactWriter,
    section: Sampling,
    *,
    prompt_set: str,
    role: str,
    model: Path,
    title: str,
) -> None:
    """Serves ``model`` and samples a prompt set of the configuration into a stage's artifact."""
    prompts, prompt_ids = context.prompts(prompt_set, model)
    if not writer.missing(-(-len(prompts) * section.samples_per_prompt // writer.shard_size)):
        return  # workers have published all: no server is needed
    with context.serve(role, model) as engine:
        sample_into(
            writer,
            engine,
            prompts,
            prompt_ids,
            sampling_params(section, context.end_models),
            samples_per_prompt=section.samples_per_prompt,
            seed=context.config.run.seed,
            purpose=context.stage.name,
            title=title,
        )


def sample_into(
    writer: ArtifactWriter,
    engine: SGLangEngine,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Ints],
    params: SamplingParams,
    *,
    samples_per_prompt: int,
    seed: int,
    purpose: str,
    title: str,
    version: str | None = None,
) -> None:
    """Samples what is not yet published. A request's seed derives from (seed, prompt, sample index,
    purpose), so a resumed stage asks for the same.

    Of a shard, one sample of every prompt is asked for, then a second of every (in_passes): a
    server then has its prefix. Beyond the prompts, only the responses of shards in flight are in
    memory; they are what a kill loses.

    version: of the weights that must answer; absent: those that the servers have now. OtherWeights:
    a server that was started again, by its owner perhaps, has others.
    """
    total, shard_size = len(prompts) * samples_per_prompt, writer.shard_size
    num_shards = -(-total // shard_size)

    def size(shard: int) -> int:
        return min(shard_size, total - shard * shard_size)

    def members(shard: int) -> Iterator[tuple[Key, Ints]]:
        for position in range(shard * shard_size, shard * shard_size + size(shard)):
            prompt, sample_index = divmod(position, samples_per_prompt)
            yield (prompts[prompt].prompt_id, sample_index), prompt_ids[prompt]

    missing = writer.missing(num_shards)
    if not missing:
        return
    shard_of: dict[Key, int] = {}  # of requests in flight
    done: dict[int, dict[Key, Response]] = {}  # of shards in flight

    def requests() -> Iterator[SamplingRequest]:
        for index in missing:
            done[index] = {}
            samples: dict[str, list[tuple[Key, Ints]]] = {}  # of each prompt
            for key, ids in members(index):
                samples.setdefault(key[0], []).append((key, ids))
            for key, ids in in_passes([*samples.values()], len(samples)):
                shard_of[key] = index
                yield SamplingRequest(*key, ids, request_seed(seed, *key, purpose))

    version = version or str(engine.model_info()["weight_version"])
    mine = sum(size(index) for index in range(num_shards) if writer.is_mine(index))
    with progress(title, total=mine, done=mine - sum(map(size, missing)), unit="responses") as bar:
        for response in engine.generate(requests(), params, version=version):
            index = shard_of.pop(response.key)
            done[index][response.key] = response
            bar.advance(1)
            if len(done[index]) == size(index):
                responses = done.pop(index)
                writer.publish_shard(
                    index, cache.to_table([responses[key] for key, _ in members(index)])
                )


def requests_in_flight(engine: SGLangEngine) -> int:
    """With all servers together."""
    return engine.settings.max_in_flight * len(engine.engines)


def in_passes(prompts: Sequence[Sequence[T]], at_once: int) -> list[T]:
    """The samples of prompts in the order in which a server computes a prompt's prefix once: one of
    every prompt, then a second of every, and so on.

    Samples of a prompt that meet in one prefill compute its prefix each for itself; only what was
    prefilled before is in the cache. at_once: so many prompts, or somewhat more, take turns before
    the next ones do. More than are in flight: then a prompt's sample before has been prefilled. Not
    many more: the cache must hold the prefix while as many other requests pass through it. 1: the
    samples of a prompt one after the other.
    """
    num_blocks = max(1, len(prompts) // at_once)
    bounds = [len(prompts) * number // num_blocks for number in range(num_blocks + 1)]
    order: list[T] = []
    for first, end in pairwise(bounds):
        block = prompts[first:end]
        passes = max(map(len, block), default=0)
        order += [
            samples[number]
            for number in range(passes)
            for samples in block
            if number < len(samples)
        ]
    return order


def by_length(responses: Iterable[Response], at_once: int) -> list[Response]:
    """Prompts of like length are neighbours, those with the longest response first; at_once of them
    take turns (in_passes), each with its longest first.
    """
    groups: dict[str, list[Response]] = {}
    for response in responses:
        groups.setdefault(response.prompt_id, []).append(response)
    samples = [
        sorted(group, key=lambda response: -len(response.token_ids)) for group in groups.values()
    ]
    samples.sort(key=lambda group: -len(group[0].prompt_ids) - len(group[0].token_ids))
    return in_passes(samples, at_once)


def score_into(
    writer: ArtifactWriter,
    engine: SGLangEngine | None,
    source: Path,
    rollouts: Manifest,
    *,
    title: str,
    logprob_bits: int = 32,
    top_k: int = 0,
) -> None:
    """The teacher's log-probabilities of every response of an artifact; shard i of the result holds
    the responses of shard i of the source.

    top_k: also the teacher's so many likeliest tokens.
    """
    missing = writer.missing(len(rollouts.shards))
    if not missing:
        return
    assert engine is not None, "without an engine only what is complete already"
    responses: dict[int, list[Response]] = {}  # of the shards in flight only
    scores: dict[int, dict[Key, TeacherScores]] = {}
    shard_of: dict[Key, int] = {}
    prompts_at_once = (
        1 if isinstance(engine, MegatronScorer) else requests_in_flight(engine)
    )  # Megatron-Core has no prefix cache

    def requests(indices: Sequence[int]) -> Iterator[ScoreRequest]:
        for index in indices:
            shard = rollouts.shards[index]
            responses[index] = [
                response
                for response, _ in cache.from_table(
                    read_shard(source, shard), where=str(source / shard.name)
                )
            ]
            scores[index] = {}
            shard_of.update({response.key: index for response in responses[index]})
            for response in by_length(responses[index], prompts_at_once):
                yield ScoreRequest(
                    response.prompt_id,
                    response.sample_index,
                    response.prompt_ids,
                    response.token_ids,
                )

    mine = sum(shard.rows for index, shard in enumerate(rollouts.shards) if writer.is_mine(index))
    already = mine - sum(rollouts.shards[index].rows for index in missing)
    # Megatron-Core packs responses: what else is in its stream decides a score's last bits, and
    # what is missing must not decide that
    streams = [[index] for index in missing] if isinstance(engine, MegatronScorer) else [missing]
    with progress(title, total=mine, done=already, unit="responses") as bar:
        for score in (
            score for indices in streams for score in engine.score(requests(indices), top_k=top_k)
        ):
            index = shard_of.pop(score.key)
            scores[index][score.key] = score
            bar.advance(1)
            if len(scores[index]) == len(responses[index]):
                ordered = responses.pop(index)
                writer.publish_shard(
                    index,
                    cache.to_table(
                        ordered,
                        [scores[index][response.key] for response in ordered],
                        logprob_bits=logprob_bits,
                    ),
                )
                del scores[index]
