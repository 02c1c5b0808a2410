"""Collects the figures of the study from its runs: what measure.py has published, and what each
model has cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.study.arms import SMALL_RUNS, Arm
from examples.study.figures import Figures, Points
from examples.study.make import Identities, Mark, is_made, marks_of
from examples.study.measure import MEASURED
from examples.study.small import SHARED, is_small
from lopd.artifacts import MANIFEST, read_manifest
from lopd.report.metrics import read_metrics

METRICS = ("greedy", "sampled", "reverse_kl", "kl_from_sft", "tokens")
COSTS = (
    "decoded",
    "scored",
    "processor_seconds",
    "wall_seconds",
    "cache_bytes",
    # The part of the two above that the rollouts and the scores of the cache took.
    "cache_processor_seconds",
    "cache_wall_seconds",
)
# The command of TRL's trainer (with_trl.py), and what its teacher has read.
TRL_VERB = "with_trl"
TRL_FIGURES = "trl/figures.json"
# A command that is counted once: the arm that ran it, and its number.
_Counted = dict[tuple[str, int], Mark]


def collect(arms: Mapping[str, Arm], seeds: Iterable[int]) -> Figures:
    """Return the figures of all measured models of arms."""
    of_seeds = [*seeds]
    identities = Identities(arms)
    values: dict[str, dict[str, dict[int, float]]] = {}
    for name, arm in arms.items():
        values[name] = {metric: {} for metric in (*METRICS, *COSTS)}
        for seed in of_seeds:
            result = MEASURED / f"seed-{seed}" / f"{name}.json"
            # Figures of an arm that has changed since are not its figures.
            is_current = is_small(name) or is_made(arm, seed, identities.of(name, seed))
            if not is_current or not result.exists():
                continue
            measured = json.loads(result.read_text())
            known = {metric: measured[metric] for metric in METRICS} | costs_of(arms, arm, seed)
            for metric, value in known.items():
                values[name][metric][seed] = value

    def read_steps(name: str, metric: str) -> dict[int, Points]:
        runs = {seed: arms[name].place(seed).run for seed in of_seeds} if name in arms else {}
        found = {seed: _steps(run, metric) for seed, run in runs.items()}
        return {seed: points for seed, points in found.items() if points}

    def read_file(name: str, file: str) -> dict[int, Any]:
        paths = {seed: arms[name].place(seed).run / file for seed in of_seeds if name in arms}
        return {
            seed: json.loads(path.read_text(encoding="utf-8"))
            for seed, path in paths.items()
            if path.exists()
        }

    return Figures(values, read_steps=read_steps, read_file=read_file)


def _steps(run: Path, metric: str) -> Points:
    rows = read_metrics(run, kind="train", stage="distill")
    return [(int(row["step"]), float(row[metric])) for row in rows if row.get(metric) is not None]


def costs_of(arms: Mapping[str, Arm], arm: Arm, seed: int) -> dict[str, float]:
    """Return what a model has cost since the base student. What is not known is left out.

    Args:
        arms: All arms, by name.
        arm: The model's arm.
        seed: The seed.
    """
    counted = _counted(arms, arm, seed)
    costs: dict[str, float] = {"decoded": 0.0, "scored": 0.0}
    for (name, index), mark in counted.items():
        run = _run_of(arms[name], seed, index)
        if mark.verb == "demonstrate":
            costs["decoded"] += _tokens(run / "demonstrate")
        if mark.verb in ("score", "run"):
            costs["scored"] += _tokens(run / "score")
        if mark.verb == TRL_VERB and (run / TRL_FIGURES).exists():
            # TRL's teacher scores within the training.
            costs["scored"] += json.loads((run / TRL_FIGURES).read_text())["response_tokens"]
        if mark.verb in ("distill", "run"):
            costs["scored"] += sum(_tokens(scores) for scores in _refreshes(run))
    processor = [mark.processor_seconds for mark in counted.values()]
    wall = [mark.wall_seconds for mark in counted.values()]
    # "run" makes several stages, so its seconds are not those of one that was copied.
    is_known = all(mark.verb != "run" or name == arm.name for (name, _), mark in counted.items())
    # Of a command that was killed and went on, nobody knows how long the first attempt took.
    is_known = is_known and not any(mark.is_resumed for mark in counted.values())
    of_cache = [mark.verb in ("rollout", "score") for mark in counted.values()]
    for name, seconds in (("processor_seconds", processor), ("wall_seconds", wall)):
        known = [value for value in seconds if value is not None]
        if is_known and len(known) == len(seconds):
            costs[name] = sum(known)
            pairs = zip(known, of_cache, strict=True)
            costs[f"cache_{name}"] = sum(value for value, is_part in pairs if is_part)
    run = arm.place(seed).run
    caches = [_cache_of(run), *_refreshes(run)] if "distill" in arm.model else []
    if caches and all((cache / MANIFEST).exists() for cache in caches):
        costs["cache_bytes"] = sum(map(_bytes, caches))
    return costs


def _counted(arms: Mapping[str, Arm], arm: Arm, seed: int) -> _Counted:
    """Return the commands that a model has cost: its own, and those before it."""
    marks = _marks(arm, seed)
    last = _index_of(marks, arm.model.partition("/")[0])
    # What comes after the command that makes the model is for other arms.
    own = marks if last is None else marks[: last + 1]
    counted = {(arm.name, index): mark for index, mark in enumerate(own)}
    for other, stage in arm.copied:
        counted |= _counted_stage(arms, arms[other], stage, seed)
    for other in arm.after:
        if arms[other].model:
            counted |= _counted(arms, arms[other], seed)
    return counted


def _counted_stage(arms: Mapping[str, Arm], arm: Arm, stage: str, seed: int) -> _Counted:
    """Return the command that made one stage of an arm's run, wherever that was."""
    if arm.name == SHARED:
        name = "small/sft" if stage in ("demonstrate", "sft") else "small/distilled"
        arm = arms[name]
    marks = _marks(arm, seed)
    index = _index_of(marks, stage)
    if index is not None:
        return {(arm.name, index): marks[index]}
    for other, copied in arm.copied:
        if copied == stage:
            return _counted_stage(arms, arms[other], stage, seed)
    return {}


def _index_of(marks: Sequence[Mark], stage: str) -> int | None:
    made = [index for index, mark in enumerate(marks) if mark.verb in (stage, "run")]
    return made[-1] if made else None


def _marks(arm: Arm, seed: int) -> list[Mark]:
    """Return an arm's marks, without that of its beginning."""
    if not is_small(arm.name):
        return marks_of(arm, seed)[1:]
    folder = SMALL_RUNS / f"seed-{seed}" / "done"
    marks: list[Mark] = []
    for index, command in enumerate(arm.commands(arm.place(seed))):
        file = folder / f"{arm.name.partition('/')[2]}-{index}-{command[1]}.json"
        done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        # The small student's own command does not measure the time of the clock.
        marks.append(Mark(command[1], "", done.get("processor_seconds"), None))
    return marks


def _run_of(arm: Arm, seed: int, index: int) -> Path:
    """Return the run folder of an arm's command, which its overrides may name."""
    place = arm.place(seed)
    for argument in arm.commands(place)[index]:
        if argument.startswith("run.dir="):
            return Path(argument.partition("=")[2])
    return place.run


def _cache_of(run: Path) -> Path:
    """Return the cache that a run's distill stage has learnt from."""
    file = run / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    given = config.get("distill.cache")
    return Path(given) if given else run / "score"


def _refreshes(run: Path) -> list[Path]:
    return sorted((run / "distill").glob("refresh-[0-9]*/scores"))


def _tokens(artifact: Path) -> float:
    """Return the response tokens of an artifact."""
    return float(sum(shard.tokens for shard in read_manifest(artifact).shards))


def _bytes(artifact: Path) -> float:
    return float(sum(file.stat().st_size for file in artifact.glob("shard-*.parquet")))
