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

from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.first_rank import run_on_first_rank
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.hf_files import CheckpointReader, CheckpointWriter
from lopd.megatron.weights.hf_mapping import Weight, global_name, weights


def load_hf(model: Any, arch: Architecture, folder: Path) -> None:
    """Read this rank's part of a Hugging Face checkpoint (safetensors) into the model; the rest is
    not read.

    ArtifactError: the checkpoint is incomplete, damaged, or not of this architecture.
    """
    with CheckpointReader(folder, arch) as reader:
        load_tensors(model, arch, reader.tensor)


@torch.no_grad()
def load_tensors(model: Any, arch: Architecture, tensor: Callable[[str], Any]) -> None:
    """Fill every parameter of this rank. tensor(name): the full Hugging Face tensor, or something
    that is sliced like it.
    """
    table = {weight.megatron: weight for weight in weights(arch)}
    for name, parameter in local_parameters(model, arch).items():
        assert name in table, f"no rule for parameter {name}"
        weight = table[name]
        value = weight.read([tensor(source) for source in weight.hf], *_shard(weight))
        assert value.shape == parameter.shape, (
            f"{name}: {tuple(value.shape)} for {tuple(parameter.shape)}"
        )
        parameter.copy_(value)


def export_hf(
    model: Any, arch: Architecture, *, bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """The full Hugging Face tensors (name, tensor), in checkpoint order, in buckets of about
    bucket_bytes.

    Collective: every rank iterates to the end. Global rank 0 gets the tensors, as copies in the
    model's dtype on its device; the other ranks get as many empty buckets. Extra memory on rank 0:
    one bucket and one tensor. Disk export, weight sync and tests read this one iterator.
    """
    mine = local_parameters(model, arch)
    table = [weight for weight in weights(arch) if not weight.copy]
    dtype = next(iter(mine.values())).dtype
    owners = _owners(table, mine)
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for weight in table:
        bucket += _collect(weight, mine.get(weight.megatron), owners, dtype)
        size += sum(math.prod(shape) for shape in weight.shapes) * dtype.itemsize
        if size >= bucket_bytes:
            yield bucket
            bucket, size = [], 0
    if size:
        yield bucket


def save_hf(
    buckets: Iterable[list[tuple[str, Tensor]]], folder: Path, *, source: Path, shard_bytes: int
) -> None:
    """Writes buckets of export_hf as a Hugging Face checkpoint. Collective where the buckets are.

    Global rank 0 writes. The other ranks wait for it as long as the disk takes: 61 GB may take
    longer
    than a collective may last. All ranks return when the folder is published (fsync, rename); an
    older
    folder of that name is replaced. Configuration, tokenizer and chat template come from source.

    Args:
        buckets: (Hugging Face name, tensor), as export_hf gives them.
        folder: Where the checkpoint goes.
        source: The Hugging Face folder that the training began from.
        shard_bytes: The size of a safetensors file at most. A single tensor may be larger.

    Raises:
        ArtifactError: It cannot be written, for example because the disk is full. On every rank.
    """
    with contextlib.ExitStack() as stack:
        writer = CheckpointWriter(folder, source=source, shard_bytes=shard_bytes)
        run_on_first_rank(lambda: stack.enter_context(writer) and None)
        for bucket in buckets:
            run_on_first_rank(partial(_add, writer, bucket))
        run_on_first_rank(stack.close)  # publishes


def _add(writer: CheckpointWriter, bucket: list[tuple[str, Tensor]]) -> None:
    for name, tensor in bucket:
        writer.add(name, tensor)


def local_parameters(model: Any, arch: Architecture) -> dict[str, Tensor]:
    """This rank's parameters by the table's names; wrappers (DistributedDataParallel,
    Float16Module) are looked through.
    """
    while hasattr(model, "module"):
        model = model.module
    layers = model.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    first_expert = parallel.expert_rank() * (arch.num_experts // parallel.expert_size())
    return {
        global_name(name, first_layer=first_layer, first_expert=first_expert): parameter
        for name, parameter in model.named_parameters()
    }


def _shard(weight: Weight) -> tuple[int, int]:
    """(rank, size) of this rank in the group over which the parameter is split."""
    if weight.expert:
        return parallel.expert_tensor_rank(), parallel.expert_tensor_size()
    return parallel.tensor_rank(), parallel.tensor_size()


def _owners(table: list[Weight], mine: dict[str, Tensor]) -> dict[tuple[str, int], int]:
    """(parameter, shard) -> the lowest global rank that holds it. Collective."""
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
            owners.setdefault(key, rank)
    return owners


@torch.no_grad()
def _collect(
    weight: Weight, parameter: Tensor | None, owners: dict[tuple[str, int], int], dtype: torch.dtype
) -> list[tuple[str, Tensor]]:
    """The full tensors of one parameter on rank 0, [] elsewhere. Each shard goes from its owner
    straight to rank 0.
    """
    num_shards = 1 if weight.layout == "whole" else _shard(weight)[1]
    me = parallel.rank()
    if me != 0:
        for shard in range(num_shards):
            if owners[weight.megatron, shard] == me:
                assert parameter is not None
                dist.send(parameter.detach().contiguous(), dst=0)
        return []
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
        for tensor, part, piece in zip(full, parts, weight.split(held), strict=True):
            tensor[part] = piece
    return list(zip(weight.hf, weight.unpad(full), strict=True))
