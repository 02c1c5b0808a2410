"""Several teachers, one a domain: models.teachers names the teacher of each domain of prompts,
models.teacher that of every other domain.

The prompts of a domain are a *part*: its own range of shards in demonstrations, rollouts and cache,
and its own teacher, whose consistency is checked on its own: the teacher that scores a domain's
rollouts must be the one that made that domain's demonstrations. In every row of the demonstrations
and the cache ``teacher`` is the fingerprint of its teacher's weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lopd.artifacts import ArtifactWriter
from lopd.artifacts.lineage import demonstrated_by, lineage_in
from lopd.config import Config, Sampling
from lopd.records import Ints, Manifest, Prompt
from lopd.stages.context import StageContext
from lopd.stages.sampling import sample_into, sampling_params

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine

OTHERS = ""  # the domain that stands for all that models.teachers does not name
PARTS = "parts"  # in the manifest's extra: [{"domain", "first", "shards"}]


@dataclass(frozen=True, slots=True)
class Part:
    """A domain's prompts, by their places in the prompt set, and its shards [first, first +
    num_shards).
    """

    domain: str
    places: tuple[int, ...]
    first: int
    num_shards: int

    def context(self, whole: StageContext) -> StageContext:
        """The stage as if this domain's teacher were the only one."""
        models = whole.config.models
        alone = models.model_copy(
            update={"teacher": teacher_of(whole.config, self.domain), "teachers": {}}
        )
        known = {**whole.identities, "teacher": whole.identity(role_of(whole.config, self.domain))}
        return dataclasses.replace(
            whole, config=whole.config.model_copy(update={"models": alone}), identities=known
        )

    def rollouts(self, whole: Manifest) -> Manifest:
        """The part of a manifest of rollouts: its shards, its rows, and what is known of its
        domain's teacher.
        """
        names = {
            f"shard-{index:05d}.parquet"
            for index in range(self.first, self.first + self.num_shards)
        }
        shards = tuple(shard for shard in whole.shards if shard.name in names)
        return dataclasses.replace(
            whole,
            shards=shards,
            rows=sum(shard.rows for shard in shards),
            lineage=lineage_in(whole.lineage, self.domain),
        )


def teacher_of(config: Config, domain: str) -> Path:
    return config.models.teachers.get(domain, config.models.teacher)


def role_of(config: Config, domain: str) -> str:
    """What StageContext.identity calls its teacher; also the role in manifests."""
    return f"teachers.{domain}" if domain in config.models.teachers else "teacher"


def domain_of(config: Config, prompt: Prompt) -> str:
    return prompt.domain if prompt.domain in config.models.teachers else OTHERS


def parts_of(
    config: Config, prompts: Sequence[Prompt], samples_per_prompt: int, shard_size: int
) -> list[Part]:
    """Domains in the order of their names, those without prompts left out."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(domain_of(config, prompt), []).append(place)
    parts, first = [], 0
    for domain in sorted(places):
        num_shards = -(-len(places[domain]) * samples_per_prompt // shard_size)
        parts.append(Part(domain, tuple(places[domain]), first, num_shards))
        first += num_shards
    return parts


def described(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        {"domain": part.domain, "first": part.first, "shards": part.num_shards} for part in parts
    ]


def parts_in(rollouts: Manifest) -> list[Part]:
    """The parts that the rollout stage wrote down."""
    return [
        Part(part["domain"], (), part["first"], part["shards"]) for part in rollouts.extra[PARTS]
    ]


class PartWriter(ArtifactWriter):
    """Publishes a part's shards 0, 1, .. as the shards first, first + 1, .. of the whole. teacher:
    goes into the column of that name, where it is given.
    """

    def __init__(self, whole: ArtifactWriter, part: Part, teacher: str = "") -> None:
        self.folder, self._whole, self._part, self._teacher = whole.folder, whole, part, teacher

    @property
    def published(self) -> frozenset[int]:
        return frozenset(index - self._part.first for index in self._whole.published)

    def is_mine(self, index: int) -> bool:
        return self._whole.is_mine(self._part.first + index)

    @property
    def shard_size(self) -> int:
        return self._whole.shard_size

    def publish_shard(self, index: int, table: pa.Table) -> None:
        if self._teacher:
            table = table.append_column(
                "teacher", pa.array([self._teacher] * table.num_rows, pa.string())
            )
        self._whole.publish_shard(self._part.first + index, table)

    def finish(self, **extra: Any) -> Manifest:
        raise AssertionError("only the whole is finished")


def demonstrate_by_domain(context: StageContext) -> None:
    """The demonstrations of every domain by its own teacher, one server after the other."""
    config, section = context.config, context.config.demonstrate
    prompts, prompt_ids = context.prompts("sft", config.models.teacher)
    domains = sorted({domain_of(config, prompt) for prompt in prompts})
    identities = {domain: context.identity(role_of(config, domain)) for domain in domains}
    writer = context.writer(
        models={role_of(config, domain): identity for domain, identity in identities.items()},
        sampling=context.sampling_record(section),
        lineage={
            "by_domain": {
                domain: demonstrated_by(identity) for domain, identity in identities.items()
            }
        },
        shard_size=section.shard_size,
    )
    parts = parts_of(config, prompts, section.samples_per_prompt, writer.shard_size)
    for part in parts:
        own = part.context(context)
        mine = PartWriter(writer, part, identities[part.domain].weights)
        if not mine.missing(part.num_shards):
            continue
        with own.serve("teacher", own.config.models.teacher) as engine:
            _sample_part(
                context, mine, engine, section, part, prompts, prompt_ids, title="demonstrations"
            )
    writer.finish(served=context.served, parts=described(parts))


def roll_out_by_domain(
    context: StageContext, writer: ArtifactWriter, student: Path
) -> list[dict[str, Any]]:
    """The student's responses, domain by domain, from one server; which shards are whose, for the
    manifest.
    """
    config, section = context.config, context.config.rollout
    prompts, prompt_ids = context.prompts("opd", student)
    parts = parts_of(config, prompts, section.samples_per_prompt, writer.shard_size)
    if writer.missing(sum(part.num_shards for part in parts)):
        with context.serve("student", student) as engine:
            for part in parts:
                _sample_part(
                    context,
                    PartWriter(writer, part),
                    engine,
                    section,
                    part,
                    prompts,
                    prompt_ids,
                    title="rollouts",
                )
    return described(parts)


def _sample_part(
    context: StageContext,
    writer: PartWriter,
    engine: SGLangEngine,
    section: Sampling,
    part: Part,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Ints],
    *,
    title: str,
) -> None:
    """The responses of one domain, into that domain's shards."""
    sample_into(
        writer,
        engine,
        [prompts[place] for place in part.places],
        [prompt_ids[place] for place in part.places],
        sampling_params(section, context.end_models),
        samples_per_prompt=section.samples_per_prompt,
        seed=context.config.run.seed,
        purpose=context.stage.name,
        title=f"{title}, {part.domain or 'other domains'}",
    )
