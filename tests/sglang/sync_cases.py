"""What the ranks of tests/sglang/test_weight_sync_trainer.py run: a trained model into a running
server, from several layouts by every transport.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lopd.config import SGLangSection, SyncSection, TrainSection
from lopd.errors import EngineError
from lopd.megatron.ranks import parallel
from lopd.megatron.training.trainer import Trainer
from lopd.megatron.weights.transfer import save_hf
from lopd.objective import Supervised
from lopd.records import Sample, int32
from lopd.stages.sync import StudentWeights
from sglang_rollout.requests.client import SGLangEngine
from tests.sglang.weight_syncing import TRANSPORTS

LAYOUTS: dict[str, dict[str, int]] = {
    "tensor-expert": {"tensor": 2, "expert": 2},
    "pipeline": {"pipeline": 2},
}


def samples(vocab_size: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(4, vocab_size, (length,), generator=generator).numpy()
        for length in (23, 40, 31, 12)
    ]
    return [
        Sample(int32(row), loss_mask=torch.ones(len(row), dtype=torch.bool).numpy()) for row in rows
    ]


def push_from_all_layouts(cases: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """For every case (model, url, key, vocab_size, layouts), layout and transport the report of a
    verified sync; and whether scores notice wrong weights.
    """
    reports: dict[str, Any] = {}
    for case in cases:
        model = Path(case["model"])
        engine = (
            SGLangEngine(
                case["url"], case["key"], SGLangSection(dtype="float32", context_length=128)
            )
            if os.environ["RANK"] == "0"
            else None
        )
        for layout in case["layouts"]:
            trainer = _trainer(model, layout)
            for index, (transport, verify) in enumerate(
                [*((transport, "tensors") for transport in TRANSPORTS), ("tensor", "scores")]
            ):
                with torch.no_grad():
                    for parameter in trainer.module.parameters():
                        parameter.mul_(1 + 0.01 * (index + 1))
                fields = {
                    "transport": transport,
                    "bucket_bytes": 20_000,
                    "verify": verify,
                    "tolerance": 1e-4,
                    "timeout_s": 120.0,
                }
                section = SyncSection.model_validate(fields)
                rows = samples(case["vocab_size"])
                weights = StudentWeights(
                    trainer,
                    rows,
                    section,
                    engine,
                    folder=Path(folder) / f"{model.name}-sync",
                    template=model,
                    weights_file=None,
                )
                report = weights.push(f"{layout}-{index}")
                if report is not None:
                    reports[f"{model.name} {layout} {transport} {verify}"] = asdict(report)
        save_hf(
            trainer.export(bucket_bytes=2**20),
            Path(folder) / f"{model.name}-trained",
            source=model,
            shard_bytes=2**30,
        )
        reports[f"{model.name} caught"] = _scores_notice(
            trainer, Path(folder), model, engine, case["vocab_size"]
        )
    parallel.shutdown()
    return reports


def _trainer(model: Path, layout: str) -> Trainer:
    settings = TrainSection.model_validate(
        {"dtype": "float32", "parallel": {"ranks": 2, **LAYOUTS[layout]}}
    )
    parallel.initialize(settings.parallel, seed=3, timeout_s=120)
    objective = Supervised(aggregation="token_mean")
    return Trainer(
        settings,
        model_dir=model,
        init="checkpoint",
        init_std=0.02,
        seed=3,
        objective=objective,
        checkpoint_dir=None,
    )


def _scores_notice(
    trainer: Trainer, folder: Path, model: Path, engine: SGLangEngine | None, vocab_size: int
) -> str:
    """The control: one weight of the trainer's changes after its scores were taken."""
    section = SyncSection(verify="scores", tolerance=1e-4)
    weights = StudentWeights(
        trainer,
        samples(vocab_size),
        section,
        engine,
        folder=folder / f"{model.name}-sync",
        template=model,
        weights_file=None,
    )
    probe = weights._probe()
    weights._probe = lambda: probe  # type: ignore[method-assign]
    with torch.no_grad():
        for name, parameter in trainer.module.named_parameters():
            if name.endswith("linear_proj.weight"):
                parameter.mul_(1.05)
    try:
        weights.push("wrong")
    except EngineError as error:
        return str(error)
    return "" if engine is not None else "not asked"
