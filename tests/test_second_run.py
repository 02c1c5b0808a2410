"""A second command reads no file that has not changed, and notices every file that has."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from lopd.artifacts.file_hashes import HASHES, STORE
from tests.stand_ins import Lopd, StandIns, command, flip_bit, write_project


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose stages are done by stand-ins."""
    StandIns().install(monkeypatch)
    # Files that were written this moment are not remembered: see lopd.artifacts.file_hashes.
    monkeypatch.setattr("lopd.artifacts.file_hashes._TICK_NS", -1)
    return write_project(tmp_path)


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read for their hash from now on."""
    names: list[str] = []
    real = hashlib.file_digest

    def counted(handle: Any, algorithm: str) -> Any:
        names.append(handle.name)
        return real(handle, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_a_second_command_reads_no_file_again(
    config: Path, lopd: Lopd, monkeypatch: pytest.MonkeyPatch
) -> None:
    lopd("run", config).succeeded()
    reads = counted_reads(monkeypatch)
    # Another process begins with nothing but the store.
    HASHES.forget()
    again = lopd("run", config).succeeded()
    assert "distill: reused" in again.out
    assert reads == []
    lopd("status", config).succeeded()
    lopd("check", config).succeeded()
    assert reads == []
    # Control: without the store every file is read, and each one once.
    HASHES.forget()
    (config.parent / "run" / STORE).unlink()
    lopd("run", config).succeeded()
    assert len(reads) > 10
    assert len(reads) == len(set(reads))
    reads.clear()
    lopd("run", config, "run.rehash=true").succeeded()
    assert len(reads) > 10
    assert len(reads) == len(set(reads))


def test_a_file_that_changed_is_noticed_all_the_same(config: Path, lopd: Lopd) -> None:
    lopd("run", config).succeeded()
    HASHES.forget()
    [shard, *_] = sorted((config.parent / "run/score").glob("*.parquet"))
    before = shard.stat()
    flip_bit(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    lopd("run", config).refused("checksum", shard.name)
