"""A server's private folder: where it lies, and when it goes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_rollout.servers.scratch import Scratch, remove_orphans


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Instead of TMPDIR."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


def test_sockets_get_a_short_path_where_tmpdir_is_a_long_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Scratch()
    assert short.path.parent == place
    long_place = place / ("x" * 80)
    long_place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long_place))
    long = Scratch()
    assert long.path.parent == Path("/tmp")
    for scratch in (short, long):
        scratch.remove()
        scratch.remove()
        assert not scratch.path.exists()
    assert not list(long_place.iterdir())


def test_what_a_killed_process_left_goes_when_the_next_one_starts(place: Path) -> None:
    code = (
        "import sys, time; from sglang_rollout.servers.scratch import Scratch; "
        "print(Scratch().path, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )
    assert other.stdout is not None
    left = Path(other.stdout.readline().strip())
    (left / "socket").touch()
    mine = Scratch()
    foreign = place / "lopd-sglang-foreign"
    foreign.mkdir()  # whoever made it, or is about to lock it
    assert left.exists()  # its owner lives
    other.kill()
    other.wait()
    remove_orphans()
    assert not left.exists()
    assert mine.path.exists()
    assert foreign.exists()
    mine.remove()
