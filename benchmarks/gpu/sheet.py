"""The figures of one part of a run.

They are a JSON file that is written anew, whole, whenever a figure is added: a part that is cut
keeps what it has.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "sglang",
    "sglang-kernel",
    "cut-cross-entropy",
    "liger-kernel",
    "nvidia-cublas",
    "nvidia-nccl-cu13",
)
STARTED = "started"
DONE = "done"
FAILED = "failed"
CUT = "cut"


class Sheet:
    """What a part has measured so far: figures by name, and what it could not measure."""

    def __init__(self, file: Path, part: str, *, dry_run: bool) -> None:
        self._file = file
        self._began = time.monotonic()
        self.dry_run = dry_run
        self._content: dict[str, Any] = {
            "part": part,
            "dry_run": dry_run,
            "status": STARTED,
            "machine": machine(),
            "figures": {},
            "needs": {},
        }
        self._write()

    def add(self, name: str, figures: Mapping[str, Any]) -> None:
        """One measurement, printed and saved."""
        self._content["figures"][name] = dict(figures)
        self._write()
        say(f"{name}: {', '.join(f'{key} {shown(value)}' for key, value in figures.items())}")

    def lacks(self, name: str, reason: str) -> None:
        """What cannot be measured here; reason begins with what it needs."""
        self._content["needs"][name] = reason
        self._write()
        say(f"{name}: {reason}")

    def done(self) -> None:
        self._content["status"] = DONE
        self._write()

    def _write(self) -> None:
        self._content["seconds"] = round(time.monotonic() - self._began, 1)
        write_json(self._file, self._content)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """The file is always a whole one: the former, or this."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def ended(file: Path, part: str, *, dry_run: bool, status: str, reason: str) -> None:
    """What a part that did not end by itself leaves behind: its figures, and why no more."""
    content: dict[str, Any] = {"part": part, "dry_run": dry_run, "figures": {}, "needs": {}}
    if file.exists():
        content = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {**content, "status": status, "reason": reason})


def machine() -> dict[str, Any]:
    """The GPU, and versions of what is there. torch is imported only where it is installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "processors": os.cpu_count(),
        "versions": versions,
        "gpu": None,
        "gpus": 0,
    }
    if "torch" in versions:
        import torch

        if torch.cuda.is_available():
            found |= {
                "gpu": torch.cuda.get_device_name(),
                "gpus": torch.cuda.device_count(),
                "gpu_memory": torch.cuda.get_device_properties(0).total_memory,
            }
    return found


def shown(value: Any) -> str:
    """A figure for the screen: four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(line: str) -> None:
    print(line, flush=True)  # a benchmark's output is what it is for
