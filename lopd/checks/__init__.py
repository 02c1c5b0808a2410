"""Checks: everything that can be found wrong before anything starts.

They look at models, tokenizers, layouts, prompts, servers, folders and disk. They start nothing and
write nothing. Each file has one subject, and each check yields findings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from lopd.artifacts.file_hashes import HASHES, STORE
from lopd.checks import combinations
from lopd.checks.alignment import alignment, alignment_problems
from lopd.checks.findings import ALL_STAGES, CORES, Finding, Shapes, devices, problems_of
from lopd.checks.folders import disk, folders
from lopd.checks.lineage import (
    cache,
    checkpoint,
    checkpoint_problems,
    demonstrations,
    lineage,
    teachers,
    verdicts,
)
from lopd.checks.models import context, context_problems, student, teacher, tokenizers
from lopd.checks.prompts import prompts, verifier
from lopd.checks.routing import routing, routing_problems
from lopd.checks.servers import server, server_problems
from lopd.checks.templates import templates
from lopd.checks.trackers import trackers
from lopd.checks.training import (
    batch_problems,
    layouts,
    megatron,
    microbatch_problems,
    objective,
    scorer,
)
from lopd.config import Config
from lopd.errors import LopdError, NotFetched

# Stages that need a server.
SERVING = ("demonstrate", "rollout", "score", "distill", "evaluate")
# Stages that start ranks. evaluate trains the equal-compute baseline.
TRAINING = ("sft", "distill", "evaluate")
# SFT on demonstrations from elsewhere needs no teacher.
_TEACHER = tuple(stage for stage in ALL_STAGES if stage != "sft")
Check = Callable[[Config], Iterator[Finding]]


def _sync(config: Config) -> Iterator[Finding]:
    # The machine is asked here and not in the check, which lopd plan uses for other machines.
    return combinations.sync(config, on_gpu=devices()[1] != CORES)


# By name, the function and the stages to which it matters. The order is the order of the findings:
# what others rest on comes first.
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    # The models themselves, and what prompts and responses need of them.
    "teacher": (teacher, _TEACHER),
    "student": (student, ALL_STAGES),
    "teachers": (teachers, ("demonstrate", "rollout", "score", "distill")),
    "context": (context, SERVING),
    "tokenizers": (tokenizers, SERVING),
    "alignment": (alignment, SERVING),
    # Knobs against each other, against the models, and against this machine.
    "sampling": (combinations.sampling, ("demonstrate", "rollout", "distill", "evaluate")),
    "layouts": (layouts, TRAINING),
    "scorer": (scorer, ("score",)),
    "objective": (objective, ("distill",)),
    "routing": (routing, ("rollout", "distill")),
    "refresh": (combinations.refresh, ("distill",)),
    "sync": (_sync, ("distill",)),
    "megatron": (megatron, TRAINING),
    # What is read besides models: prompts, and artifacts that were made elsewhere.
    "template": (templates, ("demonstrate", "sft", "rollout", "distill", "evaluate")),
    "prompts": (prompts, ("demonstrate", "rollout", "distill", "evaluate")),
    "verifier": (verifier, ("distill", "evaluate")),
    "demonstrations": (demonstrations, ("sft", "evaluate")),
    "lineage": (lineage, ("score",)),
    "checkpoint": (checkpoint, ("sft", "score", "evaluate")),
    "cache": (cache, ("distill",)),
    "verdicts": (verdicts, ("distill",)),
    # The machine: devices and ports, folders, disk.
    "server": (server, SERVING),
    "folders": (folders, ALL_STAGES),
    "disk": (disk, ALL_STAGES),
    "trackers": (trackers, TRAINING),
}


def check(
    config: Config, stage: str | None = None, *, begin: Callable[[str], None] = lambda name: None
) -> Iterator[tuple[str, Finding]]:
    """Run every check, or those that matter to one stage.

    A check that fails does not keep any other from running.

    Args:
        config: The configuration.
        stage: The only stage that will run. None means all of them.
        begin: Called with the name of each check before it runs.

    Yields:
        The name of the check, and a finding.
    """
    # Hashes of large files are remembered from earlier commands. Without them every check of a
    # large model would read all its weights.
    if not config.run.rehash:
        HASHES.load(config.run.dir / STORE)
    # Of a check it matters only whether one of these stages needs it.
    stages = {stage}
    # A refresh samples and scores as these two stages do.
    if stage == "distill" and config.distill.refresh.is_on:
        stages |= {"rollout", "score"}
    for name, (function, matters_to) in CHECKS.items():
        if stage is not None and stages.isdisjoint(matters_to):
            continue
        # Before the check runs, so that a slow one is named while it works.
        begin(name)
        try:
            # One by one: what is found before an error is shown, too.
            for finding in function(config):
                yield name, finding
        except LopdError as error:
            yield name, error


def check_anywhere(
    config: Config, shapes: Shapes, without: Collection[str] = ()
) -> Iterator[LopdError]:
    """Find what is wrong on any machine, from the configuration and the models' shapes alone.

    ``lopd plan`` uses this, so that it refuses what ``lopd check`` would refuse. Layouts that do
    not divide the models are left out, because a plan says so itself.

    Args:
        config: The configuration.
        shapes: The shapes of the models by role.
        without: Stages that this run does not make.
    """
    subjects = (
        context_problems(config, shapes),
        combinations.sampling_problems(config),
        microbatch_problems(config, without=without),
        batch_problems(config, without=without),
        # A given cache need not be on this machine yet, and the objective reads its columns.
        objective(config) if config.distill.cache is None else (),
        combinations.refresh_problems(config),
        alignment_problems(config),
        routing_problems(config, shapes.get("student")),
        combinations.sync_problems(config, on_gpu=None),
        checkpoint_problems(config, to_fetch=True),
        server_problems(config, shapes),
    )
    for subject in subjects:
        yield from problems_of(subject)


def check_all(config: Config, stage: str | None = None) -> None:
    """Run all checks before a stage starts. ``lopd run`` and each stage's verb do this first.

    Args:
        config: The configuration.
        stage: The only stage that will run. None means all of them.

    Raises:
        LopdError: The first problem. It says how many more there are.
    """
    # All checks run even after a problem, so that the number of problems is right.
    problems = [finding for _, finding in check(config, stage) if isinstance(finding, LopdError)]
    if not problems:
        return
    # The first problem is often the cause of the others, so it alone is shown in full.
    # What is only not downloaded yet is no cause of anything, so a real problem goes before it.
    wrong = [problem for problem in problems if not isinstance(problem, NotFetched)]
    first = (wrong or problems)[0]
    more = f" (and {len(problems) - 1} more: lopd check shows all)" if len(problems) > 1 else ""
    # The same class, so that callers can still tell a ConfigError from a ConsistencyError.
    raise type(first)(first.what + more, where=first.where, limit=first.limit, remedy=first.remedy)
