"""Sampling into an artifact. Each response is published exactly once, in a fixed shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.config import Config, RolloutSection, Sampling
from lopd.megatron.weights.architecture import read_architecture, router_problems
from lopd.records import Ints, Key, Prompt, Response
from lopd.report.console import progress
from lopd.stages.open_shards import OpenShards, tell_resumed
from lopd.stages.request_order import in_passes
from lopd.stages.vocabulary import num_shared_ids, within_ids
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from sglang_rollout.requests.routed import RouterShape
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest, request_seed
from sglang_rollout.requests.turns import Turns

if TYPE_CHECKING:
    from lopd.stages.context import StageContext
    from sglang_rollout.requests.client import SGLangEngine

    TurnsOf: TypeAlias = Callable[[StageContext, Sampling, Sequence[Prompt]], Turns | None]


def params_of(context: StageContext, section: Sampling) -> SamplingParams:
    """Return the engine's sampling parameters of a stage that makes an artifact of responses.

    Raises:
        ConfigError: The section asks for routed experts, and the student has no experts.
    """
    params = sampling_params(section, context.end_models)
    if not (isinstance(section, RolloutSection) and section.routed_experts):
        return params
    return dataclasses.replace(params, router=router_of(context.config))


def router_of(config: Config) -> RouterShape:
    """Return the shape of the student's routers.

    Raises:
        ConfigError: The student has no experts.
    """
    # The SFT student has the architecture of the base student.
    student = read_architecture(config.models.student)
    for problem in router_problems(student, where="rollout.routed_experts"):
        raise problem
    return RouterShape(student.num_layers, student.num_experts, student.experts_per_token)


def sampling_params(section: Sampling, models: Iterable[Path], **changes: Any) -> SamplingParams:
    """Return the engine's sampling parameters.

    Args:
        section: The section of the configuration.
        models: The models whose files name the tokens that end a response.
        changes: Values of temperature, top_p, top_k or min_p in place of the section's.
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
    """Return the ids that end a response according to any of the models' files, ascending."""
    # Teacher and student both count. The files of a base student may name only <|endoftext|>,
    # although the student has learnt to end a response as its teacher does.
    ids = {token for model in models for token in stop_token_ids(model, load_tokenizer(model))}
    return tuple(sorted(ids))


def sample_stage(
    context: StageContext,
    writer: ArtifactWriter,
    section: Sampling,
    *,
    prompt_set: str,
    role: str,
    model: Path,
    title: str,
    turns_of: TurnsOf | None = None,
) -> None:
    """Serve a model and sample a prompt set into a stage's artifact.

    Args:
        context: The stage.
        writer: The writer of its artifact.
        section: The sampling parameters.
        prompt_set: "sft", "opd" or "eval".
        role: "teacher" or "student", for the servers' log and record.
        model: The Hugging Face folder.
        title: The text at the progress bar.
        turns_of: Returns how responses of several turns are made to these prompts.
    """
    # The writer's shard size counts: a stage that continues keeps the one that it was begun with.
    prompts, prompt_ids = context.prompts(prompt_set)
    num_shards = -(-len(prompts) * section.samples_per_prompt // writer.shard_size)
    # Before the servers, whose start takes longest.
    writer.expect(num_shards)
    if not writer.missing(num_shards):
        # Workers may have published all shards. Then no server is started.
        return
    # An environment that cannot be loaded is noticed before the servers start.
    turns = None if turns_of is None else turns_of(context, section, prompts)
    with context.serve(role, model) as engine:
        sample_into(
            writer,
            engine,
            prompts,
            prompt_ids,
            params_of(context, section),
            samples_per_prompt=section.samples_per_prompt,
            seed=context.config.run.seed,
            purpose=context.stage.name,
            title=title,
            num_ids=num_shared_ids(context.config),
            turns=turns,
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
    num_ids: int | None = None,
    turns: Turns | None = None,
) -> None:
    """Sample the responses that are not published yet.

    Args:
        writer: The writer of the artifact.
        engine: The servers of the model.
        prompts: The prompts.
        prompt_ids: The token ids of each prompt, int32 [P].
        params: The sampling parameters.
        samples_per_prompt: How many responses each prompt gets.
        seed: The run's seed.
        purpose: Tells apart requests for the same prompt, for example "rollout".
        title: The text at the progress bar.
        version: The weight version that the servers must have. None: the one that they have now.
        num_ids: Responses are cut before a token id from this number on. None: they are not cut.
        turns: How responses of several turns are made. None: a response has one turn.

    Raises:
        OtherWeights: A server has another version, because it was started again.
    """
    shards = _Shards(prompts, prompt_ids, samples_per_prompt, writer.shard_size)
    missing = writer.missing(shards.count)
    writer.expect(shards.count)
    if not missing:
        # The engine is not even asked for its version: it may have other weights by now.
        return
    tell_resumed(writer, title, shards.count)
    open_shards: OpenShards[Response] = OpenShards()
    requests = _requests(shards, missing, open_shards, seed=seed, purpose=purpose)
    # One version for the whole call: a server that is restarted in the middle must not mix two.
    version = version or str(engine.model_info()["weight_version"])
    total = sum(shards.size(index) for index in range(shards.count) if writer.is_mine(index))
    already = total - sum(map(shards.size, missing))
    with progress(title, total=total, done=already, unit="responses") as bar:
        # Responses come in the order in which they are finished.
        generate = engine.generate if turns is None else partial(engine.generate, turns=turns)
        sampled = generate(requests, params, version=version)
        for response in sampled if num_ids is None else within_ids(sampled, num_ids, title=title):
            bar.advance(1)
            complete = open_shards.add(response.key, response)
            if complete is not None:
                index, responses = complete
                writer.publish_shard(index, cache.to_table(responses))


def _requests(
    shards: _Shards,
    missing: Sequence[int],
    open_shards: OpenShards[Response],
    *,
    seed: int,
    purpose: str,
) -> Iterator[SamplingRequest]:
    """Yield the requests of the missing shards, and begin each shard with its first request."""
    # The engine takes the next request when one is finished, so later shards are not begun before
    # there is room for them.
    for index in missing:
        members = [*shards.members(index)]
        open_shards.begin(index, [key for key, _ in members])
        by_prompt: dict[str, list[tuple[Key, Ints]]] = {}
        for key, ids in members:
            by_prompt.setdefault(key[0], []).append((key, ids))
        # One sample of every prompt, then a second one: the server has the prompt's prefix by then.
        for key, ids in in_passes([*by_prompt.values()], len(by_prompt)):
            # A request's own seed derives from the run's seed, the prompt, the sample index and the
            # purpose. So a killed stage asks for the same responses again.
            yield SamplingRequest(*key, ids, request_seed(seed, *key, purpose))


class _Shards:
    """The division of responses into shards. It never changes, so a killed stage can continue."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Ints],
        samples_per_prompt: int,
        shard_size: int,
    ) -> None:
        self._prompts = prompts
        self._prompt_ids = prompt_ids
        self._samples_per_prompt = samples_per_prompt
        self._shard_size = shard_size
        # Positions count all samples of the first prompt, then those of the second, and so on.
        self._total = len(prompts) * samples_per_prompt
        self.count = -(-self._total // shard_size)

    def size(self, index: int) -> int:
        """Return the rows of a shard. Only the last one may have fewer than the shard size."""
        return min(self._shard_size, self._total - index * self._shard_size)

    def members(self, index: int) -> Iterator[tuple[Key, Ints]]:
        """Yield key and prompt ids of a shard's responses, in order."""
        first = index * self._shard_size
        for position in range(first, first + self.size(index)):
            prompt, sample_index = divmod(position, self._samples_per_prompt)
            yield (self._prompts[prompt].prompt_id, sample_index), self._prompt_ids[prompt]
