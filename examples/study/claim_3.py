"""Claim 3: what it costs to come to one accuracy and one reverse KL."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from examples.study.arms import (
    HABIT,
    HABIT_LIGHTNING,
    HABIT_SFT,
    HABIT_TOP_K,
    LIGHTNING,
    SCORED,
    Answer,
    Arm,
    Claim,
    Command,
    Place,
    Plot,
    Verdict,
    distilled,
)
from examples.study.claim_1 import EVERY_4, LIGHTNING_8, ONLINE, ONLINE_8, REFRESH
from examples.study.claim_4 import ONLINE_16
from examples.study.figures import Figures, Interval, MissingFigures
from examples.study.outcomes import MARGIN
from examples.study.tables import costs_table, results_table
from examples.study.wording import words

# A bound near 1: one decision in fifty tokens changes in this task, and a mean over tokens hardly
# notices it.
DRIFT = distilled(
    "c3_drift",
    "renewed when the effective share is below 0.97",
    *REFRESH,
    "distill.refresh.min_effective_share=0.97",
    "distill.refresh.num_responses=256",
)


def _one_command(steps: int, place: Place) -> tuple[Command, ...]:
    few = (f"distill.num_steps={steps}", f"distill.checkpoint_every={steps}")
    return (("lopd", "run", *LIGHTNING, *few),)


# Claim 4's curve has come to the bar at 48 steps on the same cache. No checkpoint is needed.
LIGHTNING_48 = distilled(
    "c3_lightning_48",
    "Lightning OPD, 48 steps",
    *LIGHTNING,
    "distill.num_steps=48",
    "distill.checkpoint_every=48",
)
# The same two trainings as one command from the rollouts on, as a user gives it: its stages share a
# server, and the starts of one overlap with the work of another.
RUN_16, RUN_48 = (
    Arm(
        name=f"c3_run_{steps}",
        title=f"Lightning OPD, {steps} steps, one command",
        setting=HABIT,
        commands=partial(_one_command, steps),
        copied=SCORED[:2],
    )
    for steps in (16, 48)
)
# An arm of its own, without a model: the time of an installation is no cost of a training.
TRL_ENVIRONMENT = Arm(
    name="c3_trl_environment",
    title="TRL's environment",
    setting=HABIT,
    commands=lambda place: (("python", "with_trl", "environment", str(place.run)),),
    model="",
)
TRL = Arm(
    name="c3_trl",
    title="TRL's DistillationTrainer, 16 steps",
    setting=HABIT,
    commands=lambda place: (
        (
            "python",
            "with_trl",
            "train",
            str(place.seed),
            str(place.run / "sft" / "model"),
            str(place.run / "trl"),
        ),
    ),
    copied=SCORED[:2],
    after=(TRL_ENVIRONMENT.name,),
    model="trl/model",
)
# The loss of the cache that holds the teacher's 8 likeliest tokens, which all of these arms have.
_TOP_K_TITLE = "the same cache, top-8 reverse KL"
_TITLES = {
    HABIT_LIGHTNING.name: HABIT_LIGHTNING.title,
    RUN_16.name: RUN_16.title,
    LIGHTNING_8.name: LIGHTNING_8.title,
    LIGHTNING_48.name: LIGHTNING_48.title,
    RUN_48.name: RUN_48.title,
    HABIT_TOP_K.name: _TOP_K_TITLE,
    EVERY_4.name: EVERY_4.title,
    DRIFT.name: DRIFT.title,
    ONLINE.name: ONLINE.title,
    ONLINE_8.name: ONLINE_8.title,
    TRL.name: TRL.title,
}
_OURS = HABIT_LIGHTNING.name
# Of the rollouts in the cache, standard OPD learns from its first batch alone: 64 of 512.
_UNUSED = 1 - 64 / 512
# Below this a model has learnt as much as standard OPD with more steps: a share of what standard
# OPD has taken from the SFT student's reverse KL. It was named before the runs.
_SHARE_OF_KL = 0.9


def _reaches(figures: Figures, arm: str) -> tuple[bool | None, Interval]:
    """Return whether an arm comes to the bar, or None where the interval does not say it.

    Returns:
        The answer, and the arm's accuracy at T=1 minus the mean of both draws of standard OPD.
    """
    difference = figures.weighted_sum(
        "sampled", (1.0, arm), (-0.5, ONLINE.name), (-0.5, ONLINE_16.name)
    )
    if difference.low >= -MARGIN:
        return True, difference
    return (False if difference.high < -MARGIN else None), difference


def _kl_gained(figures: Figures, arm: str) -> float:
    """Return which share of standard OPD's fall of the reverse KL an arm has, mean over seeds."""
    sft = figures.mean(HABIT_SFT.name, "reverse_kl").mean
    online = sft - figures.mean(ONLINE.name, "reverse_kl").mean
    return (sft - figures.mean(arm, "reverse_kl").mean) / online if online > 0 else float("nan")


def _with_needed_costs(figures: Figures) -> Figures:
    """Return the figures of the lines, with what standard OPD needs in place of what its run has.

    Its run has the whole cache of 512 scored rollouts and needs 64 of them, which would cost it no
    server of their own. So the seconds of these two stages are left out, and seven eighths of their
    tokens and bytes, seed by seed.
    """
    metrics = ("sampled", "decoded", "scored", "processor_seconds", "wall_seconds", "cache_bytes")
    values: dict[str, dict[str, dict[int, float]]] = {}
    for arm in _titles(figures):
        values[arm] = {metric: _known(figures, arm, metric) for metric in metrics}
        if arm in (ONLINE.name, ONLINE_8.name):
            for metric in ("processor_seconds", "wall_seconds"):
                unneeded = _known(figures, arm, f"cache_{metric}")
                values[arm][metric] = _less(values[arm][metric], unneeded, 1.0)
            for metric in ("scored", "cache_bytes"):
                whole = _known(figures, _OURS, metric)
                values[arm][metric] = _less(values[arm][metric], whole, _UNUSED)
    return Figures(values)


def _known(figures: Figures, arm: str, metric: str) -> dict[int, float]:
    try:
        return figures.values(arm, metric)
    except MissingFigures:
        return {}


def _less(costs: dict[int, float], part: dict[int, float], share: float) -> dict[int, float]:
    return {seed: costs[seed] - share * part[seed] for seed in costs if seed in part}


def _against_online(figures: Figures, costs: Figures, arm: str) -> tuple[Answer, str]:
    """Return whether an arm comes to the bar with less time and fewer tokens, and the figures."""
    reaches, gap = _reaches(figures, arm)
    wall = costs.difference(arm, ONLINE.name, "wall_seconds")
    processor = costs.difference(arm, ONLINE.name, "processor_seconds")
    tokens = costs.difference(arm, ONLINE.name, "scored")
    answer: Answer = "open"
    if reaches is False or wall.low > 0 or tokens.low > 0:
        answer = "does not hold"
    elif reaches and wall.high < 0 and tokens.high < 0:
        answer = "holds"
    reached = {True: "comes", False: "does not come", None: "may or may not come"}[reaches]
    said = (
        f"{reached} within {100 * MARGIN:g} points of standard OPD of 16 steps (T=1: "
        f"{words(gap, 'sampled')}), with {wall.text('+.0f')} s of wall time, "
        f"{processor.text('+.0f')} s of processor time and "
        f"{tokens.text('+,.0f')} scored tokens of the teacher"
    )
    return answer, said


def judge(figures: Figures) -> Verdict:
    """Say what Lightning OPD saves, and whether it comes as far."""
    costs = _with_needed_costs(figures)
    by_steps, said = _against_online(figures, costs, RUN_16.name)
    longer, said_longer = _against_online(figures, costs, RUN_48.name)
    answer: Answer = "open"
    if "holds" in (by_steps, longer):
        answer = "holds"
    elif by_steps == longer == "does not hold":
        answer = "does not hold"
    titles = _titles(figures)
    return Verdict(
        answer=answer,
        summary=(
            f"In as many steps (16) Lightning OPD {said}. In 48 steps on the same cache it "
            f"{said_longer}. {_with_top_k(figures, costs)}{_with_trl(figures, costs)}"
        ),
        details=(
            _rule(),
            results_table(figures, titles, ONLINE.name),
            _bar_table(figures),
            costs_table(costs, titles),
            _notes(),
            _trl(figures),
        ),
        plots=(
            Plot(
                "study_3.svg",
                "Accuracy at T=1 over the wall time since the base student, with 95% intervals of "
                "both.",
                lambda path: _draw(figures, costs, path),
            ),
        ),
    )


def _titles(figures: Figures) -> dict[str, str]:
    """Return the titles of the lines. TRL is left out where it could not be installed."""
    return {arm: title for arm, title in _TITLES.items() if figures.has(arm, "greedy")}


def _with_top_k(figures: Figures, costs: Figures) -> str:
    """Return how far the top-8 loss comes with the same cache."""
    _, said = _against_online(figures, costs, HABIT_TOP_K.name)
    return f"The top-8 loss, which is not the paper's, in 16 steps on this cache {said}."


def _with_trl(figures: Figures, costs: Figures) -> str:
    """Return how TRL's trainer stands to the judged trainings, after a space."""
    if not figures.has(TRL.name, "greedy"):
        return ""
    cheaper = " and ".join(
        costs.difference(TRL.name, arm.name, "processor_seconds").text("+.0f")
        for arm in (RUN_16, RUN_48)
    )
    _, gap = _reaches(figures, TRL.name)
    return (
        f" TRL's trainer, with a live teacher and another loss, is at {words(gap, 'sampled')} from "
        f"standard OPD. Its processor time minus that of Lightning OPD of 16 and 48 steps is "
        f"{cheaper} s."
    )


def _rule() -> str:
    return (
        "The bar is standard OPD of 16 steps, as the mean of two draws: that of claim 1 and that "
        "of claim 4. An arm comes to it if the interval of its accuracy at T=1 minus the bar lies "
        f"above -{100 * MARGIN:g} points; it has the reverse KL if it has at least "
        f"{_SHARE_OF_KL:.0%} of the fall from the SFT student to standard OPD of claim 1. The "
        "claim holds if Lightning OPD comes to the bar, in 16 or in 48 steps, with wall time and "
        "scored tokens that are both lower with their whole interval. It does not hold if each of "
        "the two stays below the bar or costs more. So it has two chances. The 48 steps were "
        "chosen after claim 4 had been seen. Judged are the trainings of one command, as a user "
        "gives them; three commands with starts of their own stand beside them."
    )


def _bar_table(figures: Figures) -> str:
    reached = {True: "yes", False: "no", None: "open"}
    lines = ["| model | comes to the accuracy | share of the fall of the reverse KL | enough |"]
    lines.append("|---|---|---:|---|")
    for arm, title in _titles(figures).items():
        if arm == ONLINE.name:
            continue
        gained = _kl_gained(figures, arm)
        enough = "yes" if gained >= _SHARE_OF_KL else "no"
        reaches, _ = _reaches(figures, arm)
        lines.append(f"| {title} | {reached[reaches]} | {gained:.2f} | {enough} |")
    return "\n".join(lines)


def _notes() -> str:
    return (
        "The seconds are those of a machine on which two arms are made side by side, at different "
        "loads by seed and by arm, so the processor's are the firmer ones. With models this small "
        "they are mostly starts of servers and single requests: standard OPD has two servers "
        "beside the trainer and a weight sync for each step. On GPUs, with a teacher that fills "
        "them, the shares differ (the paper reports 30 against 120 GPU hours). The run of standard "
        "OPD has the same 512 scored rollouts as the others and needs the first 64 of them; the "
        "seconds of these two stages, and seven eighths of their tokens and bytes, are not counted "
        "for it here, so that its first 64 cost it no second (about one; claim 1 counts what the "
        "runs had). Rollouts that are renewed now and then begin with the cache and are charged "
        "for all of it. The teacher's tokens of the demonstrations are the same for all. Bytes are "
        "those of the cache and of all refreshes, with the teacher's 8 likeliest tokens of each "
        "place, which only the top-8 loss uses. Trainings of 48 steps write one checkpoint, the "
        "others one every 4 steps."
    )


def _trl(figures: Figures) -> str:
    if not figures.has(TRL.name, "greedy"):
        return "TRL's trainer was not run here."
    gap = figures.difference(TRL.name, HABIT_TOP_K.name, "sampled")
    wall = figures.difference(TRL.name, HABIT_TOP_K.name, "wall_seconds")
    processor = figures.difference(TRL.name, HABIT_TOP_K.name, "processor_seconds")
    return (
        "TRL 1.16's DistillationTrainer has the same SFT student, prompts, steps, batch and rate, "
        "AdamW without weight decay (beta2 is its own 0.999, ours 0.98), 64 fresh responses at "
        "every step, and the exact reverse KL over the vocabulary, as a mean over tokens, in place "
        "of the sampled token. So the top-8 loss is its neighbour: TRL minus it is "
        f"{words(gap, 'sampled')} at T=1, {processor.text('+.0f')} s of processor time and "
        f"{wall.text('+.0f')} s of wall time. Teacher, student and all logits are in its one "
        "process, without a server or a cache: with models this small that is cheaper than any "
        "start of a server. [The benchmarks](benchmarks.md#rollout-score-and-distill-against-trl) "
        "compare both to one bar with as little work as each needs."
    )


def _draw(figures: Figures, costs: Figures, path: Path) -> None:
    # Imported here: the parts that make and measure draw nothing.
    from examples.study.plots import Dot, draw_dots

    dots = [
        Dot(title, costs.mean(arm, "wall_seconds"), _percent(figures.mean(arm, "sampled")))
        for arm, title in _titles(figures).items()
    ]
    draw_dots(path, dots, "wall time since the base student, s", "right answers at T=1, %")


def _percent(share: Interval) -> Interval:
    return Interval(100 * share.mean, 100 * share.low, 100 * share.high, share.num_seeds)


CLAIM = Claim(
    number=3,
    title="Lightning OPD comes as far as standard OPD in less time and with fewer teacher tokens.",
    source="arXiv 2604.13010: a quarter of the GPU hours (30 against 120) for the student of 8 "
    "billion parameters.",
    method="The arms of claim 1, and four more: rollouts that are renewed when the effective share "
    "of their tokens falls below 0.97, Lightning OPD with 48 steps, the top-8 loss on the same "
    "cache, and TRL's trainer, whose teacher is live. Costs are counted from the base student "
    "on, with demonstrations, SFT and every start of servers and ranks.",
    arms=(DRIFT, LIGHTNING_48, RUN_16, RUN_48, TRL_ENVIRONMENT, TRL),
    judge=judge,
    reads=tuple(
        arm.name
        for arm in (
            HABIT_SFT,
            HABIT_LIGHTNING,
            HABIT_TOP_K,
            LIGHTNING_8,
            EVERY_4,
            ONLINE,
            ONLINE_8,
            ONLINE_16,
        )
    ),
)
