"""The image's files agree with each other and keep the rules that can be seen without an engine.
What has been executed of them: docs/image.md.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def load_verify() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_image", DOCKER / "verify_image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


verify_image = load_verify()
VERSIONS: dict[str, str] = verify_image.read_versions(DOCKER / "versions.env")


def instructions(text: str) -> list[tuple[str, str]]:
    """(KEYWORD, arguments) of a Dockerfile, continued lines joined, comments left out."""
    lines = [
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (keyword.upper(), rest.strip())
        for keyword, _, rest in (line.strip().partition(" ") for line in joined.splitlines())
    ]


def locked(name: str, folder: Path = DOCKER) -> dict[str, str]:
    """Distribution -> version of a lock."""
    return {
        canonicalize_name(package): version
        for package, version in re.findall(
            r"^([A-Za-z0-9._-]+)==(\S+)", (folder / name).read_text(), re.MULTILINE
        )
    }


LOCK = locked("requirements.lock")


def test_the_dockerfile_has_only_known_instructions() -> None:
    found = instructions((DOCKER / "Dockerfile").read_text())
    known = {
        "ARG",
        "FROM",
        "SHELL",
        "ENV",
        "RUN",
        "COPY",
        "USER",
        "WORKDIR",
        "VOLUME",
        "ENTRYPOINT",
        "CMD",
    }
    assert {keyword for keyword, _ in found} <= known
    assert [rest for keyword, rest in found if keyword == "FROM"][-1] == "environment AS final"


def test_versions_are_told_once() -> None:
    arguments = dict(
        rest.split("=", 1)
        for keyword, rest in instructions((DOCKER / "Dockerfile").read_text())
        if keyword == "ARG"
    )
    shared = arguments.keys() & VERSIONS.keys()
    assert {"CUDA_VERSION", "UBUNTU_VERSION", "APEX_COMMIT"} <= shared
    assert {key: arguments[key] for key in shared} == {key: VERSIONS[key] for key in shared}
    for key, package in verify_image.PACKAGES.items():
        assert LOCK[canonicalize_name(package)] == VERSIONS[key], key
    assert locked("transformer_engine_torch.lock") == {
        "transformer-engine-torch": VERSIONS["TRANSFORMER_ENGINE_VERSION"]
    }
    assert locked("launch.lock", ROOT / "requirements")["nemo-run"] == VERSIONS["NEMO_RUN_VERSION"]
    python = VERSIONS["PYTHON_VERSION"]
    named = set(re.findall(r"python(3\.\d+)", (DOCKER / "Dockerfile").read_text()))
    assert named == {python}


def test_cublas_has_what_transformer_engine_calls() -> None:
    """Its wheels for CUDA 13 since 2.13 call a function that cuBLAS has since 13.2.0.9, whatever
    torch pins.
    """
    assert Version(VERSIONS["TRANSFORMER_ENGINE_VERSION"]) >= Version("2.13"), (
        "then the override can go"
    )
    assert Version(LOCK["nvidia-cublas"]) >= Version("13.2.0.9")
    overridden = re.findall(r"^(\S+)==(\S+)$", (DOCKER / "overrides.txt").read_text(), re.MULTILINE)
    assert dict(overridden) == {"nvidia-cublas": LOCK["nvidia-cublas"]}
    assert "--override overrides.txt" in (DOCKER / "lock.sh").read_text()
    libraries = next(
        line
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if "LD_LIBRARY_PATH=" in line
    )
    assert libraries.strip().startswith("LD_LIBRARY_PATH=${NVIDIA_WHEELS}/cu13/lib:"), (
        "the base image has a cuBLAS of its own"
    )


def test_a_wrong_tag_inside_a_wheel_is_no_fault_of_the_image() -> None:
    """pip check says it of Transformer Engine 2.16.1; of another version, or of another package, it
    is one.
    """
    wrong_tag = "transformer_engine_cu13 2.16.1 is not supported on this platform"
    assert list(verify_image.broken_requirements(VERSIONS, lambda: wrong_tag)) == []
    assert (
        list(verify_image.broken_requirements(VERSIONS, lambda: "No broken requirements found.\n"))
        == []
    )
    other = "torch 2.11.0 requires filelock, which is not installed."
    assert list(verify_image.broken_requirements(VERSIONS, lambda: f"{wrong_tag}\n{other}")) == [
        f"pip check: {other}"
    ]
    later = {**VERSIONS, "TRANSFORMER_ENGINE_VERSION": "2.17.1"}
    assert list(verify_image.broken_requirements(later, lambda: wrong_tag)) == [
        f"pip check: {wrong_tag}"
    ]
    assert (
        list(
            verify_image.broken_requirements(
                VERSIONS, lambda: wrong_tag.replace("2.16.1", "2.16.0")
            )
        )
        != []
    )


def test_the_lock_satisfies_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        assert Version(LOCK[canonicalize_name(requirement.name)]) in requirement.specifier, line
    launch = locked("launch.lock", ROOT / "requirements")
    for line in project["optional-dependencies"]["launch"]:
        requirement = Requirement(line)
        assert Version(launch[canonicalize_name(requirement.name)]) in requirement.specifier, line


def test_torch_and_its_compilers_are_of_one_toolkit() -> None:
    major_minor = VERSIONS["CUDA_VERSION"].rpartition(".")[0]
    for package in (
        "nvidia-cuda-nvcc",
        "nvidia-cuda-nvrtc",
        "nvidia-cuda-runtime",
        "nvidia-nvvm",
        "nvidia-cuda-cccl",
        "cuda-bindings",
        "cuda-toolkit",
    ):
        assert LOCK[package].startswith(major_minor + "."), package
    assert VERSIONS["TORCH_CUDA"] == major_minor


@pytest.mark.parametrize(
    "path",
    [
        DOCKER / "requirements.lock",
        DOCKER / "transformer_engine_torch.lock",
        ROOT / "requirements/launch.lock",
    ],
    ids=lambda path: path.name,
)
def test_every_locked_package_has_a_hash_and_no_address(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    entries = re.split(r"\n(?=[a-z0-9])", text)
    assert all("--hash=sha256:" in entry for entry in entries if re.match(r"[a-z0-9]", entry))


def risks(text: str) -> list[str]:
    """What must not be in a Dockerfile."""
    found = instructions(text)
    wrong = [
        f"no tag, or latest: {rest}"
        for keyword, rest in found
        if keyword == "FROM"
        and (rest.endswith(":latest") or (":" not in rest and "AS" not in rest))
    ]
    wrong += [f"latest: {rest}" for keyword, rest in found if re.search(r":latest\b", rest)]
    wrong += [
        f"secret: {rest}"
        for _, rest in found
        if re.search(r"(?i)\b\w*(password|passwd|secret|api_?key|hf_token|private_key)\w*\b", rest)
    ]
    wrong += [
        f"download into a shell: {rest}"
        for _, rest in found
        if re.search(r"(curl|wget)[^|]*\|\s*(ba)?sh", rest)
    ]
    wrong += [
        f"unhashed: {rest}"
        for keyword, rest in found
        if keyword == "RUN"
        for part in rest.split("&&")
        if "pip install" in part and not _hashed(part)
    ]
    wrong += [
        f"patch: {rest}" for _, rest in found if re.search(r"\bpatch -p|\.patch\b|\.diff\b", rest)
    ]
    users = [rest for keyword, rest in found if keyword == "USER"]
    if not users or users[-1].split(":")[0] in ("0", "root"):
        wrong.append("runs as root")
    return wrong


def _hashed(command: str) -> bool:
    return (
        "--require-hashes" in command
        or re.search(r"--no-deps (/src|/tmp/apex)\b|--no-deps --no-build-isolation /src\b", command)
        is not None
    )


def test_no_latest_no_root_no_secret_no_patch() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert risks(text) == []
    assert '"/usr/bin/tini"' in text
    assert not [*DOCKER.glob("*.patch"), *DOCKER.glob("*.diff")]


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("USER 1000:1000", "USER root", "runs as root"),
        ("USER 1000:1000", "", "runs as root"),
        ("FROM environment AS final", "FROM environment:latest AS final", "latest"),
        ("WORKDIR /runs", "ENV HF_TOKEN=abc", "secret"),
        ("WORKDIR /runs", "RUN pip install flash-attn", "unhashed"),
        ("WORKDIR /runs", "RUN curl -L x.org/install | sh", "download"),
        ("WORKDIR /runs", "RUN patch -p1 < fix.patch", "patch"),
    ],
)
def test_the_rules_notice(old: str, new: str, what: str) -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert old in text
    assert any(what in risk for risk in risks(text.replace(old, new)))


def test_what_is_copied_exists_and_is_let_through() -> None:
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for keyword, rest in instructions((DOCKER / "Dockerfile").read_text()):
        if keyword == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in allowed, source


def test_shell_parts_pass_shellcheck(tmp_path: Path) -> None:
    runs = [
        rest
        for keyword, rest in instructions((DOCKER / "Dockerfile").read_text())
        if keyword == "RUN"
    ]
    arguments = [
        rest.split("=")[0]
        for keyword, rest in instructions((DOCKER / "Dockerfile").read_text())
        if keyword in ("ARG", "ENV")
    ]
    script = tmp_path / "runs.sh"
    known = "".join(f': "${{{name}:=}}"\n' for name in {*arguments, "NVIDIA_WHEELS", "VIRTUAL_ENV"})
    script.write_text("#!/bin/bash\nset -o pipefail\n" + known + "\n".join(runs) + "\n")
    scripts = [
        script,
        DOCKER / "lock.sh",
        ROOT / "requirements/lock_launch.sh",
        ROOT / "requirements/install_launch.sh",
    ]
    checker = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    assert checker is not None
    # SC2086: paths of the image have no blanks. SC2015: || true after userdel is meant.
    result = subprocess.run(
        [checker, "-x", "-P", DOCKER, "--exclude=SC2086,SC2015", *scripts],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    checks = ROOT / "tests/image/run.sh"
    # SC2154: what it uses is set by environment.sh. SC2329: functions that are called by name.
    command = [
        checker,
        "-x",
        "-P",
        checks.parent,
        "-P",
        DOCKER,
        "--exclude=SC2154,SC2329",
        checks,
        checks.with_name("environment.sh"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_compose_parses_and_keeps_the_rules() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose) <= {"name", "services", "volumes"}
    service = compose["services"]["lopd"]
    assert service["user"] == "1000:1000"
    assert service["ipc"] == "host"
    assert service["ulimits"]["memlock"] == -1
    assert service["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    ]
    assert not service.get("privileged")
    assert "ports" not in service
    assert not service["image"].endswith(":latest")
    named = {
        volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith("$")
    }
    assert named <= set(compose["volumes"])
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def installed_as(changes: dict[str, str | None]) -> list[str]:
    """What verify_image finds where everything is as wanted but for these."""
    versions: dict[str, str | None] = {
        package: VERSIONS[key] + "+cu130" for key, package in verify_image.PACKAGES.items()
    }
    versions |= {
        name: VERSIONS[key] for key, names in verify_image.SAME_VERSION.items() for name in names
    } | changes

    def installed(name: str) -> str:
        version = versions[name]
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return list(verify_image.wrong_versions(VERSIONS, installed))


def test_verify_image_names_what_is_wrong() -> None:
    assert installed_as({}) == []
    assert installed_as({"torch": "2.13.0"}) == [
        f"torch: 2.13.0, versions.env says {VERSIONS['TORCH_VERSION']}"
    ]
    assert len(installed_as({"torch": "2.13.0", "transformer-engine-torch": None})) == 2
    assert list(verify_image.failing_imports(("json", "no_such_module"))) == [
        "import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"
    ]
    assert list(verify_image.wrong_launcher(VERSIONS, Path("/nowhere/python"))) == [
        "/nowhere/python: missing"
    ]
