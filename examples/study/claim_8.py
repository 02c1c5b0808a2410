"""Claim 8: controls against self-deception. Is it the teacher's scores that help the student?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from examples.study.arms import (
    HABIT,
    HABIT_LIGHTNING,
    HABIT_SFT,
    HABIT_TOP_K,
    Answer,
    Arm,
    Claim,
    Command,
    Place,
    Verdict,
)
from examples.study.claim_6 import ALTERED, ALTERED_FIGURES, from_altered, recorded
from examples.study.figures import Figures, MissingFigures
from examples.study.outcomes import matches, measured
from examples.study.tables import markdown_table, results_table, table_against, titles_of
from examples.study.wording import shown, words

METHODS = (HABIT_LIGHTNING, HABIT_TOP_K)
# The budget of the methods: 16 steps of 64 responses at their rate.
BUDGET = ("sft.num_steps=16", "sft.batch_size=64", "sft.optimizer.lr=1e-4")
_SFT_STAGES = tuple((HABIT_SFT.name, stage) for stage in ("demonstrate", "sft"))


def _learns_from_altered(name: str, title: str, *how: str, loss: Sequence[str] = ()) -> Arm:
    """Return an arm that learns from an altered cache.

    Args:
        name: Its name.
        title: What tables call it.
        how: The alteration and its options; "SEED" stands for the seed.
        loss: Overrides after those of the paper's loss.
    """

    def commands(place: Place) -> tuple[Command, ...]:
        made = [str(place.seed) if word == "SEED" else word for word in how]
        altered, distilled = from_altered(place, *made)
        return altered, (*distilled, *loss)

    return Arm(
        name=name,
        title=title,
        setting=HABIT,
        commands=commands,
        copied=_SFT_STAGES,
        after=(HABIT_SFT.name,),
    )


def _sft_from(place: Place, demonstrations: str) -> Command:
    """Return SFT that goes on from the SFT student with the budget of the methods."""
    return (
        "lopd",
        "sft",
        f"models.student={place.of(HABIT_SFT.name) / 'sft' / 'model'}",
        f"sft.demonstrations={demonstrations}",
        # With the same seed it would begin with the responses that SFT began with.
        f"run.seed={100 + place.seed}",
        *BUDGET,
    )


def _own_right(place: Place) -> tuple[Command, ...]:
    out = place.run / ALTERED
    rollouts = place.of(HABIT_SFT.name) / "rollout"
    config = (str(HABIT.config), *HABIT.overrides(place.seed))
    judged = ("python", "altered_responses", "accepted", str(rollouts), str(out), *config)
    return judged, _sft_from(place, str(out))


SILENT = _learns_from_altered(
    "c8_silent", "a teacher that says nothing, paper's loss", "silent", "--seed", "SEED"
)
SILENT_TOP_K = _learns_from_altered(
    "c8_silent_top_k",
    "a teacher that says nothing, top-8 loss",
    "silent",
    "--seed",
    "SEED",
    loss=("distill.objective.loss=top_k_reverse_kl",),
)
SHUFFLED = _learns_from_altered(
    "c8_shuffled", "a teacher with shuffled tokens, paper's loss", "shuffled", "--seed", "SEED"
)
# The advantage is minus the clip at each pushed token, and each of them weighs the same.
_FIXED = ("distill.advantage_clip=1", "distill.aggregation=token_mean")
PUSHED = tuple(
    _learns_from_altered(
        f"c8_pushed_{name}",
        f"no teacher: -1 on tokens below {below} at sampling",
        "pushed_down",
        "--below",
        below,
        loss=_FIXED,
    )
    for name, below in (("half", "0.5"), ("tenth", "0.1"))
)
OWN_RIGHT = Arm(
    name="c8_own_right",
    title="SFT on the student's own right responses",
    setting=HABIT,
    commands=_own_right,
    # So that the folder is one of a run when the demonstrations are written into it.
    copied=((HABIT_SFT.name, "demonstrate"),),
    after=(HABIT_SFT.name,),
    model="sft/model",
)
MORE_SFT = Arm(
    name="c8_more_sft",
    title="SFT gone on, same demonstrations",
    setting=HABIT,
    commands=lambda place: (_sft_from(place, str(place.of(HABIT_SFT.name) / "demonstrate")),),
    after=(HABIT_SFT.name,),
    model="sft/model",
)
ARMS = (SILENT, SILENT_TOP_K, SHUFFLED, *PUSHED, OWN_RIGHT, MORE_SFT)
# Those that the teacher has no part in, beyond the SFT student that all begin with.
TEACHERLESS = (SILENT, SILENT_TOP_K, SHUFFLED, *PUSHED, OWN_RIGHT)

_READING = (
    'Outcomes: "matches" where both accuracies are shown to be less than 2 points below the '
    'method, or above it; "below" where one of them is shown to be lower (an interval of 95% '
    'leaves 0 out); "open" otherwise. The reverse KL has no part in the outcome.'
)
_MEANINGS = """\
The controls. All begin with the same SFT student and have 16 steps of 64 at the methods' rate:

- *A teacher that says nothing.* At each token the teacher's probabilities, as the cache has them,
  belong to other tokens, in a random order that is drawn anew. Its entropy is the teacher's. Of the
  24 tokens outside of the top 8 only the sum is known; they share it in equal parts.
- *A teacher with shuffled tokens.* The same with one order everywhere.
- *No teacher* (after arXiv 2608.31046, of which only the finding was at hand: pushing down tokens
  of low probability gains as much as a teacher). Assumed here: a token is unlikely if the policy of
  the rollouts gave it less than 0.5, or 0.1; its advantage is -1 throughout, by the clip; all other
  tokens carry no loss; each unlikely token weighs the same. The size of the advantage hardly
  matters, because Adam divides it out.
- *SFT on the student's own right responses.* The verifier judges the rollouts of the methods
  (`lopd cache judge`). The right ones are demonstrations. The verifier knows the answers, which a
  teacher does not.
- *SFT gone on*, on the 512 demonstrations of the SFT student."""
_LIMITS = (
    "What could overturn this: one student, one task of arithmetic, models of 750 thousand "
    "parameters, 32 tokens of vocabulary, and 16 steps. Here the student can do the task "
    "and has a bad habit, so whatever makes it sharper helps. A student that lacks knowledge may "
    "tell the controls from the method in another way. Rates of the controls were not searched: "
    "they have that of the methods. Each control has four chances to be shown lower, so its "
    "outcome is not that of one test at 95%. SFT gone on learns from as many responses as the "
    "methods, which have more tokens where the student still skips steps. Open may hide what all "
    "seeds agree on: with few seeds that differ much, an interval by Student's t holds 0 although "
    "every seed is below."
)


def judge(figures: Figures) -> Verdict:
    """Hold each control against the paper's loss and against the top-8 loss."""
    methods = measured(figures, METHODS)
    found = measured(figures, ARMS)
    if not methods or not found:
        raise MissingFigures("no method or no control of claim 8 is measured")
    outcomes = {
        method.name: {arm.name: matches(figures, arm.name, method.name) for arm in found}
        for method in methods
    }
    every = {outcome for of_method in outcomes.values() for outcome in of_method.values()}
    is_whole = len(methods) == len(METHODS) and len(found) == len(ARMS)
    answer: Answer = "open"
    if "matches" in every:
        answer = "does not hold"
    elif is_whole and every == {"below"}:
        answer = "holds"
    titles = titles_of(measured(figures, [HABIT_SFT, *METHODS, *found]))
    return Verdict(
        answer=answer,
        summary=_summary(figures, methods, found, outcomes),
        details=(
            results_table(figures, titles),
            *(table_against(figures, found, method, outcomes[method.name]) for method in methods),
            _READING,
            _MEANINGS,
            *_caches(figures, found),
            _LIMITS,
        ),
    )


def _summary(
    figures: Figures,
    methods: Sequence[Arm],
    found: Sequence[Arm],
    outcomes: dict[str, dict[str, str]],
) -> str:
    """Return the summary. A control that matches comes first."""

    def against(arm: Arm, outcome: str) -> str:
        """Return the methods to which a control stands so, with the differences."""
        parts = []
        for method in methods:
            if outcomes[method.name][arm.name] == outcome:
                greedy, sampled = (
                    shown(figures.difference(arm.name, method.name, metric), metric, sign=True)
                    for metric in ("greedy", "sampled")
                )
                parts.append(f"{method.title} (T=1 {sampled}, greedy {greedy} points)")
        return " and ".join(parts)

    def all_of(outcome: str) -> str:
        stands = [(arm.title, against(arm, outcome)) for arm in found]
        return "; ".join(f"{title}, against {others}" for title, others in stands if others)

    matched = all_of("matches")
    sentences = ["No control is shown to match a method."]
    if matched:
        sentences = [f"A control matches the method within 2 points, or is above it: {matched}."]
    below = [
        arm.title
        for arm in found
        if all(outcomes[one.name][arm.name] == "below" for one in methods)
    ]
    if below:
        sentences.append(f"Shown to be below every method: {'; '.join(below)}.")
    still_open = _open(methods, found, outcomes)
    if still_open:
        # Their differences stand in the tables. Here they would hide what is shown.
        sentences.append(f"Open: {'; '.join(still_open)}.")
    if matched and not any(
        outcomes[method.name][arm.name] == "matches"
        for method in methods
        for arm in found
        if arm in TEACHERLESS
    ):
        sentences.append(
            "No control without a teacher is shown to match: only SFT that goes on, on the "
            "teacher's demonstrations."
        )
    sentences += _largest_gain(figures, methods, found)
    missing = [arm.title for arm in (*METHODS, *ARMS) if arm not in (*methods, *found)]
    if missing:
        sentences.append(f"Not measured: {'; '.join(missing)}.")
    return " ".join(sentences)


def _open(
    methods: Sequence[Arm], found: Sequence[Arm], outcomes: dict[str, dict[str, str]]
) -> list[str]:
    """Return the controls whose outcome is open, and against which method if not against all."""
    texts = []
    for arm in found:
        against = [one.title for one in methods if outcomes[one.name][arm.name] == "open"]
        if len(against) == len(methods):
            texts.append(arm.title)
        elif against:
            texts.append(f"{arm.title}, against {' and '.join(against)} alone")
    return texts


def _largest_gain(figures: Figures, methods: Sequence[Arm], found: Sequence[Arm]) -> list[str]:
    """Return in words how far the best control without a teacher comes."""
    controls = [arm for arm in found if arm in TEACHERLESS]
    if not controls or not measured(figures, [HABIT_SFT]):
        return []
    gains = {
        arm.name: figures.difference(arm.name, HABIT_SFT.name, "sampled")
        for arm in (*methods, *controls)
    }
    best = max(controls, key=lambda arm: gains[arm.name].mean)
    others = " and ".join(
        f"{arm.title} {shown(gains[arm.name], 'sampled', sign=True)}" for arm in methods
    )
    return [
        f"Without a teacher the SFT student gains most at T=1 by {best.title}: "
        f"{words(gains[best.name], 'sampled')}, against {others}."
    ]


def _table_of_caches(figures: Figures, arms: Sequence[Arm]) -> str:
    """Return what altered caches hold before any update, as means over seeds."""
    heads = ("model", "tokens with loss, %", "mean advantage, nats", "beyond 10 nats, %", "seeds")
    lines = []
    for arm in arms:
        found = [one for one in recorded(figures, arm, ALTERED_FIGURES) if "loss_tokens" in one]
        # An arm without a cache has no line.
        if not found:
            continue
        with_loss = fmean(100 * one["loss_tokens"] / one["tokens"] for one in found)
        beyond = fmean(100 * one["share_beyond_10"] for one in found)
        # A teacher that is always beyond the clip has no advantage of its own.
        mean = (
            f"{fmean(one['mean_advantage'] for one in found):.2f}" if beyond < 100 else "the clip"
        )
        lines.append((arm.title, f"{with_loss:.2f}", mean, f"{beyond:.2f}", str(len(found))))
    return markdown_table(heads, lines)


def _caches(figures: Figures, found: Sequence[Arm]) -> list[str]:
    """Return what the altered caches hold, as far as it is known."""
    texts = [_table_of_caches(figures, found)]
    right = recorded(figures, OWN_RIGHT, ALTERED_FIGURES)
    if right:
        share = sum(one["right"] for one in right) / sum(one["rows"] for one in right)
        texts.append(f"Of the rollouts {100 * share:.1f}% are right (seeds: {len(right)}).")
    return texts


CLAIM = Claim(
    number=8,
    title="No control that leaves out the teacher's scores matches distillation from them.",
    source="Controls after arXiv 2608.31046, and this project's own negative result.",
    method=(
        "Each control begins with the same SFT student and has the budget of the methods, and is "
        "held against the paper's loss and the top-8 loss. Differences are paired by seed."
    ),
    arms=ARMS,
    judge=judge,
    reads=(HABIT_SFT.name, HABIT_LIGHTNING.name, HABIT_TOP_K.name),
)
