#!/usr/bin/env bash
# Megatron-Core marks a weight that is split over tensor ranks while it initialises it. Built with
# perform_initialization=False, as one does to load a checkpoint, weights have no mark, count as
# copies, and on all tensor ranks but the first leave the gradient norm, by which gradients are
# clipped. Their biases stay in. No error, no warning; right in 0.18.2. Size: 1 GB with torch for
# CPUs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0 megatron-core==0.16.1 numpy==2.4.6
export TMPDIR="$folder"
cd "$folder"

cat >ranks.py <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    param_is_not_tensor_parallel_duplicate,
)
from megatron.core.transformer import TransformerConfig

SIZE = 8


def norm(initialise):
    """The norm of gradients of one, over all ranks, of the parameters that Megatron counts."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=SIZE,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        use_cpu_initialization=True,
        perform_initialization=initialise,
        gradient_accumulation_fusion=False,
    )
    layer = ColumnParallelLinear(
        SIZE, SIZE, config=config, init_method=config.init_method, bias=False, gather_output=False
    )
    counted = torch.zeros(1)
    for parameter in layer.parameters():
        if param_is_not_tensor_parallel_duplicate(parameter):
            counted += parameter.numel()
    torch.distributed.all_reduce(counted)
    return counted.sqrt().item()


torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
initialised = norm(True)
uninitialised = norm(False)
torch.distributed.barrier()
if torch.distributed.get_rank() == 0:
    print("megatron-core", version("megatron-core"), "torch", torch.__version__)
    print(f"a weight of {SIZE} x {SIZE} split over 2 tensor ranks, gradients of 1")
    print(f"norm, initialised {initialised:.3f}, perform_initialization=False {uninitialised:.3f}")
    print(f"expected: {SIZE:.3f} both times; the first values of a weight are no part of its norm")
    print("seen: half of the gradient is missing in the second")
torch.distributed.destroy_process_group()
if abs(initialised - SIZE) > 1e-4 or abs(uninitialised - SIZE / 2**0.5) > 1e-4:
    sys.exit("no longer so")
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 ranks.py 2>log ||
    { cat log >&2; exit 1; }
