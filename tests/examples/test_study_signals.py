"""Claims 4, 7 and 9 of the study: their commands, their judgements of made-up figures, and the
arithmetic of the gap between gradients.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.study import claim_4, claim_7, claim_9, signals, unlearned
from examples.study.arms import HABIT_LIGHTNING, Arm, Place
from examples.study.figures import Figures, MissingFigures, change
from examples.study.gradient_gap import Half, gap_of, pull_of, sequence_chi_square
from examples.study.tables import Table
from lopd.config import Config, load_config

CLAIMS = (claim_4.CLAIM, claim_7.CLAIM, claim_9.CLAIM)
SEEDS = (2, 3, 4, 5, 6)
# Of each seed, so that no interval has a width of 0. The mean is 0.
NOISE = dict(zip(SEEDS, (-0.002, 0.001, 0.0, -0.001, 0.002), strict=True))


class MadeUp(Figures):
    """Figures of a made-up mean for each arm and metric. A metric that is not given is 0.5."""

    def __init__(self, means: Mapping[tuple[str, str], float], *missing: str) -> None:
        self._means = means
        self._missing = missing

    def values(self, arm: str, metric: str) -> dict[int, float]:
        if arm in self._missing:
            raise MissingFigures(arm)
        # Every arm has noise of its own: paired differences would lose a common one.
        shift = sum(map(ord, arm + metric)) % len(SEEDS)
        mean = self._means.get((arm, metric), 0.5)
        size = 1.0 if metric in ("greedy", "sampled") else 0.01
        return {
            seed: mean + size * NOISE[SEEDS[(index + shift) % len(SEEDS)]]
            for index, seed in enumerate(SEEDS)
        }

    def steps(self, arm: str, metric: str) -> dict[int, list[tuple[int, float]]]:
        if arm in self._missing:
            raise MissingFigures(arm)
        return {seed: [(0, 0.1 + noise), (16, 0.2 + noise)] for seed, noise in NOISE.items()}

    def recorded(self, arm: str, file: str) -> dict[int, Any]:
        raise MissingFigures(arm)


def recorded_control(arm: str, file: str) -> dict[int, Any]:
    assert (arm, file) == (claim_4.GAP.name, claim_4.CONTROL)
    rows = {
        "0": {"gap_squared": 0.6, "deviation": 0.5, "share_as_large": 0.2},
        "16": {"gap_squared": 2.0, "deviation": 0.5, "share_as_large": 0.0},
    }
    return {2: rows, 3: rows, 4: rows, 5: rows}


def place_of(arm: Arm, tmp_path: Path) -> Place:
    return Place(3, tmp_path / "seed-3" / arm.name, tmp_path / "seed-3")


def configs_of(arm: Arm, tmp_path: Path) -> list[tuple[str, Config]]:
    """Return the verb and the configuration of each lopd command of an arm."""
    place = place_of(arm, tmp_path)
    found: list[tuple[str, Config]] = []
    for kind, verb, *arguments in arm.commands(place):
        if kind == "lopd":
            overrides = [*arm.setting.overrides(3), f"run.dir={place.run}", *arguments]
            found.append((verb, load_config(arm.setting.config, overrides)))
    return found


def test_the_configuration_accepts_every_command(tmp_path: Path) -> None:
    names = set()
    for claim in CLAIMS:
        for arm in claim.arms:
            for _, config in configs_of(arm, tmp_path):
                assert config.run.seed in (3, 103), arm.name
                assert config.distill.parallel.ranks == 1, arm.name
            names.add(arm.name)
    # Those of others are shared, or begin with the number of their claim.
    assert all(name.startswith(("habit_", "c4_", "c7_", "c9_")) for name in names)
    assert len([name for name in names if not name.startswith("habit_")]) <= 22


def test_every_python_command_is_a_module_of_the_study(tmp_path: Path) -> None:
    folder = Path(claim_4.__file__).parent
    for claim in CLAIMS:
        for arm in claim.arms:
            for kind, module, *_ in arm.commands(place_of(arm, tmp_path)):
                assert kind == "lopd" or (folder / f"{module}.py").exists(), arm.name


def test_the_long_trainings_differ_in_their_rollouts_alone(tmp_path: Path) -> None:
    ((_, offline),) = configs_of(claim_4.OFFLINE_80, tmp_path)
    ((_, online),) = configs_of(claim_4.ONLINE_80, tmp_path)
    ((_, usual),) = configs_of(HABIT_LIGHTNING, tmp_path)
    assert offline.distill.num_steps == online.distill.num_steps == 5 * usual.distill.num_steps
    assert usual.distill.num_steps == claim_4.USUAL
    assert not offline.distill.refresh.is_on
    assert online.distill.refresh.every == 1
    # Without a decay the usual training is the beginning of the long one.
    assert offline.distill.optimizer == usual.distill.optimizer
    assert usual.distill.optimizer.schedule == "constant"
    same = {"refresh": usual.distill.refresh}
    assert offline.distill.model_copy(update=same) == online.distill.model_copy(update=same)
    # The points that are exported are among the checkpoints that are kept.
    every, keep = offline.distill.checkpoint_every, offline.distill.keep_checkpoints
    kept = [*range(every, offline.distill.num_steps, every)][-keep:]
    assert set(claim_4.POINTS[:-1]) <= set(kept)


def test_signals_differ_from_the_plain_update_in_what_their_names_say(tmp_path: Path) -> None:
    def objective(arm: Arm) -> dict[str, Any]:
        (*_, (_, config)) = configs_of(arm, tmp_path)
        return config.distill.objective.model_dump(exclude_defaults=True)

    assert objective(signals.FORWARD_80) == {"loss": "top_k_forward_kl"}
    assert objective(signals.GENERALISED_80) == {
        "loss": "top_k_reverse_kl",
        "top_k_support": "generalised",
    }
    assert objective(signals.CAP_80) == {"importance_cap": 2.0}
    assert objective(signals.PREFIX_16) == {"prefix_share": 0.3}
    assert objective(signals.FEW) == objective(signals.SHORT) == objective(signals.AFTER_SFT) == {}
    assert configs_of(signals.AFTER_SFT, tmp_path)[0][1].sft.num_steps == 16
    # All stages of a run are asked for with one configuration.
    horizons = {config.rollout.max_new_tokens for _, config in configs_of(signals.SHORT, tmp_path)}
    assert horizons == {24}


def kl_of(offline: float, online: float) -> MadeUp:
    return MadeUp(
        {
            (claim_4.OFFLINE_80.name, "kl_from_sft"): offline,
            (claim_4.ONLINE_80.name, "kl_from_sft"): online,
        }
    )


def test_claim_4_follows_the_kl_at_the_last_point() -> None:
    verdict = claim_4.judge(kl_of(0.02, 0.05))
    assert verdict.answer == "holds"
    assert "frozen minus fresh is -0.0300" in verdict.summary
    assert claim_4.judge(kl_of(0.05, 0.02)).answer == "does not hold"
    assert claim_4.judge(kl_of(0.05, 0.05)).answer == "open"


def test_claim_4_says_where_the_gap_was_not_measured() -> None:
    means = {(claim_4.OFFLINE_80.name, "kl_from_sft"): 0.1}
    assert any("not measured." in text for text in claim_4.judge(MadeUp(means, "c4_gap")).details)
    assert any("| 16 | 0.2 [" in text for text in claim_4.judge(MadeUp(means)).details)
    with pytest.raises(MissingFigures):
        claim_4.judge(MadeUp(means, claim_4.ONLINE_80.name))


def test_claim_4_says_how_large_the_gap_is_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = MadeUp({})
    assert not any("by exchange" in text for text in claim_4.judge(figures).details)
    monkeypatch.setattr(figures, "recorded", recorded_control)
    (table,) = [text for text in claim_4.judge(figures).details if "by exchange" in text]
    # The mean of four seeds has half of the deviation of one.
    assert "| 0 | 0.6 | 0.25 | 2.4 | 0.20, 0.20, 0.20, 0.20 |" in table
    assert "| 16 | 2 | 0.25 | 8.0 | 0.00, 0.00, 0.00, 0.00 |" in table


def stale(forward: float, reverse: float, cap: float = 0.5) -> MadeUp:
    """What 64 more steps add to the reverse KL by signal, and the accuracy with a cap."""
    return MadeUp(
        {
            (signals.FORWARD_80.name, "reverse_kl"): 0.5 + forward,
            (signals.TOP_K_80.name, "reverse_kl"): 0.5 + reverse,
            (signals.CAP_80.name, "sampled"): cap,
        },
        "small/sft_192",
    )


def test_claim_7_judges_both_statements() -> None:
    verdict = claim_7.judge(stale(forward=0.0, reverse=0.01))
    assert verdict.answer == "holds"
    assert "agrees with AsyncOPD (2606.24143)" in verdict.summary
    # The one statement or the other fails.
    assert claim_7.judge(stale(forward=0.01, reverse=0.0)).answer == "does not hold"
    assert claim_7.judge(stale(forward=0.0, reverse=0.01, cap=0.6)).answer == "does not hold"
    assert claim_7.judge(stale(forward=0.0, reverse=0.0)).answer == "open"


def test_claim_7_names_what_was_not_measured() -> None:
    details = "\n".join(claim_7.judge(stale(0.0, 0.01)).details)
    assert "Not measured: SFT student after 192 steps." in details
    # A signal that grows stale more slowly and ends behind is not called robust.
    behind = stale(0.0, 0.01)
    behind._means = {**behind._means, (signals.FORWARD_80.name, "sampled"): 0.4}
    assert claim_7.judge(behind).answer == "does not hold"


def lacking(plain: float, clip: float = 0.5) -> MadeUp:
    arms = {arm.name: 0.5 for arm in claim_9.REMEDIES} | {claim_9.PLAIN.name: plain}
    arms[claim_9.CLIP.name] = clip
    modes = ("sampled", "greedy")
    return MadeUp({(arm, mode): mean for arm, mean in arms.items() for mode in modes})


def test_claim_9_follows_the_accuracy_over_sft() -> None:
    verdict = claim_9.judge(lacking(0.4, clip=0.55))
    assert verdict.answer == "holds"
    assert "does harm" in verdict.summary
    assert "Above the SFT student too: with clip 1 (+5.0" in verdict.summary
    assert "does not gain more than 2 points" in claim_9.judge(lacking(0.5)).summary
    assert claim_9.judge(lacking(0.6)).answer == "does not hold"
    # A gain that is shown, but below the margin that was named before, and one on its border.
    assert claim_9.judge(lacking(0.51)).answer == "holds"
    assert claim_9.judge(lacking(0.5195)).answer == "open"
    assert "Nothing that was tried" in claim_9.judge(lacking(0.6)).summary


def test_pictures_are_drawn(tmp_path: Path) -> None:
    for claim in CLAIMS:
        for plot in claim.judge(MadeUp({})).plots:
            plot.draw(tmp_path / plot.file)
            assert (tmp_path / plot.file).stat().st_size > 1000


def test_a_change_of_a_difference_is_paired_by_seed() -> None:
    class Two(MadeUp):
        def values(self, arm: str, metric: str) -> dict[int, float]:
            seeds = SEEDS[1:] if arm == "late" else SEEDS
            return {seed: seed * {"late": 3, "early": 1, "of": 2, "base": 0}[arm] for seed in seeds}

    # 3 s - s - (2 s - 0) = 0 in every seed that has all of them.
    interval = change(Two({}), "greedy", "late", "early", of="of", early_of="base")
    assert (interval.mean, interval.low, interval.high, interval.num_seeds) == (0, 0, 0, 4)


def test_the_gap_has_no_noise_in_it() -> None:
    """The plain length of a difference of noisy means is too large. The product is not."""
    rng = np.random.default_rng(0)
    size = 20_000
    truth = np.zeros(size)
    truth[:100] = 1.0

    def half(distance: float) -> Half:
        frozen, fresh = (rng.normal(0.0, 1.0, size) for _ in range(2))
        return Half(frozen + distance * truth, fresh)

    # The length of truth is 10, and that of the noise of a difference of two vectors is 200.
    found = gap_of(*(half(5.0) for _ in range(2)))
    assert found["gap"] == pytest.approx(50.0, rel=0.2)
    one, other = (half(0.0) for _ in range(2))
    nothing = gap_of(one, other)
    plain = np.linalg.norm((one.frozen + other.frozen - one.fresh - other.fresh) / 2)
    assert abs(nothing["gap_squared"]) < 2500, "within what its noise allows"
    assert plain > 130, "the control: the plain length takes the noise for a gap"


def test_the_pull_is_positive_where_frozen_rollouts_lead_home() -> None:
    home = np.array([2.0, 0.0])
    # An update is minus the gradient: the frozen one goes 1 towards home, the fresh one 1 away.
    half = Half(frozen=np.array([-1.0, 5.0]), fresh=np.array([1.0, 0.0]))
    assert pull_of([half, half], home) == pytest.approx(2.0)
    assert pull_of([half], -home) == pytest.approx(-2.0)
    assert pull_of([half], 0 * home) == 0.0


def test_chi_square_is_that_of_the_two_distributions() -> None:
    # Two responses: the reference says each half the time, the student the first 0.8 of the time.
    log_weights = np.log([0.8 / 0.5, 0.2 / 0.5])
    assert sequence_chi_square(log_weights) == pytest.approx(0.8**2 / 0.5 + 0.2**2 / 0.5 - 1.0)
    assert sequence_chi_square(np.zeros(4)) == 0.0


def test_the_unlearned_student_is_an_early_checkpoint_of_its_training() -> None:
    config = load_config(unlearned.HERE / "unlearned.toml", [])
    sft = config.sft
    kept = [*range(sft.checkpoint_every, sft.num_steps, sft.checkpoint_every)]
    assert unlearned.STEP in kept[-sft.keep_checkpoints :]
    assert sft.init == "random"
    # Each text is learnt from at most once.
    assert sft.num_steps * sft.batch_size <= unlearned._NUM_TEXTS
    assert config.run.dir == unlearned.RUN


def test_the_unlearned_student_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Any] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(unlearned, "MODELS", tmp_path)
    monkeypatch.setattr(unlearned, "BASE", tmp_path / "base")
    monkeypatch.setattr(
        unlearned, "export", lambda run, step, out, stage: (tmp_path / "base").mkdir()
    )
    unlearned.make()
    assert len(commands) == 3
    unlearned.make()
    assert len(commands) == 3


def test_a_table_says_what_was_not_measured() -> None:
    table = Table({"a": "A", "b": "B"}, "a", "A").markdown(MadeUp({}, "b"))
    lines = table.splitlines()
    assert lines[3].startswith("| B | 0 | not measured |")
    assert len({line.count("|") for line in lines}) == 1, "as many cells as titles"
