"""AdamW's state and float32 weights in a form that no layout owns, so that a training can go on
under another one.

What Megatron-Core offers is bound to the layout (``dp_reshardable``: its own buckets; other sizes
of tensor, pipeline or expert fail) or gathers the whole state on every data rank first
(``fully_reshardable``). Here each rank writes just what it holds, without any exchange: a tensor
``optimizer.KIND.NAME`` of the checkpoint is one parameter of the whole model, flat, its
tensor-parallel shards one after the other:

    optimizer.exp_avg.decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight      float32 [shards * elements of a shard]

NAME counts layers and experts over all ranks (lopd.megatron.weights.hf_mapping), and a data rank's
part is a range; so pipeline, expert and data sizes leave no trace in the file. Only the number of
tensor shards does: where it differs, the shards are put together and cut anew by the table that
reads Hugging Face weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from lopd.megatron.checkpoints.parameter_state import MAIN, MOMENTS, ParameterState, state_of
from lopd.megatron.ranks import parallel
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.hf_mapping import Weight, weights
from lopd.megatron.weights.transfer import local_parameters

CHUNK_BYTES = 4 * 2**30  # read at once, per rank


@dataclass(frozen=True, slots=True)
class Piece:
    """The elements [start, stop) of a rank's flattened parameter, for which this rank keeps
    optimizer state.
    """

    weight: Weight
    parameter: Tensor
    start: int
    stop: int
    state: ParameterState
    replica: tuple[int, ...]  # all zeros on the one rank that writes it


def sharded(module: Any, arch: Architecture, optimizer: Any) -> dict[str, ShardedTensor]:
    """What dist_checkpointing.save is to write of this rank's optimizer state. The state must exist
    (lopd.megatron.training.optimizer).
    """
    kinds = _kinds(module)
    found = {}
    for number, piece in enumerate(_pieces(module, arch, optimizer)):
        shard, num_shards = _shard(piece.weight)
        for kind, tensor in piece.state.read(kinds).items():
            offset = shard * math.prod(piece.weight.local_shape(num_shards)) + piece.start
            found[f"{number}.{kind}"] = _stored(piece.weight, kind, tensor, offset, piece.replica)
    return found


@torch.no_grad()
def load(
    module: Any, arch: Architecture, optimizer: Any, path: Path, *, tensor: int, expert_tensor: int
) -> None:
    """Reads a checkpoint's optimizer state into this rank's. Collective. tensor, expert_tensor:
    sizes of the layout that wrote it.

    The model's weights must be in place. Extra memory: CHUNK_BYTES, or twice the largest parameter
    of the whole model. What dist_checkpointing raises where files are damaged or state is missing
    is not translated here.
    """
    kinds = _kinds(module)
    if MAIN not in kinds:
        optimizer.reload_model_params()
    chunks = list(_chunks(_pieces(module, arch, optimizer), len(kinds), tensor, expert_tensor))
    most = torch.tensor([len(chunks)], device=parallel.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    for index in range(int(most.item())):
        chunk = chunks[index] if index < len(chunks) else []
        wanted: dict[str, ShardedTensor] = {}
        for number, piece in enumerate(chunk):
            saved_shards = _saved_shards(piece.weight, tensor, expert_tensor)
            start, stop = _range(piece, saved_shards)
            for kind in kinds:
                buffer = torch.empty(stop - start, dtype=torch.float32, device=piece.state.device)
                wanted[f"{number}.{kind}"] = _stored(piece.weight, kind, buffer, start, ())
        found = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
        for number, piece in enumerate(chunk):
            saved_shards = _saved_shards(piece.weight, tensor, expert_tensor)
            piece.state.write(
                {kind: _cut(piece, found[f"{number}.{kind}"], saved_shards) for kind in kinds}
            )


def _kinds(module: Any) -> tuple[str, ...]:
    """In float32 the optimizer's weights are the model's."""
    return MOMENTS if module.config.params_dtype == torch.float32 else (*MOMENTS, MAIN)


def _stored(
    weight: Weight, kind: str, tensor: Tensor, offset: int, replica: tuple[int, ...]
) -> ShardedTensor:
    size = sum(math.prod(shape) for shape in weight.shapes)
    return ShardedTensor(
        f"optimizer.{kind}.{weight.megatron}",
        tensor,
        tensor.dtype,
        tuple(tensor.shape),
        global_shape=(size,),
        global_offset=(offset,),
        axis_fragmentations=None,  # ranges of unequal length
        replica_id=replica or (0,),
    )


# ---- what a rank holds ----------------------------------------------------------------------------------------------------------------------------


def _pieces(module: Any, arch: Architecture, optimizer: Any) -> Iterator[Piece]:
    """In an order that is the same in every run of this layout. The second holder of a tied
    embedding takes the first one's state.
    """
    table = {weight.megatron: weight for weight in weights(arch)}
    originals = {weight.hf: weight for weight in table.values() if not weight.copy}
    names = {parameter: name for name, parameter in local_parameters(module, arch).items()}
    for chained in optimizer.chained_optimizers:
        if getattr(chained, "is_stub_optimizer", False) or chained.optimizer is None:
            continue
        held = (
            _distributed(chained)
            if isinstance(chained, DistributedOptimizer)
            else _replicated(chained)
        )
        for parameter, start, stop, main in held:
            weight = table[names[parameter]]
            replica = _replica(weight, chained)
            stored = originals[weight.hf] if weight.copy else weight
            state = state_of(chained.optimizer, main)
            yield Piece(stored, parameter, start, stop, state, replica)


def _distributed(chained: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int, Tensor]]:
    for ranges_of_types in chained.gbuf_ranges:
        for buckets in ranges_of_types.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, order = chained.model_param_group_index_map[parameter]
                    yield (
                        parameter,
                        ranges["param"].start,
                        ranges["param"].end,
                        chained.optimizer.param_groups[group]["params"][order],
                    )


def _replicated(chained: Any) -> Iterator[tuple[Tensor, int, int, Tensor]]:
    if hasattr(chained, "fp32_from_float16_groups"):
        copies = zip(chained.float16_groups, chained.fp32_from_float16_groups, strict=True)
        pairs = [pair for models, mains in copies for pair in zip(models, mains, strict=True)]
        pairs += [
            (parameter, parameter) for group in chained.fp32_from_fp32_groups for parameter in group
        ]
    else:
        pairs = [(parameter, parameter) for parameter in chained.get_parameters()]
    for parameter, main in pairs:
        yield parameter, 0, parameter.numel(), main


def _replica(weight: Weight, chained: Any) -> tuple[int, ...]:
    """Of the ranks that hold the same state one writes it: the first tensor rank of what is not
    split, the first data rank of what is not distributed.
    """
    tensor = parallel.tensor_rank() if weight.layout == "whole" else 0
    if isinstance(chained, DistributedOptimizer):
        data = int(chained.distributed_optimizer_instance_id)
    else:
        data = (
            parallel.expert_data_rank()
            if weight.expert
            else dist.get_rank(parallel.data_context_group())
        )
    return (int(weight.copy), tensor, data)


def _shard(weight: Weight) -> tuple[int, int]:
    """(number of this rank's shard of the parameter, number of shards)."""
    if weight.layout == "whole":
        return 0, 1
    if weight.expert:
        return parallel.expert_tensor_rank(), parallel.expert_tensor_size()
    return parallel.tensor_rank(), parallel.tensor_size()


# ---- from the shards that were saved to those that are needed ---------------------------------------------------------------------------------------


def _saved_shards(weight: Weight, tensor: int, expert_tensor: int) -> int:
    if weight.layout == "whole":
        return 1
    return expert_tensor if weight.expert else tensor


def _range(piece: Piece, saved_shards: int) -> tuple[int, int]:
    """Which elements of the stored tensor are read: those of the piece where shards are the same,
    else all.
    """
    shard, num_shards = _shard(piece.weight)
    if num_shards == saved_shards:
        first = shard * math.prod(piece.weight.local_shape(num_shards))
        return first + piece.start, first + piece.stop
    return 0, sum(math.prod(shape) for shape in piece.weight.shapes)


def _chunks(
    pieces: Iterator[Piece], num_kinds: int, tensor: int, expert_tensor: int
) -> Iterator[list[Piece]]:
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        start, stop = _range(piece, _saved_shards(piece.weight, tensor, expert_tensor))
        size += (stop - start) * num_kinds * 4
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _cut(piece: Piece, stored: Tensor, saved_shards: int) -> Tensor:
    """The piece's elements from what was read."""
    weight = piece.weight
    shard, num_shards = _shard(weight)
    if num_shards == saved_shards:
        return stored
    full = [torch.empty(shape, dtype=stored.dtype, device=stored.device) for shape in weight.shapes]
    for index, held in enumerate(stored.view(saved_shards, *weight.local_shape(saved_shards))):
        for tensor, part, source in zip(
            full, weight.parts(index, saved_shards), weight.split(held), strict=True
        ):
            tensor[part] = source
    mine = weight.join(
        [tensor[part] for tensor, part in zip(full, weight.parts(shard, num_shards), strict=True)]
    )
    return mine.reshape(-1)[piece.start : piece.stop]
