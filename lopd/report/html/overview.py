"""The first screen of a report: what was distilled, how good it is, what it cost, which stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from lopd.report.html.comparing import against_baselines, right_by_prompt
from lopd.report.html.outdated import DIGITS, Outdated, outdated_stages, output_weights
from lopd.report.html.responses import MODELS
from lopd.report.html.sizes import size_of
from lopd.report.html.source import STAGES, Source
from lopd.report.html.stages import cost_of, stage_of
from lopd.report.html.tokens import QUANTILES
from lopd.report.html.transcripts import Scanned
from lopd.tasks.accuracy import accuracy_interval, shares


def overview_of(source: Source, scans: Sequence[Scanned]) -> dict[str, Any]:
    """Return the figures of the first screen, as JSON.

    Returns:
        kind, headline (a sentence), further (sentences), about (pairs of a title and a text),
        models (a row for each evaluated model), outdated (of which student they are, where that is
        not the present one), stages (a row for each stage), and cost (pairs).
    """
    models = _models(source, scans)
    stages = [stage_of(source, name) for name in STAGES if name in source.manifests]
    headline, further = _headline(models, scans)
    wrong = outdated_stages(source).get("evaluate")
    if wrong is not None:
        headline, further = _of_an_earlier_student(wrong, headline, further)
    return {
        "kind": source.kind,
        "headline": headline,
        "further": further,
        "about": _about(source),
        "models": models,
        "outdated": "" if wrong is None else wrong.told,
        "stages": stages,
        "cost": cost_of(source, stages),
    }


def _headline(
    models: Sequence[Mapping[str, Any]], scans: Sequence[Scanned]
) -> tuple[str, list[str]]:
    """Return the result in a sentence, and further sentences."""
    rows = {row["name"]: row for row in models}
    before = rows.get("sft")
    after = rows.get("distilled")
    if before and after and before.get("accuracy") and after.get("accuracy"):
        text = (
            f"The {after['title']} is right on {100 * after['accuracy'][0]:.1f}% of the held-out "
            f"answers, the {before['title']} on {100 * before['accuracy'][0]:.1f}%."
        )
        return _with_what_is_better(text, rows, scans)
    if before and after and before.get("reverse_kl") and after.get("reverse_kl"):
        text = (
            f"The reverse KL to the teacher is {after['reverse_kl'][0]:.4f} nats per token for the "
            f"{after['title']} and {before['reverse_kl'][0]:.4f} for the {before['title']}, on "
            "held-out prompts."
        )
        return text, []
    one = next((row for row in models if row.get("accuracy")), None)
    if one is not None:
        mean, low, high = (100 * value for value in one["accuracy"])
        text = f"The {one['title']} is right on {mean:.1f}% of the answers"
        return f"{text} (95% interval {low:.1f} to {high:.1f}%).", []
    count = sum(len(found.lengths) for found in scans)
    return f"Nothing was judged. {count:,} responses can be read below.", []


def _of_an_earlier_student(
    wrong: Outdated, headline: str, further: Sequence[str]
) -> tuple[str, list[str]]:
    """Return the headline and further sentences where the evaluation is not of the present one.

    A reader in a hurry reads the bold sentence alone, so it must not hold a figure without saying
    whose it is.
    """
    result = f"The evaluation is of {wrong.told}. {headline}"
    return result, [f"Of the earlier student: {sentence}" for sentence in further]


def _with_what_is_better(
    text: str, rows: Mapping[str, Mapping[str, Any]], scans: Sequence[Scanned]
) -> tuple[str, list[str]]:
    """Return the headline and further sentences.

    Where a model that costs no more is better than the distilled student, that is the headline.
    """
    differences = against_baselines(scans)
    student = rows["distilled"]["title"]
    told = [f"Distilled against {title}: {_told(one)}" for _, title, one in differences]
    for name, title, difference in differences:
        if difference["interval"][1] < 0:
            percents = [100 * rows[of]["accuracy"][0] for of in (name, "distilled")]
            better = (
                f"{title[0].upper()}{title[1:]} is better than the {student}: it is right on "
                f"{percents[0]:.1f}% of the held-out answers, the {student} on {percents[1]:.1f}%."
            )
            return better, [text, *told]
    return text, told


def _told(difference: Mapping[str, Any]) -> str:
    low, high = (100 * value for value in difference["interval"])
    sure = (
        "The interval is on one side of 0: the difference is more than chance."
        if low > 0 or high < 0
        else "The interval holds 0: the difference may be chance."
    )
    points = f"{100 * difference['mean']:+.1f} points"
    if round(100 * difference["mean"], 1) == 0:
        points = "equal (0.0 points)"
    return (
        f"{points}, 95% interval {low:+.1f} to {high:+.1f}, "
        f"over the same {difference['num_prompts']:,} prompts. {sure}"
    )


def _models(source: Source, scans: Sequence[Scanned]) -> list[dict[str, Any]]:
    """Return a row for each model that has answered held-out prompts."""
    extra = source.manifests["evaluate"].extra if "evaluate" in source.manifests else {}
    held_out = [one for one in scans if one.answers.prompt_set in ("held_out", "responses")]
    order = {name: index for index, name in enumerate(MODELS)}
    rows = []
    for found in sorted(held_out, key=lambda one: order.get(one.answers.model, len(order))):
        name = found.answers.model
        row: dict[str, Any] = {
            "name": name,
            "title": found.answers.title,
            "responses": len(found.lengths),
            "prompts": len(found.rows),
            "mean_len": float(np.mean(found.lengths)) if found.lengths else 0.0,
            "lengths": _quantiles(found.lengths, (0.1, 0.5, 0.9, 1.0)),
            "length_quantiles": _quantiles(found.lengths, QUANTILES),
            "finish": found.finish,
        }
        right = [*right_by_prompt(found).values()]
        if right:
            means = shares(right)
            (low, high), _ = accuracy_interval(means)
            row["accuracy"] = [float(means.mean()), low, high]
        divergence = extra.get("reverse_kl", {}).get(name)
        if divergence is not None:
            row["reverse_kl"] = [_finite(divergence["mean"]), _finite(divergence["standard_error"])]
        rows.append(row)
    return rows


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _quantiles(lengths: Sequence[int], shares_of: Sequence[float]) -> list[float]:
    return [float(value) for value in np.quantile(lengths, shares_of)] if lengths else []


def _sizes(source: Source) -> list[list[str]]:
    """Return the sizes of teacher and student, where their files are still there."""
    folders: dict[str, Path] = {}
    for manifest in source.manifests.values():
        for role, identity in manifest.models.items():
            folders.setdefault(role, Path(identity.path))
    # The students of a run have one size, and its own one is the one that is surely there.
    if source.kind == "run":
        folders["student"] = source.folder / "distill/model"
        if not folders["student"].is_dir():
            folders["student"] = source.folder / "sft/model"
    sizes = {role: size_of(folders[role]) for role in ("teacher", "student") if role in folders}
    return [[f"size of the {role}", size] for role, size in sizes.items() if size]


def _about(source: Source) -> list[list[str]]:
    """Return who taught whom, as pairs of a title and a text."""
    models: dict[str, str] = {}
    for manifest in source.manifests.values():
        for role, identity in manifest.models.items():
            weights = f"{PurePath(identity.path).name} (weights {identity.weights[:DIGITS]})"
            # The first stage with a student names the base student, rollouts the SFT student.
            if weights not in models.values():
                models.setdefault(role, weights)
    if source.kind == "run" and "student" in models:
        models = {{"student": "base student"}.get(role, role): one for role, one in models.items()}
    for stage, role in (("sft", "SFT student"), ("distill", "distilled student")):
        made = output_weights(source, stage)
        if made:
            models[role] = f"made by {stage} (weights {made})"
    rows = [[role, text] for role, text in models.items()]
    rows += _sizes(source)
    config = source.config
    for key, title in (("task.name", "task"), ("distill.objective.loss", "objective")):
        if key in config:
            rows.append([title, str(config[key])])
    if "distill.num_steps" in config:
        steps = f"{config['distill.num_steps']} steps of {config['distill.batch_size']} responses"
        rows.append(["distill", f"{steps}, learning rate {config['distill.optimizer.lr']:g}"])
    if source.kind == "evaluation":
        of = source.summary
        rows.append(["model", PurePath(str(of.get("model", {}).get("path", ""))).name])
        rows.append(["task", str(of.get("task", {}).get("name", ""))])
    sampling = next((one.sampling for one in source.manifests.values() if one.sampling), {})
    if sampling:
        knobs = ("temperature", "top_p", "top_k", "max_new_tokens", "samples_per_prompt")
        told = [f"{name} {sampling[name]}" for name in knobs if name in sampling]
        rows.append(["sampled with", ", ".join(told)])
    versions = next((one.versions for one in source.manifests.values()), {})
    rows.append(["made by", ", ".join(f"{name} {version}" for name, version in versions.items())])
    return rows
