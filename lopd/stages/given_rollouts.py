"""Rollouts from elsewhere, such as transcripts of agents (rollout.responses), in place of sampling.

Their rows become this run's rollouts, shard by shard, and are scored and learnt from like others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lopd.artifacts import read_complete, read_shard
from lopd.artifacts.lineage import check_same_tokenizer, tokenizers_of_rows
from lopd.cache.columns import list_lengths, without_origin
from lopd.cache.reader import CacheReader
from lopd.errors import ArtifactError, ConsistencyError, DataError
from lopd.records import Manifest, ModelIdentity
from lopd.stages.vocabulary import num_shared_ids

if TYPE_CHECKING:
    from lopd.artifacts import ArtifactWriter
    from lopd.stages.context import StageContext


@dataclass(frozen=True, slots=True)
class GivenRollouts:
    """What is known of responses from elsewhere.

    Attributes:
        sampling: How they were sampled, as far as it is on record.
        models: The student that wrote them, if it is known.
        note: Whose they are, in words, and the fingerprint of their artifact.
    """

    sampling: Mapping[str, Any]
    models: Mapping[str, ModelIdentity]
    note: Mapping[str, str]


def check_given_rollouts(context: StageContext, student: ModelIdentity) -> GivenRollouts:
    """Check the responses of rollout.responses, and return what is known of them.

    Args:
        context: The stage.
        student: The SFT student, whose responses they must be.

    Raises:
        ArtifactError: The folder holds no complete rollouts.
        ConsistencyError: Nothing shows that this student wrote them.
        DataError: A token has no row in a model, or a response is too long for a server.
    """
    folder = context.config.rollout.responses
    assert folder is not None
    manifest = read_complete(folder)
    if manifest.kind != "rollouts":
        raise ArtifactError(
            f"this artifact is of kind {manifest.kind}, but rollouts are needed",
            where=str(folder),
            limit="exactly rollouts",
            remedy="import transcripts with --as rollouts, or give the folder of a rollout stage",
        )
    for identity in tokenizers_of_rows(manifest, folder).values():
        check_same_tokenizer(identity, student)
    note = _whose(context, manifest, student)
    reader = CacheReader(folder, without_sampling=True)
    reader.require_ids_below(num_shared_ids(context.config), "one of the run's models")
    longest = int(reader.lengths.max(initial=0))
    limit = context.config.sglang.context_length
    if longest > limit:
        raise DataError(
            f"a response has {longest} tokens together with its prompt",
            where=str(folder),
            limit=f"at most sglang.context_length = {limit}",
            remedy="raise sglang.context_length, or remove this response",
        )
    return GivenRollouts(
        manifest.sampling,
        # Not the SFT student where another model wrote them: later checks compare with this.
        {role: one for role, one in manifest.models.items() if role == "student"},
        {"fingerprint": manifest.fingerprint, "note": note},
    )


def _whose(context: StageContext, manifest: Manifest, student: ModelIdentity) -> str:
    """Return in words whose responses they are, and refuse those of others."""
    known = manifest.models.get("student")
    if known is not None and known.weights == student.weights:
        return "this student's responses"
    wrong = "it is not recorded which student wrote them"
    if known is not None:
        wrong = f"another student wrote them: {known.path} (weights {known.weights[:12]})"
    if not context.config.rollout.allow_foreign_responses:
        raise ConsistencyError(
            wrong,
            where=str(context.config.rollout.responses),
            limit=f"responses of {student.path} (weights {student.weights[:12]})",
            remedy="name the student when you import them (--student), or set "
            "rollout.allow_foreign_responses=true (lopd records this)",
        )
    context.log(f"WARNING: rollout.responses: {wrong} (rollout.allow_foreign_responses is set)")
    return f"FOREIGN: {wrong}"


def take_given_rollouts(context: StageContext, writer: ArtifactWriter) -> None:
    """Publish the rows of rollout.responses as this stage's own, shard by shard.

    Raises:
        DataError: A response has no token.
    """
    folder = context.config.rollout.responses
    assert folder is not None
    shards = read_complete(folder).shards
    writer.expect(len(shards))
    for index in writer.missing(len(shards)):
        # The checksum is verified here. One shard is in memory at a time.
        table = without_origin(read_shard(folder, shards[index]))
        empty = np.flatnonzero(list_lengths(table, "token_ids") == 0)
        if len(empty):
            raise DataError(
                f"response {table.column('prompt_id')[int(empty[0])].as_py()} has no token",
                where=str(folder / shards[index].name),
                remedy="remove this response",
            )
        writer.publish_shard(index, table)
