"""The study's figures: intervals, the page, and the verdicts of two claims."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from examples.study import arms, page
from examples.study.arms import Claim, Verdict
from examples.study.claims import load_claims
from examples.study.figures import _T, Figures, Interval, MissingFigures, interval_of
from examples.study.outcomes import MARGIN, compare, is_within
from examples.study.tables import markdown_table, results_table
from examples.study.wording import shown, words

SEEDS = (2, 3, 4, 5, 6)


def of_seeds(*values: float) -> dict[int, float]:
    return dict(zip(SEEDS, values, strict=False))


def spread(mean: float, width: float = 0.0) -> dict[int, float]:
    """Five seeds around a mean."""
    return of_seeds(*(mean + width * place for place in (-1.0, -0.5, 0.0, 0.5, 1.0)))


def test_the_quantiles_are_those_of_students_t() -> None:
    """The density between -t and t is 95%, by Simpson's rule."""
    for freedom, quantile in enumerate(_T, start=1):
        constant = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        constant /= math.sqrt(freedom * math.pi)

        def density(x: float, freedom: int = freedom, constant: float = constant) -> float:
            return constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

        count = 4000
        width = quantile / count
        weights = [1, *(4 if place % 2 else 2 for place in range(1, count)), 1]
        inside = sum(weight * density(place * width) for place, weight in enumerate(weights))
        assert abs(2 * inside * width / 3 - 0.95) < 1e-4, freedom
        # The control: the quantile of a normal distribution is too small for any of them.
        assert quantile > 1.96


def test_differences_are_paired_by_seed() -> None:
    figures = Figures(
        {
            "a": {"sampled": of_seeds(0.50, 0.70, 0.90)},
            "b": {"sampled": of_seeds(0.48, 0.69, 0.89, 0.10)},
        }
    )
    difference = figures.difference("a", "b", "sampled")
    assert difference.num_seeds == 3
    assert difference.mean == pytest.approx(0.04 / 3)
    # Of 0.02, 0.01 and 0.01: t(2) = 4.303, and the standard error is 0.00333.
    assert difference.high - difference.mean == pytest.approx(4.303 * 0.0033333, rel=1e-3)
    # The control: intervals of the two means, which are not paired, are wider than 0.4.
    assert figures.mean("a", "sampled").high - figures.mean("a", "sampled").low > 0.8


def test_one_seed_is_no_figure() -> None:
    figures = Figures({"a": {"sampled": of_seeds(0.5)}, "b": {"sampled": of_seeds(0.5, 0.6)}})
    for call in (
        lambda: figures.values("a", "sampled"),
        lambda: figures.mean("absent", "sampled"),
        lambda: figures.difference("a", "b", "sampled"),
        lambda: figures.steps("a", "loss"),
        lambda: interval_of([1.0]),
    ):
        with pytest.raises(MissingFigures):
            call()
    assert figures.mean("b", "sampled").num_seeds == 2


def test_the_stored_figures_have_the_steps_that_were_asked_for_and_no_others() -> None:
    asked: list[tuple[str, str]] = []

    def read(arm: str, metric: str) -> dict[int, list[tuple[int, float]]]:
        asked.append((arm, metric))
        return {2: [(1, 0.123456789), (2, 0.5)], 3: [(1, 0.25)]}

    figures = Figures(
        {"a": {"sampled": of_seeds(0.5, 0.123456789)}},
        read_steps=read,
        read_file=lambda arm, file: {2: {"share": 0.1}} if file == "known.json" else {},
    )
    figures.steps("a", "loss")
    assert figures.recorded("a", "known.json") == {2: {"share": 0.1}}
    with pytest.raises(MissingFigures):
        figures.recorded("a", "absent.json")
    stored = json.loads(json.dumps(figures.as_json()))
    again = Figures.from_json(stored)
    assert asked == [("a", "loss")]
    assert again.values("a", "sampled") == {2: 0.5, 3: 0.123457}
    assert again.steps("a", "loss") == {2: [(1, 0.123457), (2, 0.5)], 3: [(1, 0.25)]}
    assert again.recorded("a", "known.json") == {2: {"share": 0.1}}
    with pytest.raises(MissingFigures):
        again.steps("a", "reverse_kl")


def claim(number: int, verdict: Verdict | None) -> Claim:
    def judge(figures: Figures) -> Verdict:
        if verdict is None:
            raise MissingFigures("sampled of a is known of 0 seeds")
        return verdict

    return Claim(number, f"Title {number} | bar.", "a paper", "method", (arms.HABIT_SFT,), judge)


def test_the_page_has_the_controls_first_and_invents_no_verdict(tmp_path: Path) -> None:
    verdicts = [Verdict("holds", "It is +1.0 [0.5, 1.5]."), None, Verdict("open", "The control.")]
    claims = [claim(*pair) for pair in zip((1, 2, 8), verdicts, strict=True)]
    figures = Figures({"a": {"sampled": of_seeds(0.5, 0.6)}})
    page.write_page(claims, figures, SEEDS, tmp_path)
    text = (tmp_path / page.PAGE).read_text()
    assert max(map(len, text.split("## All")[0].splitlines())) <= 100
    first, rest = text.split("## All verdicts")
    assert "The control. See [claim 8](#claim-8)." in first
    assert "| 1 | [Title 1 \\| bar.](#claim-1) | **holds** | It is +1.0 [0.5, 1.5]. |" in rest
    not_run = rest.split("## Claim 2")[1].split("## Claim 8")[0]
    assert "Verdict: **not run** (sampled of a is known of 0 seeds)." in " ".join(not_run.split())
    assert "holds" not in not_run
    assert "`habit_sft`" in not_run
    again, seeds = page.read_figures(tmp_path / page.FIGURES)
    assert seeds == [*SEEDS]
    assert again.values("a", "sampled") == {2: 0.5, 3: 0.6}
    # Without the controls, the page says that nothing is proved.
    page.write_page(claims[:2], figures, SEEDS, tmp_path)
    first = (tmp_path / page.PAGE).read_text().split("## All verdicts")[0]
    assert "does not prove" in " ".join(first.split())


def test_the_claims_that_are_written_say_that_they_were_not_run() -> None:
    for judged in page.judge(load_claims(), Figures({})):
        assert judged.verdict is None, judged.claim.number
        assert judged.missing


def test_equality_needs_the_whole_interval_within_the_margin() -> None:
    assert compare(Interval(0.0, -0.01, 0.01, 5), 0.02) == "equal"
    assert compare(Interval(0.0, -0.03, 0.01, 5), 0.02) == "open"
    assert compare(Interval(0.05, 0.03, 0.07, 5), 0.02) == "higher"
    assert compare(Interval(-0.05, -0.07, -0.03, 5), 0.02) == "lower"
    # A difference that is there, and of which nobody knows whether it matters.
    assert compare(Interval(-0.02, -0.03, -0.01, 5), 0.02) == "open"


def test_an_interval_that_touches_the_margin_is_not_within_it() -> None:
    assert is_within(Interval(0.0, -0.0199, 0.0199, 5))
    assert not is_within(Interval(0.0, -MARGIN, 0.0, 5))
    assert not is_within(Interval(0.0, 0.0, MARGIN, 5))


def test_a_difference_has_a_sign_and_the_unit_of_its_metric() -> None:
    difference = Interval(0.0123, -0.001, 0.0256, 5)
    assert words(difference, "sampled") == "+1.2 [-0.1, +2.6] points"
    assert words(difference, "reverse_kl") == "+0.0123 [-0.0010, +0.0256] nats per token"
    # A mean has no sign, and a share of right answers is in percent.
    assert shown(Interval(0.951, 0.9, 0.99, 5), "greedy") == "95.1 [90.0, 99.0]"


def test_tables_have_as_many_cells_as_heads() -> None:
    figures = made_up(0.96)
    titles = {"c1_online": "standard OPD", "habit_lightning": "Lightning OPD"}
    for reference, num_columns in (("", 5), ("c1_online", 8)):
        lines = results_table(figures, titles, reference).splitlines()
        assert [line.count("|") for line in lines] == [num_columns + 1] * 4
    assert "greedy minus that of “standard OPD”" in lines[0]
    # A line that ends early, and a column of words at its end.
    short = markdown_table(["model", "seeds", "outcome"], [["a", "0"]], words=(0, 2))
    assert short.splitlines() == ["| model | seeds | outcome |", "|---|---:|---|", "| a | 0 | |"]


def test_a_weighted_sum_needs_seeds_that_have_all_of_its_arms() -> None:
    figures = Figures(
        {
            "a": {"sampled": dict.fromkeys((2, 3, 4), 0.5)},
            "b": {"sampled": dict.fromkeys((3, 4, 5), 0.25)},
            "c": {"sampled": dict.fromkeys((4, 5), 0.125)},
        }
    )
    found = figures.weighted_sum("sampled", (1.0, "a"), (-2.0, "b"))
    assert (found.mean, found.num_seeds) == (0.0, 2)
    assert figures.has("a", "sampled")
    assert not figures.has("a", "sampled", "greedy")
    with pytest.raises(MissingFigures, match="a and b and c have 1 seeds in common"):
        figures.weighted_sum("sampled", (1.0, "a"), (1.0, "b"), (1.0, "c"))


def made_up(lightning: float, width: float = 0.001, wall: float = 60.0) -> Figures:
    """Return figures in which standard OPD has 96%, needs 110 s and is charged 150 s of wall time.

    Both trainings of Lightning OPD have the same accuracy and the same costs.
    """
    online = ("c1_online", "c4_online_16", "c1_online_8", "c1_every_4", "c3_drift", "c3_trl")
    offline = ("c1_frozen_1024", "c3_lightning_8", "habit_top_k")
    values: dict[str, dict[str, dict[int, float]]] = {}
    ours = ("habit_lightning", "c3_lightning_48", "c3_run_16", "c3_run_48")
    for name in ("habit_sft", *ours, *online, *offline):
        is_ours = name in ours
        accuracy = lightning if is_ours else 0.96
        values[name] = {
            "greedy": spread(accuracy, width if is_ours else 0.0),
            "sampled": spread(accuracy, width if is_ours else 0.0),
            "reverse_kl": spread(0.06 if name == "habit_sft" else 0.002),
            "wall_seconds": spread(wall if is_ours else 150.0, 1.0),
            "processor_seconds": spread(wall, 1.0),
            "scored": spread(20_000 if is_ours else 60_000),
            "decoded": spread(20_000),
            "cache_bytes": spread(1e5 if is_ours else 3e5),
            "cache_wall_seconds": spread(40.0),
            "cache_processor_seconds": spread(10.0),
        }
    return Figures(values)


@pytest.mark.parametrize(
    ("figures", "answer"),
    [
        (made_up(0.96), "holds"),
        (made_up(0.99), "holds"),
        (made_up(0.90), "does not hold"),
        (made_up(0.96, width=0.05), "open"),
    ],
)
def test_claim_1_is_judged_by_the_intervals(figures: Figures, answer: str) -> None:
    from examples.study.claim_1 import CLAIM

    verdict = CLAIM.judge(figures)
    assert verdict.answer == answer
    assert "[" in verdict.summary
    assert "At equal steps (16)" in verdict.summary
    assert "At as many scored responses" in verdict.summary


@pytest.mark.parametrize(
    ("figures", "answer"),
    [
        (made_up(0.96), "holds"),
        (made_up(0.90), "does not hold"),
        (made_up(0.96, wall=200.0), "does not hold"),
        (made_up(0.96, width=0.05), "open"),
        # As long as what standard OPD needs, and less than what its run has.
        (made_up(0.96, wall=110.0), "open"),
        (made_up(0.96, wall=130.0), "does not hold"),
    ],
)
def test_claim_3_needs_the_accuracy_and_both_savings(figures: Figures, answer: str) -> None:
    from examples.study.claim_3 import CLAIM

    verdict = CLAIM.judge(figures)
    assert verdict.answer == answer
    assert "benchmarks.md" in " ".join(verdict.details)
    # Seven eighths of 20,000 are taken from the 60,000 of standard OPD.
    assert "-22,500 [-22,500, -22,500] scored tokens" in verdict.summary


def test_claim_3_holds_if_the_longer_training_comes_to_the_bar() -> None:
    from examples.study.claim_3 import CLAIM

    stored = made_up(0.90).as_json()
    stored["values"]["c3_run_48"]["sampled"] = dict.fromkeys(map(str, SEEDS), 0.96)
    assert CLAIM.judge(Figures.from_json(stored)).answer == "holds"
    # Too dear: the control.
    stored["values"]["c3_run_48"]["wall_seconds"] = dict.fromkeys(map(str, SEEDS), 130.0)
    assert CLAIM.judge(Figures.from_json(stored)).answer == "does not hold"
    # The bar is the mean of two draws: a lucky one of 8 points more raises it by 4.
    lucky = made_up(0.96).as_json()
    lucky["values"]["c4_online_16"]["sampled"] = dict.fromkeys(map(str, SEEDS), 1.04)
    verdict = CLAIM.judge(Figures.from_json(lucky))
    assert verdict.answer == "does not hold"
    assert "(T=1: -4.0 [" in verdict.summary
    # Without TRL the page says so.
    del stored["values"]["c3_trl"]
    details = " ".join(CLAIM.judge(Figures.from_json(stored)).details)
    assert "TRL's trainer was not run here" in details


def test_the_pictures_are_the_same_files_for_the_same_figures(tmp_path: Path) -> None:
    from examples.study.claim_3 import CLAIM

    (plot,) = CLAIM.judge(made_up(0.96)).plots
    for name in ("first.svg", "second.svg"):
        plot.draw(tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert b"<svg" in (tmp_path / "first.svg").read_bytes()
