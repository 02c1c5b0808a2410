"""Which of two models or runs is better, by how much, and how sure that is; and how runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lopd.report.console import MODEL_TITLES
from lopd.report.html.outdated import DIGITS, Outdated, outdated_stages
from lopd.report.html.source import Source
from lopd.report.html.transcripts import Scanned
from lopd.tasks.accuracy import shares, standard_error

# Of a normal distribution: 95% lie within so many standard deviations.
Z = 1.96


def paired_difference(one: Scanned, other: Scanned) -> dict[str, Any] | None:
    """Return how much more often ``other`` is right, over the prompts that both have answered.

    Prompts differ in difficulty more than models do, so the differences of the same prompts spread
    less than the two accuracies.

    Returns:
        mean, interval (95%, normal) and num_prompts; None below two common prompts.
    """
    rows = [right_by_prompt(found) for found in (one, other)]
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
        "interval": [mean - Z * error, mean + Z * error],
        "num_prompts": len(common),
    }


def against_baselines(scans: Sequence[Scanned]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return how the distilled student compares with SFT, and with SFT of equal compute.

    Returns:
        Of each baseline that has answered the same prompts its name, its title, and how much more
        often the distilled student is right (paired_difference).
    """
    of = {one.answers.model: one for one in scans if one.answers.prompt_set == "held_out"}
    found = []
    # The stronger baseline last: a reader first wants to know what distillation has changed.
    for name, title in (("sft", "the SFT student"), ("sft_longer", MODEL_TITLES["sft_longer"])):
        if name in of and "distilled" in of:
            difference = paired_difference(of[name], of["distilled"])
            if difference is not None:
                found.append((name, title, difference))
    return found


def right_by_prompt(found: Scanned) -> dict[str, list[bool]]:
    right: dict[str, list[bool]] = {}
    for (prompt_id, _), verdict in found.answers.verdicts.items():
        right.setdefault(prompt_id, []).append(verdict.right)
    return right


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
            knobs[f"models.{role}"] = f"weights {manifest.models[role].weights[:DIGITS]}"
    return knobs


def comparisons(
    sources: Sequence[Source], scans: Sequence[Sequence[Scanned]]
) -> list[dict[str, Any]]:
    """Return how each further source compares with the first one, on the prompts of both.

    Returns:
        text, for each pair of sources whose final models answered the same held-out prompts. Where
        an evaluation is outdated, the text says why nothing can be said.
    """
    finals = [_final(of_source) for of_source in scans]
    outdated = [outdated_stages(source).get("evaluate") for source in sources]
    rows = []
    for index, (source, other) in enumerate(zip(sources[1:], finals[1:], strict=True), start=1):
        if finals[0] is None or other is None:
            continue
        wrong = [(sources[at].name, outdated[at]) for at in (0, index)]
        refusal = refused([(name, one) for name, one in wrong if one is not None])
        if refusal:
            rows.append({"text": refusal})
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


def refused(wrong: Sequence[tuple[str, Outdated]]) -> str:
    """Return why it cannot be said which run is better; "" where it can.

    Args:
        wrong: The names of the runs whose evaluation is outdated, with what is wrong.
    """
    if not wrong:
        return ""
    told = " and ".join(f"the evaluation of {name} is of {one.told}" for name, one in wrong)
    return f"It cannot be said which run is better: {told}. Run `lopd run CONFIG` again."


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
        if round(100 * difference["mean"], 1) == 0:
            ends = [100 * value for value in difference["interval"]]
            return (
                f"{names[0]} and {names[1]} are equal {prompts}: the difference is 0.0 points (95% "
                f"interval {ends[0]:+.1f} to {ends[1]:+.1f}). {seeds}"
            )
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
