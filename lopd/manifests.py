"""The records about artifacts: their files, the models behind them, and the manifest.

lopd.records has them under the same names, together with the records of single responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One published file of an artifact.

    Attributes:
        rows: The number of responses. It is 0 for a file that is not a Parquet shard.
        tokens: The number of response tokens.
        sha256: The checksum of the whole file, in hexadecimal digits.

    Example:
        >>> shard = ShardInfo("shard-00000.parquet", rows=256, tokens=318_464, sha256="5f2b91ac")
        >>> shard.tokens // shard.rows
        1244
    """

    name: str
    rows: int
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A checkpoint by its content. Each fingerprint is a sha256 in hexadecimal digits.

    Attributes:
        path: Where the checkpoint was then. It tells people something and decides nothing.
        weights: Of config.json and all safetensors files.
        tokenizer: Of tokenizer.json.
        template: Of the chat template.

    Example:
        Two models can be teacher and student of each other only if they have one tokenizer. (Real
        fingerprints have 64 digits.)

        >>> teacher = ModelIdentity("/models/Qwen3-32B", "9c1d40e7", "aeb13307", "a55ee1b1")
        >>> student = ModelIdentity("/models/Qwen3-8B-Base", "04be7c12", "aeb13307", "1d3f8a60")
        >>> teacher.tokenizer == student.tokenizer
        True
    """

    path: str
    weights: str
    tokenizer: str
    template: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is, from what it was made, and by whom.

    lopd.artifacts reads and writes it. docs/cache_format.md specifies every key.

    Attributes:
        complete: True once the last shard is published.
        inputs: Every configuration key that the content depends on, with its value.
        parents: The fingerprint of each parent artifact, by the parent's kind.
        models: The models by their role, for example "teacher".
        sampling: The sampling parameters of the responses.
        lineage: Which teacher made the demonstrations behind the artifact, and which checks the
            user has switched off.
        fingerprint: Names the artifact with its content. It is empty until complete is True.
        extra: Figures of the stage, for example steps, losses and seconds.

    Example:
        >>> shard = ShardInfo("shard-00000.parquet", rows=256, tokens=318_464, sha256="5f2b91ac")
        >>> manifest = Manifest(
        ...     kind="teacher_cache",
        ...     schema_version=1,
        ...     complete=True,
        ...     inputs={"seed": 0, "score.top_k": 0},
        ...     parents={"rollouts": "71e0c2d9"},
        ...     models={},
        ...     sampling={"temperature": 0.8, "top_p": 1.0, "max_new_tokens": 4096},
        ...     lineage={"sft_teacher": "9c1d40e7", "score_teacher": "9c1d40e7"},
        ...     rows=256,
        ...     shards=(shard,),
        ...     versions={"sglang": "0.5.17"},
        ... )
        >>> manifest.rows == sum(shard.rows for shard in manifest.shards)
        True
    """

    # The kind decides which stage may read the artifact, and a newer schema is refused by older
    # code.
    kind: str
    schema_version: int
    complete: bool
    inputs: Mapping[str, Any]
    parents: Mapping[str, str]
    models: Mapping[str, ModelIdentity]
    sampling: Mapping[str, Any]
    lineage: Mapping[str, Any]
    rows: int
    shards: tuple[ShardInfo, ...]
    versions: Mapping[str, str]
    fingerprint: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
