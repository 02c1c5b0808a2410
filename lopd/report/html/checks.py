"""What a report warns of: rules with their figure, their limit, what to do, and where to read on.

Each rule says what it has seen also where all is well, so that a reader knows what was looked at.
The limits are rules of thumb and decide nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lopd.cache.recommendation import is_sharp
from lopd.cache.regime import ADVANTAGE_CLIP, FAR, share_excluded
from lopd.records import Manifest
from lopd.report.console import MODEL_TITLES
from lopd.report.html.comparing import against_baselines
from lopd.report.html.outdated import Outdated, listed, outdated_stages, told_of
from lopd.report.html.responses import SETS
from lopd.report.html.source import Source
from lopd.report.html.transcripts import Scanned
from lopd.report.metrics import LOW_EFFECTIVE_SHARE, mean_of_last, read_metrics, worst_step

# A student whose answers became so much longer has learned to go on.
_LENGTH_RATIO = 1.5
# From this share on a stage warns too (lopd.stages.truncation).
_CUT_SHARE = 0.2
# So many more answers that are cut off are no chance.
_CUT_RISE = 0.05
_CLIPPED_SHARE = 0.03
# Nats. An advantage that stays below it drives the student off its own samples.
_ADVANTAGE = -0.3
_END_ADVANTAGE = -1.0
_OBJECTIVE_FIGURES = "objectives.md#the-figures-of-a-step"
_DRIFT_REMEDY = (
    "Lower distill.optimizer.lr or let it decay (distill.optimizer.schedule). Then make new "
    "rollouts on the way (distill.refresh), or weight tokens by importance "
    "(distill.objective.importance_cap)."
)
_NO_END = "understand.md#responses-without-an-end"
_END_REMEDY = (
    'Raise max_new_tokens, or set distill.objective.truncated = "drop", so that no response '
    "without an end is learned."
)


@dataclass(frozen=True, slots=True)
class Check:
    """One rule.

    Attributes:
        state: "fine", "warning", or "note" for what a reader must know and what is no fault.
        title: What was looked at.
        text: What was seen, as a sentence.
        remedy: What to do about it; "" where all is well.
        doc: The page of docs/ and the heading that say more.
    """

    state: Literal["fine", "warning", "note"]
    title: str
    text: str
    remedy: str = ""
    doc: str = ""


def checks_of(
    source: Source, scans: Sequence[Scanned], tokens: Sequence[Mapping[str, Any]]
) -> list[Check]:
    """Return all checks for which a source has figures, warnings first.

    Args:
        source: The source.
        scans: All responses of the source.
        tokens: The panels of lopd.report.html.transcripts.token_panels.
    """
    train = []
    if source.kind == "run":
        train = read_metrics(source.folder, kind="train", stage="distill")
    # The stage whose figures a rule reads. Rules of the rollouts read the newest of them.
    cache = "score" if "score" in source.manifests else "rollout"
    rules = {
        "evaluate": [*_results(source, scans), *_lengths(scans), *_of_evaluation(source)],
        "distill": [*_training(train)],
        cache: [*_ends(scans), *_teacher(source), *_sharp_teacher(source, tokens)],
    }
    outdated = outdated_stages(source)
    not_judged = {name: _silenced(rules, name) for name in outdated}
    found = [
        *_outdated(outdated, not_judged),
        *_progress(source),
        *(one for name, of in rules.items() for one in _still_said(of, name in outdated)),
        *_servers(source),
        *_from_stages(source),
    ]
    order = ("warning", "note", "fine")
    return sorted(found, key=lambda check: order.index(check.state))


def _judged(is_wrong: bool, title: str, text: str, remedy: str, doc: str) -> Check:
    if is_wrong:
        return Check("warning", title, text, remedy, doc)
    return Check("fine", title, text, "", doc)


def _progress(source: Source) -> Iterator[Check]:
    """Say what the run does not have yet."""
    if source.kind != "run":
        return
    unfinished = [name for name, one in source.manifests.items() if not one.complete]
    doc = "understand.md#where-is-the-run"
    if unfinished:
        names = ", ".join(unfinished)
        yield Check("note", "progress", f"Not finished: {names}.", "Give lopd run again.", doc)
    if "evaluate" not in source.manifests or "evaluate" in unfinished:
        text = "No evaluation has finished, so nothing here says how good the student is."
        yield Check("note", "evaluation", text, "Run lopd evaluate CONFIG.", "evaluation.md")


def _silenced(rules: Mapping[str, Sequence[Check]], stage: str) -> list[str]:
    """Return the titles of the rules that have found nothing in the figures of a stage."""
    return [check.title for check in rules.get(stage, ()) if check.state == "fine"]


def _still_said(checks: Sequence[Check], is_outdated: bool) -> Iterator[Check]:
    """Yield what rules have found. Of outdated figures it is no good news that nothing is found."""
    for check in checks:
        if not is_outdated:
            yield check
        elif check.state != "fine":
            yield replace(check, text=f"(From outdated figures.) {check.text}")


def _outdated(
    outdated: Mapping[str, Outdated], not_judged: Mapping[str, Sequence[str]]
) -> Iterator[Check]:
    """Warn once of each artifact that was made again, with all stages of the earlier one.

    Args:
        outdated: lopd.report.html.outdated.outdated_stages.
        not_judged: By stage, the rules that are not applied to its figures.
    """
    for names, text in told_of(outdated):
        silent = [title for name in names for title in not_judged[name]]
        if silent:
            text += f" Not judged, because the figures are outdated: {', '.join(silent)}."
        doc = "understand.md#where-is-the-run"
        yield Check("warning", f"outdated {listed(names)}", text, "", doc)


def _results(source: Source, scans: Sequence[Scanned]) -> Iterator[Check]:
    """Say whether the training has done good or harm."""
    doc = "understand.md#is-the-training-healthy"
    remedy = (
        "Look where the curves turn. Lower distill.optimizer.lr, take fewer steps, or use newer "
        "rollouts."
    )
    for name, title, difference in against_baselines(scans):
        low, high = (100 * value for value in difference["interval"])
        text = f"Against {title} it is {low:+.1f} to {high:+.1f} points (95% interval)."
        if name == "sft":
            yield _judged(high < 0, "accuracy of the distilled student", text, remedy, doc)
        else:
            yield _equal_compute(low, high, text)
    evaluated = source.manifests.get("evaluate")
    divergence = evaluated.extra.get("reverse_kl", {}) if evaluated is not None else {}
    if "sft" in divergence and "distilled" in divergence:
        values = [divergence[name]["mean"] for name in ("sft", "distilled")]
        text = (
            f"The reverse KL to the teacher on held-out prompts went from {values[0]:.4f} to "
            f"{values[1]:.4f} nats per token."
        )
        yield _judged(values[1] > values[0], "distance to the teacher", text, remedy, doc)


def _equal_compute(low: float, high: float, text: str) -> Check:
    """Compare with what else the compute could have bought: more SFT, without any OPD.

    Args:
        low: The lower end of the 95% interval of the difference, in points.
        high: Its upper end.
        text: What was seen.
    """
    page = "evaluation.md#the-baseline-of-equal-compute"
    more = "Compare them on your own task before you choose."
    if high < 0:
        return Check("warning", "equal compute", f"{text} More SFT is better here.", more, page)
    if low <= 0:
        unsure = f"{text} Distillation is not shown to be better than more SFT."
        return Check("note", "equal compute", unsure, more, page)
    return Check("fine", "equal compute", text, "", page)


def _teacher(source: Source) -> Iterator[Check]:
    """Say whether the teacher that scored also made the demonstrations."""
    doc = "objectives.md#a-teacher-that-did-not-make-the-demonstrations"
    scored = source.manifests.get("score") or source.manifests.get("artifact")
    if scored is None:
        scored = source.manifests.get("distill")
    lineage = scored.lineage if scored is not None else {}
    if "consistent" not in lineage:
        return
    evidence = lineage.get("evidence", "unknown")
    remedy = (
        "Use one teacher for the demonstrations and the scores, or take the style of this one "
        "away with lopd cache residualise."
    )
    if not lineage["consistent"]:
        text = "The scoring teacher is not shown to be the one that made the demonstrations."
        yield Check("warning", "one teacher", text, remedy, doc)
    else:
        text = f"The scoring teacher also made the demonstrations (evidence: {evidence})."
        yield Check("fine", "one teacher", text, "", doc)


def _lengths(scans: Sequence[Scanned]) -> Iterator[Check]:
    """Compare lengths and ends of answers before and after."""
    held_out = {one.answers.model: one for one in scans if one.answers.prompt_set == "held_out"}
    before = held_out.get("sft")
    after = held_out.get("distilled")
    if before is not None and after is not None:
        means = [sum(one.lengths) / max(1, len(one.lengths)) for one in (before, after)]
        ratio = means[1] / max(means[0], 1e-9)
        text = (
            f"The answers have {means[1]:,.0f} tokens after distillation and {means[0]:,.0f} "
            f"before ({ratio:.2f} times)."
        )
        yield _judged(ratio > _LENGTH_RATIO, "length of answers", text, _END_REMEDY, _NO_END)
        cut = [one.cut_share for one in (before, after)]
        text = f"{cut[1]:.1%} of the answers have no end after distillation, {cut[0]:.1%} before."
        lost = cut[1] > cut[0] + _CUT_RISE or cut[1] > _CUT_SHARE
        yield _judged(lost, "end token", text, _END_REMEDY, _NO_END)


def _ends(scans: Sequence[Scanned]) -> Iterator[Check]:
    """Look at the ends of the responses that a training learns from."""
    for one in _whose_ends_matter(scans):
        title = f"ends of the {SETS[one.answers.prompt_set]}"
        if one.answers.is_refresh:
            title = "ends of the refreshed rollouts"
        text = f"{one.cut_share:.1%} of these responses were cut off at a token limit."
        yield _judged(one.cut_share >= _CUT_SHARE, title, text, _END_REMEDY, _NO_END)


def _whose_ends_matter(scans: Sequence[Scanned]) -> list[Scanned]:
    """Return the responses that a training learns from, and of all refreshes the worst."""
    found = [one for one in scans if one.answers.prompt_set not in ("held_out", "policy")]
    refreshes = [one for one in found if one.answers.is_refresh]
    worst = max(refreshes, key=lambda one: one.cut_share, default=None)
    return [one for one in found if one is worst or not one.answers.is_refresh]


def _training(train: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """Look at the figures of the last steps of distill."""
    share = mean_of_last(train, "effective_sample_share")
    if share is not None:
        worst = _worst(train, "effective_sample_share", ".2f", lowest=True)
        text = (
            f"The effective sample share of the last steps is {share:.2f} (1 is no drift).{worst}"
        )
        doc = "understand.md#a-low-effective-sample-share"
        yield _judged(
            share < LOW_EFFECTIVE_SHARE, "drift from the rollouts", text, _DRIFT_REMEDY, doc
        )
    gap = mean_of_last(train, "gradient_gap")
    spread = mean_of_last(train, "advantage_std")
    if gap is not None and spread is not None:
        worst = _worst(train, "gradient_gap", ".3f", lowest=False)
        text = (
            f"The gradient on the rollouts may be {gap:.3f} nats from the one on fresh tokens in "
            f"the last steps, where the advantage spreads by {spread:.3f}.{worst}"
        )
        # Where it is as large, the rollouts decide more than the student.
        wrong = gap >= spread > 0
        yield _judged(wrong, "gap of the gradient", text, _DRIFT_REMEDY, _OBJECTIVE_FIGURES)
    clipped = mean_of_last(train, "clipped_share")
    if clipped is not None:
        worst = _worst(train, "clipped_share", ".2%", lowest=False)
        text = f"{clipped:.2%} of the tokens of the last steps are beyond the clip.{worst}"
        remedy = "Look at single tokens below: is it the right teacher? lopd audit tests it."
        wrong = clipped > _CLIPPED_SHARE
        yield _judged(wrong, "clipped share", text, remedy, _OBJECTIVE_FIGURES)
    yield from _advantages(train)


def _advantages(train: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """Look at the advantage of all tokens, and of end tokens."""
    advantage = mean_of_last(train, "advantage")
    if advantage is not None:
        worst = _worst(train, "advantage", "+.3f", lowest=True)
        text = (
            f"The mean advantage of the last steps is {advantage:+.3f} nats (0 is the teacher)."
            f"{worst}"
        )
        remedy = (
            "The student is still driven off its own samples: train for more steps, use newer "
            "rollouts, or a smaller distill.advantage_clip."
        )
        wrong = advantage < _ADVANTAGE
        yield _judged(wrong, "mean advantage", text, remedy, _OBJECTIVE_FIGURES)
    end = mean_of_last(train, "end_token_advantage")
    if end is not None:
        worst = _worst(train, "end_token_advantage", "+.3f", lowest=True)
        text = f"The mean advantage of end tokens in the last steps is {end:+.3f} nats.{worst}"
        remedy = "The teacher wants longer responses. Watch the lengths at the syncs."
        wrong = end < _END_ADVANTAGE
        yield _judged(wrong, "advantage of end tokens", text, remedy, _OBJECTIVE_FIGURES)


def _worst(train: Sequence[Mapping[str, Any]], name: str, form: str, *, lowest: bool) -> str:
    """Return a sentence about the worst step: a mean of the last ones can hide it."""
    worst = worst_step(train, name, lowest=lowest)
    if worst is None:
        return ""
    word = "lowest" if lowest else "highest"
    return f" The {word} was {worst[0]:{form}}, at step {worst[1]}."


def _sharp_teacher(source: Source, tokens: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """Say whether the teacher all but excludes tokens of the rollouts."""
    panel = next((one for one in tokens if one["set"] in ("rollouts", "responses")), None)
    if panel is None:
        return
    overall = panel["overall"]
    far = overall["over_far"]
    num_far = round(far * overall["tokens"])
    num_excluded = round(overall["over_clip"] * overall["tokens"])
    text = (
        f"{far:.2%} of the tokens are beyond {FAR:g} nats, and "
        f"{share_excluded(num_far, num_excluded):.0%} of these beyond {ADVANTAGE_CLIP:g}."
    )
    remedy = (
        "A sharp teacher gives strong signals at few sampled tokens. Compare with a top-K loss "
        "(score.top_k) or with newer rollouts (distill.refresh) on a part of the prompts."
    )
    # Losses that are not hurt by it were configured already.
    loss = source.config.get("distill.objective.loss", "lightning")
    cap = source.config.get("distill.objective.importance_cap")
    wrong = is_sharp(num_far, num_excluded) and loss == "lightning" and cap is None
    yield _judged(wrong, "sharp teacher", text, remedy, "objectives.md#which-loss-suits-a-cache")


def _servers(source: Source) -> Iterator[Check]:
    restarts = {
        stage: sum(
            int(server.get("num_restarts", 0))
            for record in manifest.extra.get("served", {}).values()
            for server in record.get("servers", [])
        )
        for stage, manifest in source.manifests.items()
        if "served" in manifest.extra
    }
    if not restarts:
        return
    doc = "sglang.md#when-a-server-dies-or-hangs"
    seen = [f"{count} in {stage}" for stage, count in restarts.items() if count]
    text = f"Servers were started again: {', '.join(seen)}." if seen else "No server died."
    yield _judged(bool(seen), "servers", text, "Read the server's log in that stage's folder.", doc)


def _from_stages(source: Source) -> Iterator[Check]:
    """Repeat what the stages have warned of themselves."""
    for stage, manifest in source.manifests.items():
        if stage != "evaluate":
            yield from _repeated(stage, manifest)
    # What a checkpoint's evaluation has warned of.
    for warning in source.summary.get("warnings", ()):
        yield Check("warning", "warning of the evaluation", f"{warning}.", "", _NO_END)


def _of_evaluation(source: Source) -> Iterator[Check]:
    if "evaluate" in source.manifests:
        yield from _repeated("evaluate", source.manifests["evaluate"])


def _repeated(stage: str, manifest: Manifest) -> Iterator[Check]:
    for warning in manifest.extra.get("warnings", ()):
        # The model's name in it is the one of the folders.
        text = f"{stage}: {warning}."
        for name, title in MODEL_TITLES.items():
            text = text.replace(f" of {name} ", f" of the {title} ")
        yield Check("warning", f"warning of {stage}", text, "", "understand.md")
