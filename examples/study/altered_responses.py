"""Two looks at a student's own responses: which are right, and which change as text.

    python -m examples.study.altered_responses accepted ROLLOUTS OUT CONFIG [OVERRIDE ...]
    python -m examples.study.altered_responses retokenised ROLLOUTS OUT.json CONFIG [OVERRIDE ...]

``accepted`` publishes the responses that the configuration's verifier finds right as demonstrations
for SFT. The verdicts are those of ``lopd cache judge``, in OUT-verdicts. ``retokenised`` counts the
responses whose token ids change where their text is tokenised again, as the reference code does.
The same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lopd.artifacts import ArtifactWriter, publish_json, read_complete, read_shard
from lopd.artifacts.lineage import declared
from lopd.cache.columns import without_origin
from lopd.cache.reader import CacheReader
from lopd.cache.verdicts import right_of
from lopd.config import Config, load_config
from lopd.records import Manifest
from lopd.stages.judge import judge
from lopd.tasks.tokenizer import decode, load_tokenizer

# What the reference code may put before a response that does not begin with it.
THINK = "<think>"


def accepted(source: Path, out: Path, config: Config) -> Manifest:
    """Publish the right responses of an artifact as demonstrations.

    Args:
        source: The rollouts.
        out: The folder of the demonstrations.
        config: For the verifier and the prompts.

    Raises:
        LopdError: A response cannot be judged, or ``out`` holds something else.
    """
    verdicts = out.with_name(f"{out.name}-verdicts")
    judged = judge(config, source, verdicts, "opd")
    manifest = read_complete(source)
    right = right_of(CacheReader(source), verdicts)
    student = {role: one for role, one in manifest.models.items() if role == "student"}
    writer = ArtifactWriter(
        out,
        kind="demonstrations",
        inputs={"altered": "accepted"},
        parents={manifest.kind: manifest.fingerprint, judged.kind: judged.fingerprint},
        models=student,
        sampling=manifest.sampling,
        # No teacher wrote them, and nobody may take them for a teacher's.
        lineage={**declared(None), "altered": "the student's own responses that are right"},
    )
    first = 0
    for index, shard in enumerate(manifest.shards):
        table = without_origin(read_shard(source, shard))
        kept = np.flatnonzero(right[first : first + table.num_rows])
        first += table.num_rows
        if len(kept) and not writer.is_published(index):
            writer.publish_shard(index, table.take(pa.array(kept)))
    return writer.finish(altered={"rows": manifest.rows, "right": int(right.sum())})


def retokenised(source: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """Return how many responses change where their text takes the place of their token ids.

    Returns:
        responses and changed: all, and those whose ids before the end token change. with_end: those
        that ended by themselves, whose end token is lost. added_think: those that do not begin with
        THINK.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    counts = {"responses": 0, "changed": 0, "with_end": 0, "added_think": 0}
    for response, _ in CacheReader(source).rows():
        has_end = response.finish_reason == "stop"
        ids = response.token_ids[:-1] if has_end else response.token_ids
        text = decode(tokenizer, ids)
        again = tokenizer.encode(text, add_special_tokens=False)
        counts["responses"] += 1
        counts["changed"] += again != ids.tolist()
        counts["with_end"] += has_end
        counts["added_think"] += not text.startswith(THINK)
    return counts


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("what", choices=("accepted", "retokenised"))
    made.add_argument("source", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("config", type=Path)
    made.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    # What rendering keeps beside a run lies beside the result.
    run = f"run.dir={options.out.parent}"
    config = load_config(options.config, [*options.overrides, run])
    if options.what == "retokenised":
        counts = retokenised(options.source, config.models.student)
        publish_json(options.out, counts)
        print(f"{options.source}: {json.dumps(counts)}")
        return
    manifest = accepted(options.source, options.out, config)
    publish_json(options.out.with_suffix(".json"), manifest.extra["altered"])
    print(f"{options.out}: {manifest.rows} right responses")


if __name__ == "__main__":
    main()
