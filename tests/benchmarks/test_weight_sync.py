"""The benchmark of weight sync: its model can be served, its buckets and plain copies move every
byte; the whole of it runs with LOPD_SLOW=1.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sglang_rollout.server_side.checkpoint import tensor_shapes

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "weight_sync.py"


@pytest.fixture(scope="module")
def weight_sync() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_weight_sync", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_of_the_size_asked_for(weight_sync: Any, tmp_path: Path) -> None:
    num_bytes = weight_sync.write_model(
        tmp_path / "model", 8, torch.bfloat16, hidden=256, width=128, experts=4
    )
    assert 5e6 < num_bytes < 12e6
    assert AutoConfig.from_pretrained(tmp_path / "model").model_type == "qwen3_moe"
    assert (
        sum(2 * torch.Size(shape).numel() for shape in tensor_shapes(tmp_path / "model").values())
        == num_bytes
    )


def test_buckets_and_the_copy_by_disk_hold_every_byte(weight_sync: Any, tmp_path: Path) -> None:
    named = [(str(index), torch.full((100,), index, dtype=torch.float32)) for index in range(10)]
    buckets = [*weight_sync.in_buckets(named, 1000)]
    assert [len(bucket) for bucket in buckets] == [3, 3, 3, 1]
    pieces = [weight_sync.flat(bucket) for bucket in buckets]
    assert sum(len(piece) for piece in pieces) == 4000
    weight_sync.copy_by_disk(pieces, tmp_path / "raw")()
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("num_buffers", [1, 2])
def test_the_copy_by_shared_memory_waits_for_the_other_side(
    weight_sync: Any, num_buffers: int
) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    pieces = [torch.arange(length, dtype=torch.uint8) for length in (50, 20, 30)]
    copy = weight_sync.copy_by_shared_memory(pieces, ours, num_buffers)
    names, lengths = theirs.recv()
    assert (len(names), lengths) == (num_buffers, [50, 20, 30])
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copy)
        told = [theirs.recv() for _ in range(num_buffers)]
        assert not theirs.poll(0.05)  # a buffer is not written again before it was read
        for _ in pieces:
            theirs.send(None)
        copying.result(20)
    told += [theirs.recv() for _ in pieces[num_buffers:]]
    assert told == [(index % num_buffers, index) for index in range(len(pieces))]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_benchmark_writes_its_figures(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--megabytes",
        "20",
        "--repeats",
        "1",
        "--bucket-mib",
        "4",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    subprocess.run(command, check=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["share_of_raw"]) == {"disk", "tensor", "distributed"}
    assert all(0 < share < 2 for share in figures["share_of_raw"].values())
    assert set(figures["delta"]) == {"tensor", "distributed"}
