"""Servers that a user runs already: are they what the configuration says they are? Everything that
can be asked over HTTP is, before anything is sampled.

What a server cannot prove from afar is its weights. Where its model folder can be read here too,
its content decides. Where not, its log-probabilities of a fixed sequence (a probe) must be those
that the same model gave before, where that is on record; else its word is taken, and that is what
the record says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config import SGLangSection
from lopd.errors import ConfigError, EngineError
from lopd.records import int32
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.fleet import fleet_of
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.server_side.checkpoint import check_same_tensors, tensor_shapes
from sglang_rollout.servers.arguments import check_urls
from sglang_rollout.servers.launch import KEY_VARIABLE

OLDEST_VERSION = (0, 5, 17)
PROBE_LEN = 64  # tokens, the first of which has no log-probability
_MEAN_TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 0.1,
    "float16": 0.05,
}  # nats a token, between layouts and versions of one model
_NOT_THE_SAME = "start it with the model that the configuration names, or name the one it serves"


@dataclass(frozen=True, slots=True)
class Expected:
    """What the servers are to be.

    model_dir: the model by its files here. same_content: does a folder hold this very model?
    loads_weights: the weights will be put into the servers, so only their architecture matters.
    tokenized: text -> its ids, to be compared with a server's own tokenizer where it has one.
    probe: log-probabilities [63] that this model gave before, where that is known.
    """

    model_dir: Path
    same_content: Callable[[Path], bool]
    loads_weights: bool = False
    tokenized: Mapping[str, Sequence[int]] = field(default_factory=dict)
    probe: Sequence[float] | None = None


def connect(urls: Sequence[str], settings: SGLangSection, model_dir: Path) -> SGLangEngine:
    """An engine for servers that run already; nothing is asked of them yet. Their key: environment
    variable LOPD_SGLANG_KEY. ConfigError: no URLs.
    """
    check_urls(settings)
    key, vocab_size = os.environ.get(KEY_VARIABLE, ""), vocab_size_of(model_dir)
    return fleet_of([SGLangEngine(url, key, settings, vocab_size=vocab_size) for url in urls])


def check_external(engine: SGLangEngine, expected: Expected) -> dict[str, Any]:
    """Checks each server; returns {url, version, model_path, dtype, weights, probe}, where weights
    says how they are known: content, probe or declared.

    version: several, with commas, where the servers are not of one. weights is "to be loaded" for
    loads_weights. EngineError, ConfigError: cannot be reached, wrong key, an older version, another
    model, tokenizer, number format or context than expected, with the URL.
    """
    config = _read_config(expected.model_dir / "config.json")
    found: dict[str, Any] = {}
    versions: list[str] = []
    for one in engine.engines:
        found = _check_one(one, expected, config)
        versions.append(found["version"])
    return {
        **found,
        "url": [one.url for one in engine.engines],
        "version": ", ".join(sorted(set(versions))),
    }


def probe_ids(vocab_size: int) -> list[int]:
    """The ids of the probe: the same for every model of that vocabulary."""
    return [
        int(token)
        for token in np.random.default_rng(vocab_size).integers(0, vocab_size - 1, PROBE_LEN)
    ]


def vocab_size_of(model_dir: Path) -> int:
    """From config.json. EngineError: not to be read."""
    return int(_read_config(model_dir / "config.json")["vocab_size"])


def probe_logprobs(engine: SGLangEngine, vocab_size: int) -> list[float]:
    """Natural logs, temperature 1, [63]; fewer where the context is shorter."""
    ids = int32(probe_ids(vocab_size)[: engine.settings.context_length])
    [scores] = engine.score([ScoreRequest("probe", 0, ids[:1], ids[1:])], vocab_size=vocab_size)
    return [float(value) for value in scores.teacher_logprobs]


def _check_one(
    engine: SGLangEngine, expected: Expected, config: Mapping[str, Any]
) -> dict[str, Any]:
    settings, model, server = (
        engine.settings,
        engine.model_info(),
        engine.call("GET", "/server_info"),
    )
    version = engine.server_version()
    if version < OLDEST_VERSION:
        raise EngineError(
            f"SGLang {server['version']}",
            where=engine.url,
            limit="0.5.17 or later",
            remedy="update the server",
        )
    for key in ("architectures", "model_type"):
        if model.get(key) is not None and model[key] != config.get(key):
            raise EngineError(
                f"it serves {key} {model[key]}, where {expected.model_dir} has {config.get(key)}",
                where=engine.url,
                remedy=_NOT_THE_SAME,
            )
    dtype = server.get("dtype", "auto")
    if dtype == "auto":
        dtype = str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix(
            "torch."
        )
    if dtype != settings.dtype:
        raise ConfigError(
            f"it computes in {dtype}",
            where=engine.url,
            limit=f"sglang.dtype = {settings.dtype}",
            remedy=f"set sglang.dtype={dtype}",
        )
    if settings.deterministic and not server.get("enable_deterministic_inference"):
        remedy = "start it with --enable-deterministic-inference, or set sglang.deterministic=false: seeds then fix nothing"
        raise ConfigError(
            "it was started without deterministic inference",
            where=engine.url,
            limit="sglang.deterministic = true",
            remedy=remedy,
        )
    longest = server.get("max_req_input_len")
    if longest is not None and longest < settings.context_length:
        raise ConfigError(
            f"it takes {longest} tokens of prompt and response", where=engine.url, limit=f"sglang.context_length = {settings.context_length}",
            remedy=f"start it with --context-length {settings.context_length + 8} or more, or lower sglang.context_length",
        )  # fmt: skip
    _check_tokenizer(engine, expected, server)
    weights, probe = _check_weights(
        engine, expected, Path(str(model["model_path"])), int(config["vocab_size"])
    )
    return {
        "version": server["version"],
        "model_path": model["model_path"],
        "dtype": dtype,
        "weights": weights,
        "probe": probe,
    }


def _check_tokenizer(engine: SGLangEngine, expected: Expected, server: Mapping[str, Any]) -> None:
    """A server without a tokenizer only ever sees our ids; one that has another one was started for
    another model.
    """
    if server.get("skip_tokenizer_init"):
        return
    for text, ids in expected.tokenized.items():
        answer = engine.call("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
        if list(answer["tokens"]) != list(ids):
            what = f"its tokenizer makes {answer['tokens']} of {text!r}, where that of {expected.model_dir} makes {list(ids)}"
            raise EngineError(what, where=engine.url, remedy=_NOT_THE_SAME)


def _check_weights(
    engine: SGLangEngine, expected: Expected, served: Path, vocab_size: int
) -> tuple[str, list[float] | None]:
    readable = (served / "config.json").is_file()
    if expected.loads_weights:
        if not readable:
            remedy = "weights go in by a folder that both sides read: give the server a model folder on a shared file system"
            raise EngineError(
                f"its model folder {served} cannot be read here", where=engine.url, remedy=remedy
            )
        check_same_tensors(tensor_shapes(served), expected.model_dir)
        return "to be loaded", None
    same = readable and expected.same_content(served)
    if readable and not same:
        raise EngineError(
            f"it serves {served}, which is not the model in {expected.model_dir}",
            where=engine.url,
            remedy=_NOT_THE_SAME,
        )
    probe = probe_logprobs(engine, vocab_size)
    if expected.probe is not None:
        common = min(
            len(probe), len(expected.probe)
        )  # a shorter one is the beginning of a longer one
        distance = float(
            np.mean(np.abs(np.array(probe[:common]) - np.array(expected.probe[:common])))
        )
        limit = _MEAN_TOLERANCE[engine.settings.dtype]
        if not distance <= limit:
            raise EngineError(
                f"its log-probabilities of the probe are {distance:.3g} nats a token away from those on record", where=engine.url, limit=f"{limit:g}",
                remedy="it does not serve the weights that made the demonstrations",
            )  # fmt: skip
    return ("content" if same else "probe" if expected.probe is not None else "declared"), probe


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**config, "vocab_size": int(config["vocab_size"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"no readable config.json with a vocab_size ({error})",
            where=str(path),
            remedy="give a Hugging Face folder",
        ) from None
