"""The stages of a run: which model made what from what, and what each has cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lopd.records import Manifest
from lopd.report.console import duration
from lopd.report.html.outdated import DIGITS, outdated_stages, output_weights
from lopd.report.html.source import Source, read_json

# What a stage makes. Before it stands a number of rows, and behind a model its weights.
_GAVE = {
    "demonstrate": "responses of the teacher",
    "sft": "SFT student",
    "rollout": "responses of the SFT student",
    "score": "responses with the teacher's log-probabilities",
    "distill": "distilled student",
    "export": "distilled student",
}


def stage_of(source: Source, name: str) -> dict[str, Any]:
    """Return the row of one stage, as JSON."""
    manifest = source.manifests[name]
    done = {row["name"]: row["status"] for row in source.summary.get("stages", [])}
    seconds = read_json(source.folder / name / "seconds.json").get("seconds")
    count, kind = _devices(source, name)
    return {
        "name": name,
        "state": _state(source, name),
        # What the last command that reached this stage did.
        "last_command": {"done": "made", "reused": "reused"}.get(done.get(name, ""), ""),
        "seconds": seconds,
        "devices": count,
        "device": kind,
        "rows": manifest.rows,
        "tokens": sum(shard.tokens for shard in manifest.shards),
        "bytes": manifest.extra.get("bytes"),
        "fingerprint": manifest.fingerprint[:DIGITS],
        "parents": {parent: print_[:DIGITS] for parent, print_ in manifest.parents.items()},
        "models": {
            _role(source, name, role): (
                f"{PurePath(identity.path).name} {identity.weights[:DIGITS]}"
            )
            for role, identity in manifest.models.items()
        },
        "gave": _gave(source, name),
    }


def _state(source: Source, name: str) -> str:
    if not source.manifests[name].complete:
        return "not finished"
    return "outdated" if name in outdated_stages(source) else "done"


def _role(source: Source, stage: str, role: str) -> str:
    """Return what a model is in a run. Manifests call both the base and the SFT student student."""
    if role == "student" and source.kind == "run":
        return "SFT student" if stage in ("rollout", "score") else "base student"
    return role.replace("_", " ")


def _gave(source: Source, name: str) -> str:
    """Return what a stage has made, in words."""
    weights = output_weights(source, name)
    if weights:
        return f"{_GAVE.get(name, 'model')}, weights {weights}"
    if name == "evaluate":
        evaluated = source.manifests[name].extra.get("responses", {})
        return f"answers and scores of {len(evaluated)} models" if evaluated else ""
    rows = source.manifests[name].rows
    return f"{rows:,} {_GAVE.get(name, 'rows')}" if rows else ""


def _devices(source: Source, name: str) -> tuple[int, str]:
    """Return how many processes or GPUs a stage computed with, and "CPU" or "GPU"."""
    kind = "CPU" if _is_on_cpu(source.manifests.values()) else "GPU"
    manifest = source.manifests[name]
    served = 0
    for record in manifest.extra.get("served", {}).values():
        for server in record.get("servers", []):
            arguments = server.get("arguments", {})
            served += int(arguments.get("tp_size", 1)) * int(arguments.get("dp_size", 1))
    knobs = manifest.inputs
    ranks = knobs.get(f"{name}.parallel.ranks", 0)
    nodes = read_json(source.folder / name / "job.json").get("config", {}).get(name, {})
    ranks *= nodes.get("parallel", {}).get("nodes", 1) if isinstance(nodes, dict) else 1
    return max(int(ranks), served, 1), kind


def _is_on_cpu(manifests: Any) -> bool:
    return any(
        server.get("arguments", {}).get("device") == "cpu"
        for manifest in manifests
        for record in manifest.extra.get("served", {}).values()
        for server in record.get("servers", [])
    )


def cost_of(source: Source, stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return what the run has cost, as pairs of a title and a text.

    What the last command has not made was paid by an earlier one, and is told apart.
    """
    # Without a summary nothing is known of the last command.
    earlier = {row["name"] for row in stages if source.summary and row["last_command"] != "made"}
    rows = [*_times(source, stages), *_hours(stages, earlier)]
    generated = _tokens(source.manifests.get("demonstrate"))
    work = source.summary.get("teacher_work", {})
    if generated:
        text = f"{generated:,}{_payer('demonstrate', earlier)}"
        rows.append(["tokens that the teacher wrote", text])
    if work:
        # The refreshes of distill are a part of it.
        by = "distill" if work["refreshes"] else "score"
        text = f"{work['tokens']:,}{_payer(by, earlier)}"
        rows.append(["tokens that the teacher scored", text])
        rows.append(["refreshes", f"{work['refreshes']}"])
    scored = source.manifests.get("score") or source.manifests.get("artifact")
    if scored is not None and scored.extra.get("bytes"):
        size = f"{scored.extra['bytes'] / 2**20:,.1f} MiB"
        rows.append(["cache", f"{size}, {scored.extra['bytes_per_token']:.2f} bytes per token"])
    trained = source.summary.get("distill", {}).get("num_tokens")
    if trained:
        text = f"{trained:,}{_payer('distill', earlier)}"
        rows.append(["tokens through the student in distill", text])
    return rows


def _payer(stage: str, earlier: set[str]) -> str:
    return " (by an earlier command)" if stage in earlier else ""


def _times(source: Source, stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return how long the last command took, and how long the stages took that made the run."""
    last = source.summary.get("stages", [])
    rows = []
    if last:
        made = sum(row["status"] == "done" for row in last)
        text = f"{duration(sum(row['seconds'] for row in last))}; stages made: {made}, "
        rows.append(["time of the last command", f"{text}reused: {len(last) - made}"])
    times = [row["seconds"] for row in stages if row["seconds"] is not None]
    # Where nothing was reused, the last command has done it all.
    if times and any(row["last_command"] != "made" for row in stages):
        text = f"{duration(sum(times))}, each by the command that finished it"
        rows.append(["time of all stages", text])
    return rows


def _hours(stages: Sequence[Mapping[str, Any]], earlier: set[str]) -> list[list[str]]:
    """Return the hours of GPUs or processes, told apart by the command that has paid for them."""
    hours: dict[str, list[float]] = {}
    for row in stages:
        if row["seconds"] is not None:
            parts = hours.setdefault(row["device"], [0.0, 0.0])
            parts[row["name"] in earlier] += row["seconds"] * row["devices"] / 3600
    rows = []
    for kind, (now, before) in hours.items():
        text = f"{now + before:.2f}"
        if before:
            text += f": {now:.2f} by the last command, {before:.2f} by earlier ones"
        unit = "GPU hours" if kind == "GPU" else "hours of processes on CPUs"
        rows.append([unit, text])
    return rows


def _tokens(manifest: Manifest | None) -> int:
    return sum(shard.tokens for shard in manifest.shards) if manifest is not None else 0
