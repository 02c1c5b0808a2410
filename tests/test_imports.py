"""Imports run one way (docs/architecture.md); a module that looks up the wrong way fails here by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# room -> rooms it may import, besides itself
CORE = {"errors", "records", "config", "processes"}
PURE = {*CORE, "artifacts", "cache", "consistency", "objective", "batching"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "processes": set(),
    "records": set(),
    "config": {"errors"},
    "artifacts": {*CORE},
    "cache": {*CORE, "artifacts"},
    "audit": set(),
    "audit.scores": {*CORE, "audit", "cache", "tasks"},
    "verbs.audit": {*CORE, "artifacts", "audit", "audit.scores", "cache", "report"},
    "cache.tools": {*CORE, "artifacts", "cache", "consistency", "tasks"},
    "cache.residualise": {*CORE, "artifacts", "cache", "cache.tools"},
    "verbs.cache": {*CORE, "artifacts", "cache", "cache.residualise", "cache.tools", "report", "tasks"},
    "consistency": {*CORE},
    "objective": {*CORE},
    "batching": {*CORE},
    "report": {*CORE, "artifacts"},
    "megatron": {*PURE, "report", "megatron_patches"} - {"consistency"},
    "tasks": {*CORE, "artifacts", "cache"},
    "stages": {*PURE, "evaluation", "report", "megatron", "tasks", "sglang_rollout"},
    "checks": {*PURE, "megatron", "tasks", "sglang_rollout"},
    "summary": {*CORE, "artifacts", "report"},
    "parity": {"records"},
    "verbs.parity": {*CORE, "artifacts", "cache", "megatron", "parity", "report", "sglang_rollout"},
    "launching": {*CORE, "artifacts"},
    "verbs.launch": {*CORE, "artifacts", "launching", "megatron", "pipeline", "checks", "report"},
    "pipeline": {*PURE, "report", "stages", "summary"},
    "planning": {*CORE, "megatron"},
    "verbs.plan": {*CORE, "checks", "planning", "report"},
    "hub": {*CORE},
    "machine": {*CORE, "hub", "planning"},
    "smoke": {*PURE, "report", "megatron", "stages", "sglang_rollout"},
    "verbs.prepare": {*CORE, "hub", "machine", "report"},
    "evaluation": set(),
    "prompt_files": {*CORE, "artifacts", "tasks"},
    "verbs.prompts": {*CORE, "prompt_files", "tasks"},
    "model_evaluation": {*PURE, "evaluation", "megatron", "report", "stages", "tasks"},
    "verbs.evaluate": {*CORE, "checks", "verbs.launch", "model_evaluation", "pipeline", "report", "stages", "summary"},
    "verbs": set(),
    "cli": {
        *PURE,
        "report",
        "pipeline",
        "checks",
        "summary",
        "verbs.audit",
        "verbs.cache",
        "verbs.evaluate",
        "verbs.launch",
        "verbs.parity",
        "verbs.plan",
        "verbs.prepare",
        "verbs.prompts",
    },
    "sglang_rollout": {"records", "config", "errors", "processes"},
    "megatron_patches": set(),
}


def room_of(module: str) -> str | None:
    """lopd.stages.sft -> stages; lopd.cache.tools -> cache.tools, which has rules of its own; sglang_rollout.client -> sglang_rollout; numpy, lopd -> None."""
    parts = module.split(".")
    if parts[0] in ("sglang_rollout", "megatron_patches"):
        return parts[0]
    if parts[0] != "lopd" or len(parts) == 1:
        return None
    return ".".join(parts[1:3]) if ".".join(parts[1:3]) in ALLOWED else parts[1]


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names} if node.module.startswith("lopd") else set()
            found.update({node.module, *named})
    return found


def library_files() -> list[Path]:
    return sorted(path for package in ("lopd", "sglang_rollout", "megatron_patches") for path in (ROOT / package).rglob("*.py") if "stubs" not in path.parts)


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here in (None, "__init__"):
        return
    rooms = {room for module in imports_of(path) if (room := room_of(module)) is not None} - {here, "__version__"}
    assert rooms <= ALLOWED[here], f"{path.relative_to(ROOT)} imports {sorted(rooms - ALLOWED[here])}; {here} may import {sorted(ALLOWED[here])}"


def test_the_rule_notices_a_wrong_direction() -> None:
    assert "stages" not in ALLOWED["objective"]
    assert room_of("lopd.stages.sft") == "stages"
    assert room_of("numpy.random") is None


def test_one_file_alone_knows_parallel_state() -> None:
    users = [path.relative_to(ROOT).as_posix() for path in library_files() if "parallel_state" in path.read_text() and path.is_relative_to(ROOT / "lopd")]
    assert users == ["lopd/megatron/parallel.py"]


def test_the_objective_is_pure_torch() -> None:
    for path in (ROOT / "lopd/objective").glob("*.py"):
        assert not {module for module in imports_of(path) if module.startswith(("torch.distributed", "megatron"))}, path


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 90, f"{node.name} in {path.relative_to(ROOT)}"
