"""Whoever uses the library may give a path as text: each public function that takes one takes both.

The types are found by reading the code, so a new function cannot be forgotten. That a text works is
then shown by calls, and mypy holds that nothing else is done with it before it is a Path.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lopd import artifacts, cache
from lopd.artifacts.file_hashes import FileHashes
from lopd.cache.checks import check_cache, require_sound
from lopd.cache.columns import column_bytes
from lopd.cache.half_precision import logprob_loss
from lopd.cache.merging import merge
from lopd.cache.reader import CacheReader
from lopd.cache.reference_export import export_reference
from lopd.cache.reference_import import import_reference
from lopd.cache.residualise import residualise
from lopd.cache.splitting import split
from lopd.cache.statistics import inspect_cache
from lopd.cache.style import Settings
from lopd.config import load_config
from lopd.megatron.weights.architecture import read_architecture
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from tests.cache.rollouts import TINY_TEACHER, publish_cache, some_responses

ROOT = Path(__file__).resolve().parents[1]
# What docs/library.md names outside of the two packages below, by file.
NAMED = {
    "lopd/config/loading.py": ("load_config",),
    "lopd/megatron/weights/architecture.py": ("read_architecture",),
    "lopd/megatron/weights/transfer.py": ("load_hf", "save_hf"),
    "lopd/tasks/tokenizer.py": ("load_tokenizer", "stop_token_ids"),
    "sglang_rollout/requests/client.py": ("__init__",),
    "sglang_rollout/requests/fleet.py": ("serve",),
    "sglang_rollout/weight_sync/building.py": ("build_receiver",),
}
# Parts of other functions. The path is only a name in their errors.
INTERNAL = {"parse_shard", "damaged_shard", "check_given_cache"}


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    """Yield the public functions and methods of a file, and the constructors of public classes."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner in (tree, *(node for node in classes if not node.name.startswith("_"))):
        for node in owner.body:
            public = isinstance(node, ast.FunctionDef) and (
                node.name == "__init__" or not node.name.startswith("_")
            )
            if public and isinstance(node, ast.FunctionDef):
                yield node


def refusing_text(path: Path, names: tuple[str, ...] = ()) -> list[str]:
    """Return the parameters of a file's public functions that are paths and not text too."""
    found = []
    for function in functions_of(path):
        if function.name in INTERNAL or (names and function.name not in names):
            continue
        for parameter in (*function.args.args, *function.args.kwonlyargs):
            kind = ast.unparse(parameter.annotation) if parameter.annotation else ""
            if re.search(r"\bPath\b", kind.replace("str | Path", "")):
                found.append(f"{path.name}:{function.name}({parameter.arg}: {kind})")
    return found


def test_the_types_say_text_too() -> None:
    files = [*(ROOT / "lopd/cache").glob("*.py"), *(ROOT / "lopd/artifacts").glob("*.py")]
    assert [one for path in files for one in refusing_text(path)] == []
    for name, functions in NAMED.items():
        known = {function.name for function in functions_of(ROOT / name)}
        assert known.issuperset(functions), name
        assert refusing_text(ROOT / name, functions) == []


def test_a_path_alone_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "class Reader:\n    def __init__(self, folder: Path) -> None: ...\n"
        "def read(folder: str | Path, others: Sequence[Path]) -> None: ...\n"
        "def _inner(folder: Path) -> None: ...\n"
    )
    assert refusing_text(tmp_path / "one.py") == [
        "one.py:read(others: Sequence[Path])",
        "one.py:__init__(folder: Path)",
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher cache in `score`, another one in `other`, and a configuration."""
    folder = tmp_path_factory.mktemp("text_paths")
    publish_cache(folder / "score", some_responses(8))
    publish_cache(folder / "other", some_responses(8, prefix="q"))
    (folder / "run.toml").write_text((ROOT / "examples/tiny_moe.toml").read_text())
    return folder


def _read_reference(folder: str) -> int:
    """Write the reference code's file and read it again."""
    export_reference(f"{folder}/score", f"{folder}/ref.parquet", str(TINY_TEACHER))
    tiny = str(TINY_TEACHER)
    return import_reference(f"{folder}/ref.parquet", f"{folder}/back", tiny, teacher=tiny).rows


def _hashes(folder: str) -> bool:
    manifest = f"{folder}/score/manifest.json"
    hashes = FileHashes()
    hashes.load(f"{folder}/hashes.json")
    known = hashes.sha256(manifest) == hashes.sha256_all([manifest])[0]
    hashes.wrote(f"{folder}/run.toml", "0" * 64)
    hashes.save(f"{folder}/hashes.json")
    return known and not hashes.unknown_bytes([f"{folder}/run.toml"])


def _published(folder: str) -> bool:
    with artifacts.storage_errors(folder):
        artifacts.publish_json(f"{folder}/new/one.json", {})
    artifacts.publish_bytes(f"{folder}/new/two", b"x")
    artifacts.fsync_folder(f"{folder}/new")
    artifacts.check_replaceable(f"{folder}/new", "two")
    artifacts.remove_folder(f"{folder}/new")
    return not Path(folder, "new").exists()


def _written(folder: str) -> int:
    responses = some_responses(4)
    made = cache.write_responses(f"{folder}/own", responses, kind="demonstrations", inputs={})
    artifacts.write_manifest(f"{folder}/own", made)
    artifacts.verify(f"{folder}/own", made)
    writer = artifacts.ArtifactWriter(f"{folder}/listed", kind="x", inputs={})
    writer.finish(files=[f"{folder}/own/manifest.json"])
    read = artifacts.read_shard(f"{folder}/own", made.shards[0]).num_rows
    return read - artifacts.published_rows(f"{folder}/own")


# What a user does with a folder whose name is text, and what comes of it.
CALLS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "read_rows": (lambda at: len([*cache.read_rows(f"{at}/score")]), 8),
    "CacheReader": (lambda at: len(CacheReader(f"{at}/score").fetch([0, 7])), 2),
    "write": (_written, 0),
    "check_cache": (lambda at: len(check_cache(f"{at}/score")[0]), 0),
    "require_sound": (lambda at: require_sound(f"{at}/score"), None),
    "inspect_cache": (lambda at: inspect_cache(f"{at}/score")["rows"], 8),
    "column_bytes": (lambda at: column_bytes(f"{at}/score")["token_ids"] > 0, True),
    "logprob_loss": (lambda at: logprob_loss(f"{at}/score"), None),
    "merge": (lambda at: merge([f"{at}/score", f"{at}/other"], f"{at}/merged").rows, 16),
    "split": (lambda at: sum(one.rows for one in split(f"{at}/score", f"{at}/parts", 2)), 8),
    "residualise": (lambda at: residualise(f"{at}/score", f"{at}/plain", Settings()).rows, 8),
    "reference": (_read_reference, 8),
    "read_manifest": (lambda at: artifacts.read_manifest(f"{at}/score").rows, 8),
    "read_complete": (lambda at: artifacts.read_complete(f"{at}/score").rows, 8),
    "sha256_file": (lambda at: len(artifacts.sha256_file(f"{at}/run.toml")), 64),
    "identify_model": (lambda at: len(artifacts.identify_model(str(TINY_TEACHER)).weights), 64),
    "hashes": (_hashes, True),
    "publishing": (_published, True),
    "load_config": (lambda at: load_config(f"{at}/run.toml").task.name, "register_arithmetic"),
    "read_architecture": (lambda at: read_architecture(str(TINY_TEACHER)).family, "qwen3_moe"),
    "tokenizer": (
        lambda at: len(stop_token_ids(str(TINY_TEACHER), load_tokenizer(str(TINY_TEACHER)))) > 0,
        True,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_text_is_taken(name: str, made: Path) -> None:
    call, expected = CALLS[name]
    assert call(str(made)) == expected
