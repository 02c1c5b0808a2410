"""Everything that can be found wrong before anything starts: models, tokenizers, layouts, prompts, servers, folders, disk. Starts nothing, writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lopd.checks.findings import ALL_STAGES, Finding
from lopd.checks.folders import disk, folders
from lopd.checks.lineage import cache, checkpoint, demonstrations, lineage, teachers
from lopd.checks.models import context, student, teacher, tokenizers
from lopd.checks.prompts import prompts, verifier
from lopd.checks.servers import server
from lopd.checks.training import layouts, megatron, objective, scorer
from lopd.config import Config
from lopd.errors import LopdError

SERVING = ("demonstrate", "rollout", "score", "distill", "evaluate")
TRAINING = ("sft", "distill", "evaluate")  # evaluate trains the equal-compute baseline
Check = Callable[[Config], Iterator[Finding]]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {  # name -> function, and the stages to which it matters
    "teacher": (teacher, tuple(stage for stage in ALL_STAGES if stage != "sft")),  # SFT on demonstrations from elsewhere needs none
    "student": (student, ALL_STAGES),
    "teachers": (teachers, ("demonstrate", "rollout", "score", "distill")),
    "context": (context, SERVING),
    "tokenizers": (tokenizers, SERVING),
    "layouts": (layouts, TRAINING),
    "scorer": (scorer, ("score",)),
    "objective": (objective, ("distill",)),
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
    """Runs every check (or those that matter to one stage); yields (name, finding). A check that fails keeps no other from running."""
    for name, (function, stages) in CHECKS.items():
        if stage is None or stage in stages:
            try:
                for finding in function(config):
                    yield name, finding
            except LopdError as error:
                yield name, error


def check_all(config: Config, stage: str | None = None) -> None:
    """Raises the first error of all checks; what ``lopd run`` and each stage's verb do before anything else."""
    problems = [finding for _, finding in check(config, stage) if isinstance(finding, LopdError)]
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more: lopd check tells all)" if len(problems) > 1 else ""
        raise type(first)(first.what + more, where=first.where, limit=first.limit, remedy=first.remedy)


def as_rows(config: Config) -> list[dict[str, Any]]:
    """The checks as rows for a table or JSON: name, ok, finding."""
    return [{"name": name, "ok": not isinstance(finding, LopdError), "finding": str(finding)} for name, finding in check(config)]
