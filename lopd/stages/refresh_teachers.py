"""The teachers of refreshes: one, or one for each domain of prompts.

They are checked before the training starts, and served only while they score.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lopd.artifacts import ArtifactWriter, remove_folder
from lopd.artifacts.lineage import lineage_in
from lopd.cache.reader import CacheReader
from lopd.records import Manifest, ModelIdentity, Response
from lopd.stages.context import StageContext
from lopd.stages.domains import context_in, domain_of, parts_in, role_of
from lopd.stages.score import (
    check_teacher,
    complete_cache,
    complete_cache_of,
    joint_lineage,
    score_responses,
)
from lopd.stages.score_shards import join_scores, score_into
from lopd.stages.teacher import serve_teacher
from lopd.stages.teacher_prompts import prompts_for_scoring

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine

# In the folder of a refresh: what each of several teachers has scored. Removed when it is joined.
BY_DOMAIN = "scores-by-domain"
# The kind of such a part.
_PART = "domain_scores"
# Returns the writer of a folder and a kind, with the inputs and parents of a refresh's scores.
WriterOf = Callable[[Path, str], ArtifactWriter]


class RefreshTeachers:
    """Scores the responses of refreshes. Use it as a context manager.

    Attributes:
        models: The teachers for the manifest of the scores, by role.
        lineage: What is known of them, for the same manifest.
    """

    models: dict[str, ModelIdentity]
    lineage: dict[str, Any]

    def __init__(self, context: StageContext, scored: Manifest) -> None:
        """Check the teachers before the training starts.

        Args:
            context: The distill stage.
            scored: The manifest of the score stage.

        Raises:
            ConsistencyError, DataError: For the same reasons as in the score stage.
        """
        config = context.config
        self._context = context
        # Closed with this object: whatever ends the training ends the teacher as well.
        self._kept = contextlib.ExitStack()
        # The teacher's server, where distill.refresh.keep_teacher lets it run on.
        self._teacher: SGLangEngine | None = None
        # The stage as each domain's teacher has it. Empty: one teacher scores all.
        self._by_domain: dict[str, StageContext] = {}
        if not config.models.teachers:
            self.models = {"teacher": context.identity("teacher")}
            self.lineage = check_teacher(context, scored.lineage)
            return
        # The domains that the score stage had responses of. A refresh has prompts of the same set.
        domains = [part.domain for part in parts_in(scored)]
        self._by_domain = {domain: context_in(context, domain) for domain in domains}
        self.models = {
            role_of(config, domain): own.identity("teacher")
            for domain, own in self._by_domain.items()
        }
        self.lineage = joint_lineage(
            {
                domain: check_teacher(own, lineage_in(scored.lineage, domain))
                for domain, own in self._by_domain.items()
            }
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def score(
        self,
        writer: ArtifactWriter,
        source: Path,
        rollouts: Manifest,
        *,
        title: str,
        writer_of: WriterOf,
    ) -> float:
        """Publish the scores that are missing. The cache is not complete afterwards.

        Args:
            writer: The writer of the cache.
            source: The folder of the responses.
            rollouts: The manifest of the responses.
            title: The text at the progress bar.
            writer_of: Makes the writers of the parts of several teachers.

        Returns:
            The seconds in which teachers scored, without the starts and ends of their servers.
        """
        if self._by_domain:
            return self._score_by_domain(writer, source, rollouts, title, writer_of)
        with self._served() as teacher:
            began = time.monotonic()
            score_responses(self._context, writer, teacher, source, rollouts, title=title)
            return time.monotonic() - began

    def complete(self, writer: ArtifactWriter, rollouts: Manifest) -> None:
        """Publish the manifest of a cache whose shards are all there."""
        if not self._by_domain:
            complete_cache(self._context, writer, rollouts)
            return
        folders = [own.config.models.teacher for own in self._by_domain.values()]
        complete_cache_of(self._context, writer, rollouts, folders)
        # A kill before this line leaves some megabytes that nothing reads.
        remove_folder(_parts_of(writer))

    def _score_by_domain(
        self,
        writer: ArtifactWriter,
        source: Path,
        rollouts: Manifest,
        title: str,
        writer_of: WriterOf,
    ) -> float:
        """Have each teacher score the responses of its domain, and join what they have scored.

        The shards keep the order in which the responses were sampled, with rows of several
        teachers in one shard. So a step learns from the same prompts as with one teacher.
        """
        config = self._context.config
        prompts, _ = self._context.prompts("opd")
        domains = {prompt.prompt_id: domain_of(config, prompt) for prompt in prompts}
        sampled = {domains[prompt_id] for prompt_id in CacheReader(source).prompts_of_rows()}
        asked = prompts_for_scoring(self._context)
        parts: list[tuple[str, ArtifactWriter]] = []
        seconds = 0.0
        for domain, own in self._by_domain.items():
            if domain not in sampled:
                # A small refresh may have no prompt of a domain. Its teacher is not started.
                continue
            name = domain or "other domains"

            def is_own(response: Response, domain: str = domain) -> bool:
                return domains[response.prompt_id] == domain

            # A folder's name must not depend on what a domain is called.
            folder = _parts_of(writer) / f"part-{len(parts):03d}"
            part = writer_of(folder, _PART)
            # A teacher whose part was finished before a kill is not started again.
            if part.missing(len(rollouts.shards)):
                with serve_teacher(own) as engine:
                    began = time.monotonic()
                    score_into(
                        part,
                        engine,
                        source,
                        rollouts,
                        title=f"{title}, {name}",
                        top_k=config.score.top_k,
                        asked=asked,
                        only=is_own,
                    )
                    seconds += time.monotonic() - began
            part.finish()
            parts.append((own.identity("teacher").weights, part))
        join_scores(writer, parts, source, rollouts, logprob_bits=config.score.logprob_bits)
        return seconds

    @contextlib.contextmanager
    def _served(self) -> Iterator[SGLangEngine]:
        """Serve the one teacher for a refresh alone, or let it run on beside the training."""
        # For each refresh alone by default: there may be no memory for the teacher beside the
        # trainer and the student.
        teacher = serve_teacher(self._context)
        if self._context.config.distill.refresh.keep_teacher:
            # Started at the first refresh, not before: a bound of the drift may never be passed.
            if self._teacher is None:
                self._teacher = self._kept.enter_context(teacher)
            yield self._teacher
        else:
            with teacher as engine:
                yield engine


def _parts_of(writer: ArtifactWriter) -> Path:
    return writer.folder.with_name(BY_DOMAIN)
