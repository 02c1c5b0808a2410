"""benchmarks/gpu: wheels are cut, carried, put together and unpacked; what is damaged is named."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import install, run
from benchmarks.gpu.bundle import (
    HERE,
    SUMS,
    Group,
    parts_of,
    read_groups,
    read_pins,
    wheels_of,
    write_group,
)
from benchmarks.gpu.wheels import SOURCE_ONLY, name_of, packed_without
from lopd.errors import ArtifactError

Patch = pytest.MonkeyPatch
GROUP = Group(1, "some", "something", ("first", "second"))
PART_BYTES = 4000


def wheel(folder: Path, name: str, **files: bytes) -> Path:
    """A wheel with these files (_ in a name stands for /) and a RECORD of them."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    names = {file.replace("__", "/"): content for file, content in files.items()}
    record = f"{name}-1.0.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in names.items():
            archive.writestr(file, content)
        lines = [f"{file},sha256=x,{len(content)}" for file, content in names.items()]
        archive.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")
    return path


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    """A folder with two wheels in several parts."""
    source = tmp_path / "wheels"
    folder = tmp_path / "carried"
    source.mkdir()
    folder.mkdir()
    first = wheel(source, "first", first__code=b"1" * 5000)
    second = wheel(source, "second", **{"second-1.0.data__purelib__second__code": b"2" * 5000})
    parts = write_group(folder, GROUP, [first, second], PART_BYTES)
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) <= PART_BYTES
    return folder


def test_wheels_come_back_as_they_were(carried: Path, tmp_path: Path) -> None:
    for name, content in wheels_of(carried, GROUP):
        assert content == (tmp_path / "wheels" / name).read_bytes()
    assert [name.split("-")[0] for name, _ in wheels_of(carried, GROUP)] == ["first", "second"]


def test_a_smaller_group_leaves_no_part_of_the_former_one(carried: Path, tmp_path: Path) -> None:
    before = parts_of(carried, GROUP)
    for part in before:
        part.unlink()
    after = write_group(carried, GROUP, [wheel(tmp_path, "third")], PART_BYTES)
    assert parts_of(carried, GROUP) == after
    assert len(after) < len(before)


def test_what_was_lost_or_damaged_on_the_way_is_named(carried: Path) -> None:
    last = parts_of(carried, GROUP)[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ArtifactError, match=rf"{last.name}.*damaged"):
        [*wheels_of(carried, GROUP)]
    last.unlink()
    with pytest.raises(ArtifactError, match=rf"{last.name}.*not here"):
        [*wheels_of(carried, GROUP)]
    last.write_bytes(whole)
    assert [*wheels_of(carried, GROUP)]
    (carried / SUMS).unlink()
    with pytest.raises(ArtifactError, match="no part of this group"):
        [*wheels_of(carried, GROUP)]


def test_a_wheel_that_is_not_listed_is_refused(carried: Path) -> None:
    file = carried / "wheels.json"
    file.write_text(file.read_text().replace('"second', '"other'))
    with pytest.raises(ArtifactError, match="not the one listed"):
        [*wheels_of(carried, GROUP)]


def test_what_is_missing_is_unpacked(carried: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(install, "PYTHON", f"3.{sys.version_info.minor}")
    monkeypatch.setattr(install, "present", lambda package, version: package == "first")
    site = tmp_path / "site"
    assert install.install(carried, site, GROUP) == "1 installed, 1 there already"
    assert (site / "some/second/code").read_bytes() == b"2" * 5000
    assert not (site / "some/first").exists()
    assert install.install(carried, site, GROUP) == "is there already"
    found = install.environment(site, ("some", "absent"))
    assert found["PYTHONPATH"].split(":")[0] == str(site / "some")
    assert "LD_PRELOAD" not in found


def test_packages_come_before_the_first_part_that_needs_them(
    carried: Path,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(install, "PYTHON", f"3.{sys.version_info.minor}")
    monkeypatch.setattr(run, "read_groups", lambda: [GROUP, Group(2, "other", "more", ("x",))])
    found: dict[str, str] = {}
    run.bring(carried, tmp_path / "site", ("some",), found, dry_run=True)
    assert found == {"some": "2 installed, 0 there already"}
    run.bring(carried, tmp_path / "site", ("some", "other"), found, dry_run=True)
    assert found["some"] == "2 installed, 0 there already"  # once
    assert found["other"].startswith("not installed: 2-other.tar: no part of this group")


def test_another_python_is_refused(carried: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(install, "PYTHON", "3.1")
    with pytest.raises(ArtifactError, match=r"for Python 3\.1"):
        install.install(carried, tmp_path / "site", GROUP)


def test_no_file_leaves_the_folder(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("../outside", b"")
    with pytest.raises(AssertionError, match="below its root"):
        install.unpack(content.getvalue(), tmp_path / "site")
    assert not (tmp_path / "outside").exists()


def test_cublas_comes_before_torchs_own(tmp_path: Path) -> None:
    library = tmp_path / "cublas/nvidia/cu13/lib/libcublasLt.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    assert "LD_PRELOAD" not in install.environment(tmp_path, ("cublas",))  # not whole yet
    (tmp_path / "cublas/installed").touch()
    assert install.environment(tmp_path, ("cublas",))["LD_PRELOAD"] == str(library)
    assert "LD_PRELOAD" not in install.environment(tmp_path, ("base",))


def test_the_stand_in_for_an_older_cublas(tmp_path: Path, monkeypatch: Patch) -> None:
    assert "not carried" in install.cublas_stand_in(tmp_path)
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/installed").touch()
    monkeypatch.setattr(install, "has_function", lambda: True)
    assert "has the function" in install.cublas_stand_in(tmp_path)
    monkeypatch.setattr(install, "has_function", lambda: False)
    assert install.NEW_FUNCTION in install.cublas_stand_in(tmp_path)
    preloaded = install.environment(tmp_path, ("engine",))["LD_PRELOAD"]
    call = f"import ctypes; print(ctypes.CDLL(None).{install.NEW_FUNCTION}())"
    command = [sys.executable, "-c", call]
    answer = subprocess.run(command, env={"LD_PRELOAD": preloaded}, capture_output=True, check=True)
    assert int(answer.stdout) == install.NOT_SUPPORTED


# ---- what is fetched ----


def test_every_package_is_pinned_with_hashes() -> None:
    pins = read_pins()
    images = read_pins(HERE.parents[1] / "docker/requirements.lock")
    packages = [name for group in read_groups() for name in group.packages]
    assert len(packages) == len({*packages})
    for name in packages:
        assert pins[name].hashes, name
    for name in ("megatron-core", "sglang", "sglang-kernel", "transformer-engine-cu13"):
        assert pins[name] == images[name]
    assert SOURCE_ONLY in packages
    assert "torch" not in packages


def test_a_wheel_without_what_is_never_loaded(tmp_path: Path) -> None:
    path = wheel(tmp_path, "kernels", kernels__sm90=b"9", kernels__sm100=b"10")
    packed_without(path, ["kernels/sm100*"])
    with zipfile.ZipFile(path) as archive:
        record = archive.read("kernels-1.0.dist-info/RECORD").decode()
        assert {*archive.namelist()} == {"kernels/sm90", "kernels-1.0.dist-info/RECORD"}
    assert "sm90" in record
    assert "sm100" not in record
    with pytest.raises(ArtifactError, match="no file fits"):
        packed_without(path, ["kernels/sm100*"])


def test_names_of_files() -> None:
    assert name_of("sglang_kernel-0.4.5-cp310-abi3-manylinux2014_x86_64.whl") == "sglang-kernel"
    assert name_of("transformer_engine_torch-2.16.1.tar.gz") == SOURCE_ONLY
