"""Lightning OPD, refreshes in between, and standard OPD side by side on the laptop task: accuracy,
reverse KL, wall time, what the teacher had to do.

    python benchmarks/refresh.py --runs runs/refresh --json refresh.json
        everything: about 15 minutes a seed on 2 cores

The same in parts. A part that was killed continues where it ended:

    OPTIONS="--runs runs/refresh --seeds 17 18 19"
    python benchmarks/refresh.py $OPTIONS --only prepare
    python benchmarks/refresh.py $OPTIONS --only lightning every10 drift every1
    python benchmarks/refresh.py $OPTIONS --only table --json refresh.json

All variants of a seed go on from copies of the same four stages (demonstrate, sft, rollout, score),
see the same prompts in the same order for as many steps, and are evaluated on the same held-out
prompts. Seconds are those of the distill stage as the clock showed them, over all attempts, starts
of servers included; beside them stands the machine's load meanwhile (of the last minute, mean of
beginning and end), without which they say little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOPD = Path(sys.executable).with_name("lopd")
STAGES = ("demonstrate", "sft", "rollout", "score")
NUM_STEPS = 40
BATCH = 96
SETTINGS = (
    f"prompts.opd.num_prompts={NUM_STEPS * BATCH}",  # so that Lightning OPD sees each response once
    f"distill.num_steps={NUM_STEPS}",
    f"distill.batch_size={BATCH}",
    # The paper's loss, whose rollouts this benchmark renews.
    "score.top_k=0",
    "distill.objective.loss=lightning",
    "sglang.replicas=1",
    "distill.sync_every=0",
    "distill.checkpoint_every=10",
    "distill.log_every=5",
    "evaluate.equal_compute_baseline=false",
)
KEEP = "distill.refresh.keep_teacher=true"
VARIANTS: dict[str, tuple[str, ...]] = {
    "lightning": (),
    "every10": ("distill.refresh.every=10", KEEP),
    "every10_shared": ("distill.refresh.every=10",),
    "drift": (
        "distill.refresh.min_effective_share=0.97",
        "distill.refresh.num_responses=960",
        KEEP,
    ),
    "every1": ("distill.refresh.every=1", KEEP),
}
TITLES = {
    "lightning": "never (Lightning OPD)",
    "every10": "every 10 steps",
    "every10_shared": "every 10 steps, teacher started for each",
    "drift": "effective share < 0.97",
    "every1": "every step (standard OPD)",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/refresh"),
        help="folder of the run directories (default %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[17],
        help="run.seed of each repetition of everything (default %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=("prepare", *VARIANTS, "table"), help="pieces; absent: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args()


def lopd(verb: str, run_dir: Path, seed: int, *overrides: str) -> None:
    """Runs a verb to its end; its seconds, over all attempts, and the load meanwhile, stand in
    RUN_DIR.wall.json.
    """
    wall_file = run_dir.with_name(f"{run_dir.name}.wall.json")
    began = time.monotonic()
    load = os.getloadavg()[0]
    try:
        subprocess.run(
            [
                LOPD,
                verb,
                ROOT / "examples" / "tiny_moe.toml",
                f"run.dir={run_dir}",
                f"run.seed={seed}",
                *SETTINGS,
                *overrides,
            ],
            check=True,
        )
    finally:
        wall = json.loads(wall_file.read_text()) if wall_file.exists() else {}
        wall[verb] = wall.get(verb, 0.0) + time.monotonic() - began
        wall[f"{verb}_load"] = [*wall.get(f"{verb}_load", []), (load + os.getloadavg()[0]) / 2]
        wall_file.write_text(json.dumps(wall))


def prepare(runs: Path, seed: int) -> None:
    for stage in STAGES:
        lopd(stage, runs / "prepared", seed)


def run_variant(runs: Path, seed: int, name: str) -> None:
    run_dir = runs / name
    if not run_dir.exists():
        partial = runs / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for stage in STAGES:
            shutil.copytree(runs / "prepared" / stage, partial / stage)
        shutil.copy2(runs / "prepared" / "config.json", partial)
        partial.rename(run_dir)
    lopd("distill", run_dir, seed, *VARIANTS[name])
    lopd("evaluate", run_dir, seed, *VARIANTS[name])


def is_evaluated(run_dir: Path) -> bool:
    manifest = run_dir / "evaluate" / "manifest.json"
    return manifest.exists() and bool(json.loads(manifest.read_text())["complete"])


def figures_of(run_dir: Path) -> dict[str, Any]:
    summary = json.loads((run_dir / "summary.json").read_text())
    wall = json.loads(run_dir.with_name(f"{run_dir.name}.wall.json").read_text())
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if row["stage"] == "distill" and row["kind"] == "train"]
    made = json.loads((run_dir / "distill" / "manifest.json").read_text())["extra"].get(
        "refreshes", []
    )
    return {
        "accuracy": {name: summary["accuracy"][name] for name in ("sft", "distilled", "teacher")},
        "accuracy_standard_error": summary["accuracy_standard_error"]["distilled"],
        "reverse_kl": {name: summary["reverse_kl"][name] for name in ("sft", "distilled")},
        "reverse_kl_standard_error": summary["reverse_kl_standard_error"]["distilled"],
        "distill_seconds": wall["distill"],
        "distill_load": round(fmean(wall["distill_load"]), 1),
        "training_seconds": sum(row["seconds"] for row in steps),
        "teacher": summary["teacher_work"],
        "refreshed_before_steps": [refresh["step"] for refresh in made],
        "effective_sample_share": [round(row["effective_sample_share"], 4) for row in steps],
        "chi_square": [round(row["chi_square"], 4) for row in steps],
    }


def table(figures: dict[str, list[dict[str, Any]]]) -> str:
    """A line a variant, of each figure the mean over the seeds and, where there are several, each
    seed's. figures: variant -> of each seed.
    """
    lines = [
        (
            "| refresh | refreshes | accuracy, % | reverse KL, nats per token "
            "| least effective share | distill, s (load) | teacher tokens |"
        )
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, of_seeds in figures.items():
        cells = [
            "/".join(str(of["teacher"]["refreshes"]) for of in of_seeds),
            _cell(
                [100 * of["accuracy"]["distilled"] for of in of_seeds],
                "{:.1f}",
                [100 * of["accuracy_standard_error"] for of in of_seeds],
            ),
            _cell(
                [of["reverse_kl"]["distilled"] for of in of_seeds],
                "{:.4f}",
                [of["reverse_kl_standard_error"] for of in of_seeds],
            ),
            _cell([min(of["effective_sample_share"]) for of in of_seeds], "{:.2f}"),
            " / ".join(f"{of['distill_seconds']:.0f} ({of['distill_load']})" for of in of_seeds),
            _cell([of["teacher"]["tokens"] for of in of_seeds], "{:,.0f}"),
        ]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], form: str, errors: Sequence[float] = ()) -> str:
    """One value with its standard error, or the mean of several and, in brackets, each."""
    if len(values) == 1:
        return form.format(values[0]) + "".join(f" ± {form.format(error)}" for error in errors)
    return f"{form.format(fmean(values))} ({', '.join(form.format(value) for value in values)})"


def main() -> None:
    options = arguments()
    pieces = options.only or ["prepare", *VARIANTS, "table"]
    folders = {seed: options.runs.resolve() / f"seed-{seed}" for seed in options.seeds}
    for seed, runs in folders.items():
        runs.mkdir(parents=True, exist_ok=True)
        if "prepare" in pieces:
            prepare(runs, seed)
        for name in VARIANTS:
            if name in pieces:
                run_variant(runs, seed, name)
    if "table" in pieces:
        done = {
            name: {seed: runs / name for seed, runs in folders.items() if is_evaluated(runs / name)}
            for name in VARIANTS
        }
        figures = {
            name: {seed: figures_of(run_dir) for seed, run_dir in of_seeds.items()}
            for name, of_seeds in done.items()
            if of_seeds
        }
        if options.json is not None:
            options.json.write_text(
                json.dumps(
                    {"num_steps": NUM_STEPS, "batch_size": BATCH, "variants": figures}, indent=1
                )
                + "\n"
            )
        sys.stdout.write(
            table({name: list(of_seeds.values()) for name, of_seeds in figures.items()}) + "\n"
        )


if __name__ == "__main__":
    main()
