"""Remembered hashes: nothing is read twice, and nothing that has changed is taken for known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lopd.artifacts import file_hashes
from lopd.artifacts.file_hashes import FileHashes

OLD = 10 * 10**9  # nanoseconds: longer than any file system's tick


def write(path: Path, content: bytes, *, age_ns: int = OLD) -> str:
    """Write a file that looks as if it was written some time ago; return its sha256."""
    path.write_bytes(content)
    then = time.time_ns() - age_ns
    os.utime(path, ns=(then, then))
    return hashlib.sha256(content).hexdigest()


def stored(store: Path) -> FileHashes:
    """The hashes of a new process that begins with a store."""
    hashes = FileHashes()
    hashes.load(store)
    return hashes


@pytest.fixture
def no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctime cannot be set back, so the age that a file must have is lowered instead."""
    monkeypatch.setattr("lopd.artifacts.file_hashes._TICK_NS", -1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    real = hashlib.file_digest

    def counted(handle, algorithm):  # type: ignore[no-untyped-def]
        names.append(Path(handle.name).name)
        return real(handle, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_a_file_is_read_once(tmp_path: Path, no_tick: None, reads: list[str]) -> None:
    sha = write(tmp_path / "a", b"one")
    store = tmp_path / "hashes.json"
    for _ in range(2):
        hashes = stored(store)
        assert hashes.sha256(tmp_path / "a") == sha
        assert hashes.sha256(tmp_path / "a") == sha
        hashes.save(store)
    assert reads == ["a"]


@pytest.mark.parametrize("change", ["content", "same size", "touched", "replaced", "moved"])
def test_a_change_is_noticed(change: str, tmp_path: Path, no_tick: None, reads: list[str]) -> None:
    path = tmp_path / "a"
    write(path, b"one")
    hashes = FileHashes()
    hashes.sha256(path)
    before = path.stat()
    expected = hashlib.sha256(b"two").hexdigest()
    if change == "content":
        path.write_bytes(b"two")
    elif change == "same size":
        # Same size, inode and mtime: ctime alone differs.
        path.write_bytes(b"two")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "touched":
        os.utime(path)
        expected = hashlib.sha256(b"one").hexdigest()
    elif change == "replaced":
        write(tmp_path / "b", b"two")
        os.utime(tmp_path / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "b").rename(path)
    else:
        path = path.rename(tmp_path / "c")
        expected = hashlib.sha256(b"one").hexdigest()
    assert hashes.sha256(path) == expected
    assert len(reads) == 2


def test_a_file_of_this_moment_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    """Two changes within a tick of the clock look the same. ctime cannot be set, so a file that
    was just made is always that young.
    """
    write(tmp_path / "a", b"one")
    hashes = FileHashes()
    hashes.sha256(tmp_path / "a")
    hashes.sha256(tmp_path / "a")
    assert reads == ["a", "a"]


def test_a_copied_folder_is_read_once_more(tmp_path: Path, no_tick: None, reads: list[str]) -> None:
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/a", b"one")
    store = tmp_path / "run/hashes.json"
    hashes = stored(store)
    hashes.sha256(tmp_path / "run/a")
    hashes.save(store)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # times are kept, inodes are not
    for _ in range(2):
        hashes = stored(tmp_path / "copy/hashes.json")
        hashes.sha256(tmp_path / "copy/a")
        hashes.save(tmp_path / "copy/hashes.json")
    assert len(reads) == 2
    assert len(json.loads((tmp_path / "copy/hashes.json").read_text())) == 2


def test_what_is_forgotten_is_read_again(tmp_path: Path, no_tick: None, reads: list[str]) -> None:
    write(tmp_path / "a", b"one")
    hashes = FileHashes()
    hashes.sha256(tmp_path / "a")
    hashes.forget()
    hashes.sha256(tmp_path / "a")
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', "\x00"])
def test_a_damaged_store_is_as_good_as_none(content: str, tmp_path: Path, no_tick: None) -> None:
    store = tmp_path / "hashes.json"
    store.write_text(content)
    sha = write(tmp_path / "a", b"one")
    hashes = stored(store)
    assert hashes.sha256(tmp_path / "a") == sha
    hashes.save(store)


def test_entries_of_files_that_are_gone_are_dropped(tmp_path: Path, no_tick: None) -> None:
    store = tmp_path / "hashes.json"
    for name in ("a", "b"):
        write(tmp_path / name, name.encode())
    hashes = stored(store)
    hashes.sha256_all([tmp_path / "a", tmp_path / "b"])
    hashes.save(store)
    (tmp_path / "a").unlink()
    write(tmp_path / "b", b"changed")
    hashes = stored(store)
    hashes.sha256(tmp_path / "b")
    hashes.save(store)
    [key] = json.loads(store.read_text())
    assert key.startswith(f"{tmp_path / 'b'}|7|")


def test_many_files_side_by_side(tmp_path: Path, no_tick: None) -> None:
    files = [tmp_path / str(number) for number in range(40)]
    expected = [write(path, path.name.encode()) for path in files]
    hashes = FileHashes()
    done: list[int] = []
    assert hashes.unknown_bytes(files) == sum(len(path.name) for path in files)
    assert hashes.sha256_all(files, read=done.append) == expected
    assert sum(done) == sum(len(path.name) for path in files)
    assert hashes.unknown_bytes(files) == 0


def test_a_bar_moves_while_a_large_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "SHOWN_BYTES", 1 << 20)
    monkeypatch.setattr(file_hashes, "_TOLD_BYTES", 1 << 20)
    monkeypatch.setattr(file_hashes, "_TICK_NS", -1)
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(path.name.encode() * (3 << 20))
    moved: list[int] = []
    totals: list[int] = []

    @contextlib.contextmanager
    def show(num_bytes: int) -> Iterator[Callable[[int], None]]:
        totals.append(num_bytes)
        yield moved.append

    hashes = FileHashes()
    hashes.show_with(show)
    assert hashes.sha256_all(paths) == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    ]
    assert totals == [6 << 20]
    assert sum(moved) == 6 << 20
    # Not once for each file.
    assert len(moved) >= 6
    # The control: what is known is not read, and no bar is shown.
    hashes.sha256_all(paths)
    assert totals == [6 << 20]
