"""How far our models' log-probabilities lie from those of transformers in float32 on a CPU.

A small dense and a small mixture-of-experts model, in float32 and in bfloat16, with the local
layers and with Transformer Engine's (in bfloat16, where it imports). The control has its labels
moved by one. In bfloat16 a token whose router chooses another expert is far off.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.gpu.bodies import engine_obstacle, parity
from benchmarks.gpu.part import arguments
from benchmarks.gpu.sheet import Sheet
from benchmarks.gpu.trainer import reason_of

from tests.megatron.launch import RanksFailed, run_ranks
from tests.models import write_qwen3_dense, write_qwen3_moe


def main() -> None:
    options = arguments(__doc__)
    sheet = Sheet(options.out, "parity", dry_run=options.dry_run)
    cases = [(family, dtype) for dtype in ("float32", "bfloat16") for family in ("moe", "dense")]
    with tempfile.TemporaryDirectory(prefix="lopd-gpu-") as scratch:
        folders = {
            "moe": write_qwen3_moe(Path(scratch) / "moe"),
            "dense": write_qwen3_dense(Path(scratch) / "dense"),
        }
        for family, dtype in cases:
            compare(sheet, f"{family}, {dtype}, local layers", folders[family], dtype, False)
        name = "bfloat16, Transformer Engine"
        if options.dry_run:
            sheet.lacks(name, "needs a GPU: Transformer Engine's kernels have no form for a CPU")
        elif reason := engine_obstacle():
            sheet.lacks(name, f"needs Transformer Engine: {reason}")
        else:
            for family, folder in folders.items():
                compare(sheet, f"{family}, {name}", folder, "bfloat16", True)
    sheet.done()


def compare(sheet: Sheet, name: str, folder: Path, dtype: str, engine: bool) -> None:
    sent = {"folder": str(folder), "dtype": dtype, "engine": engine}
    try:
        found = run_ranks(parity, 1, env={}, timeout_s=100, **sent)[0]
    except RanksFailed as error:
        sheet.lacks(name, f"failed: {reason_of(error)}")
        return
    if bool(found.pop("device")) == sheet.dry_run:
        where = "a GPU" if sheet.dry_run else "a CPU"
        sheet.lacks(name, f"failed: it ran on {where}")
        return
    sheet.add(name, found)


if __name__ == "__main__":
    main()
