"""The arms of claim 7: signals, and what may change which of them is the right one."""

from __future__ import annotations

from examples.study.arms import (
    HABIT,
    HABIT_LIGHTNING,
    HABIT_SFT,
    HABIT_TOP_K,
    LIGHTNING,
    SCORED,
    Arm,
    Command,
    Place,
    distilled,
    rolled_out_again,
)
from examples.study.claim_4 import LONG, OFFLINE_80, ONLINE_80

RATE = "distill.optimizer.lr=1e-4"
FORWARD = ("distill.objective.loss=top_k_forward_kl", RATE)
# No checkpoint is needed, and each costs time.
_LONG = (LONG, "distill.checkpoint_every=80")
GENERALISED = "distill.objective.top_k_support=generalised"
CAP = "distill.objective.importance_cap=2"
PREFIX = "distill.objective.prefix_share=0.3"
# A response that writes its steps out has some 50 tokens, and one that skips them few.
HORIZON = "rollout.max_new_tokens=24"
MORE_SFT = "sft.num_steps=16"
PARTS = 4

FORWARD_16 = distilled("c7_forward_16", "top-8 forward KL", *FORWARD)
TOP_K_80 = distilled("c7_top_k_80", "top-8 reverse KL, 80 steps", RATE, *_LONG)
FORWARD_80 = distilled("c7_forward_80", "top-8 forward KL, 80 steps", *FORWARD, *_LONG)
GENERALISED_80 = distilled(
    "c7_generalised_80", "generalised reverse KL, 80 steps", RATE, GENERALISED, *_LONG
)
CAP_80 = distilled(
    "c7_cap_80", "sampled token, importance_cap = 2, 80 steps", *LIGHTNING, CAP, *_LONG
)
PREFIX_16 = distilled("c7_prefix", "sampled token, first 30% of a response", *LIGHTNING, PREFIX)


def _few(place: Place) -> tuple[Command, ...]:
    scores = place.of(HABIT_SFT.name) / "score"
    parts = place.run / "parts"
    return (
        ("python", "few_rollouts", str(scores), str(parts), str(PARTS)),
        ("lopd", "distill", *LIGHTNING, f"distill.cache={parts / 'part-00'}"),
    )


FEW = Arm(
    name="c7_rollouts_128",
    title="sampled token, a quarter of the rollouts",
    setting=HABIT,
    commands=_few,
    copied=SCORED[:2],
    after=(HABIT_SFT.name,),
)
SHORT = rolled_out_again("c7_horizon", "sampled token, rollouts of 24 tokens at most", HORIZON)
AFTER_SFT = Arm(
    name="c7_sft_16",
    title="sampled token, after 16 steps of SFT in place of 4",
    setting=HABIT,
    commands=lambda place: (
        *(("lopd", verb, MORE_SFT) for verb in ("sft", "rollout", "score")),
        ("lopd", "distill", *LIGHTNING, MORE_SFT),
    ),
    copied=SCORED[:1],
)
# Few passes and many passes over the same frozen rollouts, by signal.
STALE = {
    "sampled token": (HABIT_LIGHTNING.name, OFFLINE_80.name),
    "top-8 reverse KL": (HABIT_TOP_K.name, TOP_K_80.name),
    "top-8 forward KL": (FORWARD_16.name, FORWARD_80.name),
}
# At 80 steps alone.
ONLY_LATE = {
    "generalised reverse KL": GENERALISED_80.name,
    "sampled token, importance_cap = 2": CAP_80.name,
    "sampled token, fresh rollouts at every step": ONLINE_80.name,
}
SMALL_ARMS = {
    "small/sft_48": "SFT student after 48 steps",
    "small/sft": "SFT student after 96 steps, where all others begin",
    "small/sft_192": "SFT student after 192 steps",
    "small/distilled": "top-8 reverse KL",
    "small/forward_kl": "top-8 forward KL",
    "small/on_demonstrations": "top-8 reverse KL on the teacher's own responses",
    "small/lightning": "sampled token",
    "small/lightning_cap": "sampled token, importance_cap = 1",
}
