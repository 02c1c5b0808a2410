"""The server of every stage of every recipe: its arguments are taken and resolved by the image's
SGLang.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lopd.config import load_config
from lopd.planning.known_models import KNOWN_MODELS
from sglang_rollout.servers import server as server_module
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.servers.shared_gpus import training_settings
from tests.megatron.launch import ROOT

REAL = os.environ.get("LOPD_ENGINE") in ("real", "stub")
pytestmark = [
    pytest.mark.skipif(not REAL, reason="needs the image's environment: bash tests/image/run.sh"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to make an empty driver"),
]
RECIPES = sorted((ROOT / "examples").glob("run_*.toml"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 whose functions all fail: SGLang's kernels load with it."""
    folder = tmp_path_factory.mktemp("driver")
    kernels = Path(os.environ["LOPD_IMAGE_PACKAGES"], "sgl_kernel")
    needed: set[str] = set()
    for library in kernels.rglob("*.so"):
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        needed |= set(re.findall(r" U (cu[A-Z]\w*)", listed))
    assert needed
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(needed)))
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        str(source),
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(folder / "libcuda.so.1"),
    ]
    subprocess.run(command, check=True)
    return folder


def _model(root: Path, name: str) -> Path:
    """A checkpoint's configuration, as published, without weights."""
    known = KNOWN_MODELS[name]
    kinds = {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
    }
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"architectures": [kinds[known["model_type"]]], "dtype": "bfloat16", **known})
    )
    return folder


def _arguments(recipe: Path, root: Path) -> dict[str, dict[str, Any]]:
    """Of each server that the recipe starts: the teacher's, the student's, and the one that shares
    the trainer's GPUs.
    """
    config = load_config(recipe)
    names = {
        role: Path(getattr(config.models, role)).name.rpartition("--")[2].partition("@")[0]
        for role in ("teacher", "student")
    }
    servers = {
        role: SGLangServer(_model(root, name), config.sglang, log=root / f"{role}.log", name=role)
        for role, name in names.items()
    }
    found = {role: dict(server.arguments) for role, server in servers.items()}
    if config.distill.sync_every or config.distill.refresh.is_on:
        log = root / "shared.log"
        shared = SGLangServer(
            _model(root, names["student"]), training_settings(config), log=log, name="shared"
        )
        found["shared"] = dict(shared.arguments)
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_servers_are_resolved(
    recipe: Path, driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_has_gpu", lambda: True)
    asked = _arguments(recipe, tmp_path)
    libraries = f"{os.environ['LD_LIBRARY_PATH']}:{driver}"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.image.server_arguments",
        json.dumps(list(asked.values())),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    resolved = dict(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for role, found in resolved.items():
        sent = asked[role]
        assert found["tp_size"] == sent["tp_size"]
        assert found["dtype"] == sent["dtype"]
        assert found["enable_deterministic_inference"] == sent["enable_deterministic_inference"]
        assert found["max_running_requests"] == sent["max_running_requests"]
        assert found["context_length"] > sent["context_length"], (
            "ours is exact, SGLang's has a margin"
        )
        assert found["attention_backend"]
    assert resolved.keys() >= {"teacher", "student"}


def test_an_argument_that_sglang_does_not_know_would_be_noticed(
    driver: Path, tmp_path: Path
) -> None:
    folder = _model(tmp_path, "Qwen3-0.6B")
    wrong = [{"model_path": str(folder), "context_length": 4096, "a_field_that_is_not_there": 1}]
    libraries = f"{os.environ['LD_LIBRARY_PATH']}:{driver}"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.image.server_arguments",
        json.dumps(wrong),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
    )
    assert done.returncode != 0
    assert "a_field_that_is_not_there" in done.stderr
