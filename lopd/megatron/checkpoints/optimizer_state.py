"""AdamW's state and float32 weights in a form that belongs to no layout.

So a training can continue under another layout. What Megatron-Core offers is bound to the layout
(``dp_reshardable`` has its own buckets; other sizes of tensor, pipeline or expert fail), or gathers
the whole state on every data rank first (``fully_reshardable``).

Here each rank writes just what it holds, without any exchange. A tensor ``optimizer.KIND.NAME`` of
the checkpoint is one parameter of the whole model, flat, with its tensor-parallel shards one after
the other:

    optimizer.exp_avg.decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight
                                                    float32 [shards * elements of a shard]

NAME counts layers and experts over all ranks (lopd.megatron.weights.hf_mapping), and the part of a
data rank is a range. So the sizes of pipeline, expert and data leave no trace in the file. Only the
number of tensor shards does. Where it differs, the shards are put together and split anew, by the
table that reads Hugging Face weights.

Where adapters are trained, the optimizer has state of them alone. Then their weights are kept in
the same form too (``adapter.NAME``), in place of all weights of the model.
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

from lopd.config import LoraSection
from lopd.megatron.checkpoints.parameter_state import (
    MAIN,
    MOMENTS,
    ParameterState,
    WeightState,
    state_of,
)
from lopd.megatron.ranks import parallel
from lopd.megatron.weights.adapters import adapter_weights
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.hf_mapping import Weight, weights
from lopd.megatron.weights.transfer import local_adapters, local_parameters

# How many bytes a rank reads at once.
CHUNK_BYTES = 4 * 2**30
# The weights of adapters, beside the kinds of optimizer state.
_ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class HeldRange:
    """The elements [start, stop) of a flat parameter, of which this rank keeps optimizer state."""

    # The parameter of the whole model.
    weight: Weight
    # Counted within this rank's tensor shard of the parameter.
    start: int
    stop: int
    state: ParameterState
    # All zeros on the one rank that writes the state.
    replica: tuple[int, ...]


def sharded(
    module: Any, arch: Architecture, optimizer: Any, lora: LoraSection
) -> dict[str, ShardedTensor]:
    """Return this rank's optimizer state as dist_checkpointing.save takes it.

    Args:
        module: The model.
        arch: The model's sizes.
        optimizer: Megatron-Core's optimizer. Its state must exist (see Optimizer.create_state).
        lora: The settings of the model's adapters.
    """
    # The tensors are the state itself where that is possible, and no copies: a copy of all state
    # would need two to three times the memory of the float32 weights.
    return _sharded_ranges(_held_ranges(module, arch, optimizer, lora), _kinds(module))


def sharded_adapters(
    module: Any, arch: Architecture, lora: LoraSection
) -> dict[str, ShardedTensor]:
    """Return this rank's weights of adapters as dist_checkpointing.save takes them."""
    return _sharded_ranges(_adapter_ranges(module, arch, lora), (_ADAPTER,))


def _sharded_ranges(
    ranges: Iterator[HeldRange], kinds: tuple[str, ...]
) -> dict[str, ShardedTensor]:
    tensors = {}
    for number, held in enumerate(ranges):
        # Where the range begins in the parameter of the whole model.
        shard, num_shards = _shard(held.weight)
        offset = shard * math.prod(held.weight.local_shape(num_shards)) + held.start
        for kind, tensor in held.state.read(kinds).items():
            # The key only has to be unique on this rank. The name in the file is that of the
            # ShardedTensor.
            key = f"{number}.{kind}"
            tensors[key] = _stored(held.weight, kind, tensor, offset, held.replica)
    return tensors


@torch.no_grad()
def load(
    module: Any,
    arch: Architecture,
    optimizer: Any,
    lora: LoraSection,
    path: Path,
    *,
    tensor: int,
    expert_tensor: int,
) -> None:
    """Read a checkpoint's optimizer state into this rank's. Collective.

    It needs CHUNK_BYTES of memory, or twice the largest parameter of the whole model if that is
    more. Errors of dist_checkpointing about damaged files or missing state are not translated.

    Args:
        module: The model. Its weights must be in place.
        arch: The model's sizes.
        optimizer: Megatron-Core's optimizer. Its state must exist.
        lora: The settings of the model's adapters.
        path: The folder of the checkpoint.
        tensor: The number of tensor ranks of the layout that wrote it.
        expert_tensor: The number of tensor ranks inside an expert of that layout.
    """
    kinds = _kinds(module)
    if MAIN not in kinds:
        # The file has no weights of the optimizer. It takes those of the model, which are loaded.
        optimizer.reload_model_params()
    ranges = _held_ranges(module, arch, optimizer, lora)
    _load_ranges(ranges, kinds, path, tensor, expert_tensor)


@torch.no_grad()
def load_adapters(
    module: Any,
    arch: Architecture,
    lora: LoraSection,
    path: Path,
    *,
    tensor: int,
    expert_tensor: int,
) -> None:
    """Read a checkpoint's weights of adapters into the model. Collective.

    The arguments are those of load.
    """
    ranges = _adapter_ranges(module, arch, lora)
    _load_ranges(ranges, (_ADAPTER,), path, tensor, expert_tensor)


def _load_ranges(
    ranges: Iterator[HeldRange], kinds: tuple[str, ...], path: Path, tensor: int, expert_tensor: int
) -> None:
    chunks = list(_chunks(ranges, len(kinds), tensor, expert_tensor))
    # dist_checkpointing.load is collective. A rank with fewer chunks takes part with nothing.
    most = torch.tensor([len(chunks)], device=parallel.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    for index in range(int(most.item())):
        chunk = chunks[index] if index < len(chunks) else []
        _load_chunk(chunk, kinds, path, tensor, expert_tensor)


def _load_chunk(
    chunk: list[HeldRange], kinds: tuple[str, ...], path: Path, tensor: int, expert_tensor: int
) -> None:
    wanted: dict[str, ShardedTensor] = {}
    for number, held in enumerate(chunk):
        start, stop = _range_to_read(held, _saved_shards(held.weight, tensor, expert_tensor))
        for kind in kinds:
            buffer = torch.empty(stop - start, dtype=torch.float32, device=held.state.device)
            wanted[f"{number}.{kind}"] = _stored(held.weight, kind, buffer, start, ())
    # Its check of integrity asks that the ranks together read every element exactly once. Here
    # several ranks may read the same one, and a chunk is only a part of the whole.
    read = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
    for number, held in enumerate(chunk):
        saved_shards = _saved_shards(held.weight, tensor, expert_tensor)
        held.state.write(
            {kind: _own_elements(held, read[f"{number}.{kind}"], saved_shards) for kind in kinds}
        )


def _kinds(module: Any) -> tuple[str, ...]:
    # In float32 the optimizer's weights are the model's, which the checkpoint has already.
    return MOMENTS if module.config.params_dtype == torch.float32 else (*MOMENTS, MAIN)


def _stored(
    weight: Weight, kind: str, tensor: Tensor, offset: int, replica: tuple[int, ...]
) -> ShardedTensor:
    """Describe a range of the tensor that the file has of a parameter."""
    # A parameter may hold several Hugging Face tensors, for example query, key and value. The file
    # has all of them in one tensor.
    size = sum(math.prod(shape) for shape in weight.shapes)
    return ShardedTensor(
        f"{kind}.{weight.megatron}" if kind == _ADAPTER else f"optimizer.{kind}.{weight.megatron}",
        tensor,
        tensor.dtype,
        tuple(tensor.shape),
        global_shape=(size,),
        global_offset=(offset,),
        # None, because the ranges have unequal lengths.
        axis_fragmentations=None,
        replica_id=replica or (0,),
    )


def _adapter_ranges(module: Any, arch: Architecture, lora: LoraSection) -> Iterator[HeldRange]:
    """Yield this rank's weights of adapters, each as a whole."""
    table = {weight.megatron: weight for weight in adapter_weights(arch, lora)}
    for name, parameter in local_adapters(module, arch).items():
        weight = table[name]
        # The weights of the model are on every data rank, whatever the optimizer divides.
        yield HeldRange(
            weight, 0, parameter.numel(), WeightState(parameter), (0, *_copy_of(weight))
        )


def _held_ranges(
    module: Any, arch: Architecture, optimizer: Any, lora: LoraSection
) -> Iterator[HeldRange]:
    """Yield what this rank holds, in an order that is the same in every run of this layout."""
    # Both directions of a name: from this rank's tensors to the name in the whole model, and from
    # there to how the parameter is laid out.
    every_weight = [*weights(arch), *adapter_weights(arch, lora)]
    table = {weight.megatron: weight for weight in every_weight}
    originals = {weight.hf: weight for weight in table.values() if not weight.copy}
    names = {parameter: name for name, parameter in local_parameters(module, arch).items()}
    for chained in optimizer.chained_optimizers:
        # A rank may have nothing to update, for example no expert.
        if getattr(chained, "is_stub_optimizer", False) or chained.optimizer is None:
            continue
        if isinstance(chained, DistributedOptimizer):
            held = _distributed(chained)
        else:
            held = _replicated(chained)
        for parameter, start, stop, main in held:
            weight = table[names[parameter]]
            # The second holder of a tied embedding is on the last pipeline stage. It stores and
            # takes the state of the first, so that a layout without pipeline stages can read it.
            original = originals[weight.hf] if weight.copy else weight
            state = state_of(chained.optimizer, main)
            yield HeldRange(original, start, stop, state, _replica(weight, chained))


def _distributed(chained: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int, Tensor]]:
    """Yield (parameter, start, stop, the float32 weights of that range) of a sharded optimizer."""
    # The optimizer divides buffers among the data ranks, and not parameters. So a rank's range may
    # begin and end in the middle of a parameter.
    for ranges_of_types in chained.gbuf_ranges:
        for buckets in ranges_of_types.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, order = chained.model_param_group_index_map[parameter]
                    main = chained.optimizer.param_groups[group]["params"][order]
                    yield parameter, ranges["param"].start, ranges["param"].end, main


def _replicated(chained: Any) -> Iterator[tuple[Tensor, int, int, Tensor]]:
    """Yield the same of an optimizer that every data rank has whole."""
    # The optimizer of a bfloat16 model updates float32 copies of its weights, but a weight that is
    # float32 in the model it updates in place. That of a float32 model updates all in place.
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
    """Return zeros on one of the ranks that hold the same state, which writes it."""
    tensor, data = _copy_of(weight)
    # What is distributed differs between data ranks.
    if isinstance(chained, DistributedOptimizer):
        data = int(chained.distributed_optimizer_instance_id)
    return (int(weight.copy), tensor, data)


def _copy_of(weight: Weight) -> tuple[int, int]:
    """Return which of the equal copies of a parameter this rank has: by tensor and by data rank."""
    # Experts have tensor ranks and data ranks of their own.
    if weight.expert:
        tensor = parallel.expert_tensor_rank()
        data = parallel.expert_data_rank()
    else:
        tensor = parallel.tensor_rank()
        data = dist.get_rank(parallel.data_context_group())
    # What is not split is the same on all tensor ranks.
    return (tensor if weight.layout == "whole" else 0), data


def _shard(weight: Weight) -> tuple[int, int]:
    """Return the number of this rank's shard of a parameter, and the number of shards."""
    if weight.layout == "whole":
        return 0, 1
    # Experts are divided by a grid of their own, so they have other ranks than dense weights.
    if weight.expert:
        return parallel.expert_tensor_rank(), parallel.expert_tensor_size()
    return parallel.tensor_rank(), parallel.tensor_size()


def _saved_shards(weight: Weight, tensor: int, expert_tensor: int) -> int:
    if weight.layout == "whole":
        return 1
    return expert_tensor if weight.expert else tensor


def _range_to_read(held: HeldRange, saved_shards: int) -> tuple[int, int]:
    """Return which elements of the stored tensor this rank reads."""
    shard, num_shards = _shard(held.weight)
    if num_shards == saved_shards:
        first = shard * math.prod(held.weight.local_shape(num_shards))
        return first + held.start, first + held.stop
    # With other shards the elements of a range lie scattered in the stored tensor: a shard by
    # columns has a part of every row, and a shard of queries, keys and values a part of each.
    return 0, sum(math.prod(shape) for shape in held.weight.shapes)


def _chunks(
    ranges: Iterator[HeldRange], num_kinds: int, tensor: int, expert_tensor: int
) -> Iterator[list[HeldRange]]:
    """Group the ranges so that a group reads about CHUNK_BYTES."""
    # In chunks, because the buffers of a whole optimizer would double its memory.
    chunk: list[HeldRange] = []
    size = 0
    for held in ranges:
        chunk.append(held)
        start, stop = _range_to_read(held, _saved_shards(held.weight, tensor, expert_tensor))
        # 4 bytes per element: the file has float32.
        size += (stop - start) * num_kinds * 4
        if size >= CHUNK_BYTES:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def _own_elements(held: HeldRange, stored: Tensor, saved_shards: int) -> Tensor:
    """Return the elements of a range from what was read for it."""
    weight = held.weight
    shard, num_shards = _shard(weight)
    if num_shards == saved_shards:
        return stored
    # From the saved shards to the full Hugging Face tensors, and from these to this rank's shard.
    full = [torch.empty(shape, dtype=stored.dtype, device=stored.device) for shape in weight.shapes]
    for index, saved in enumerate(stored.view(saved_shards, *weight.local_shape(saved_shards))):
        parts = weight.parts(index, saved_shards)
        for tensor, part, source in zip(full, parts, weight.split(saved), strict=True):
            tensor[part] = source
    own_parts = weight.parts(shard, num_shards)
    own = weight.join([tensor[part] for tensor, part in zip(full, own_parts, strict=True)])
    return own.reshape(-1)[held.start : held.stop]
