"""Weights by broadcast from the trainer's rank 0 into every rank of the servers.

The backend is NCCL between GPUs and gloo on a CPU. Nothing is pickled. NCCL needs every rank on a
GPU of its own. Where trainer and server share a GPU, the transport is "tensor".

Each sync forms a process group of its own. So a server that was restarted, or a group that broke,
needs no special treatment. The ranks meet at the address of sglang_rollout.servers.addresses.
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

# The longest wait for late answers when a group is closed.
_CLOSING_TIMEOUT_S = 10.0
_POLL_S = 0.002
# Each call to a server has its own timeout. The wait for all of them lasts this much longer.
_ANSWER_MARGIN_S = 10
# The name of our side of a bucket among the futures of its servers.
_BROADCAST = "broadcast"


class DistributedWeightReceiver(InPlaceReceiver):
    """A WeightReceiver that broadcasts every tensor from its own memory.

    A bucket is broadcast while the next one is gathered. The extra memory is one bucket here (the
    one before) and one bucket in a server's rank. A rank on a CPU needs none for the tensors that
    it holds whole.
    """

    transport = "distributed"

    def __init__(self, *arguments: Any, host: str = LOOPBACK, **named: Any) -> None:
        """
        Args:
            *arguments: The positional arguments of InPlaceReceiver.
            host: The value of sync.host.
            **named: The keyword arguments of InPlaceReceiver.
        """
        super().__init__(*arguments, **named)
        self._host = host
        self._address = LOOPBACK
        self._interface = "lo"
        # Holds the one group, or nothing. Threads share the list and not the group, so that none of
        # them keeps the group alive after it was destroyed (see _destroy).
        self._group: list[Any] = []
        self._group_name = ""
        # Answers of the servers to buckets that may still come.
        self._answers: list[Future[Any]] = []
        # Of the newest bucket: the answers of the servers and our side of the broadcast.
        self._under_way: dict[str, Future[Any]] = {}

    def begin(self, version: str) -> None:
        """Hold requests back and form the group.

        Raises:
            EngineError: For the same reasons as InPlaceReceiver.
            ConfigError: sync.host is not an address of this machine.
        """
        # Before any request is held back, because both can fail.
        self._address = meeting_address(self._host, [engine.url for engine in self._engines])
        self._interface = interface_of(self._address)
        super().begin(version)

    def _open_transport(self) -> None:
        """Form the group of the trainer's rank 0 and all ranks of the servers."""
        # A name of its own, because a server may still hold the group of an earlier sync.
        self._group_name = f"lopd-{secrets.token_hex(4)}"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # The trainer is rank 0. The ranks of the first server follow from 1 on, and so on.
        offsets = []
        world_size = 1
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
        # A server answers only when the group stands, and the group stands only when all ranks have
        # joined. So the calls run in threads, and this thread joins meanwhile.
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
        # No local name for the group. The traceback of an error in the next line would keep it
        # alive while abandon() destroys it, and servers that wait in it would not be freed.
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
            # The session forgets cached prefixes once, when all buckets are there.
            "flush_cache": False,
        }
        # A broadcast sends memory as it lies, so a view with gaps is copied first.
        tensors = [tensor.detach().contiguous() for _, tensor in bucket]
        self.report.extra_bytes = max(self.report.extra_bytes, nbytes(tensors))
        former = self._under_way
        # Broadcasts have no names: a server takes the next tensors that come. So it must have begun
        # with the previous bucket before it hears of this one. When our side of that broadcast has
        # ended, the one server has. Of several servers one may still be taking the bucket from
        # another, and only the answers of all of them show that it is over.
        if len(self._engines) == 1:
            self._await_broadcast(former)
        else:
            self._await_sent()
        broadcast: Future[Any] = started(partial(_broadcast, self._group, tensors))
        taking = {
            engine.url: started(
                partial(self._call, engine, "/update_weights_from_distributed", body)
            )
            for engine in self._engines
        }
        self._under_way = {**taking, _BROADCAST: broadcast}
        # Answers that have come are forgotten, so the list does not grow over hundreds of buckets.
        still_open = [future for future in self._answers if not _answered(future)]
        self._answers = still_open + list(taking.values())
        # Only now: the servers have the next bucket to continue with while we look at their
        # answers.
        finished(former, self._timeout_s + _ANSWER_MARGIN_S)

    def _await_sent(self) -> None:
        finished(self._under_way, self._timeout_s + _ANSWER_MARGIN_S)
        self._under_way = {}

    def _await_broadcast(self, futures: Mapping[str, Future[Any]]) -> None:
        """Wait until our side of a bucket's broadcast has ended.

        Args:
            futures: The futures of a bucket, or none before the first bucket.

        Raises:
            EngineError: The broadcast or an answer has failed. The error comes as soon as it has.
        """
        waiting = set(futures.values())
        while waiting and not futures[_BROADCAST].done():
            done, waiting = wait(waiting, self._timeout_s + _ANSWER_MARGIN_S, FIRST_COMPLETED)
            # A server that refuses the bucket never joins the broadcast, which would then end only
            # at the timeout of the group.
            if not done or any(future.exception() for future in done):
                break
        if futures and (not futures[_BROADCAST].done() or futures[_BROADCAST].exception()):
            # It raises the error that is there, or the one of the timeout.
            finished(futures, self._timeout_s + _ANSWER_MARGIN_S)

    def _call(self, engine: SGLangEngine, path: str, body: dict[str, Any]) -> Any:
        return engine.call("POST", path, body, timeout_s=self._timeout_s)

    def _detach_transport(self) -> Callable[[], None]:
        # The returned function runs in a thread of its own. From here on it alone holds the group,
        # so the next sync cannot use the old one by mistake.
        group = self._group
        answers = self._answers
        self._group = []
        self._answers = []
        self._under_way = {}
        timeout_s = min(self._timeout_s, _CLOSING_TIMEOUT_S)
        return partial(_destroy, group, self._group_name, self._engines, answers, timeout_s)


def _store_at(address: str, world_size: int, timeout: datetime.timedelta) -> tuple[Any, int]:
    """Return the store at which the ranks find each other, and its port."""
    # torch's own way of making a store listens on every interface, and the store has no key.
    listener = socket.socket()
    listener.bind((address, 0))
    listener.listen()
    port = listener.getsockname()[1]
    torch_distributed: Any = dist
    store = torch_distributed.TCPStore(
        address,
        port,
        world_size,
        True,
        timeout,
        wait_for_workers=False,
        # The store owns the socket from here on.
        master_listen_fd=listener.detach(),
    )
    return store, port


def _await_ranks(
    store: Any, num_keys: int, joining: Mapping[str, Future[Any]], timeout_s: float
) -> None:
    """Wait until the servers' ranks have come to the store.

    Args:
        store: The store at which the ranks meet.
        num_keys: How many keys they leave there. With gloo it is one for each of them and one for
            all together. With NCCL it is no more than that one.
        joining: The calls to the servers.
        timeout_s: The longest wait in seconds.

    Raises:
        EngineError: A server fails, or the time is over.
    """
    # To form the group before the others are there could not be broken off: it would block this
    # thread inside torch until the group's timeout, even if a server has refused at once.
    began = time.monotonic()
    # Each rank writes a key into the store when it has come.
    while store.num_keys() < num_keys:
        # A server that refuses will never come, and its answer says why.
        for future in joining.values():
            if future.done():
                future.result()
        if time.monotonic() - began > timeout_s:
            raise EngineError(
                "the ranks of the servers did not connect to the trainer",
                limit="at most sync.timeout_s seconds",
                remedy="read the logs of the servers",
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
    """Return the group in which this process is rank 0.

    Raises:
        EngineError: A server is lost while the group forms.
    """
    torch_distributed: Any = dist
    helper: Any = distributed_c10d
    # The trainer has a default group already, and init_process_group() can make only that one. So
    # this makes the group as SGLang's servers make theirs: prefix and name must be the same.
    try:
        with gloo_on(interface):
            prefixed = torch_distributed.PrefixStore(name, store)
            group, _ = helper._new_process_group_helper(
                world_size, 0, [], dist.Backend(backend), prefixed, group_name=name, timeout=timeout
            )
    except RuntimeError as error:
        raise EngineError(
            "the trainer and the servers could not connect in one process group "
            f"({_first_line(error)})",
            limit="at most sync.timeout_s seconds",
            remedy="read the logs of the servers",
        ) from None
    # Without this table dist.broadcast() does not know which rank src=0 is in the group.
    helper._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def _broadcast(group: list[Any], tensors: list[Tensor]) -> None:
    """Broadcast the tensors of a bucket.

    Raises:
        EngineError: A server's rank is gone, or did not take them within the group's timeout.
    """
    broken = _broadcast_all(group, tensors)
    if broken:
        raise EngineError(
            f"the broadcast to the servers failed ({broken})",
            limit="at most sync.timeout_s seconds",
            remedy="read the logs of the servers",
        )


def _broadcast_all(group: list[Any], tensors: list[Tensor]) -> str:
    """Broadcast the tensors and return what went wrong as a text.

    The result is a text because the error itself would keep its frames alive, and with them the
    group and its connections. A server that waits in the group would then never be freed.
    """
    try:
        # All are started before the first wait, so that the backend is never idle between two.
        handles = [
            dist.broadcast(tensor, src=0, group=group[0], async_op=True) for tensor in tensors
        ]
        for handle in handles:
            handle.wait()
        # wait() of NCCL only orders streams. The next gather must not overwrite the tensors while
        # they are still being read.
        if tensors[0].is_cuda:
            torch.cuda.synchronize(tensors[0].device)
    # IndexError: the group was given up in the meantime, and the list is empty.
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
    """Destroy the group here and on the servers, without an error.

    Args:
        group: A list with the group, or an empty list.
        name: The name of the group on the servers.
        engines: One engine for each server.
        answers: Answers to buckets that may still come.
        timeout_s: The longest time in seconds for the answers and for each call.
    """
    # A server that has not heard of a bucket yet needs the group for it.
    wait(answers, timeout_s)
    if group and all(_answered(future) for future in answers):
        # This call also frees a broadcast of ours that a server has refused to take. A server that
        # has not answered is not called: it waits in a broadcast and hears nothing.
        for engine in engines:
            with contextlib.suppress(EngineError):
                body = {"group_name": name}
                engine.call("POST", "/destroy_weights_update_group", body, timeout_s=timeout_s)
    # The end of the connection frees servers that wait in a broadcast. pop() takes the last
    # reference, so the group is gone when this returns.
    while group:
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group(group.pop())


def _answered(call: Future[Any]) -> bool:
    """Return whether the server has said yes or no.

    A timeout is neither: the server may still come to what it was asked.
    """
    if not call.done():
        return False
    error = call.exception()
    return error is None or isinstance(error, Refused)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
