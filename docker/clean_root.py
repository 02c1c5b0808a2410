"""Runs the Dockerfile's steps, one by one, in a clean root of Debian made with debootstrap, where
no engine and no base image are at hand.

    debootstrap --variant=minbase bookworm /tmp/root && python docker/clean_root.py /tmp/root
    --python /path/to/python-3.12-prefix

Needs root. Each RUN and COPY is executed with the Dockerfile's own words, but for what CHANGES and
SKIPPED name: no CUDA, and no wheel of more than some megabytes is downloaded. The last step is
verify_image.py, which must then name exactly what was left out. docs/image.md has what was seen.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CHANGES = {  # text of a RUN -> what runs instead, and why
    " python3.12 python3.12-dev python3.12-venv": (
        "",
        "Debian 12 has no Python 3.12; a build of it is put in place",
    ),
    "userdel --remove ubuntu 2>/dev/null || true;": ("", "Debian has no user ubuntu"),
}
SKIPPED = {  # a word of a RUN -> why
    "transformer_engine_torch.lock": (
        "Transformer Engine's extension needs torch with CUDA headers: gigabytes of wheels"
    ),
    "/tmp/apex": "only runs where APEX_COMMIT is given",
}
# Wheels of some ten to some hundred megabytes, and packages that need them.
LARGE = re.compile(
    "(nvidia-(cu|nccl|nvshmem|nvjitlink|mathdx|nvvm|nvtx)|torch|triton|sglang-kernel|flashinfer|"
    "flash-attn|transformer-engine|tilelang|tokenspeed|cuda-|sgl-deep|"
    r"humming|helion|quack|apache-tvm|z3|llvmlite|scipy|scikit|opencv|pyarrow|numba|mlx)"
)
MACHINE_FILES = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/pip.conf",
    "/etc/ssl/certs/ca-certificates.crt",
)
# of the Python put in place
LIBRARIES = (
    "ca-certificates libbz2-1.0 libffi8 liblzma5 libncursesw6 libreadline8 libsqlite3-0 libssl3 "
    "libuuid1 zlib1g"
)

AS_USER = (  # after the last step, as the image's user; the one that writes into /opt must fail
    "id -u",
    "lopd --version",
    "/usr/bin/tini -g -- lopd --help | head -3",
    "touch /cache/x /runs/x",
    "touch /opt/x",
    "/opt/launch/bin/python -c 'import nemo_run'",
)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(KEYWORD, arguments) in order, continued lines joined."""
    lines = [
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        keyword, _, rest = line.strip().partition(" ")
        yield keyword.upper(), rest.strip()


def pairs(text: str) -> list[tuple[str, str]]:
    """KEY=value KEY=value of an ENV or ARG."""
    return [
        (key, value.strip('"')) for key, _, value in (part.partition("=") for part in text.split())
    ]


def without_large(lock: Path) -> tuple[str, list[str]]:
    """The lock without large wheels, and their names."""
    entries = re.split(r"\n(?=[a-z0-9])", lock.read_text(encoding="utf-8"))
    left_out = [entry.partition("==")[0] for entry in entries if LARGE.match(entry)]
    return "\n".join(entry for entry in entries if not LARGE.match(entry)), left_out


class Root:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
        }
        self.user = ""

    def run(self, command: str) -> tuple[int, str]:
        env = [f"{key}={value}" for key, value in self.environment.items()]
        user = ["--userspec", self.user] if self.user else []
        whole = [
            "chroot",
            *user,
            str(self.folder),
            "/usr/bin/env",
            "-i",
            *env,
            "/bin/bash",
            "-o",
            "pipefail",
            "-c",
            command,
        ]
        result = subprocess.run(whole, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout + result.stderr

    def set(self, text: str) -> None:
        known = self.environment
        for key, value in pairs(text):
            known[key] = re.sub(r"\$\{(\w+)\}", lambda match: known.get(match[1], ""), value)


def prepare(root: Root, python: Path) -> None:
    for name in MACHINE_FILES:
        if Path(name).exists():
            target = root.folder / name[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, target)
    code, output = root.run(
        f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {LIBRARIES}"
    )
    assert code == 0, output
    target = root.folder / str(python)[1:]  # its own path: it looks there for its library
    shutil.copytree(
        python,
        target,
        symlinks=True,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("test", "__pycache__"),
    )
    for name in MACHINE_FILES[-1:]:  # ca-certificates has written its own
        shutil.copy(name, root.folder / name[1:])
    (root.folder / "usr/bin/python3.12").symlink_to(python / "bin/python3.12")
    for parent in python.parents[:-1]:  # /root, for one, is closed to the image's user
        inside = root.folder / str(parent)[1:]
        inside.chmod(inside.stat().st_mode | 0o111)


def copy(root: Root, text: str) -> None:
    *sources, target = text.split()
    for source in (HERE.parent / name for name in sources):
        into = root.folder / target[1:]
        if source.is_dir():
            shutil.copytree(
                source, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            into.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, into)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="prefix of a Python 3.12")
    options = parser.parse_args()
    root = Root(options.root)
    prepare(root, options.python)
    failed = 0
    for keyword, text in instructions((HERE / "Dockerfile").read_text(encoding="utf-8")):
        notes = []
        start = time.monotonic()
        skipped = [why for word, why in SKIPPED.items() if word in text and keyword == "RUN"]
        code = 0
        output = ""
        if keyword in ("ENV", "ARG"):
            root.set(text)
        elif keyword == "USER":
            root.user = text
        elif keyword == "WORKDIR":
            code, output = root.run(f"cd {text}")
        elif keyword == "COPY":
            copy(root, text)
            lock = root.folder / "tmp/locks/requirements.lock"
            if lock.name in text:
                kept, left_out = without_large(lock)
                lock.write_text(kept, encoding="utf-8")
                notes.append(f"{len(left_out)} large wheels left out: {' '.join(left_out)}")
        elif keyword == "RUN" and not skipped:
            for old, (new, why) in CHANGES.items():
                if old in text:
                    text = text.replace(old, new)
                    notes.append(why)
            code, output = root.run(text)
        verdict = "skipped" if skipped else "ok" if code == 0 else f"code {code}"
        failed += code != 0
        sys.stdout.write(
            f"[{verdict:>8} {time.monotonic() - start:6.1f} s] {keyword} {text[:150]}\n"
        )
        for line in [*notes, *skipped, *(output.strip().splitlines()[-40:] if code != 0 else [])]:
            sys.stdout.write(f"{'':22}{line}\n")
        sys.stdout.flush()
    for command in AS_USER:
        code, output = root.run(command)
        sys.stdout.write(
            f"[{'ok' if code == 0 else f'code {code}':>8}] "
            f"as the image's user: {command}: {output.strip()[-200:]}\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
