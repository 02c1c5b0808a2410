"""The first screen of a report: what was distilled, how good it is, what it cost, which stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from lopd.records import Manifest
from lopd.report.html.responses import MODELS
from lopd.report.html.source import STAGES, Source, read_json
from lopd.report.html.transcripts import Scanned
from lopd.tasks.accuracy import accuracy_interval, shares, standard_error

# Hexadecimal digits of a fingerprint on the page: enough to tell artifacts apart.
_DIGITS = 12
# Of a normal distribution: 95% lie within so many standard deviations.
_Z = 1.96


def overview_of(source: Source, scans: Sequence[Scanned]) -> dict[str, Any]:
    """Return the figures of the first screen, as JSON.

    Returns:
        kind, headline (a sentence), further (sentences), about (pairs of a title and a text),
        models (a row for each evaluated model), stages (a row for each stage), and cost (pairs).
    """
    models = _models(source, scans)
    stages = [_stage(source, name) for name in STAGES if name in source.manifests]
    headline, further = _headline(models, scans)
    return {
        "kind": source.kind,
        "headline": headline,
        "further": further,
        "about": _about(source),
        "models": models,
        "stages": stages,
        "cost": _cost(source, stages),
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
            f"The distilled student is right on {100 * after['accuracy'][0]:.1f}% of the held-out "
            f"answers, the SFT student on {100 * before['accuracy'][0]:.1f}%."
        )
        return text, _differences(scans)
    if before and after and before.get("reverse_kl") and after.get("reverse_kl"):
        text = (
            f"The reverse KL to the teacher is {after['reverse_kl'][0]:.4f} nats per token for the "
            f"distilled student and {before['reverse_kl'][0]:.4f} for the SFT student, on held-out "
            "prompts."
        )
        return text, []
    one = next((row for row in models if row.get("accuracy")), None)
    if one is not None:
        mean, low, high = (100 * value for value in one["accuracy"])
        text = f"The {one['title']} is right on {mean:.1f}% of the answers"
        return f"{text} (95% interval {low:.1f} to {high:.1f}%).", []
    count = sum(len(found.lengths) for found in scans)
    return f"Nothing was judged. {count:,} responses can be read below.", []


def _differences(scans: Sequence[Scanned]) -> list[str]:
    """Return how the distilled student compares with SFT, and with SFT of equal compute."""
    of = {one.answers.model: one for one in scans if one.answers.prompt_set == "held_out"}
    told = []
    for name in ("sft", "sft_longer"):
        if name in of and "distilled" in of:
            difference = paired_difference(of[name], of["distilled"])
            if difference is not None:
                title = "SFT of equal compute" if name == "sft_longer" else of[name].answers.title
                told.append(f"Distilled against {title}: {_told(difference)}")
    return told


def _told(difference: Mapping[str, Any]) -> str:
    low, high = (100 * value for value in difference["interval"])
    sure = (
        "The interval is on one side of 0: the difference is more than chance."
        if low > 0 or high < 0
        else "The interval holds 0: the difference may be chance."
    )
    return (
        f"{100 * difference['mean']:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, "
        f"over the same {difference['num_prompts']:,} prompts. {sure}"
    )


def paired_difference(one: Scanned, other: Scanned) -> dict[str, Any] | None:
    """Return how much more often ``other`` is right, over the prompts that both have answered.

    Prompts differ in difficulty more than models do, so the differences of the same prompts spread
    less than the two accuracies.

    Returns:
        mean, interval (95%, normal) and num_prompts; None below two common prompts.
    """
    rows = [_right_by_prompt(found) for found in (one, other)]
    # Prompt sets of other seeds have the same names for other prompts.
    common = [
        name
        for name in rows[0]
        if name in rows[1] and one.prompts.get(name) == other.prompts.get(name)
    ]
    if len(common) < 2:
        return None
    values = shares([rows[1][name] for name in common]) - shares([rows[0][name] for name in common])
    error = standard_error(values)
    mean = float(np.mean(values))
    return {
        "mean": mean,
        "interval": [mean - _Z * error, mean + _Z * error],
        "num_prompts": len(common),
    }


def _right_by_prompt(found: Scanned) -> dict[str, list[bool]]:
    right: dict[str, list[bool]] = {}
    for (prompt_id, _), verdict in found.answers.verdicts.items():
        right.setdefault(prompt_id, []).append(verdict.right)
    return right


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
            "lengths": _quantiles(found.lengths),
            "finish": found.finish,
        }
        right = [*_right_by_prompt(found).values()]
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


def _quantiles(lengths: Sequence[int]) -> list[float]:
    if not lengths:
        return []
    return [float(value) for value in np.quantile(lengths, [0.1, 0.5, 0.9, 1.0])]


def _about(source: Source) -> list[list[str]]:
    """Return who taught whom, as pairs of a title and a text."""
    models: dict[str, str] = {}
    for manifest in source.manifests.values():
        for role, identity in manifest.models.items():
            weights = f"{PurePath(identity.path).name} (weights {identity.weights[:_DIGITS]})"
            # The first stage with a student names the base student, rollouts the SFT student.
            if weights not in models.values():
                models.setdefault(role, weights)
    if source.kind == "run" and "student" in models:
        models = {{"student": "base student"}.get(role, role): one for role, one in models.items()}
    rows = [[role, text] for role, text in models.items()]
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


def _stage(source: Source, name: str) -> dict[str, Any]:
    manifest = source.manifests[name]
    done = {row["name"]: row["status"] for row in source.summary.get("stages", [])}
    seconds = read_json(source.folder / name / "seconds.json").get("seconds")
    count, kind = _devices(source, name)
    return {
        "name": name,
        "state": "done" if manifest.complete else "not finished",
        # What the last command that reached this stage did.
        "last_command": {"done": "made", "reused": "reused"}.get(done.get(name, ""), ""),
        "seconds": seconds,
        "devices": count,
        "device": kind,
        "rows": manifest.rows,
        "tokens": sum(shard.tokens for shard in manifest.shards),
        "bytes": manifest.extra.get("bytes"),
        "fingerprint": manifest.fingerprint[:_DIGITS],
        "parents": {parent: print_[:_DIGITS] for parent, print_ in manifest.parents.items()},
        "models": {
            role: f"{PurePath(identity.path).name} {identity.weights[:_DIGITS]}"
            for role, identity in manifest.models.items()
        },
    }


def _devices(source: Source, name: str) -> tuple[int, str]:
    """Return how many processes or GPUs a stage computed with, and "CPU" or "GPU"."""
    kind = "CPU" if _is_on_cpu(source.manifests.values()) else "GPU"
    manifest = source.manifests[name]
    served = 0
    for record in manifest.extra.get("served", {}).values():
        for server in record.get("servers", []):
            arguments = server.get("arguments", {})
            served += int(arguments.get("tp_size", 1)) * int(arguments.get("dp_size", 1))
    knobs = manifest.inputs
    ranks = knobs.get(f"{name}.parallel.ranks", 0)
    nodes = read_json(source.folder / name / "job.json").get("config", {}).get(name, {})
    ranks *= nodes.get("parallel", {}).get("nodes", 1) if isinstance(nodes, dict) else 1
    return max(int(ranks), served, 1), kind


def _is_on_cpu(manifests: Any) -> bool:
    return any(
        server.get("arguments", {}).get("device") == "cpu"
        for manifest in manifests
        for record in manifest.extra.get("served", {}).values()
        for server in record.get("servers", [])
    )


def _cost(source: Source, stages: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return what the run has cost, as pairs of a title and a text."""
    rows: list[list[Any]] = []
    hours: dict[str, float] = {}
    for row in stages:
        if row["seconds"] is not None:
            kind = row["device"]
            hours[kind] = hours.get(kind, 0.0) + row["seconds"] * row["devices"] / 3600
    for kind, number in hours.items():
        unit = "GPU hours" if kind == "GPU" else "hours of processes on CPUs"
        rows.append([unit, f"{number:.2f}"])
    generated = _tokens(source.manifests.get("demonstrate"))
    work = source.summary.get("teacher_work", {})
    if generated:
        rows.append(["tokens that the teacher wrote", f"{generated:,}"])
    if work:
        rows.append(["tokens that the teacher scored", f"{work['tokens']:,}"])
        rows.append(["refreshes", f"{work['refreshes']}"])
    scored = source.manifests.get("score") or source.manifests.get("artifact")
    if scored is not None and scored.extra.get("bytes"):
        size = f"{scored.extra['bytes'] / 2**20:,.1f} MiB"
        rows.append(["cache", f"{size}, {scored.extra['bytes_per_token']:.2f} bytes per token"])
    trained = source.summary.get("distill", {}).get("num_tokens")
    if trained:
        rows.append(["tokens through the student in distill", f"{trained:,}"])
    return rows


def _tokens(manifest: Manifest | None) -> int:
    return sum(shard.tokens for shard in manifest.shards) if manifest is not None else 0


def differing_knobs(sources: Sequence[Source]) -> list[list[Any]]:
    """Return the knobs in which runs differ: [knob, value of each source]."""
    configs = [_knobs(source) for source in sources]
    keys = sorted({key for config in configs for key in config})
    rows = []
    for key in keys:
        values = [config.get(key) for config in configs]
        if any(value != values[0] for value in values[1:]):
            rows.append([key, *("" if value is None else value for value in values)])
    return rows


def _knobs(source: Source) -> dict[str, Any]:
    """Return the knobs of a source. Models are named by their weights and not by their path."""
    knobs = dict(source.config)
    for role, stage in (("teacher", "demonstrate"), ("teacher", "score"), ("student", "sft")):
        manifest = source.manifests.get(stage)
        if manifest is not None and role in manifest.models:
            # The same model in another folder is no difference.
            knobs[f"models.{role}"] = f"weights {manifest.models[role].weights[:_DIGITS]}"
    return knobs


def comparisons(
    sources: Sequence[Source], scans: Sequence[Sequence[Scanned]]
) -> list[dict[str, Any]]:
    """Return how each further source compares with the first one, on the prompts of both.

    Returns:
        text, for each pair of sources whose final models answered the same held-out prompts.
    """
    finals = [_final(of_source) for of_source in scans]
    rows = []
    for source, other in zip(sources[1:], finals[1:], strict=True):
        if finals[0] is None or other is None:
            continue
        difference = paired_difference(finals[0], other)
        if difference is None:
            continue
        names = [
            f"{of.name} ({final.answers.title})"
            for of, final in ((sources[0], finals[0]), (source, other))
        ]
        rows.append({"text": verdict_of(names, difference), **difference})
    return rows


def verdict_of(names: Sequence[str], difference: Mapping[str, Any]) -> str:
    """Return which of two sources is better, the better one first.

    Args:
        names: The first source and the other one.
        difference: How much more often the other one is right (paired_difference).
    """
    # The better one first: a negative difference of the other one is read wrongly in a hurry.
    better, worse = names if difference["mean"] <= 0 else (names[1], names[0])
    low, high = sorted(abs(100 * value) for value in difference["interval"])
    points = f"{abs(100 * difference['mean']):.1f} points"
    prompts = f"over the same {difference['num_prompts']:,} prompts"
    # What a second training with another seed would give is not in the interval.
    seeds = "Each is one training: the interval knows nothing of other seeds."
    if min(difference["interval"]) <= 0 <= max(difference["interval"]):
        return (
            f"{better} is ahead of {worse} by {points} {prompts}, which may be chance: the 95% "
            f"interval holds 0. {seeds}"
        )
    return (
        f"{better} is better than {worse} by {points} (95% interval {low:.1f} to {high:.1f}), "
        f"{prompts}. {seeds}"
    )


def _final(scans: Sequence[Scanned]) -> Scanned | None:
    """Return the answers that a source is judged by: those of its distilled student."""
    judged = {one.answers.model: one for one in scans if one.answers.verdicts}
    for name in ("distilled", "model", "sft"):
        if name in judged:
            return judged[name]
    return None
