"""Fingerprints: sha256 of JSON values and files, the identity of a model folder, the versions of
the software.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from lopd.errors import ArtifactError
from lopd.records import ModelIdentity

_VERSIONED = ("lopd", "sglang", "megatron-core", "torch", "transformers", "pyarrow")


def sha256_json(value: Any) -> str:
    """Fingerprint of a JSON value, independent of key order."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()
    ).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def identify_model(folder: Path) -> ModelIdentity:
    """A Hugging Face folder by content: weights (config.json and every safetensors file),
    tokenizer, chat template.

    ArtifactError: config.json is missing, or it or tokenizer_config.json is damaged.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            "no config.json",
            where=str(folder),
            remedy="give the folder of a Hugging Face checkpoint",
        )
    template, tokenizer, tokenizer_config = (
        folder / name for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    )
    about = _read_table(tokenizer_config) if tokenizer_config.is_file() else {}
    template_bytes = (
        template.read_bytes()
        if template.is_file()
        else json.dumps(about.get("chat_template")).encode()
    )
    config = _read_table(folder / "config.json")
    for volatile in (
        "transformers_version",
        "_name_or_path",
    ):  # who wrote the file, not what the model is
        config.pop(volatile, None)
    weights = [sha256_json(config)] + [
        sha256_file(path) for path in sorted(folder.glob("*.safetensors"))
    ]
    return ModelIdentity(
        path=str(folder),
        weights=sha256_json(weights),
        tokenizer=sha256_file(tokenizer) if tokenizer.is_file() else "",
        template=hashlib.sha256(template_bytes).hexdigest(),
    )


def _read_table(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot be read ({error})", where=str(path), remedy="copy it again from where it came"
        ) from None
    if not isinstance(table, dict):
        raise ArtifactError(
            "not a JSON object", where=str(path), remedy="copy it again from where it came"
        )
    return table


def software_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
