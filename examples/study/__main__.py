"""The study: what the paper claims, tested with seeds by this project's own stages.

    python -m examples.study                              everything: make, measure, page
    python -m examples.study --claims 1 3                 two claims
    python -m examples.study --claims 1 --seeds 2 3       a first look, with two seeds
    python -m examples.study --only make                  the models alone
    python -m examples.study --only page --figures docs/study.json    the page without runs

A claim names arms; an arm is one model of each seed (examples/study/arms.py). "make" makes the
arms by commands of lopd, two side by side, in runs/study/seed-N/ARM. "measure" has every model
answer the held-out prompts and its teacher score the answers, in runs/study/measured. "page" writes
the page, its pictures and its figures: into docs/ where all claims and seeds are asked for, and
into runs/study/page otherwise. At least two seeds are needed for a verdict.

After a kill the same command goes on. What is finished is not made again, unless its configuration
or its commands have changed. An arm that fails is named with its log at the end, the others go on,
and the command then ends with 1.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.small_student.commands import run_measured
from examples.study.arms import ROOT, RUNS, SEEDS, Arm, Claim
from examples.study.claims import NUMBERS, arms_of, load_claims
from examples.study.make import Job, jobs_of, run_jobs

DOCS = ROOT / "docs"
STEPS = ("make", "measure", "page")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--claims",
        nargs="+",
        type=int,
        choices=NUMBERS,
        default=[*NUMBERS],
        metavar="N",
        help=f"the claims, {NUMBERS[0]} to {NUMBERS[-1]} (default: all)",
    )
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="only these arms, and those that they need"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[*SEEDS], metavar="N", help="default: 2 to 6"
    )
    parser.add_argument("--only", choices=STEPS, help="one of the three parts")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="how much is done side by side; default: 2"
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="FILE",
        help="make the page from the figures in this file, and not from runs",
    )
    return parser.parse_args()


def chosen(arms: Mapping[str, Arm], names: Sequence[str] | None) -> dict[str, Arm]:
    """Return the arms of these names and those that they need; all arms where no name is given."""
    if names is None:
        return dict(arms)
    wanted: set[str] = set()

    def add(name: str) -> None:
        if name not in arms:
            sys.exit(f"error: there is no arm {name}; the arms are {', '.join(arms)}")
        wanted.add(name)
        for needed in (*(other for other, _ in arms[name].copied), *arms[name].after):
            add(needed)

    for name in names:
        add(name)
    return {name: arm for name, arm in arms.items() if name in wanted}


def measure_jobs(options: argparse.Namespace, arms: Mapping[str, Arm]) -> list[Job]:
    """Return the jobs that measure all models that are made."""
    jobs: list[Job] = []
    for index in range(options.jobs):
        log = RUNS / "measured" / f"measure-{index}.log"
        command = [sys.executable, "-m", "examples.study.measure", "--arms", *arms]
        what = ["--seeds", *map(str, options.seeds), "--part", f"{index}/{options.jobs}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        work = functools.partial(run_measured, [*command, *what], log, env=environment, cwd=ROOT)
        name = f"measuring, part {index + 1} of {options.jobs}"
        jobs.append(Job(name, work, is_made=False, needs=frozenset(), log=log))
    return jobs


def write(options: argparse.Namespace, claims: Sequence[Claim], arms: Mapping[str, Arm]) -> None:
    """Write the page."""
    # Imported here: the first two parts need none of this.
    from examples.study.collect import collect
    from examples.study.page import PAGE, read_figures, write_page
    from examples.study.recommendation import record

    is_whole = [*NUMBERS] == options.claims and {*SEEDS} <= {*options.seeds} and not options.arms
    to = DOCS if is_whole else RUNS / "page"
    seeds: list[int] = options.seeds
    if options.figures is not None:
        figures, seeds = read_figures(options.figures)
    else:
        record(arms, seeds)
        figures = collect(arms, seeds)
    write_page(claims, figures, seeds, to)
    print(f"the page is {to / PAGE}")


def main() -> int:
    options = arguments()
    claims = load_claims(options.claims)
    every = arms_of(claims)
    arms = chosen(every, options.arms)
    failures: list[str] = []
    if options.only in (None, "make"):
        failures += run_jobs(jobs_of(arms, options.seeds), options.jobs)
    if options.only in (None, "measure"):
        print("measuring; progress is in runs/study/measured/measure-0.log and so on", flush=True)
        failures += run_jobs(measure_jobs(options, arms), options.jobs)
    if options.only in (None, "page"):
        write(options, claims, every)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
