"""What a second `lopd run` costs when nothing has changed.

    python -m benchmarks.second_run RUN_CONFIG --json second_run.json

RUN_CONFIG is the configuration of a finished run, for example examples/tiny_moe.toml. The same
command is run again, several times in alternation with a command that only imports what it needs.
`seconds_beyond_imports` is the difference of the medians, and `processor_s_beyond_imports` the same
in processor time.

Models of the example are small, so the part that grows with the models is measured on its own: a
folder with a sparse weight file of 60 GB is identified twice, as two processes would do it.
`seconds_identify_again` is the second time. `seconds_identify_first` is the first time, which reads
the file (of zeros, from no disk: a real one is slower).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lopd.artifacts import identify_model
from lopd.artifacts.file_hashes import HASHES

# What a second run imports before it looks at anything.
IMPORTS = "import lopd.cli, lopd.checks, lopd.pipeline"


def seconds(command: list[str]) -> tuple[float, float]:
    """Return the wall time and the processor time of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def second_run(config: str, overrides: list[str], repeats: int) -> dict[str, float]:
    """Measure the same command again, in alternation with its imports."""
    command = [sys.executable, "-m", "lopd.cli", "run", config, *overrides]
    # Whatever is still missing is done here, and files are read once.
    seconds(command)
    runs: list[tuple[float, float]] = []
    imports: list[tuple[float, float]] = []
    for _ in range(repeats):
        runs.append(seconds(command))
        imports.append(seconds([sys.executable, "-c", IMPORTS]))
    run, run_processor = map(statistics.median, zip(*runs, strict=True))
    imported, imported_processor = map(statistics.median, zip(*imports, strict=True))
    return {
        "seconds_run": run,
        "seconds_imports": imported,
        "seconds_beyond_imports": run - imported,
        # The same in processor time, which a busy machine changes less.
        "processor_s_beyond_imports": run_processor - imported_processor,
    }


def large_model(gigabytes: float) -> dict[str, float]:
    """Measure the identity of a model folder of this size, the first and the second time."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        with (folder / "model.safetensors").open("wb") as handle:
            # Sparse: it has a size and takes no space.
            handle.truncate(int(gigabytes * 1e9))
        # A file of this moment is not remembered (lopd.artifacts.file_hashes).
        time.sleep(2.5)
        store = Path(work) / "hashes.json"
        times: list[float] = []
        for _ in range(2):
            HASHES.forget()
            HASHES.load(store)
            began = time.perf_counter()
            identify_model(folder)
            times.append(time.perf_counter() - began)
            HASHES.save(store)
    return {
        "gigabytes": gigabytes,
        "seconds_identify_first": times[0],
        "seconds_identify_again": times[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="configuration of a finished run")
    parser.add_argument("overrides", nargs="*", help="overrides, as for lopd run")
    parser.add_argument("--repeats", type=int, default=5, help="runs that are measured")
    parser.add_argument("--gigabytes", type=float, default=60.0, help="size of the large model")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    figures = {
        **second_run(options.config, options.overrides, options.repeats),
        **large_model(options.gigabytes),
    }
    for name, value in figures.items():
        print(f"{name:24} {value:8.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
