"""Imports run one way (docs/architecture.md); a module that looks up the wrong way fails here by
name.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# room -> rooms it may import, besides itself
CORE = {"errors", "records", "config", "processes", "deferred", "devices"}
PURE = {*CORE, "artifacts", "cache", "objective", "batching"}
MEGATRON = {
    "megatron.ranks",
    "megatron.weights",
    "megatron.model",
    "megatron.checkpoints",
    "megatron.training",
    "megatron.scoring",
}
SGLANG = {
    "sglang_rollout.server_side",
    "sglang_rollout.cpu",
    "sglang_rollout.servers",
    "sglang_rollout.requests",
    "sglang_rollout.weight_sync",
}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "processes": set(),
    "deferred": set(),
    "devices": set(),
    "interruption": set(),
    "manifests": set(),
    "records": {"manifests"},
    "config": {"errors"},
    "artifacts": {*CORE},
    "cache": {*CORE, "artifacts"},
    "cache.reference_import": {*CORE, "artifacts", "cache", "tasks"},
    "cache.reference_export": {*CORE, "artifacts", "cache", "tasks"},
    "cache.transcript_import": {*CORE, "artifacts", "cache", "tasks"},
    "audit": {"records"},
    "audit.scores": {*CORE, "audit", "cache", "tasks"},
    "objective": {*CORE},
    "batching": {*CORE},
    "report": {*CORE, "artifacts"},
    "report.html": {*CORE, "artifacts", "cache", "report", "tasks"},
    "megatron": set(),
    "megatron.ranks": {*CORE, "artifacts", "megatron_patches"},
    "megatron.weights": {*CORE, "megatron.ranks"},
    "megatron.model": {*CORE, "batching", "megatron.ranks", "megatron.weights", "megatron_patches"},
    "megatron.checkpoints": {*CORE, "artifacts", "megatron.ranks", "megatron.weights"},
    "megatron.training": {*PURE, *MEGATRON, "report", "megatron_patches"} - {"megatron.scoring"},
    "megatron.scoring": {*PURE, *MEGATRON, "report", "megatron_patches"} - {"megatron.training"},
    "tasks": {*CORE, "artifacts", "cache", "report"},
    "stages": {*PURE, *MEGATRON, *SGLANG, "report", "tasks"},
    "pipeline": {*PURE, "report", "stages", "summary", "tasks"},
    "summary": {*CORE, "artifacts", "report", "report.html"},
    "checks": {*PURE, *MEGATRON, *SGLANG, "planning", "report", "tasks"},
    "planning": {*CORE, *MEGATRON},
    "entry": {*CORE, "artifacts", "checks", "pipeline", "stages", "summary"},
    "launching": {*CORE, "artifacts"},
    "machine": {*CORE, "planning"},
    "smoke": {*PURE, *MEGATRON, *SGLANG, "report", "stages"},
    "verbs": {"config", "errors"},
    "verbs.audit": {*CORE, "artifacts", "audit", "audit.scores", "cache", "report", "verbs"},
    "verbs.cache": {
        *CORE,
        "artifacts",
        "cache",
        "cache.reference_import",
        "cache.reference_export",
        "report",
        "tasks",
        "verbs",
        "verbs.cache_figures",
        "verbs.cache_import",
        "verbs.cache_judge",
        "verbs.cache_samples",
    },
    "verbs.cache_figures": {*CORE, "cache", "report"},
    "verbs.cache_import": {
        *CORE,
        "cache",
        "cache.reference_import",
        "cache.transcript_import",
        "report",
        "verbs",
        "verbs.cache_figures",
    },
    "verbs.cache_judge": {*CORE, "report", "stages", "verbs"},
    "verbs.cache_samples": {*CORE, "artifacts", "cache", "report", "tasks"},
    "verbs.evaluate": {
        *CORE,
        "checks",
        "pipeline",
        "stages",
        "verbs",
        "verbs.launch",
        "verbs.pipeline",
    },
    "verbs.generate": {*CORE, "stages", "verbs"},
    "verbs.init": {*CORE, "artifacts", "planning", "tasks"},
    "verbs.launch": {
        *CORE,
        *MEGATRON,
        "artifacts",
        "checks",
        "launching",
        "pipeline",
        "report",
        "verbs",
    },
    "verbs.parity": {*CORE, *MEGATRON, *SGLANG, "artifacts", "audit", "cache", "report", "verbs"},
    "verbs.pipeline": {*CORE, "entry", "report"},
    "verbs.plan": {*CORE, "checks", "planning", "report", "verbs"},
    "verbs.knobs": {*CORE, "report"},
    "verbs.prepare": {*CORE, "machine", "report", "verbs"},
    "verbs.prompts": {*CORE, "tasks", "verbs"},
    "verbs.run_answers": {*CORE, "artifacts", "cache", "report", "tasks"},
    "verbs.run_transcripts": {
        *CORE,
        "artifacts",
        "cache",
        "report",
        "report.html",
        "tasks",
        "verbs.run_answers",
    },
    "verbs.show": {*CORE, "report", "verbs", "verbs.run_transcripts", "verbs.watch"},
    "verbs.watch": {*CORE, "report", "verbs", "verbs.run_answers"},
    "verbs.report": {*CORE, "artifacts", "report", "report.html", "verbs"},
    "cli": {
        *PURE,
        "report",
        "interruption",
        "pipeline",
        "checks",
        "verbs",
        "verbs.audit",
        "verbs.cache",
        "verbs.evaluate",
        "verbs.generate",
        "verbs.init",
        "verbs.knobs",
        "verbs.launch",
        "verbs.parity",
        "verbs.pipeline",
        "verbs.plan",
        "verbs.prepare",
        "verbs.prompts",
        "verbs.show",
        "verbs.watch",
        "verbs.report",
    },
    "sglang_rollout.server_side": {*CORE},
    "sglang_rollout.cpu": {*CORE, "sglang_rollout.server_side"},
    "sglang_rollout.servers": {*CORE, "sglang_rollout.cpu", "sglang_rollout.server_side"},
    "sglang_rollout.requests": {
        *CORE,
        "sglang_rollout.server_side",
        "sglang_rollout.servers",
    },
    "sglang_rollout.weight_sync": {*CORE, *SGLANG},
    "megatron_patches": set(),
}


def room_of(module: str) -> str | None:
    """Return the room of a module.

    lopd.stages.sft stands in stages. lopd.cache.reference_import has rules of its own, so it is its
    own room.
    numpy and lopd itself stand in no room.
    """
    parts = module.split(".")
    if parts[0] == "megatron_patches":
        return parts[0]
    if parts[0] == "sglang_rollout" and len(parts) > 1:
        return ".".join(parts[:2])
    if parts[0] != "lopd" or len(parts) == 1:
        return None
    return ".".join(parts[1:3]) if ".".join(parts[1:3]) in ALLOWED else parts[1]


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, lazily and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            ours = node.module.startswith(("lopd", "sglang_rollout", "megatron_patches"))
            named = {f"{node.module}.{alias.name}" for alias in node.names if ours}
            # `from lopd.cache import reader` imports lopd.cache.reader, not what stands in
            # lopd.cache.
            modules = named & MODULES
            found.update(modules)
            if not ours or named - modules:
                found.add(node.module)
    return found


def library_files() -> list[Path]:
    return sorted(
        path
        for package in ("lopd", "sglang_rollout", "megatron_patches")
        for path in (ROOT / package).rglob("*.py")
        if "stubs" not in path.parts
    )


def module_of(path: Path) -> str:
    """Return the dotted name of a file of the library."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in library_files()}


def circles_in(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reached = {module: _reached_from(module, imports) for module in imports}
    groups = {
        frozenset(other for other in reached[module] if module in reached[other]) | {module}
        for module in imports
        if module in reached[module]
    }
    return sorted(sorted(group) for group in groups)


def _reached_from(module: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    to_visit = [module]
    while to_visit:
        for other in imports.get(to_visit.pop(), set()) - seen:
            seen.add(other)
            to_visit.append(other)
    return seen


def test_no_circles() -> None:
    """No module imports itself through others, not even lazily or for types alone."""
    imports = {module_of(path): imports_of(path) & MODULES for path in library_files()}
    for module in imports:
        imports[module].discard(module)
    assert circles_in(imports) == []


def test_a_circle_is_noticed() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles_in(imports) == [["b", "c"]]


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    here = room_of(module_of(path))
    if here is None:
        return
    rooms = {room for module in imports_of(path) if (room := room_of(module)) is not None} - {
        here,
        "__version__",
    }
    assert rooms <= ALLOWED[here], (
        f"{path.relative_to(ROOT)} imports {sorted(rooms - ALLOWED[here])}; "
        f"{here} may import {sorted(ALLOWED[here])}"
    )


def test_the_rule_notices_a_wrong_direction() -> None:
    assert "stages" not in ALLOWED["objective"]
    assert room_of("lopd.stages.sft") == "stages"
    assert room_of("numpy.random") is None


def test_only_a_rank_imports_megatron_core() -> None:
    """The files of sft and distill are imported by the parent process too, and run by the ranks.

    The package imports no stage. Otherwise a rank would import its own file twice.
    """
    code = """
import sys
import lopd.stages
print("lopd.stages.distill" in sys.modules)
import lopd.pipeline
print("megatron.core" in sys.modules)
import lopd.stages.training_rank
print("megatron.core" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True
    )
    assert done.stdout.split() == ["False", "False", "True"]


def test_one_file_alone_knows_parallel_state() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for path in library_files()
        if "parallel_state" in path.read_text() and path.is_relative_to(ROOT / "lopd")
    ]
    assert users == ["lopd/megatron/ranks/parallel.py"]


def test_the_objective_is_pure_torch() -> None:
    for path in (ROOT / "lopd/objective").glob("*.py"):
        assert not {
            module
            for module in imports_of(path)
            if module.startswith(("torch.distributed", "megatron"))
        }, path


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 120, f"{node.name} in {path.relative_to(ROOT)}"
