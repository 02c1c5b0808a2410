"""summary.json and the learning curve of a run, read from the stages' manifests."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lopd.artifacts import publish_json, read_manifest
from lopd.config import Config
from lopd.errors import DataError, LopdError
from lopd.records import Manifest
from lopd.report.console import print_line
from lopd.report.html.outdated import outdated_stages, told_of
from lopd.report.html.source import open_sources
from lopd.report.metrics import LOW_EFFECTIVE_SHARE, mean_of_last, read_metrics

FILE = "summary.json"
# Standard errors of a difference from which on the distilled student counts as worse.
_ERRORS_OF_HARM = 2.0


@dataclass(frozen=True)
class Outcome:
    """What one command did with a stage, and how long it took."""

    name: str
    status: Literal["done", "reused"]
    seconds: float


def write(config: Config, outcomes: Sequence[Outcome], complete: Collection[str]) -> dict[str, Any]:
    """Publish summary.json in the run directory.

    Args:
        config: The configuration.
        outcomes: What this command did.
        complete: The stages that are done under this configuration.

    Returns:
        The summary.
    """
    run_dir = config.run.dir
    # Only the stages of this command: a reused one took the time of its verification.
    stages = [
        {"name": outcome.name, "status": outcome.status, "seconds": round(outcome.seconds, 3)}
        for outcome in outcomes
    ]
    # What is missing in a summary was not made yet under this configuration.
    summary: dict[str, Any] = {"stages": stages}
    # The metrics of the other stages come from other knobs. They would not belong to these.
    stages_read = ("demonstrate", "rollout", "score", "distill", "evaluate")
    made = {name: read_manifest(run_dir / name) for name in stages_read if name in complete}
    if "score" in made:
        summary |= _score_figures(made["score"])
    if "distill" in made:
        # The metrics that the ranks kept, from the first step on, whatever was killed in between.
        names = ("num_steps", "num_tokens", "first_loss", "last_loss", "weight_syncs")
        summary["distill"] = {name: made["distill"].extra[name] for name in names}
        if "score" in made:
            summary["teacher_work"] = _teacher_figures(run_dir, made["score"], made["distill"])
        else:
            # The cache was given by distill.cache, so only distill knows its teacher.
            summary["teacher"] = dict(made["distill"].lineage)
            note = made["distill"].lineage["cache"]["note"]
            summary["notes"] = [f"distill.cache: {note}"]
    if "evaluate" in made:
        summary |= _evaluate_figures(made["evaluate"])
        # A larger or smaller accuracy means little to a reader who does not know these.
        section = config.evaluate
        summary["evaluation"] = {"temperature": section.temperature, "top_p": section.top_p}
    _add_warnings(run_dir, summary, made)
    publish_json(run_dir / FILE, summary)
    return summary


def _add_warnings(run_dir: Path, summary: dict[str, Any], made: Mapping[str, Manifest]) -> None:
    """Add how much was cut off, and what the stages have warned of."""
    cut = {name: of.extra["truncated_share"] for name, of in made.items() if _knows_cut(of)}
    if cut:
        summary["truncated_share"] = cut
    # A stage that was reused has warned in an earlier command. Its warning still holds.
    warnings = [
        f"WARNING: {name}: {text}"
        for name, of in made.items()
        for text in of.extra.get("warnings", ())
    ]
    # Harm and drift are seen only when the figures of several stages stand side by side.
    warnings += warnings_of_harm(summary)
    if "distill" in made:
        warnings += warnings_of_drift(read_metrics(run_dir, kind="train", stage="distill"))
    warnings += [f"WARNING: outdated: {text}" for text in _outdated(run_dir)]
    if warnings:
        summary["notes"] = [*summary.get("notes", ()), *warnings]


def _outdated(run_dir: Path) -> list[str]:
    """Return what to say of stages that were made from an earlier artifact than the present one."""
    # Their figures are not in the summary, but they stand in the run directory.
    with contextlib.suppress(LopdError):
        (source,) = open_sources([run_dir])
        return [text for _, text in told_of(outdated_stages(source))]
    # A damaged manifest is an error of the stage that reads it.
    return []


def warnings_of_harm(summary: Mapping[str, Any]) -> list[str]:
    """Return a warning for each metric by which the distilled student is worse than before."""
    found: list[str] = []
    for name, title, sign in (("accuracy", "accuracy", 1), ("reverse_kl", "the reverse KL", -1)):
        values = summary.get(name, {})
        errors = summary.get(f"{name}_standard_error", {})
        if "sft" not in values or "distilled" not in values:
            continue
        error = math.hypot(errors.get("sft") or 0.0, errors.get("distilled") or 0.0)
        # Two errors of the difference: chance alone does this in one run of forty.
        if sign * (values["distilled"] - values["sft"]) < -_ERRORS_OF_HARM * error:
            found.append(
                f"WARNING: distill: {title} got worse than that of the SFT student, from "
                f"{values['sft']:.4f} to {values['distilled']:.4f}; lower distill.optimizer.lr, "
                "take fewer steps, or use the top-K loss (docs/understand.md)"
            )
    return found


def warnings_of_drift(train: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a warning where the last steps of distill were far from the rollouts' policy.

    Args:
        train: The lines of the training steps in metrics.jsonl.
    """
    share = mean_of_last(train, "effective_sample_share")
    if share is None or share >= LOW_EFFECTIVE_SHARE:
        return []
    return [
        f"WARNING: distill: effective_sample_share of the last steps is {share:.2f}, below "
        f"{LOW_EFFECTIVE_SHARE}: the student is far from the policy of its rollouts; first lower "
        "distill.optimizer.lr or let it decay (distill.optimizer.schedule), then set "
        "distill.refresh.every (docs/understand.md)"
    ]


def _knows_cut(manifest: Manifest) -> bool:
    # Artifacts of earlier versions do not have the figure.
    return "truncated_share" in manifest.extra


def draw(config: Config) -> None:
    """Publish the learning curve, if there are metrics to draw."""
    # Imported here: matplotlib takes long to import.
    from lopd.report.html.learning_curve import draw_learning_curve, learning_title

    try:
        draw_learning_curve(config.run.dir, title=learning_title(config.distill.objective.loss))
    except DataError as error:
        # A run without a curve is still a run.
        print_line(f"no learning curve: {error}", config.run.dir / "log.txt")


def _score_figures(score: Manifest) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "cache": {
            "rows": score.rows,
            "tokens": score.extra["tokens"],
            "bytes_per_token": round(score.extra["bytes_per_token"], 4),
        },
        "teacher": dict(score.lineage),
    }
    # How much the student could learn from a teacher with another tokenizer.
    if "alignment_counts" in score.extra:
        figures["cache"]["alignment"] = dict(score.extra["alignment_counts"])
    # The method assumes one teacher. Who reads only the summary must see that it was not so.
    if not score.lineage["consistent"]:
        figures["notes"] = [
            "WARNING: score.allow_foreign_teacher is set: the scoring teacher did not make the "
            "student's demonstrations"
        ]
    return figures


def _teacher_figures(run_dir: Path, score: Manifest, distill: Manifest) -> dict[str, float]:
    """Return what the teacher did after the demonstrations, in score and in refreshes.

    Returns:
        refreshes: How many there were. tokens: Response tokens that were scored. seconds: How long
        it started or scored, in the commands that finished the stage and each refresh.
    """
    refreshes = distill.extra.get("refreshes", [])
    # Each refresh has its own file, because the teacher is started for each of them.
    refreshed = sorted((run_dir / "distill").glob("refresh-*/seconds.json"))
    seconds = _seconds(run_dir / "score" / "seconds.json", "seconds")
    seconds += sum(_seconds(path, "teacher_seconds") for path in refreshed)
    return {
        "refreshes": len(refreshes),
        "tokens": score.extra["tokens"] + sum(refresh["tokens"] for refresh in refreshes),
        "seconds": round(seconds, 3),
    }


def _evaluate_figures(evaluate: Manifest) -> dict[str, Any]:
    """Return accuracy, reverse KL and lengths of each model, with standard errors.

    Without a verifier there is no accuracy.
    """
    # The counts stand beside the metrics, because a metric without them says little.
    extra = evaluate.extra
    counts = {name: extra[name] for name in ("num_prompts", "samples_per_prompt")}
    figures: dict[str, Any] = {}
    for quantity in [name for name in ("accuracy", "reverse_kl") if name in extra]:
        of_models = extra[quantity]
        means = {name: value["mean"] for name, value in of_models.items()}
        errors = {name: value["standard_error"] for name, value in of_models.items()}
        figures[quantity] = {**means, **counts}
        figures[f"{quantity}_standard_error"] = errors
    if "accuracy" in extra:
        intervals = {name: value["interval"] for name, value in extra["accuracy"].items()}
        figures["accuracy_interval"] = intervals
    # An evaluation of an earlier version does not have them.
    figures["responses"] = extra.get("responses", {})
    figures["sft_longer"] = extra["sft_longer"]
    return figures


def _seconds(path: Path, name: str) -> float:
    """Return a figure of a file that decides nothing; 0 where it is missing or damaged."""
    # A summary is not worth a failed run: the manifests have all that matters.
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
