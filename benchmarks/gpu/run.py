"""Measures on one H100 or H200, without a network, what docs/gpu_results.md lacks.

    bash benchmarks/gpu/run.sh --wheels FOLDER       12 minutes on a GPU; figures in ./gpu_results
    bash benchmarks/gpu/run.sh --dry-run             every part at a tiny size on a CPU
    bash benchmarks/gpu/run.sh --report gpu_results  the table of docs/gpu_results.md from figures

The parts run in the order of their worth, each in a process of its own with a time limit of its
own, and save every figure as soon as it is there. So a run that is cut keeps what it has, and a
part that fails is reported and does not end the next ones. FOLDER is what
benchmarks/gpu/wheels.sh has fetched; without it the parts use what is installed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import report
from benchmarks.gpu.bundle import read_groups
from benchmarks.gpu.install import STAND_IN, cublas_stand_in, environment, install
from benchmarks.gpu.part import ROOT, last_line
from benchmarks.gpu.sheet import CUT, FAILED, ended, machine, say, write_json

from lopd.errors import EXIT_CODE, ConfigError, LopdError

MINUTES = 12.0
DRY_MINUTES = 60.0  # of a CPU, on which other work may run
LEAST_S = 20.0  # with less time left no part is started
GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Part:
    """A process of the run. limit_s: of it, on a GPU. groups: of packages that it may use."""

    name: str
    module: str
    variant: str
    limit_s: float
    groups: tuple[str, ...] = ("base",)

    def command(self, out: Path, *, dry_run: bool) -> list[str]:
        module = f"benchmarks.gpu.{self.module}"
        command = [sys.executable, "-W", "ignore", "-m", module, "--out", str(out)]
        command += ["--variant", self.variant] if self.variant else []
        return command + (["--dry-run"] if dry_run else [])


NO_ENGINE = ROOT / "benchmarks/gpu/no_engine"
ENGINE = ("base", "engine", "cublas")
SERVER = ("base", "server")
PARTS = (
    Part("1-kernels", "kernels", "", 150),
    Part("2-trainer-local", "trainer", "local", 120),
    Part("3-trainer-engine", "trainer", "engine", 120, ENGINE),
    Part("4-parity", "parity", "", 120, ENGINE),
    Part("5-serving", "serving", "seeded", 150, SERVER),
    Part("6-colocation", "serving", "colocation", 90, SERVER),
    Part("7-serving-free", "serving", "free", 90, SERVER),
)
DRY_LIMIT_S = 900.0


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part too
    try:
        sys.exit(run(options))
    except LopdError as error:
        say(str(error))
        sys.exit(EXIT_CODE)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu/run.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="from wheels.sh")
    parser.add_argument("--site", type=Path, metavar="FOLDER", help="where wheels are unpacked")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, help="for everything: 12, of a dry run 60")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], default=[])
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write the page's table")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    """The exit code: 0 where every part ended by itself."""
    if options.report is not None:
        report.write_page(options.report)
        return 0
    began = time.monotonic()
    minutes = options.minutes or (DRY_MINUTES if options.dry_run else MINUTES)
    deadline = began + minutes * 60
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    here = machine()
    if not options.dry_run and here["gpu"] is None:
        remedy = "add --dry-run to see every part start on a CPU"
        raise ConfigError("torch sees no GPU", where="benchmarks/gpu/run.sh", remedy=remedy)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    site = (options.site or out / "site").resolve()
    if options.dry_run:
        site /= "dry-run"  # which lacks what only a GPU's driver can load
    say(f"{here['gpu'] or 'no GPU'}; {versions(here)}; figures go to {out}")
    complete = True
    found = dict[str, str]()
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        if options.wheels is not None:  # of each part just before it: those before have begun
            bring(options.wheels, site, part.groups, found, dry_run=options.dry_run)
        about = {"dry_run": options.dry_run, "machine": here, "packages": found}
        write_json(out / "run.json", about)
        complete &= run_part(part, out, site, deadline, dry_run=options.dry_run)
    say("")
    say(report.table(out))
    say(f"{time.monotonic() - began:.0f} s in all")
    return 0 if complete else 1


def versions(here: dict[str, object]) -> str:
    found = here["versions"]
    assert isinstance(found, dict)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def bring(
    wheels: Path, site: Path, groups: Sequence[str], found: dict[str, str], *, dry_run: bool
) -> None:
    """Unpacks those of the groups that are whole; found: what was done with each, once."""
    for group in read_groups():
        if group.name not in groups or group.name in found:
            continue
        began = time.monotonic()
        try:
            found[group.name] = install(wheels, site, group, dry_run=dry_run)
        except (LopdError, OSError) as error:
            found[group.name] = f"not installed: {error}"
        seconds = time.monotonic() - began
        say(f"packages, {group.name}: {found[group.name]} ({seconds:.0f} s)")
    if "cublas" not in groups or STAND_IN in found:
        return
    try:
        found[STAND_IN] = cublas_stand_in(site)
    except (OSError, subprocess.CalledProcessError) as error:
        found[STAND_IN] = f"could not be compiled: {error}"
    say(f"packages, cuBLAS: {found[STAND_IN]}")


def run_part(part: Part, out: Path, site: Path, deadline: float, *, dry_run: bool) -> bool:
    """Whether it ended by itself with a whole file of figures."""
    file = out / f"{part.name}.json"
    log = out / f"{part.name}.log"
    file.unlink(missing_ok=True)
    left = deadline - time.monotonic()
    limit = min(DRY_LIMIT_S if dry_run else part.limit_s, left)
    if left < LEAST_S:
        reason = "the time of the whole run was up before it"
        ended(file, part.name, dry_run=dry_run, status=CUT, reason=reason)
        say(f"--- {part.name}: {reason}")
        return False
    say(f"--- {part.name}, at most {limit:.0f} s")
    changes = environment(site, part.groups)
    paths = [str(ROOT), *filter(None, [changes.pop("PYTHONPATH", "")])]
    if dry_run and part.variant != "engine":
        paths.insert(0, str(NO_ENGINE))
    path = os.pathsep.join(paths)
    env = {**os.environ, **changes, "PYTHONPATH": path}
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command(file, dry_run=dry_run),
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
        cut = not followed(process, limit)
    if cut:
        ended(file, part.name, dry_run=dry_run, status=CUT, reason=f"cut after {limit:.0f} s")
    elif process.returncode != 0:
        reason = last_line(log.read_text(errors="replace")) or f"code {process.returncode}"
        ended(file, part.name, dry_run=dry_run, status=FAILED, reason=reason)
        say(f"failed: {reason} (see {log})")
    say(f"{part.name}: {'cut' if cut else 'ended'} after {time.monotonic() - began:.0f} s")
    return not cut and process.returncode == 0


def followed(process: subprocess.Popen[str], limit_s: float) -> bool:
    """Prints what the part says; False where it was still running after its time and was ended."""

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            say(f"    {line.rstrip()}")

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        process.wait(limit_s)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        end_group(process)
        reader.join(GRACE_S)


def end_group(process: subprocess.Popen[str]) -> None:
    """Ends the part with everything it has started: politely, then not."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


if __name__ == "__main__":
    main()
