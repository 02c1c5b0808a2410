"""Wheels in files that are small enough to carry: one archive a group, cut into parts.

A folder of them holds `N-GROUP.tar.PART` (N: the order of worth), `SHA256SUMS` with the checksum
of every part, and `wheels.json` with the checksum of every wheel. An archive is an uncompressed
tar: wheels are compressed already.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lopd.errors import ArtifactError

HERE = Path(__file__).parent
LOCKS = (
    HERE.parents[1] / "docker/requirements.lock",
    HERE.parents[1] / "docker/transformer_engine_torch.lock",
    HERE / "extra.lock",
)
PART_BYTES = 60 * 2**20
SUMS = "SHA256SUMS"
WHEELS = "wheels.json"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ \\;]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Group:
    """Packages that belong together. without: files that a package's wheel is packed without."""

    number: int
    name: str
    brings: str
    packages: tuple[str, ...]
    without: dict[str, list[str]] = field(default_factory=dict)

    @property
    def archive(self) -> str:
        return f"{self.number}-{self.name}.tar"


def read_groups(file: Path = HERE / "packages.toml") -> list[Group]:
    """In the order of worth."""
    found = tomllib.loads(file.read_text(encoding="utf-8"))["group"]
    return [
        Group(
            number,
            one["name"],
            one["brings"],
            tuple(one["packages"]),
            one.get("without", {}),
        )
        for number, one in enumerate(found, 1)
    ]


@dataclass(frozen=True, slots=True)
class Pin:
    """A version of a package, and the checksums of its files."""

    version: str
    hashes: frozenset[str]


def read_pins(*files: Path) -> dict[str, Pin]:
    """By package; where two files name one, the later one counts."""
    pins: dict[str, Pin] = {}
    for file in files or LOCKS:
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if match := _PIN.match(line):
                pins[match[1].lower()] = Pin(match[2], frozenset(_HASH.findall(line)))
    return pins


# ---- writing ----


def write_group(folder: Path, group: Group, wheels: list[Path], part_bytes: int) -> list[Path]:
    """The group's parts, whose checksums and those of its wheels are added to the lists."""
    archive = folder / group.archive
    with tarfile.open(archive, "w") as tar:
        for wheel in wheels:
            entry = tarfile.TarInfo(wheel.name)
            entry.size = wheel.stat().st_size
            with wheel.open("rb") as content:
                tar.addfile(entry, content)
    parts = cut(archive, part_bytes)
    archive.unlink()
    sums = {name: digest for name, digest in read_sums(folder).items() if not _is_of(name, group)}
    sums |= {part.name: sha256(part) for part in parts}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    known = read_wheels(folder)
    known[group.name] = {wheel.name: sha256(wheel) for wheel in wheels}
    (folder / WHEELS).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return parts


def cut(file: Path, part_bytes: int) -> list[Path]:
    """The file's content in numbered parts beside it."""
    parts = []
    with file.open("rb") as whole:
        while content := whole.read(part_bytes):
            part = file.with_name(f"{file.name}.{len(parts):02d}")
            part.write_bytes(content)
            parts.append(part)
    return parts


# ---- reading ----


def parts_of(folder: Path, group: Group) -> list[Path]:
    """Every part that belongs to the group, checked. ArtifactError: one is missing or damaged."""
    named = {name: digest for name, digest in read_sums(folder).items() if _is_of(name, group)}
    if not named:
        raise ArtifactError("no part of this group is here", where=group.archive)
    for name, digest in sorted(named.items()):
        part = folder / name
        if not part.exists():
            raise ArtifactError("the part is not here", where=name, remedy="carry it too")
        if sha256(part) != digest:
            remedy = "carry it again"
            raise ArtifactError("the part is damaged", where=name, limit=SUMS, remedy=remedy)
    return [folder / name for name in sorted(named)]


def wheels_of(folder: Path, group: Group) -> Iterator[tuple[str, bytes]]:
    """Name and content of the group's wheels, checked. ArtifactError: one is another one."""
    whole = io.BufferedReader(_Joined(parts_of(folder, group)))
    expected = read_wheels(folder).get(group.name, {})
    with tarfile.open(fileobj=whole, mode="r|") as tar:
        for entry in tar:
            stream = tar.extractfile(entry)
            assert stream is not None, "the archive holds nothing but files"
            content = stream.read()
            if hashlib.sha256(content).hexdigest() != expected.get(entry.name):
                what = "the wheel is not the one listed"
                raise ArtifactError(what, where=entry.name, limit=WHEELS)
            yield entry.name, content


class _Joined(io.RawIOBase):
    """Files read one after the other as if they were one."""

    def __init__(self, files: list[Path]) -> None:
        self._left = list(files)
        self._open: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while self._open is not None or self._left:
            if self._open is None:
                self._open = self._left.pop(0).open("rb")
            if count := self._open.readinto(buffer):
                return count
            self._open.close()
            self._open = None
        return 0


def _is_of(name: str, group: Group) -> bool:
    return name.startswith(f"{group.archive}.")


def read_sums(folder: Path) -> dict[str, str]:
    file = folder / SUMS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}


def read_wheels(folder: Path) -> dict[str, dict[str, str]]:
    file = folder / WHEELS
    found: dict[str, dict[str, str]] = {}
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else found


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
