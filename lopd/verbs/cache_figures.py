"""What the verbs of ``lopd cache`` say of a new cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=1))


def show_new_cache(manifest: Any, out: Path, as_json: bool) -> None:
    """Print the size and the fingerprint of a new cache, or all figures as JSON."""
    from lopd.report.cache_view import show_line

    figures = figures_of(manifest, out)
    if as_json:
        print_json(figures)
    else:
        show_line(size_line(out, figures))
        show_line(f"fingerprint {figures['fingerprint']}")


def size_line(out: Path, figures: dict[str, Any]) -> str:
    """Return the line that says how large a cache is."""
    return (
        f"{out}: {figures['rows']:,} responses, {figures['tokens']:,} tokens, "
        f"{figures['bytes_per_token']:.2f} bytes per token"
    )


def figures_of(manifest: Any, folder: Path) -> dict[str, Any]:
    """Return what `--json` prints of a cache. All sizes are in bytes on disk."""
    from lopd.cache import column_bytes

    # Response tokens. Prompts are stored too, and are part of the bytes.
    tokens = sum(shard.tokens for shard in manifest.shards)
    size = sum(column_bytes(folder).values())
    return {
        "folder": str(folder),
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / max(1, tokens),
        "lacks": list(manifest.extra.get("lacks", [])),
    }
