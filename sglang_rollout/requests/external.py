"""Servers that a user runs already: are they what the configuration says they are?

Everything that HTTP can tell is checked before anything is sampled. A server cannot prove its
weights from afar. Where its model folder can be read here too, the folder's content decides. If it
cannot, the server's log-probabilities of a fixed sequence (a probe) must be those on record for
that model. Without a record the server is believed, and the manifest says so.
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
from sglang_rollout.servers.launch import CONTEXT_MARGIN, KEY_VARIABLE

# The oldest version whose replies this package was tested with (docs/sglang.md).
OLDEST_VERSION = (0, 5, 17)
# In tokens. The first of them has no log-probability.
PROBE_LEN = 64
# In nats per token, in the mean. One model differs this much between layouts and SGLang versions.
_MEAN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
_NOT_THE_SAME = (
    "start the server with the model of the configuration, or set the configuration to "
    "the model of the server"
)


@dataclass(frozen=True, slots=True)
class Expected:
    """The model that the servers must have, and the facts that show it.

    Attributes:
        model_dir: The folder of the model on this machine.
        same_content: A function that returns whether a folder holds this very model.
        loads_weights: Whether weights will be loaded into the servers. In that case only the
            architecture must be the same.
        tokenized: Texts and their token ids. A server with a tokenizer must give the same ids.
        probe: The recorded log-probabilities, float [63], of this model for the tokens of a fixed
            test sequence (the probe), or None.
    """

    model_dir: Path
    same_content: Callable[[Path], bool]
    loads_weights: bool = False
    tokenized: Mapping[str, Sequence[int]] = field(default_factory=dict)
    probe: Sequence[float] | None = None


def connect(urls: Sequence[str], settings: SGLangSection, model_dir: Path) -> SGLangEngine:
    """Return an engine for servers that run already.

    Nothing is asked of the servers yet. Their key comes from the environment variable
    LOPD_SGLANG_KEY.

    Args:
        urls: The base URLs of the servers.
        settings: The section [sglang].
        model_dir: The folder of the served model on this machine.

    Raises:
        ConfigError: A value is no URL.
    """
    check_urls(settings)
    # From the environment alone: a key in the configuration would end in manifests and logs.
    key = os.environ.get(KEY_VARIABLE, "")
    # From our copy of the model: the folder of a server on another machine may be unreadable.
    vocab_size = vocab_size_of(model_dir)
    return fleet_of([SGLangEngine(url, key, settings, vocab_size=vocab_size) for url in urls])


def check_external(engine: SGLangEngine, expected: Expected) -> dict[str, Any]:
    """Check each server and return what the manifest records about them.

    Args:
        engine: The engine of one server or of a fleet.
        expected: The model that the servers must have.

    Returns:
        {url, version, model_path, dtype, weights, probe}. The value of weights says how they are
        known: "content", "probe" or "declared", or "to be loaded" with loads_weights. Several
        versions are separated by commas.

    Raises:
        EngineError: A server cannot be reached, refuses the key, has an older version, or serves
            another model or tokenizer. The message has its URL.
        ConfigError: A server has another number format or a shorter context than configured.
    """
    config = _read_config(expected.model_dir / "config.json")
    found: dict[str, Any] = {}
    versions: list[str] = []
    # After the checks all servers have the same model, dtype and weights. Only their versions may
    # differ, so the record of the last one and all versions are kept.
    for one in engine.engines:
        found = _check_one(one, expected, config)
        versions.append(found["version"])
    return {
        **found,
        "url": [one.url for one in engine.engines],
        "version": ", ".join(sorted(set(versions))),
    }


def probe_ids(vocab_size: int) -> list[int]:
    """Return the token ids of the probe. They depend on the size of the vocabulary alone."""
    # Random ids: a text would become other ids with every tokenizer.
    generator = np.random.default_rng(vocab_size)
    # The last id of the vocabulary is left out: SGLang returns it as 0 (scoring.LAST_ID_ECHO).
    return [int(token) for token in generator.integers(0, vocab_size - 1, PROBE_LEN)]


def vocab_size_of(model_dir: Path) -> int:
    """Return the vocab_size of a checkpoint's config.json.

    Raises:
        EngineError: The file cannot be read.
    """
    return int(_read_config(model_dir / "config.json")["vocab_size"])


def probe_logprobs(engine: SGLangEngine, vocab_size: int) -> list[float]:
    """Return the log-probabilities that a server gives to the probe.

    Returns:
        63 natural logarithms at temperature 1, or fewer where the context is shorter.
    """
    # A tiny model may have a context that is shorter than the probe.
    ids = int32(probe_ids(vocab_size)[: engine.settings.context_length])
    # The first token is the prompt: there is nothing before it that could give it a probability.
    request = ScoreRequest("probe", 0, ids[:1], ids[1:])
    [scores] = engine.score([request], vocab_size=vocab_size)
    return [float(value) for value in scores.teacher_logprobs]


def _check_one(
    engine: SGLangEngine, expected: Expected, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Check one server and return its part of the record."""
    model = engine.model_info()
    server = engine.call("GET", "/server_info")
    # The version comes first: an older SGLang may answer the later questions in another form.
    if engine.server_version() < OLDEST_VERSION:
        raise EngineError(
            f"the server runs SGLang {server['version']}, which is too old",
            where=engine.url,
            limit="at least 0.5.17",
            remedy="install a newer SGLang on the server",
        )
    _check_architecture(engine, expected, model, config)
    dtype = _check_dtype(engine, server, config)
    _check_settings(engine, server)
    _check_tokenizer(engine, expected, server)
    # The weights come last, because a comparison of them costs the most: the hash of a whole
    # folder, or a request.
    served = Path(str(model["model_path"]))
    weights, probe = _check_weights(engine, expected, served, int(config["vocab_size"]))
    return {
        "version": server["version"],
        "model_path": model["model_path"],
        "dtype": dtype,
        "weights": weights,
        "probe": probe,
    }


def _check_architecture(
    engine: SGLangEngine, expected: Expected, model: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    for key in ("architectures", "model_type"):
        # A server that does not report a key cannot be held against it.
        if model.get(key) is not None and model[key] != config.get(key):
            raise EngineError(
                f"the served model has {key} = {model[key]}, but {expected.model_dir} has "
                f"{key} = {config.get(key)}",
                where=engine.url,
                remedy=_NOT_THE_SAME,
            )


def _check_dtype(engine: SGLangEngine, server: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the number format in which the server computes."""
    dtype = server.get("dtype", "auto")
    # "auto" is the format of the checkpoint. transformers has renamed the key.
    if dtype == "auto":
        dtype = str(config.get("dtype", config.get("torch_dtype", "float32")))
        dtype = dtype.removeprefix("torch.")
    # In another number format the same weights give other log-probabilities.
    if dtype != engine.settings.dtype:
        raise ConfigError(
            f"the server computes in {dtype}",
            where=engine.url,
            limit=f"exactly sglang.dtype = {engine.settings.dtype}",
            remedy=f"set sglang.dtype={dtype}",
        )
    return str(dtype)


def _check_settings(engine: SGLangEngine, server: Mapping[str, Any]) -> None:
    settings = engine.settings
    if settings.deterministic and not server.get("enable_deterministic_inference"):
        raise ConfigError(
            "the server was started without deterministic inference",
            where=engine.url,
            limit="exactly sglang.deterministic = true",
            remedy="start the server with --enable-deterministic-inference, or set "
            "sglang.deterministic=false: seeds then have no effect",
        )
    # Since 0.5.22 a server can mark its text. It then draws a token by a hash of its key and of the
    # tokens before, so answers to one prompt are no independent samples. A server that is only able
    # to do so marks what asks for it, and lopd never asks.
    if server.get("watermark_default_enabled") or server.get("watermark_enforce_all"):
        raise ConfigError(
            "the server marks its text with a watermark, so its responses are no independent "
            "samples of the model",
            where=engine.url,
            remedy="start the server without default_enabled and enforce_all in --watermark-config",
        )
    # The server's own limit is a few tokens below its context_length (launch.CONTEXT_MARGIN).
    longest = server.get("max_req_input_len")
    needed = settings.context_length
    if longest is not None and longest < needed:
        raise ConfigError(
            f"the server accepts only {longest} tokens of prompt and response",
            where=engine.url,
            limit=f"at least sglang.context_length = {needed}",
            remedy=f"start the server with --context-length {needed + CONTEXT_MARGIN} or more, "
            "or lower sglang.context_length",
        )


def _check_tokenizer(engine: SGLangEngine, expected: Expected, server: Mapping[str, Any]) -> None:
    """Compare the tokenizers, where the server has one.

    lopd sends token ids, so the server's tokenizer is never used. But another tokenizer shows that
    the server was started for another model.
    """
    # The servers that lopd starts have none, and neither may this one.
    if server.get("skip_tokenizer_init"):
        return
    for text, ids in expected.tokenized.items():
        # A whole text and not the vocabulary: it also shows another normalization or other merges.
        answer = engine.call("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
        if list(answer["tokens"]) != list(ids):
            raise EngineError(
                f"the tokenizer of the server turns {text!r} into {answer['tokens']}, but "
                f"the tokenizer of {expected.model_dir} gives {list(ids)}",
                where=engine.url,
                remedy=_NOT_THE_SAME,
            )


def _check_weights(
    engine: SGLangEngine, expected: Expected, served: Path, vocab_size: int
) -> tuple[str, list[float] | None]:
    """Return how the weights are known, and the log-probabilities of the probe if it was asked."""
    # A server on another machine may name a folder that does not exist here.
    readable = (served / "config.json").is_file()
    if expected.loads_weights:
        # These weights will be replaced, so it does not matter which they are.
        _check_can_load(engine, expected, served, readable=readable)
        return "to be loaded", None
    # The same hash that the manifest has. A finetune of the same architecture differs in it.
    same = readable and expected.same_content(served)
    if readable and not same:
        raise EngineError(
            f"the server has loaded {served}, which is not the model in {expected.model_dir}",
            where=engine.url,
            remedy=_NOT_THE_SAME,
        )
    # The probe is taken also where the content has decided: the manifest keeps it for a later
    # stage, whose server may have a folder that cannot be read here.
    probe = probe_logprobs(engine, vocab_size)
    if expected.probe is not None:
        _compare_probes(engine, probe, expected.probe)
    if same:
        return "content", probe
    return ("probe" if expected.probe is not None else "declared"), probe


def _check_can_load(
    engine: SGLangEngine, expected: Expected, served: Path, *, readable: bool
) -> None:
    if not readable:
        raise EngineError(
            f"the server's model folder {served} cannot be read here",
            where=engine.url,
            remedy="start the server with a model folder on a shared file system, which this "
            "machine can read too",
        )
    # Now, and not at the first sync, which may come hours later.
    check_same_tensors(tensor_shapes(served), expected.model_dir)


def _compare_probes(
    engine: SGLangEngine, probe: Sequence[float], on_record: Sequence[float]
) -> None:
    # A shorter probe is the beginning of a longer one.
    common = min(len(probe), len(on_record))
    differences = np.array(probe[:common]) - np.array(on_record[:common])
    distance = float(np.mean(np.abs(differences)))
    limit = _MEAN_TOLERANCE[engine.settings.dtype]
    # Not "distance > limit": that is false for NaN.
    if not distance <= limit:
        raise EngineError(
            "the log-probabilities that the server gives to the test sequence differ by "
            f"{distance:.3g} nats per token from the recorded ones",
            where=engine.url,
            limit=f"at most {limit:g} nats per token",
            remedy="start the server with the weights that made the demonstrations",
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # A configuration without the size must fail here, where the error can name the file.
        return {**config, "vocab_size": int(config["vocab_size"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"there is no readable config.json with a vocab_size ({error})",
            where=str(path),
            remedy="give the folder of a Hugging Face checkpoint",
        ) from None
