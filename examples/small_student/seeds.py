"""Distillation against more SFT over several seeds, by the project's own stages.

    python examples/small_student/seeds.py                     five seeds, all models, the table
    python examples/small_student/seeds.py --seeds 2 --arms sft distilled
    python examples/small_student/seeds.py --only table        the table of what is there

A seed decides the demonstrations, the prompts of SFT and of the rollouts, the order of the
responses and every draw. The base student, the teacher and the held-out prompts are always the
same. Seed 1 is not among the five, because the base student, the learning rate and the number of
steps of distill were chosen on it. Everything is made one after the other. After a kill the same
command goes on. What is finished is not made again, unless examples/small_student.toml or the
commands have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import (
    ARMS,
    CONFIG,
    MAIN,
    MODELS,
    NUM_ROLLOUTS,
    OPD_PROMPTS,
    ROOT,
    SFT_PROMPTS,
    Arm,
    Command,
    arm_named,
)
from commands import adopt_orphans, begin_with_copies, run_measured
from measure import is_measured
from table import figures_of, in_short, markdown

HERE = Path(__file__).resolve().parent
LOPD = Path(sys.executable).with_name("lopd")
WEIGHTS = "model.safetensors"


def make(arm: Arm, seed: int, folder: Path) -> None:
    """Make one model of one seed, unless it is there.

    Args:
        arm: The model.
        seed: The seed.
        folder: The folder of the seed.
    """
    main = folder / MAIN
    run_dir = folder / arm.run
    for number, (verb, overrides) in enumerate(arm.commands(main, seed)):
        mark = folder / "done" / f"{arm.name}-{number}-{verb}.json"
        command = _command((verb, overrides), run_dir, seed)
        identity = _identity(command)
        done = json.loads(mark.read_text()) if mark.exists() else {}
        if done.get("command") == identity:
            continue
        if arm.copied and (done or not run_dir.exists()):
            # Also after a change: the stages that were copied then may not be those of now.
            begin_with_copies(run_dir, [main / stage for stage in arm.copied])
        print(f"seed {seed}: {arm.name}: lopd {verb}", flush=True)
        seconds = run_measured(command, folder / f"{arm.name}.log")
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"command": identity, "processor_seconds": seconds}))


def _command(command: Command, run_dir: Path, seed: int) -> list[str | Path]:
    verb, overrides = command
    return [
        LOPD,
        verb,
        CONFIG,
        f"run.dir={run_dir}",
        f"run.seed={seed}",
        f"prompts.sft.seed={SFT_PROMPTS + seed}",
        f"prompts.opd={{num_prompts={NUM_ROLLOUTS}, seed={OPD_PROMPTS + seed}}}",
        # All models are evaluated in one way, by measure.py.
        "evaluate.enabled=false",
        *overrides,
    ]


def _identity(command: Sequence[str | Path]) -> str:
    """Return a hash of a command, the configuration and the two models that it begins with."""
    # After a change of one of them it is another command, and lopd decides what it makes again.
    digest = hashlib.sha256(json.dumps([*map(str, command)]).encode())
    for file in (CONFIG, *(MODELS / name / WEIGHTS for name in ("teacher", "small_student"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def measure(seeds: Sequence[int], arms: Sequence[Arm], runs: Path) -> None:
    """Measure every model that has no figures yet, by one server for all of them."""
    models = {"base": MODELS / "small_student"}
    for seed in seeds:
        for arm in arms:
            models[f"seed-{seed}/{arm.name}"] = runs / f"seed-{seed}" / arm.run / arm.model
    # The last one, because it has another architecture, and so a server of its own.
    models["teacher"] = MODELS / "teacher"
    out = runs / "measured"
    missing = {
        name: model
        for name, model in models.items()
        if not is_measured(out / f"{name}.json", model)
    }
    if missing:
        print(f"measuring {len(missing)} models", flush=True)
        named = [f"{name}={model}" for name, model in missing.items()]
        command = [sys.executable, HERE / "measure.py", CONFIG, out, *named]
        run_measured(command, runs / "measure.log")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "small_student_seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4, 5, 6])
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument("--only", choices=("make", "measure", "table"))
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="FILE",
        help="the table and the picture from this file, for example docs/small_student.json",
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    runs = options.runs.resolve()
    if options.figures is not None:
        write(json.loads(options.figures.read_text()), runs)
        return
    adopt_orphans()
    arms = [arm_named(name) for name in options.arms]
    if options.only in (None, "make"):
        # Seed by seed, so that a command that is ended early leaves whole seeds.
        for seed in options.seeds:
            for arm in arms:
                make(arm, seed, runs / f"seed-{seed}")
    if options.only == "make":
        # Two such commands may make different seeds at the same time, and the table is of all.
        return
    if options.only in (None, "measure"):
        measure(options.seeds, arms, runs)
    write(figures_of(runs, options.seeds), runs)


def write(figures: dict[str, Any], folder: Path) -> None:
    """Write the figures, the table, the README's table and the picture, and print the table."""
    # Imported here: what makes models needs no pictures.
    from picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    text = markdown(figures)
    (folder / "table.md").write_text(text + "\n")
    (folder / "in_short.md").write_text(in_short(figures) + "\n")
    draw(figures, folder / "picture.svg")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        # Its own message is in the log that run_measured() has written.
        command = " ".join(map(str, error.cmd[:3]))
        sys.exit(f"error: {command} ended with {error.returncode}; see the newest .log in --runs")
