"""Weights between Hugging Face checkpoints and the ranks of a Megatron model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lopd.config import LoraSection
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.first_rank import run_on_first_rank
from lopd.megatron.weights.adapters import adapter_weights, adapters
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.hf_files import CheckpointReader, CheckpointWriter
from lopd.megatron.weights.hf_mapping import Weight, global_name, weights


def load_hf(model: Any, arch: Architecture, folder: str | Path) -> None:
    """Read this rank's part of a Hugging Face checkpoint (safetensors) into the model.

    The parts of other ranks are not read.

    Raises:
        ArtifactError: The checkpoint is incomplete, damaged, or not of this architecture.
    """
    folder = Path(folder)
    # The reader has checked all names and shapes before the first parameter is changed.
    with CheckpointReader(folder, arch) as reader:
        load_tensors(model, arch, reader.tensor)


def load_tensors(model: Any, arch: Architecture, tensor: Callable[[str], Any]) -> None:
    """Fill every parameter of this rank.

    Args:
        model: This rank's part of the model.
        arch: The architecture of the whole model.
        tensor: A function that returns the full Hugging Face tensor of a name, or an object that is
            sliced like that tensor.
    """
    table = {weight.megatron: weight for weight in weights(arch)}
    _fill(local_parameters(model, arch), table, tensor)


def load_adapters(
    model: Any, arch: Architecture, lora: LoraSection, tensor: Callable[[str], Any]
) -> None:
    """Fill the adapters of this rank.

    Args:
        model: This rank's part of the model, with adapters.
        arch: The architecture of the whole model.
        lora: The settings of the adapters.
        tensor: As of load_tensors, by PEFT's names. A matrix A that several share has the name of
            the first.
    """
    _fill(local_adapters(model, arch), _adapter_table(arch, lora), tensor)


@torch.no_grad()
def _fill(
    parameters: dict[str, Tensor], table: dict[str, Weight], tensor: Callable[[str], Any]
) -> None:
    for name, parameter in parameters.items():
        assert name in table, f"no rule for parameter {name}"
        weight = table[name]
        value = weight.read([tensor(source) for source in weight.hf], *_shard(weight))
        # copy_ would broadcast a wrong shape without an error.
        assert value.shape == parameter.shape, (
            f"{name}: {tuple(value.shape)} for {tuple(parameter.shape)}"
        )
        # The parameter keeps its memory, because optimizer and gradient buffers refer to it.
        parameter.copy_(value)


def export_hf(
    model: Any, arch: Architecture, *, bucket_bytes: int, lora: LoraSection | None = None
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the full Hugging Face tensors in buckets, in the order of the checkpoint. Collective.

    Every rank iterates to the end. Global rank 0 gets the tensors, as copies in the model's dtype
    on its device. The other ranks get as many empty buckets. Disk export, weight sync and tests
    read this one iterator. It takes the memory of one bucket and one tensor on rank 0.

    Args:
        model: This rank's part of the model.
        arch: The architecture of the whole model.
        bucket_bytes: The size of a bucket. A bucket ends with the tensor that reaches it.
        lora: The settings of the model's adapters. They are added to the weights, which stay as
            they are in the model.

    Yields:
        A list of (Hugging Face name, tensor).
    """
    mine = local_parameters(model, arch)
    # A copy is left out: another parameter exports the same tensor.
    table = [weight for weight in weights(arch) if not weight.copy]
    # All parameters of a model have one dtype.
    dtype = next(iter(mine.values())).dtype
    owners = _owners(table, mine)
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for weight in table:
        bucket += _collect(weight, _merged(weight, mine, lora), owners, dtype)
        # The size is counted on every rank, so that all of them end a bucket at the same place. A
        # reader may run a collective of its own between two buckets.
        size += sum(math.prod(shape) for shape in weight.shapes) * dtype.itemsize
        if size >= bucket_bytes:
            yield bucket
            bucket = []
            size = 0
    if size:
        yield bucket


def export_adapters(
    model: Any, arch: Architecture, lora: LoraSection
) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapters under PEFT's names, whole and one by one. Collective.

    Every rank iterates to the end. Global rank 0 gets the tensors, as copies on the CPU in the
    dtype of the model. The other ranks get none.

    Args:
        model: This rank's part of the model, with adapters.
        arch: The architecture of the whole model.
        lora: The settings of the adapters.
    """
    mine = local_adapters(model, arch)
    owners = _owners(adapter_weights(arch, lora), mine)
    # As in export_hf. A rank may have no adapter, for example where a pipeline stage has no layer.
    dtype = model.config.params_dtype
    for adapter in adapters(arch, lora):
        for _, shared in _collect(adapter.a, mine.get(adapter.a.megatron), owners, dtype):
            # A copy for each name: two names of one tensor cannot be written to a file.
            yield from ((name, shared.cpu().clone()) for name in adapter.peft_a)
        for name, tensor in _collect(adapter.b, mine.get(adapter.b.megatron), owners, dtype):
            yield name, tensor.cpu()


def save_hf(
    buckets: Iterable[list[tuple[str, Tensor]]],
    folder: str | Path,
    *,
    source: str | Path,
    shard_bytes: int,
) -> None:
    """Write buckets of export_hf as a Hugging Face checkpoint. Collective where the buckets are.

    Global rank 0 writes. All ranks return when the folder is published (fsync, rename). An older
    folder of that name is replaced. Configuration, tokenizer and chat template come from source.

    Args:
        buckets: (Hugging Face name, tensor), as export_hf gives them.
        folder: Where the checkpoint goes.
        source: The Hugging Face folder that the training began from.
        shard_bytes: The size of a safetensors file at most. A single tensor may be larger.

    Raises:
        ArtifactError: The checkpoint cannot be written, for example because the disk is full. Every
            rank raises it.
    """
    folder = Path(folder)
    source = Path(source)
    # Every step goes through run_on_first_rank, so that the other ranks wait for the disk as long
    # as it takes. In a plain collective they would give up: to write 61 GB may take longer than a
    # collective may last.
    with contextlib.ExitStack() as stack:
        writer = CheckpointWriter(folder, source=source, shard_bytes=shard_bytes)
        # `and None`: the writer itself cannot be sent to the other ranks.
        run_on_first_rank(lambda: stack.enter_context(writer) and None)
        for bucket in buckets:
            run_on_first_rank(partial(_add, writer, bucket))
        # This publishes the folder. On the other ranks the stack is empty.
        run_on_first_rank(stack.close)


def _add(writer: CheckpointWriter, bucket: list[tuple[str, Tensor]]) -> None:
    for name, tensor in bucket:
        writer.add(name, tensor)


def local_parameters(model: Any, arch: Architecture) -> dict[str, Tensor]:
    """Return this rank's parameters by the table's names.

    Args:
        model: The model, also inside of DistributedDataParallel or Float16Module.
        arch: The architecture of the whole model.
    """
    while hasattr(model, "module"):
        model = model.module
    layers = model.decoder.layers
    # layer_number counts over all pipeline stages, from 1. A stage may have no layers.
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    # Each expert rank holds the experts of one range.
    first_expert = parallel.expert_rank() * (arch.num_experts // parallel.expert_size())
    return {
        global_name(name, first_layer=first_layer, first_expert=first_expert): parameter
        for name, parameter in model.named_parameters()
    }


def local_adapters(model: Any, arch: Architecture) -> dict[str, Tensor]:
    """Return this rank's parameters of adapters by the table's names."""
    return {
        name: parameter
        for name, parameter in local_parameters(model, arch).items()
        if name.endswith((".lora_A", ".lora_B"))
    }


def _adapter_table(arch: Architecture, lora: LoraSection) -> dict[str, Weight]:
    return {weight.megatron: weight for weight in adapter_weights(arch, lora)}


def _shard(weight: Weight) -> tuple[int, int]:
    """Return (rank, size) of this rank in the group over which the parameter is split."""
    # Experts have a tensor group of their own, of another size.
    if weight.expert:
        return parallel.expert_tensor_rank(), parallel.expert_tensor_size()
    return parallel.tensor_rank(), parallel.tensor_size()


def _owners(table: list[Weight], mine: dict[str, Tensor]) -> dict[tuple[str, int], int]:
    """Return for each (parameter, shard) the lowest global rank that holds it. Collective."""
    # Data ranks hold the same shards, and tensor ranks hold the same whole parameters. One holder
    # is enough. All ranks choose from the same list, so they agree without a further message.
    held = [
        (weight.megatron, 0 if weight.layout == "whole" else _shard(weight)[0])
        for weight in table
        if weight.megatron in mine
    ]
    everyone: list[list[tuple[str, int]]] = [held]
    if parallel.world_size() > 1:
        everyone = [[] for _ in range(parallel.world_size())]
        dist.all_gather_object(everyone, held)
    owners: dict[tuple[str, int], int] = {}
    for rank, keys in enumerate(everyone):
        for key in keys:
            # The first rank that holds a tensor gives it.
            owners.setdefault(key, rank)
    return owners


@torch.no_grad()
def _merged(weight: Weight, mine: dict[str, Tensor], lora: LoraSection | None) -> Tensor | None:
    """Return this rank's part of a parameter, with its adapter added, or None if it has no part.

    The rank's parts of the two matrices have a product of the shape of its part of the weight, with
    the rows and columns in the same order (lopd.megatron.weights.adapters). So nothing is exchanged
    for it, and no rank has more than one merged parameter at a time.
    """
    parameter = mine.get(weight.megatron)
    stem = weight.megatron.removesuffix(".weight")
    a = mine.get(f"{stem}.lora_A")
    if lora is None or parameter is None or a is None:
        return parameter
    b = mine[f"{stem}.lora_B"]
    # In float32, so that a bfloat16 weight is rounded once.
    change = b.float() @ a.float()
    return (parameter.float() + lora.scale * change).to(parameter.dtype)


@torch.no_grad()
def _collect(
    weight: Weight, parameter: Tensor | None, owners: dict[tuple[str, int], int], dtype: torch.dtype
) -> list[tuple[str, Tensor]]:
    """Return the full tensors of one parameter on rank 0, and nothing on the other ranks."""
    num_shards = 1 if weight.layout == "whole" else _shard(weight)[1]
    me = parallel.rank()
    # Each shard goes from its owner straight to rank 0. A gather over the groups would give the
    # whole tensor to ranks that do not need it.
    if me != 0:
        for shard in range(num_shards):
            if owners[weight.megatron, shard] == me:
                assert parameter is not None
                dist.send(parameter.detach().contiguous(), dst=0)
        return []
    # Rank 0 puts the shards together, in the order of the ranks.
    device = parallel.device()
    full = [torch.empty(shape, dtype=dtype, device=device) for shape in weight.shapes]
    for shard in range(num_shards):
        parts = weight.parts(shard, num_shards)
        owner = owners[weight.megatron, shard]
        if owner == 0:
            assert parameter is not None
            held = parameter.detach()
        else:
            held = torch.empty(weight.local_shape(num_shards), dtype=dtype, device=device)
            dist.recv(held, src=owner)
        # The pieces are copied, so the reader of a bucket never sees a later training step.
        for tensor, part, values in zip(full, parts, weight.split(held), strict=True):
            tensor[part] = values
    return list(zip(weight.hf, weight.unpad(full), strict=True))
