"""The hub's folder as lopd fetch would leave it, with a few rows of each data set that a recipe
names, in the columns that it publishes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.config.hub import hub_name, local_path
from lopd.machine.hub import NOTE
from lopd.planning.known_models import KNOWN_MODELS

IN_A_BENCHMARK = 505


def question(number: int) -> str:
    return (
        f"Find the number of positive integers n at most {number} "
        f"such that n squared plus {number} is divisible by seven and by eleven"
    )


def fill() -> None:
    """Below $LOPD_HUB. One DAPO question is one of AIME 2024's."""
    for name in ("Qwen3-32B", "Qwen3-8B-Base"):
        (model_folder(name) / "config.json").write_text(json.dumps(KNOWN_MODELS[name]))
    fill_prompts()


def model_folder(name: str) -> Path:
    """The folder of a model of Qwen's in the hub, made as if it had been fetched; what goes into it
    is up to the caller.
    """
    folder = local_path(f"hf://Qwen/{name}@main")
    _note(folder)
    return folder


def fill_prompts() -> None:
    """The data sets alone."""
    thoughts = [
        {
            "domain": "math",
            "conversations": [
                {"from": "human", "value": question(i // 2)},
                {"from": "gpt", "value": "so"},
            ],
        }
        for i in range(20)
    ]
    _rows("open-thoughts/OpenThoughts3-1.2M@main/data/train-00000.parquet", thoughts)
    dapo = []
    for i in range(10):
        prompt = [{"role": "user", "content": question(500 + i)}]
        dapo.append(
            {
                "prompt": prompt,
                "reward_model": {"ground_truth": "7"},
                "extra_info": {"index": f"id{i}"},
            }
        )
    _rows("BytedTsinghua-SIA/DAPO-Math-17k@main/data/dapo-math-17k.parquet", dapo)
    _rows(
        "HuggingFaceH4/MATH-500@main/test.jsonl",
        [{"problem": question(900 + i), "answer": "3", "unique_id": f"u{i}"} for i in range(5)],
    )
    _rows(
        "HuggingFaceH4/aime_2024@main/data/train.parquet",
        [{"id": 1, "problem": question(IN_A_BENCHMARK), "answer": "5"}],
    )
    _rows(
        "math-ai/aime25@main/test.jsonl",
        [{"id": 1, "problem": "Something else entirely, about circles", "answer": "5"}],
    )
    _rows(
        "MathArena/hmmt_feb_2025@main/data/train.parquet",
        [{"problem_idx": 1, "problem": "Another one, about lines", "answer": "5"}],
    )


def _rows(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    path = local_path(f"hf://datasets/{name}")
    _note(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))


def _note(path: Path) -> None:
    name = hub_name(path)
    assert name is not None
    name.folder.mkdir(parents=True, exist_ok=True)
    (name.folder / NOTE).write_text(json.dumps({"source": str(name), "commit": "abc1234"}))
