"""Several teachers, one for each domain of prompts.

``models.teachers`` names the teacher of a domain, ``models.teacher`` that of every other domain.

The prompts of a domain are a *part* of the prompt set. A part has its own range of shards in the
demonstrations, the rollouts and the cache, and its own teacher. Each teacher's consistency is
checked by itself: the one that scores a domain's rollouts must be the one that made that domain's
demonstrations. In the demonstrations and in the cache the column ``teacher`` of a row is the
fingerprint of its teacher's weights.
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
from lopd.stages.dialogues import turns_of
from lopd.stages.sample_shards import params_of, sample_into
from lopd.stages.truncation import truncation_figures
from lopd.stages.vocabulary import num_shared_ids

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine

# The domain that stands for all domains that models.teachers does not name.
OTHER_DOMAINS = ""
# The key in a manifest's extra: [{"domain", "first", "shards"}].
PARTS = "parts"


@dataclass(frozen=True, slots=True)
class Part:
    """The prompts of one domain and their shards."""

    # The domain, or OTHER_DOMAINS.
    domain: str
    # The places of its prompts in the prompt set. Empty where the part comes from a manifest, which
    # knows only its shards.
    places: tuple[int, ...]
    # Its first shard in the whole artifact.
    first: int
    num_shards: int

    def context(self, whole: StageContext) -> StageContext:
        """Return the stage as if this domain's teacher were the only one."""
        # The part publishes through a PartWriter and logs to the same stage.
        return context_in(whole, self.domain)

    def rollouts(self, whole: Manifest) -> Manifest:
        """Return the part of a manifest of rollouts that belongs to this domain."""
        # By name: the manifest of the rollouts lists the shards of all parts.
        indices = range(self.first, self.first + self.num_shards)
        names = {f"shard-{index:05d}.parquet" for index in indices}
        shards = tuple(shard for shard in whole.shards if shard.name in names)
        return dataclasses.replace(
            whole,
            shards=shards,
            rows=sum(shard.rows for shard in shards),
            lineage=lineage_in(whole.lineage, self.domain),
        )


def context_in(whole: StageContext, domain: str) -> StageContext:
    """Return a stage as if the teacher of one domain were the only one."""
    # So a stage with one teacher needs no second form: it runs once for each teacher.
    config = whole.config
    teacher = {"teacher": teacher_of(config, domain), "teachers": {}}
    models = config.models.model_copy(update=teacher)
    identity = whole.identity(role_of(config, domain))
    return dataclasses.replace(
        whole,
        config=config.model_copy(update={"models": models}),
        identities={**whole.identities, "teacher": identity},
    )


def teacher_of(config: Config, domain: str) -> Path:
    return config.models.teachers.get(domain, config.models.teacher)


def role_of(config: Config, domain: str) -> str:
    """Return the role of a domain's teacher, for StageContext.identity and in manifests."""
    return f"teachers.{domain}" if domain in config.models.teachers else "teacher"


def domain_of(config: Config, prompt: Prompt) -> str:
    return prompt.domain if prompt.domain in config.models.teachers else OTHER_DOMAINS


def parts_of(
    config: Config, prompts: Sequence[Prompt], samples_per_prompt: int, shard_size: int
) -> list[Part]:
    """Return the parts of a prompt set, sorted by domain. A domain without prompts has none."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        # Places and not prompts: the prompts and their token ids are two lists in the same order.
        places.setdefault(domain_of(config, prompt), []).append(place)
    # The same prompts and knobs must give the same parts in each stage and after a kill. So they
    # are sorted by name and not by the order in which domains occur.
    parts: list[Part] = []
    first = 0
    for domain in sorted(places):
        # A part begins with a new shard, so that no shard has rows of two teachers.
        num_shards = -(-len(places[domain]) * samples_per_prompt // shard_size)
        parts.append(Part(domain, tuple(places[domain]), first, num_shards))
        first += num_shards
    return parts


def described(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return the parts for a manifest."""
    return [
        {"domain": part.domain, "first": part.first, "shards": part.num_shards} for part in parts
    ]


def parts_in(rollouts: Manifest) -> list[Part]:
    """Return the parts that the rollout stage has described in its manifest."""
    return [
        Part(part["domain"], (), part["first"], part["shards"]) for part in rollouts.extra[PARTS]
    ]


class PartWriter(ArtifactWriter):
    """Publishes the shards 0, 1, .. of a part as the shards first, first + 1, .. of the whole."""

    # It has no manifest of its own, so it does not call the constructor of ArtifactWriter. The
    # whole writer knows what is published and completes the artifact.
    def __init__(self, whole: ArtifactWriter, part: Part, teacher: str = "") -> None:
        """Write a part. Every row gets ``teacher`` in that column; "" for no such column."""
        self.folder = whole.folder
        self._whole = whole
        self._part = part
        self._teacher = teacher

    @property
    def published(self) -> frozenset[int]:
        # Shards of other parts have indices below 0 or beyond the part. Nobody asks for them.
        return frozenset(index - self._part.first for index in self._whole.published)

    def is_published(self, index: int) -> bool:
        return self._whole.is_published(self._part.first + index)

    def is_mine(self, index: int) -> bool:
        return self._whole.is_mine(self._part.first + index)

    @property
    def shard_size(self) -> int:
        return self._whole.shard_size

    def publish_shard(self, index: int, table: pa.Table) -> None:
        # Rollouts have no such column: their parts name no teacher.
        if self._teacher:
            column = pa.array([self._teacher] * table.num_rows, pa.string())
            table = table.append_column("teacher", column)
        self._whole.publish_shard(self._part.first + index, table)

    def expect(self, num_shards: int) -> None:
        """Set the least number of shards of the whole: those up to the end of this part."""
        self._whole.expect(self._part.first + num_shards)

    def finish(self, **extra: Any) -> Manifest:
        raise AssertionError(
            "this writer writes a part of the artifact; call finish() of the whole one"
        )


def demonstrate_by_domain(context: StageContext) -> None:
    """Publish the demonstrations of every domain by its own teacher, one server after the other."""
    config = context.config
    section = config.demonstrate
    # One tokenizer for all prompts: the teachers' tokenizers must be the same.
    prompts, prompt_ids = context.prompts("sft")
    domains = sorted({domain_of(config, prompt) for prompt in prompts})
    identities = {domain: context.identity(role_of(config, domain)) for domain in domains}
    by_domain = {domain: demonstrated_by(identity) for domain, identity in identities.items()}
    writer = context.writer(
        models={role_of(config, domain): identity for domain, identity in identities.items()},
        sampling=context.sampling_record(section),
        lineage={"by_domain": by_domain},
        shard_size=section.shard_size,
    )
    # The writer's shard size, which a stage that continues keeps even if the knob has changed.
    parts = parts_of(config, prompts, section.samples_per_prompt, writer.shard_size)
    for part in parts:
        own = part.context(context)
        part_writer = PartWriter(writer, part, identities[part.domain].weights)
        if not part_writer.missing(part.num_shards):
            # A killed command has published this domain. Its teacher need not be started.
            continue
        with own.serve("teacher", own.config.models.teacher) as engine:
            title = "demonstrations"
            _sample_part(context, part_writer, engine, section, part, prompts, prompt_ids, title)
    cut = truncation_figures(context, writer.folder)
    writer.finish(served=context.served, parts=described(parts), **cut)


def roll_out_by_domain(
    context: StageContext, writer: ArtifactWriter, student: Path
) -> list[dict[str, Any]]:
    """Sample the student's responses, domain by domain, from one server.

    Returns:
        Which shards belong to which domain, for the manifest.
    """
    config = context.config
    section = config.rollout
    prompts, prompt_ids = context.prompts("opd")
    parts = parts_of(config, prompts, section.samples_per_prompt, writer.shard_size)
    # The student answers all domains, so one server serves for all parts.
    if writer.missing(sum(part.num_shards for part in parts)):
        with context.serve("student", student) as engine:
            for part in parts:
                # Each part counts its shards from 0, and the writer puts them into the artifact of
                # all.
                part_writer = PartWriter(writer, part)
                title = "rollouts"
                _sample_part(
                    context, part_writer, engine, section, part, prompts, prompt_ids, title
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
    title: str,
) -> None:
    """Sample the responses of one domain into that domain's shards."""
    sample_into(
        writer,
        engine,
        [prompts[place] for place in part.places],
        [prompt_ids[place] for place in part.places],
        params_of(context, section),
        samples_per_prompt=section.samples_per_prompt,
        seed=context.config.run.seed,
        purpose=context.stage.name,
        title=f"{title}, {part.domain or 'other domains'}",
        num_ids=num_shared_ids(context.config),
        turns=turns_of(context, section, prompts),
    )
