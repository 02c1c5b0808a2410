"""Judge: a verifier's verdict of every response of an artifact, once, as an artifact beside it.

The verifier is that of [task]. The prompts and their answers are those of a prompt set of the
configuration. Shard i of the verdicts belongs to shard i of the responses. A killed command
continues at the shards that are missing.

The columns are prompt_id, sample_index, token_hash, right, reason and found. docs/cache_format.md
specifies them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_tokenizer, read_complete, read_shard
from lopd.artifacts.lineage import tokenizers_of_rows
from lopd.cache.verdicts import VERDICTS, refuse_verdicts
from lopd.config import Config
from lopd.config.secrets import scrubbed
from lopd.errors import ConfigError, DataError
from lopd.records import Ints, Manifest, Prompt, Response, token_hash
from lopd.report.console import progress
from lopd.stages.context import Stage, StageContext
from lopd.tasks import Verifier, get_task
from lopd.tasks.tokenizer import load_tokenizer, response_text
from lopd.tasks.verdicts import Judged, Verdict, judge_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def judge(config: Config, source: Path, out: Path, prompt_set: str) -> Manifest:
    """Publish the verdicts of an artifact's responses.

    Args:
        config: The configuration, for its task, its prompts and its student's tokenizer.
        source: A cache, rollouts, demonstrations, or the answers of an evaluation.
        out: The folder of the verdicts.
        prompt_set: "sft", "opd" or "eval", the set whose prompts were answered.

    Raises:
        ArtifactError: The source is not complete or damaged, or ``out`` holds something else.
        ConfigError: The task has no verifier.
        DataError: A response answers no prompt of the set, or its tokens are of another tokenizer.
    """
    task = get_task(config.task.name, config.task.options)
    if not isinstance(task, Verifier):
        raise ConfigError(
            f"task {config.task.name} has no verifier, so nothing can be judged",
            where="task.name",
            remedy="set task.name to a task that verifies, such as math, code or plain",
        )
    manifest = read_complete(source)
    # Verdicts have the form of an artifact too, and their folder is easily given by mistake.
    refuse_verdicts(source, manifest)
    _check_tokenizer(config, source, manifest)
    # The parts of the configuration that decide a verdict. A stage of the pipeline names its inputs
    # by the same means.
    context = StageContext(config, dataclasses.replace(_STAGE, prompts=(prompt_set,)))
    prompts, prompt_ids = context.prompts(prompt_set, need_answers=True, record=False)
    asked = {
        prompt.prompt_id: (prompt, ids) for prompt, ids in zip(prompts, prompt_ids, strict=True)
    }
    writer = ArtifactWriter(
        out,
        kind=VERDICTS,
        # The same inputs and parents find their verdicts again, and a second call judges nothing
        # twice.
        inputs=context.inputs,
        parents={manifest.kind: manifest.fingerprint},
        # These three are the source's: verdicts say nothing new of models, sampling or lineage.
        models=manifest.models,
        sampling=manifest.sampling,
        lineage=manifest.lineage,
    )
    judging = _Judging(task, asked, load_tokenizer(config.models.student), source)
    judging.publish_missing(writer, manifest)
    verifier = {"name": config.task.name, "options": scrubbed(config.task.options)}
    return writer.finish(verifier=verifier, prompts=prompt_set, **figures_of(out, manifest))


# Its inputs are what decides the verdicts: the task, and the prompts with their answers.
_STAGE = Stage(
    name="judge",
    summary="The verifier's verdict of every response.",
    kind=VERDICTS,
    knobs=("task",),
    models=(),
    prompts=(),
    parents=lambda config: (),
    run=lambda context: None,
)


def _check_tokenizer(config: Config, source: Path, manifest: Manifest) -> None:
    ours = identify_tokenizer(config.models.student)
    for role, identity in tokenizers_of_rows(manifest, source).items():
        # Decoded with another tokenizer, the tokens would be another text.
        if identity.tokenizer != ours.tokenizer:
            raise DataError(
                f"the responses have the tokenizer of {role} ({identity.path}), and the student of "
                "the configuration has another one",
                where=str(source),
                limit=f"the tokenizer {identity.tokenizer[:12] or 'missing'}",
                remedy="give the configuration of the run that made these responses",
            )


@dataclasses.dataclass(frozen=True)
class _Judging:
    """The verifier, and what it needs to judge a response."""

    task: Verifier
    # Each prompt with its token ids, by its id.
    asked: Mapping[str, tuple[Prompt, Ints]]
    tokenizer: PreTrainedTokenizerBase
    source: Path

    def publish_missing(self, writer: ArtifactWriter, manifest: Manifest) -> None:
        """Judge the shards that have no verdicts yet."""
        shards = [shard for shard in manifest.shards if shard.name.endswith(".parquet")]
        writer.expect(len(shards))
        missing = writer.missing(len(shards))
        total = sum(shard.rows for shard in shards)
        done = total - sum(shards[index].rows for index in missing)
        with progress("verdicts", total=total, done=done, unit="responses") as bar:
            for index in missing:
                # The checksum is verified here. One shard is in memory at a time.
                table = read_shard(self.source, shards[index])
                where = str(self.source / shards[index].name)
                responses = [response for response, _ in cache.from_table(table, where)]
                verdicts = []
                # One by one, so that the bar moves: a verdict of code may take seconds.
                for verdict in judge_all(self.task, self._to_judge(responses, where)):
                    verdicts.append(verdict)
                    bar.advance(1)
                writer.publish_shard(index, _table_of(responses, verdicts))

    def _to_judge(self, responses: list[Response], where: str) -> Iterator[Judged]:
        for response in responses:
            known = self.asked.get(response.prompt_id)
            # The same name may stand for another question in another set, so the tokens are
            # compared too.
            if known is None or not np.array_equal(known[1], response.prompt_ids):
                what = "is not in this prompt set" if known is None else "has other tokens there"
                raise DataError(
                    f"prompt {response.prompt_id!r} of response {response.key} {what}",
                    where=where,
                    remedy="name the set that was answered with --prompts, or give the "
                    "configuration of the run that made these responses",
                )
            text = response_text(self.tokenizer, response.token_ids, response.finish_reason)
            yield known[0], text, response.finish_reason


def _table_of(responses: list[Response], verdicts: list[Verdict]) -> pa.Table:
    pairs = [*zip(responses, verdicts, strict=True)]
    hashes = [token_hash(one.prompt_ids, one.token_ids) for one in responses]
    return pa.table(
        {
            "prompt_id": pa.array([one.prompt_id for one in responses], pa.string()),
            "sample_index": pa.array([one.sample_index for one in responses], pa.int32()),
            # Verdicts are found again by the tokens that were judged, in whatever cache they are.
            "token_hash": pa.array(hashes, pa.string()),
            "right": pa.array([verdict.right for _, verdict in pairs], pa.bool_()),
            "reason": pa.array([verdict.reason for _, verdict in pairs], pa.string()),
            "found": pa.array([verdict.found for _, verdict in pairs], pa.string()),
        }
    )


def figures_of(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return how many responses are right, why the others are not, and the same by prompt.

    Args:
        folder: The folder of the verdicts, whose shards are all there.
        manifest: The manifest of the responses, for the number of shards.
    """
    right: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for path in sorted(folder.glob("shard-*.parquet")):
        # From the published shards, because some of them may be the work of an earlier call.
        table = pq.read_table(path, columns=["prompt_id", "right", "reason"])
        for row in table.to_pylist():
            answers[row["prompt_id"]] += 1
            # Added also where it is 0, so that a prompt without any right response has an entry.
            right[row["prompt_id"]] += row["right"]
            if not row["right"]:
                reasons[row["reason"]] += 1
    return {
        "num_right": sum(right.values()),
        "num_prompts": len(answers),
        "prompts_never_right": sum(right[name] == 0 for name in answers),
        "reasons": dict(reasons.most_common()),
    }
