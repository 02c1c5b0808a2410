"""What the page of a large cache costs: its size, the time to make it, and the time to open it.

    python -m benchmarks.report --responses 100000 --json report.json

The cache is made here: prompts of 30 tokens and responses of 20 to 220 tokens, all drawn at random,
which compress worse than text. `--tokenizer` is the folder whose vocabulary they are drawn from.
`lopd report` runs as a process of its own: `user_s` is its processor time in user mode, and
`peak_mib` the most memory that it had. Where there is a Chromium, it opens the page: `open_s` is
the time until all sections are filled, `first_search_s` that of the first search in all texts, and
`next_search_s` that of the second one, which finds the texts made.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lopd.artifacts import ArtifactWriter, identify_model
from lopd.cache import to_table
from lopd.records import Response, TeacherScores, float32, int32, token_hash
from lopd.tasks.tokenizer import load_tokenizer
from tests.report.chromium import Chromium, program

_TEACHER = Path(__file__).resolve().parents[1] / "examples" / "tiny_models" / "teacher"
_SHARD = 2000
# Searches for a text that no prompt has, so that every text is looked at.
_SEARCH = """(() => {{ const box = document.querySelector('input[type=search]');
box.value = {text}; const began = performance.now(); box.dispatchEvent(new Event('input'));
return (performance.now() - began) / 1000; }})()"""


def make_cache(folder: Path, count: int, tokenizer: Path) -> int:
    """Publish a cache of responses drawn at random, and return its tokens."""
    size = len(load_tokenizer(tokenizer))
    teacher = identify_model(_TEACHER)
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 256}
    writer = ArtifactWriter(
        folder,
        kind="teacher_cache",
        inputs={},
        models={"teacher": teacher},
        sampling=sampling,
        lineage={},
    )
    rng = np.random.default_rng(0)
    total = 0
    for shard, start in enumerate(range(0, count, _SHARD)):
        rows = [*_responses(rng, start, min(_SHARD, count - start), size)]
        responses = [response for response, _ in rows]
        writer.publish_shard(shard, to_table(responses, [scores for _, scores in rows]))
        total += sum(len(response.token_ids) for response in responses)
    writer.finish()
    return total


def _responses(
    rng: np.random.Generator, start: int, count: int, size: int
) -> Iterator[tuple[Response, TeacherScores]]:
    for index in range(start, start + count):
        length = int(rng.integers(20, 221))
        prompt = int32(rng.integers(0, size, 30))
        tokens = int32(rng.integers(0, size, length))
        sampled = float32(-rng.exponential(0.5, length))
        name = f"prompt-{index}"
        yield (
            Response(name, 0, prompt, tokens, sampled, "stop", "random"),
            TeacherScores(
                name, 0, token_hash(prompt, tokens), float32(-rng.exponential(0.6, length))
            ),
        )


def report(cache: Path, page: Path, tokenizer: Path) -> dict[str, float]:
    """Run ``lopd report`` and return what it has cost."""
    command = ["report", cache, "--out", page, "--tokenizer", tokenizer]
    subprocess.run([sys.executable, "-m", "lopd.cli", *map(str, command)], check=True)
    # It is the only child so far.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "page_mb": round(page.stat().st_size / 1e6, 2),
        "user_s": round(used.ru_utime, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
    }


def opened(page: Path, profile: Path) -> dict[str, Any]:
    """Open the page in Chromium and search in it."""
    with Chromium(profile) as browser:
        seconds = browser.open(page)
        searches = [
            browser.js(_SEARCH.format(text=json.dumps(text)))
            for text in ("no such text", "none like it")
        ]
        prompts = browser.js(
            "document.querySelector('#transcripts [role=status]').textContent.split(' ')[2]"
        )
        assert browser.errors == []
    return {
        "prompts": prompts,
        "open_s": round(seconds, 2),
        "first_search_s": round(searches[0], 2),
        "next_search_s": round(searches[1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--tokenizer", type=Path, default=_TEACHER)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = make_cache(folder / "score", arguments.responses, arguments.tokenizer)
        page = folder / "report.html"
        figures: dict[str, Any] = {"responses": arguments.responses, "tokens": tokens}
        figures |= report(folder / "score", page, arguments.tokenizer)
        if program() is not None:
            figures |= opened(page, folder / "chromium")
    text = json.dumps(figures, indent=2)
    sys.stdout.write(f"{text}\n")
    if arguments.json is not None:
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
