"""Everything that can be found wrong before anything starts: models, tokenizers, layouts, prompts,
servers, folders, disk. Starts nothing, writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from lopd.checks import combinations
from lopd.checks.findings import ALL_STAGES, CORES, Finding, Shapes, devices, problems_of
from lopd.checks.folders import disk, folders
from lopd.checks.lineage import (
    cache,
    checkpoint,
    checkpoint_problems,
    demonstrations,
    lineage,
    teachers,
)
from lopd.checks.models import context, context_problems, student, teacher, tokenizers
from lopd.checks.prompts import prompts, verifier
from lopd.checks.servers import server, server_problems
from lopd.checks.training import layouts, megatron, microbatch_problems, objective, scorer
from lopd.config import Config
from lopd.errors import LopdError

SERVING = ("demonstrate", "rollout", "score", "distill", "evaluate")
TRAINING = ("sft", "distill", "evaluate")  # evaluate trains the equal-compute baseline
Check = Callable[[Config], Iterator[Finding]]


def _sync(config: Config) -> Iterator[Finding]:
    return combinations.sync(config, on_gpu=devices()[1] != CORES)


CHECKS: dict[
    str, tuple[Check, tuple[str, ...]]
] = {  # name -> function, and the stages to which it matters
    "teacher": (
        teacher,
        tuple(stage for stage in ALL_STAGES if stage != "sft"),
    ),  # SFT on demonstrations from elsewhere needs none
    "student": (student, ALL_STAGES),
    "teachers": (teachers, ("demonstrate", "rollout", "score", "distill")),
    "context": (context, SERVING),
    "tokenizers": (tokenizers, SERVING),
    "sampling": (combinations.sampling, ("demonstrate", "rollout", "distill", "evaluate")),
    "layouts": (layouts, TRAINING),
    "scorer": (scorer, ("score",)),
    "objective": (objective, ("distill",)),
    "refresh": (combinations.refresh, ("distill",)),
    "sync": (_sync, ("distill",)),
    "megatron": (megatron, TRAINING),
    "prompts": (prompts, ("demonstrate", "rollout", "distill", "evaluate")),
    "verifier": (verifier, ("distill", "evaluate")),
    "demonstrations": (demonstrations, ("sft", "evaluate")),
    "lineage": (lineage, ("score",)),
    "checkpoint": (checkpoint, ("sft", "score", "evaluate")),
    "cache": (cache, ("distill",)),
    "server": (server, SERVING),
    "folders": (folders, ALL_STAGES),
    "disk": (disk, ALL_STAGES),
}


def check(config: Config, stage: str | None = None) -> Iterator[tuple[str, Finding]]:
    """Runs every check (or those that matter to one stage); yields (name, finding). A check that
    fails keeps no other from running.
    """
    done = {
        stage,
        *(("rollout", "score") if stage == "distill" and config.distill.refresh.is_on else ()),
    }  # a refresh samples and scores as they do
    for name, (function, stages) in CHECKS.items():
        if stage is None or not done.isdisjoint(stages):
            try:
                for finding in function(config):
                    yield name, finding
            except LopdError as error:
                yield name, error


def check_anywhere(
    config: Config, shapes: Shapes, without: Collection[str] = ()
) -> Iterator[LopdError]:
    """What is wrong on whatever machine, by the configuration and its models' shapes alone: of
    ``lopd plan``, by the same code as ``lopd check``.

    without: stages that this run does not make. What a plan says itself is left out: layouts that
    do not divide the models.
    """
    for subject in (
        context_problems(config, shapes),
        combinations.sampling_problems(config),
        microbatch_problems(config, without=without),
        objective(config) if config.distill.cache is None else (),  # a cache need not be here yet
        combinations.refresh_problems(config),
        combinations.sync_problems(config, on_gpu=None),
        checkpoint_problems(config, to_fetch=True),
        server_problems(config, shapes),
    ):
        yield from problems_of(subject)


def check_all(config: Config, stage: str | None = None) -> None:
    """Raises the first error of all checks; what ``lopd run`` and each stage's verb do before
    anything else.
    """
    problems = [finding for _, finding in check(config, stage) if isinstance(finding, LopdError)]
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more: lopd check tells all)" if len(problems) > 1 else ""
        raise type(first)(
            first.what + more, where=first.where, limit=first.limit, remedy=first.remedy
        )


def as_rows(config: Config) -> list[dict[str, Any]]:
    """The checks as rows for a table or JSON: name, ok, finding."""
    return [
        {"name": name, "ok": not isinstance(finding, LopdError), "finding": str(finding)}
        for name, finding in check(config)
    ]
