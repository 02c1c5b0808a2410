"""Fetches what an isolated GPU machine lacks, on a machine with a package index.

    bash benchmarks/gpu/wheels.sh FOLDER

FOLDER then holds files of at most 60 MiB, in the order of their worth: carry as many as you can,
with SHA256SUMS and wheels.json, and name the folder there: `run.sh --wheels FOLDER`. The wheels
are those of Linux, x86-64 and Python 3.12 whatever this machine is; pip verifies the pinned
hash of each. Transformer Engine's extension for torch exists as source only: it is carried as
source and compiled there, unless --extension names a wheel of it that was built before. pip asks
the source for its metadata before it gives it, and the source asks torch for its CUDA version:
without --extension set PYTHON to one with the image's torch.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.gpu.bundle import (
    PART_BYTES,
    SUMS,
    Group,
    read_groups,
    read_pins,
    write_group,
)
from benchmarks.gpu.sheet import say

from lopd.errors import EXIT_CODE, ArtifactError, LopdError

PYTHON = "3.12"
SOURCE_ONLY = "transformer-engine-torch"
NEWEST_GLIBC = 39  # of Ubuntu 24.04: pip takes a wheel for exactly the versions that it is told


def main() -> None:
    if not run(arguments()):
        sys.exit(EXIT_CODE)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the files go")
    parser.add_argument("--extension", type=Path, metavar="WHEEL", help="a built extension")
    names = [group.name for group in read_groups()]
    parser.add_argument("--group", choices=names, action="append", help="only this group")
    return parser.parse_args()


def run(options: argparse.Namespace) -> bool:
    """Whether every group is there; one that cannot be had does not keep the others away."""
    options.folder.mkdir(parents=True, exist_ok=True)
    total = 0
    complete = True
    for group in read_groups():
        if options.group and group.name not in options.group:
            continue
        try:
            wheels, parts = bring(group, options.folder, options.extension)
        except LopdError as error:
            say(f"{group.name}: {error}")
            complete = False
            continue
        size = sum(part.stat().st_size for part in parts)
        total += size
        say(f"{group.name}: {wheels} wheels, {size / 2**20:.1f} MiB in {len(parts)} files")
        say(f"    {group.brings}")
    say(f"{total / 2**20:.1f} MiB in {options.folder}, checksums in {SUMS}")
    return complete


def bring(group: Group, folder: Path, extension: Path | None) -> tuple[int, list[Path]]:
    """The number of the group's wheels, and its files."""
    with tempfile.TemporaryDirectory(prefix="lopd-wheels-") as scratch:
        wheels = fetch(group, Path(scratch), extension)
        for stale in folder.glob(f"{group.archive}.*"):
            stale.unlink()
        return len(wheels), write_group(folder, group, wheels, PART_BYTES)


def fetch(group: Group, folder: Path, extension: Path | None) -> list[Path]:
    """The group's wheels, in the order of packages.toml. ArtifactError: one is not to be had."""
    pins = read_pins()
    for name in group.packages:
        if name not in pins:
            remedy = "pin it in benchmarks/gpu/extra.lock"
            raise ArtifactError(f"{name} is in no lock", where="packages.toml", remedy=remedy)
    binary = [name for name in group.packages if name != SOURCE_ONLY]
    download(binary, folder, platform=True)
    if SOURCE_ONLY in group.packages:
        if extension is not None:
            (folder / extension.name).write_bytes(extension.read_bytes())
        else:
            download([SOURCE_ONLY], folder, platform=False)
    found = []
    for name in group.packages:
        [file] = [one for one in folder.iterdir() if name_of(one.name) == name]
        unwanted = group.without.get(name)
        found.append(packed_without(file, unwanted) if unwanted else file)
    return found


def download(names: list[str], folder: Path, *, platform: bool) -> None:
    """By pip, with hashes required."""
    pins = read_pins()
    lines = []
    for name in names:
        hashes = " ".join(f"--hash=sha256:{digest}" for digest in sorted(pins[name].hashes))
        lines.append(f"{name}=={pins[name].version} {hashes}\n")
    listed = folder / "wanted.txt"
    listed.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-deps", "-d", str(folder), "-r", str(listed)]
    if platform:
        command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
        kinds = [f"manylinux_2_{minor}" for minor in range(5, NEWEST_GLIBC + 1)]
        for kind in (*kinds, "manylinux1", "manylinux2010", "manylinux2014", "linux"):
            command += ["--platform", f"{kind}_x86_64"]
    else:
        command += ["--no-binary=:all:", "--no-build-isolation"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    listed.unlink()
    if done.returncode != 0:
        raise ArtifactError(f"pip could not fetch it: {done.stderr.strip()[-400:]}", where=names[0])


def name_of(file: str) -> str:
    """The package of a wheel or of a source archive, as the lists spell it."""
    return file.split("-")[0].replace("_", "-").lower() if file.endswith(".whl") else SOURCE_ONLY


def packed_without(wheel: Path, patterns: list[str]) -> Path:
    """The wheel again, without these files. ArtifactError: a pattern fits none of its files."""
    reduced = wheel.with_name(f"reduced-{wheel.name}")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(reduced, "w") as target:
        names = source.namelist()
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ArtifactError(f"no file fits {pattern}", where=wheel.name)
        kept = [name for name in names if not any(fnmatch.fnmatch(name, one) for one in patterns)]
        [record] = [name for name in kept if name.endswith(".dist-info/RECORD")]
        for name in kept:
            if name != record:
                entry = zipfile.ZipInfo(name)
                entry.external_attr = source.getinfo(name).external_attr
                entry.compress_type = zipfile.ZIP_DEFLATED
                target.writestr(entry, source.read(name))
        lines = csv.reader(io.StringIO(source.read(record).decode()))
        rows = [row for row in lines if row and row[0] in kept]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        target.writestr(zipfile.ZipInfo(record), text.getvalue())
    reduced.replace(wheel)
    return wheel


if __name__ == "__main__":
    main()
