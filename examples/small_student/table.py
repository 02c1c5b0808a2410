"""The table of examples/small_student/seeds.py, from what the runs have published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, MAIN, SFT_ONLY, Arm, arm_named
from numpy.typing import NDArray

from lopd import cache
from lopd.artifacts import MANIFEST, read_manifest
from lopd.tasks.accuracy import standard_error

MODES = ("greedy", "sampled")
# The row that the others are compared with.
OURS = "distilled"
BEST = "sft_best"
_HEAD = (
    "model",
    "seeds",
    "greedy, %",
    "T=1, %",
    "distilled minus it, greedy",
    "distilled minus it, T=1",
    "teacher tokens decoded",
    "only scored",
    "processor s",
)
# Of these the README's table has none.
_LEFT_OUT = ("seeds", "distilled minus it, greedy")
# The rows of the README's table: what a reader would do instead, and the paper's loss.
IN_SHORT = ("base", "sft", BEST, "sft_longer", "sft_fresh", "lightning", OURS, "teacher")
_FIXED = {"base": "base student", "teacher": "teacher"}
_BEST_TITLE = "best of the SFT models above, per column"


@dataclass(frozen=True)
class Row:
    """A model with its shares of right answers, in percent."""

    name: str
    title: str
    # By mode, over the seeds.
    mean: dict[str, float]
    # The standard errors of these means: 0 where there is one model for all seeds.
    error: dict[str, float]


def figures_of(runs: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return everything that the table is made from, as JSON.

    Args:
        runs: The folder of all runs.
        seeds: The seeds of the table. Models that are not measured yet are left out.
    """
    measured = runs / "measured"
    figures: dict[str, Any] = {
        # The same for all seeds.
        "fixed": {name: _read(measured / f"{name}.json") for name in ("base", "teacher")},
        "models": {},
        "costs": {},
        "advantages": {},
    }
    for arm in ARMS:
        found = {seed: _read(measured / f"seed-{seed}" / f"{arm.name}.json") for seed in seeds}
        of_seeds = {str(seed): of for seed, of in found.items() if of is not None}
        if of_seeds:
            figures["models"][arm.name] = of_seeds
            figures["costs"][arm.name] = {
                seed: _costs(runs / f"seed-{seed}", arm) for seed in of_seeds
            }
    for seed in seeds:
        scores = runs / f"seed-{seed}" / MAIN / "score"
        if (scores / MANIFEST).exists():
            figures["advantages"][str(seed)] = _advantages(scores)
    return figures


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def _costs(folder: Path, arm: Arm) -> dict[str, float]:
    """Return what a model has cost since the base student, in one seed.

    Returns:
        decoded and scored: response tokens that the teacher has decoded or has only scored.
        processor_seconds: those of all commands; missing where a command also makes another model.
    """
    needed = [arm]
    for name in arm.after:
        needed += [arm_named(name), *map(arm_named, arm_named(name).after)]
    folders = {folder / one.run / "demonstrate" for one in needed if "demonstrate" in _verbs(one)}
    costs: dict[str, float] = {"decoded": sum(map(_tokens, folders)), "scored": 0}
    is_scored = any(one.name == OURS for one in needed)
    if is_scored:
        costs["scored"] = _tokens(folder / MAIN / "score")
    if arm.name == "on_demonstrations":
        # What the teacher has decoded it then scores, to have its likeliest tokens too.
        costs["scored"] = _tokens(folder / "teacher_rollouts" / "score")
        costs["decoded"] += costs["scored"]
    # The command of the distilled model makes the rollouts of the other losses too.
    if arm.name == OURS or not is_scored:
        marks = [mark for one in needed for mark in (folder / "done").glob(f"{one.name}-[0-9]*")]
        costs["processor_seconds"] = sum(
            json.loads(mark.read_text())["processor_seconds"] for mark in marks
        )
    return costs


def _verbs(arm: Arm) -> tuple[str, ...]:
    return tuple(verb for verb, _ in arm.commands(Path(MAIN), 0))


def _tokens(artifact: Path) -> int:
    return sum(shard.tokens for shard in read_manifest(artifact).shards)


def _advantages(scores: Path) -> dict[str, float]:
    """Return the advantages teacher - student of the rollouts' tokens, before any update."""
    rows = [
        teacher - response.sampling_logprobs
        for response, teacher in cache.read_rows(scores)
        if teacher is not None
    ]
    values = np.concatenate(rows).astype(np.float64)
    return {
        "mean": float(values.mean()),
        "share_above_3": float((np.abs(values) > 3).mean()),
        "min": float(values.min()),
    }


def markdown(figures: dict[str, Any]) -> str:
    """Return the table: a line a model, each value the mean over the seeds and its error."""
    return _joined(_cells(figures))


def in_short(figures: dict[str, Any]) -> str:
    """Return the README's table, which has fewer rows and columns."""
    head, *rows = _cells(figures)
    kept = [index for index, title in enumerate(head) if title not in _LEFT_OUT]
    titles = {_title(name) for name in IN_SHORT}
    chosen = [row for row in rows if row[0].strip("*") in titles]
    return _joined([[row[index] for index in kept] for row in [head, *chosen]])


def _joined(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _cells(figures: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the table, the titles first."""
    rows = [[*_HEAD]]
    models = {**figures["models"], **_best(figures["models"])}
    for name in ("base", *_order(models), "teacher"):
        if name in models:
            rows.append(_line(name, models, figures["costs"].get(name, {})))
        elif figures["fixed"].get(name):
            fixed = figures["fixed"][name]
            values = [f"{100 * fixed[mode]:.1f}" for mode in MODES]
            rows.append([_title(name), "", *values, *[""] * (len(_HEAD) - 4)])
    return rows


def rows_of(figures: dict[str, Any]) -> list[Row]:
    """Return the models of the table in its order, for a picture."""
    models = {**figures["models"], **_best(figures["models"])}
    rows: list[Row] = []
    for name in ("base", *_order(models), "teacher"):
        of_seeds = [*models[name].values()] if name in models else [figures["fixed"].get(name)]
        if of_seeds == [None]:
            continue
        values = {mode: np.array([100 * of[mode] for of in of_seeds]) for mode in MODES}
        rows.append(
            Row(
                name=name,
                title=_title(name),
                mean={mode: float(values[mode].mean()) for mode in MODES},
                error={
                    mode: float(standard_error(values[mode])) if len(of_seeds) > 1 else 0.0
                    for mode in MODES
                },
            )
        )
    return rows


def _title(name: str) -> str:
    if name in _FIXED:
        return _FIXED[name]
    return _BEST_TITLE if name == BEST else arm_named(name).title


def _order(models: dict[str, Any]) -> list[str]:
    """Return the rows' names: the distilled model last."""
    # First SFT on the 512 demonstrations, from the shortest on. The best of them comes after it.
    others = [arm.name for arm in ARMS if arm.name not in (*SFT_ONLY, OURS)]
    names = [name for name in (*SFT_ONLY, *others) if name in models]
    if BEST in models:
        names.insert(1 + max(names.index(name) for name in SFT_ONLY if name in names), BEST)
    return [*names, *([OURS] if OURS in models else [])]


def _best(models: dict[str, Any]) -> dict[str, Any]:
    """Return the best SFT model of each seed, chosen for each column by the column itself."""
    present = [models[name] for name in SFT_ONLY if name in models]
    if len(present) < 2:
        return {}
    # Only seeds that have all of them: a maximum over fewer would be smaller.
    seeds = set.intersection(*(set(of_seeds) for of_seeds in present))
    best = {
        seed: {mode: max(of_seeds[seed][mode] for of_seeds in present) for mode in MODES}
        for seed in sorted(seeds, key=int)
    }
    return {BEST: best} if best else {}


def _line(name: str, models: dict[str, Any], costs: dict[str, dict[str, float]]) -> list[str]:
    of_seeds = models[name]
    cells = [_title(name), str(len(of_seeds))]
    for mode in MODES:
        cells.append(_cell(np.array([100 * of[mode] for of in of_seeds.values()])))
    for mode in MODES:
        # Paired by seed: both models of a seed have the same demonstrations.
        ours = models.get(OURS, {})
        both = [seed for seed in of_seeds if seed in ours and name != OURS]
        pairs = [100 * (ours[seed][mode] - of_seeds[seed][mode]) for seed in both]
        cells.append(_cell(np.array(pairs), sign="+") if pairs else "")
    for cost in ("decoded", "scored", "processor_seconds"):
        values = [of[cost] for of in costs.values() if cost in of]
        cells.append(f"{np.mean(values):,.0f}" if values else "")
    bold = "**" if name == OURS else ""
    return [f"{bold}{cells[0]}{bold}", *cells[1:]]


def _cell(values: NDArray[np.float64], sign: str = "") -> str:
    """Return a mean and, in brackets, its standard error over the seeds."""
    mean = f"{values.mean():{sign}.1f}"
    return mean if len(values) < 2 else f"{mean} ({standard_error(values):.1f})"
