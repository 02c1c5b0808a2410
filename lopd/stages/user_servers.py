"""Servers that the user runs: they are checked, compared with earlier stages, and given weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopd.artifacts import MANIFEST, identify_model, read_manifest
from lopd.config import Config
from lopd.records import Manifest
from lopd.tasks.tokenizer import load_tokenizer
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.external import Expected, check_external, connect
from sglang_rollout.weight_sync import update_weights_from_disk

# A server that tokenizes must give the ids of the model's own tokenizer for this text.
_TEXT = "What is 12 + 30? Think step by step."
# How a log line tells by what the servers' weights are known. The keys are those of check_external.
_EVIDENCE = {
    "probe": "the probe on record agrees",
    "content": "the model folder is the same",
    "to be loaded": "the weights are put in anew",
}


def use_servers(
    config: Config,
    role: str,
    urls: Sequence[str],
    model: Path,
    *,
    loads_weights: bool,
    log: Callable[[str], None],
) -> tuple[SGLangEngine, dict[str, Any]]:
    """Return an engine for the user's servers, which hold this model's weights then.

    Args:
        config: The configuration.
        role: The name of these servers in manifests, for example "teacher".
        urls: The servers.
        model: The model that they must serve.
        loads_weights: Whether the weights are put into them here; otherwise they must be there.
        log: Shows a line and writes it to the stage's log.

    Returns:
        The engine, and for the manifest what the servers were found to be.

    Raises:
        EngineError, ConfigError: A server cannot be reached or is not what it must be.
    """
    # What can be asked is not taken on trust: a server with another model, tokenizer or number
    # format gives log-probabilities that look like those of the right one.
    identity = identify_model(model)
    engine = connect(urls, config.sglang, model)
    log(f"using the servers at {', '.join(urls)}")
    expected = Expected(
        model_dir=model,
        same_content=lambda folder: identify_model(folder).weights == identity.weights,
        loads_weights=loads_weights,
        tokenized=tokenized(model, _TEXT),
        # Where the weights are put in anew, it does not matter which ones the servers have now.
        probe=None if loads_weights else _teacher_probe(config),
    )
    found = check_external(engine, expected)
    found["version_on_record"] = _compare_version(config, role, found, log)
    if found["weights"] == "declared":
        # The servers run on a machine whose folders are not seen here, and no probe is on record.
        log(
            f"WARNING: it cannot be seen from here that these servers hold the weights of {model}; "
            "you declare it"
        )
    if loads_weights:
        # The version names the weights by content, so that a response of others is noticed.
        update_weights_from_disk(engine, model, version=f"lopd-{identity.weights[:12]}")
        # A trainer that was killed in the middle of an update has left them paused.
        engine.call("POST", "/continue_generation", {})
    return engine, found


def tokenized(model: Path, text: str) -> dict[str, list[int]]:
    """Return the text with its token ids.

    Empty where the tokenizer cannot tokenize it: the tiny models know few words.
    """
    try:
        return {text: load_tokenizer(model).encode(text, add_special_tokens=False)}
    except Exception as error:
        # The tokenizers library raises no narrower type.
        if "Missing [UNK]" not in str(error):
            raise
        return {}


def _teacher_probe(config: Config) -> list[float] | None:
    """Return the log-probabilities that the teacher gave for the probe in an earlier stage."""
    for _, _, served in _served_before(config, "teacher"):
        if served.get("probe") is not None:
            return list(served["probe"])
    return None


def _served_before(config: Config, role: str) -> Iterator[tuple[str, Manifest, Mapping[str, Any]]]:
    """Yield stage, manifest, and the record of the servers that had this role in it."""
    # In the order of the pipeline: the first stage that has a record is the one to compare with.
    for stage in ("demonstrate", "rollout", "score", "distill"):
        folder = config.run.dir / stage
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            served = manifest.extra.get("served", {}).get(role)
            if served is not None:
                yield stage, manifest, served


def _compare_version(
    config: Config, role: str, found: Mapping[str, Any], log: Callable[[str], None]
) -> dict[str, str] | None:
    """Warn where an earlier stage had another SGLang for this role.

    Returns:
        That stage and its version, for the manifest; None where no stage has one on record.
    """
    # Not an error: another version is usually right, and the user may have no choice.
    for stage, manifest, served in _served_before(config, role):
        # Servers that lopd started run the SGLang that was installed then.
        former = served.get("version", manifest.versions.get("sglang"))
        if former is None:
            continue
        if former != found["version"]:
            evidence = _EVIDENCE.get(found["weights"], "no probe is on record")
            if found["weights"] == "content" and served.get("probe") is not None:
                evidence += ", and the probe on record agrees"
            log(
                f"WARNING: these servers run SGLang {found['version']}, those of {stage} ran "
                f"{former}: log-probabilities and samples may differ by rounding, a seed may give "
                f"another response ({evidence})"
            )
        return {"stage": stage, "version": former}
    return None
