"""Weights by broadcast from the trainer's rank 0 into every rank of the servers: NCCL between GPUs,
gloo on a CPU. Nothing is pickled.

A sync has a process group of its own: a server that was restarted, or a group that broke, is then
nothing special. Its ranks meet on loopback, or where sync.host says
(sglang_rollout/servers/addresses.py). NCCL wants every rank on a GPU of its own: where trainer and
server share one, the transport is "tensor".
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from lopd.errors import EngineError
from sglang_rollout.requests.client import Refused, SGLangEngine
from sglang_rollout.servers.addresses import LOOPBACK, gloo_on, interface_of, meeting_address
from sglang_rollout.weight_sync.in_place import InPlaceReceiver
from sglang_rollout.weight_sync.interface import Bucket, finished, nbytes, started

_LEAVING_TIMEOUT_S = 10.0
_POLL_S = 0.002
_BROADCAST = "broadcast"


class DistributedWeightReceiver(InPlaceReceiver):
    """Every tensor is broadcast from where it lies, while the next bucket is gathered. Extra
    memory: one bucket here, the one before; in a server's rank one, or on a CPU none for the
    tensors that it holds whole.
    """

    transport = "distributed"

    def __init__(self, *arguments: Any, host: str = LOOPBACK, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._host, self._address, self._interface = host, LOOPBACK, "lo"
        self._group: list[
            Any
        ] = []  # the one group, or none: whoever holds the list does not keep the group alive
        self._group_name = ""
        self._answers: list[Future[Any]] = []  # of servers to buckets, that may still come
        self._under_way: dict[
            str, Future[Any]
        ] = {}  # of the newest bucket: the servers' answers and the broadcast

    def begin(self, version: str) -> None:
        """As InPlaceReceiver. ConfigError: sync.host is no address of this machine."""
        self._address = meeting_address(self._host, [engine.url for engine in self._engines])
        self._interface = interface_of(self._address)  # before any request is held back
        super().begin(version)

    def _join(self) -> None:
        """Form the group. EngineError: a server refuses or dies, or it does not stand within the
        timeout.
        """
        self._group_name = f"lopd-{secrets.token_hex(4)}"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        offsets, world_size = [], 1
        for ranks in self._session.num_ranks:
            offsets.append(world_size)
            world_size += ranks
        timeout = datetime.timedelta(seconds=self._timeout_s)
        store, port = _store_at(self._address, world_size, timeout)
        body = {
            "master_address": self._address,
            "master_port": port,
            "backend": backend,
            "group_name": self._group_name,
            "world_size": world_size,
        }
        joining = {
            engine.url: started(
                partial(
                    self._call,
                    engine,
                    "/init_weights_update_group",
                    {**body, "rank_offset": offset},
                )
            )
            for engine, offset in zip(self._engines, offsets, strict=True)
        }
        _await_ranks(store, world_size if backend == "gloo" else 1, joining, self._timeout_s)
        self._group = [
            _form_group(backend, store, world_size, self._group_name, timeout, self._interface)
        ]
        finished(joining, self._timeout_s)

    def _send(self, bucket: Bucket) -> None:
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._group_name,
            "flush_cache": False,
        }
        tensors = [tensor.detach().contiguous() for _, tensor in bucket]
        self.report.extra_bytes = max(self.report.extra_bytes, nbytes(tensors))
        former = self._under_way
        if len(self._engines) == 1:
            self._await_broadcast(
                former
            )  # the server is at that bucket then: it cannot take the next one for it
        else:
            self._settle()
        broadcast: Future[Any] = started(partial(_broadcast, self._group, tensors))
        taking = {
            engine.url: started(
                partial(self._call, engine, "/update_weights_from_distributed", body)
            )
            for engine in self._engines
        }
        self._under_way = {**taking, _BROADCAST: broadcast}
        self._answers = [future for future in self._answers if not _answered(future)] + list(
            taking.values()
        )
        finished(former, self._timeout_s + 10)

    def _settle(self) -> None:
        finished(self._under_way, self._timeout_s + 10)
        self._under_way = {}

    def _await_broadcast(self, futures: Mapping[str, Future[Any]]) -> None:
        """Of a bucket, or of none. EngineError: as soon as the broadcast or an answer fails."""
        waiting = set(futures.values())
        while waiting and not futures[_BROADCAST].done():
            done, waiting = wait(waiting, self._timeout_s + 10, FIRST_COMPLETED)
            if not done or any(future.exception() for future in done):
                break
        if futures and (not futures[_BROADCAST].done() or futures[_BROADCAST].exception()):
            finished(futures, self._timeout_s + 10)

    def _call(self, engine: SGLangEngine, path: str, body: dict[str, Any]) -> Any:
        return engine.call("POST", path, body, timeout_s=self._timeout_s)

    def _leave(self) -> Callable[[], None]:
        group, answers, self._group, self._answers, self._under_way = (
            self._group,
            self._answers,
            [],
            [],
            {},
        )
        return partial(
            _destroy,
            group,
            self._group_name,
            self._engines,
            answers,
            min(self._timeout_s, _LEAVING_TIMEOUT_S),
        )


def _store_at(address: str, world_size: int, timeout: datetime.timedelta) -> tuple[Any, int]:
    """Where the ranks find each other, and its port. torch's own way of making one would listen on
    every interface.
    """
    listener = socket.socket()
    listener.bind((address, 0))
    listener.listen()
    port = listener.getsockname()[1]
    torch_distributed: Any = dist
    return torch_distributed.TCPStore(
        address,
        port,
        world_size,
        True,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    ), port


def _await_ranks(
    store: Any, num_keys: int, joining: Mapping[str, Future[Any]], timeout_s: float
) -> None:
    """Returns once the servers' ranks have come to the store: forming a group without them could
    not be broken off.

    num_keys: what they leave there, one key together and with gloo one each; NCCL's leave no more.
    EngineError: a server fails, or the time is up.
    """
    began = time.monotonic()
    while store.num_keys() < num_keys:
        for future in joining.values():
            if future.done():
                future.result()
        if time.monotonic() - began > timeout_s:
            raise EngineError(
                "the servers' ranks did not come to the group",
                limit="sync.timeout_s",
                remedy="see the servers' logs",
            )
        time.sleep(_POLL_S)


def _form_group(
    backend: str,
    store: Any,
    world_size: int,
    name: str,
    timeout: datetime.timedelta,
    interface: str,
) -> Any:
    """The group in which this process is rank 0, made as SGLang's servers make theirs. EngineError:
    a server is lost on the way.
    """
    torch_distributed: Any = dist
    helper: Any = distributed_c10d
    try:
        with gloo_on(interface):
            prefixed = torch_distributed.PrefixStore(name, store)
            group, _ = helper._new_process_group_helper(
                world_size, 0, [], dist.Backend(backend), prefixed, group_name=name, timeout=timeout
            )
    except RuntimeError as error:
        what = f"the group of trainer and servers did not form ({_first_line(error)})"
        raise EngineError(what, limit="sync.timeout_s", remedy="see the servers' logs") from None
    helper._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def _broadcast(group: list[Any], tensors: list[Tensor]) -> None:
    """EngineError: a server's rank did not take them within the group's timeout, or is gone."""
    broken = _broadcast_all(group, tensors)
    if broken:
        raise EngineError(
            f"the broadcast to the servers broke off ({broken})",
            limit="sync.timeout_s",
            remedy="see the servers' logs",
        )


def _broadcast_all(group: list[Any], tensors: list[Tensor]) -> str:
    """What went wrong, as a text: the error itself would keep the group alive with its connections,
    and a server waiting in it.
    """
    try:
        for work in [
            dist.broadcast(tensor, src=0, group=group[0], async_op=True) for tensor in tensors
        ]:
            work.wait()
        if tensors[0].is_cuda:
            torch.cuda.synchronize(tensors[0].device)
    except (RuntimeError, ValueError, IndexError) as error:
        return _first_line(error)
    return ""


def _destroy(
    group: list[Any],
    name: str,
    engines: Sequence[SGLangEngine],
    answers: Sequence[Future[Any]],
    timeout_s: float,
) -> None:
    """Here and on the servers, without an error. answers: that may still come; a server that has
    not heard of a bucket yet needs the group for it.
    """
    wait(answers, timeout_s)
    if group and all(_answered(future) for future in answers):
        for (
            engine
        ) in engines:  # it also frees a broadcast of ours that a server has refused to take
            with contextlib.suppress(EngineError):
                engine.call(
                    "POST",
                    "/destroy_weights_update_group",
                    {"group_name": name},
                    timeout_s=timeout_s,
                )
    while (
        group
    ):  # the end of the connection frees servers that wait in a broadcast and hear nothing else
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group(group.pop())


def _answered(call: Future[Any]) -> bool:
    """Whether the server has said yes or no. A time-out is neither: it may still come to what it
    was asked.
    """
    if not call.done():
        return False
    error = call.exception()
    return error is None or isinstance(error, Refused)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
