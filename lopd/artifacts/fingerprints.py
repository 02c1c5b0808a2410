"""Fingerprints: what names a value, a file, a model folder and the installed software.

Every fingerprint is a sha256 in 64 hexadecimal digits. docs/cache_format.md has the formulas.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopd.artifacts.file_hashes import HASHES
from lopd.errors import ArtifactError
from lopd.records import ModelIdentity, ShardInfo

# The packages whose versions stand in every manifest.
_VERSIONED = ("lopd", "sglang", "megatron-core", "torch", "transformers", "pyarrow")
# Keys of config.json that say who wrote the file. They change with every save_pretrained() and do
# not belong to what the model is.
_VOLATILE = ("transformers_version", "_name_or_path")


def sha256_json(value: Any) -> str:
    """Return the fingerprint of a JSON value. The order of keys does not change it."""
    # default=str, because the values of a configuration may be paths.
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the fingerprint of a file's bytes.

    A file that has not changed since it was read last is not read again
    (lopd.artifacts.file_hashes).
    """
    return HASHES.sha256(Path(path))


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a model folder."""
    # The order of the names makes the list the same on every system.
    return sorted(Path(folder).glob("*.safetensors"))


def identify_model(folder: str | Path) -> ModelIdentity:
    """Identify a Hugging Face folder by its content.

    The weights are config.json and every safetensors file. A folder without tokenizer.json has an
    empty tokenizer fingerprint.

    Raises:
        ArtifactError: config.json is missing, or a JSON file of the folder is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            "there is no config.json in this folder",
            where=str(folder),
            remedy="give the folder of a Hugging Face checkpoint",
        )
    # The small files come first. A damaged one is then reported before many gigabytes of weights
    # are hashed.
    template = _chat_template(folder)
    config = _read_object(folder / "config.json")
    # config.json counts as weights: the same tensors with another rope base or another epsilon of
    # the norms are another model.
    weights = HASHES.sha256_all(weight_files(folder))
    tokenizer = folder / "tokenizer.json"
    return ModelIdentity(
        path=str(folder),
        weights=_weights(config, weights),
        tokenizer=sha256_file(tokenizer) if tokenizer.is_file() else "",
        template=hashlib.sha256(template).hexdigest(),
    )


def published_weights(folder: str | Path, shards: Sequence[ShardInfo]) -> str:
    """Return the fingerprint of a model's weights as an artifact has published them.

    It is the one of identify_model(), from the checksums in the manifest: no weight is read.

    Args:
        folder: The folder of the artifact, with the model in ``model``.
        shards: Those of its manifest.

    Returns:
        "" where the artifact has published no model.

    Raises:
        ArtifactError: config.json is damaged.
    """
    # The order is that of weight_files().
    files = {one.name: one.sha256 for one in shards if one.name.startswith("model/")}
    weights = [files[name] for name in sorted(files) if name.endswith(".safetensors")]
    config = Path(folder) / "model" / "config.json"
    if not weights or not config.is_file():
        return ""
    return _weights(_read_object(config), weights)


def _weights(config: dict[str, Any], checksums: Sequence[str]) -> str:
    """Return the fingerprint of a model's weights from its config.json and their checksums."""
    # config.json counts as weights: the same tensors with another rope base or another epsilon of
    # the norms are another model.
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return sha256_json([sha256_json(kept), *checksums])


def identify_tokenizer(folder: str | Path) -> ModelIdentity:
    """Identify the tokenizer of a Hugging Face folder alone. No weight is read.

    The fingerprint of the weights is empty. check_same_tokenizer does not ask for it.

    Raises:
        ArtifactError: tokenizer_config.json is damaged.
    """
    folder = Path(folder)
    tokenizer = folder / "tokenizer.json"
    return ModelIdentity(
        path=str(folder),
        # Left empty: a tokenizer is compared without reading gigabytes of weights.
        weights="",
        tokenizer=sha256_file(tokenizer) if tokenizer.is_file() else "",
        template=hashlib.sha256(_chat_template(folder)).hexdigest(),
    )


def _chat_template(folder: Path) -> bytes:
    """Return the chat template of a model, in the form that its fingerprint is made of."""
    path = folder / "chat_template.jinja"
    # The configuration is read in any case, so that a damaged one is noticed here and not when the
    # tokenizer is loaded.
    config = folder / "tokenizer_config.json"
    about = _read_object(config) if config.is_file() else {}
    # Newer checkpoints keep the template in a file of its own, older ones in this configuration.
    return path.read_bytes() if path.is_file() else json.dumps(about.get("chat_template")).encode()


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint."""
    remedy = "copy the file again from its source"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        # ValueError stands for wrong JSON and for wrong UTF-8.
        raise ArtifactError(f"cannot be read ({error})", where=str(path), remedy=remedy) from None
    if not isinstance(value, dict):
        raise ArtifactError("the file does not hold a JSON object", where=str(path), remedy=remedy)
    return value


def software_versions() -> dict[str, str]:
    """Return the version of each installed package that can change a result."""
    versions: dict[str, str] = {}
    for package in _VERSIONED:
        # A laptop without a GPU need not have every package.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
