"""Buckets under way while the next is gathered: in order where the order matters, in two buffers,
and what goes wrong with one is told soon.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lopd.errors import EngineError
from sglang_rollout.requests.client import Refused
from sglang_rollout.weight_sync import distributed, tensor
from sglang_rollout.weight_sync.distributed import DistributedWeightReceiver
from tests.sglang.weight_syncing import Named, receiver

PATIENCE_S = 120.0  # for what must happen
MOMENT_S = 0.05  # for what must not


class Server:
    """In the place of an engine: a bucket is answered when the test says so."""

    def __init__(self, number: int = 0) -> None:
        self.url = f"http://server-{number}"
        self.asked: list[str] = []  # first tensor of every bucket; then paths
        self.came = threading.Semaphore(0)
        self.answer = threading.Semaphore(0)
        self.refuses: type[EngineError] | None = None

    def call(
        self, method: str, path: str, body: dict[str, Any], *, timeout_s: float
    ) -> dict[str, Any]:
        self.asked.append(body["names"][0] if "names" in body else path)
        self.came.release()
        if "names" in body:
            assert self.answer.acquire(timeout=PATIENCE_S)
        if self.refuses:
            raise self.refuses("not today", where=self.url)
        return {}


class Broadcasts:
    """In the place of torch's: each ends when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self.end = threading.Semaphore(0)
        monkeypatch.setattr(distributed.dist, "broadcast", self._broadcast)
        monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda group: None)

    def _broadcast(self, values: torch.Tensor, **named: Any) -> Any:
        self.begun.append(int(values[0]))
        outer = self

        class Work:
            def wait(self) -> None:
                if not outer.end.acquire(timeout=PATIENCE_S):
                    raise RuntimeError("nobody took it")

        return Work()


def bucket(number: int) -> Named:
    return [(f"tensor-{number}", torch.full((4,), number))]


def joined(servers: list[Server], template: Path) -> DistributedWeightReceiver:
    to = DistributedWeightReceiver(servers, template, timeout_s=PATIENCE_S)
    to._group = ["group"]
    return to


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_server_hears_of_a_bucket_only_when_it_is_at_the_one_before(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the one's tensors for the other's: HTTP calls may overtake each other,
    broadcasts go by their order.
    """
    server = Server()
    broadcasts = Broadcasts(monkeypatch)
    to = joined([server], student_dir)
    to._send(bucket(0))  # returns at once
    assert server.came.acquire(timeout=PATIENCE_S)
    second = in_thread(lambda: to._send(bucket(1)))
    assert not server.came.acquire(timeout=MOMENT_S)
    broadcasts.end.release()
    assert server.came.acquire(timeout=PATIENCE_S)  # though the first was not answered yet
    assert server.asked == ["tensor-0", "tensor-1"]
    server.answer.release()
    second.join(PATIENCE_S)
    assert not second.is_alive()  # the second bucket is under way still
    server.answer.release()
    broadcasts.end.release()
    to._await_sent()
    assert broadcasts.begun == [0, 1]


def test_of_several_servers_each_answers_before_the_next_bucket(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broadcast that has ended here may still be on its way from one server to another."""
    servers = [Server(0), Server(1)]
    broadcasts = Broadcasts(monkeypatch)
    to = joined(servers, student_dir)
    to._send(bucket(0))
    broadcasts.end.release()
    servers[0].answer.release()
    second = in_thread(lambda: to._send(bucket(1)))
    assert all(server.came.acquire(timeout=PATIENCE_S) for server in servers)
    assert not any(server.came.acquire(timeout=MOMENT_S) for server in servers)
    servers[1].answer.release()
    assert all(server.came.acquire(timeout=PATIENCE_S) for server in servers)
    second.join(PATIENCE_S)
    assert not second.is_alive()


def test_a_refusal_ends_the_wait_for_a_broadcast_that_nobody_takes(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    broadcasts = Broadcasts(monkeypatch)
    server.refuses = Refused
    to = joined([server], student_dir)
    to._send(bucket(0))
    server.answer.release()
    with pytest.raises(EngineError, match="not today"):
        to._send(bucket(1))
    assert server.asked == ["tensor-0"]
    to._detach_transport()()
    # Destroying the group frees our broadcast: the server does not wait in one.
    assert server.asked == ["tensor-0", "/destroy_weights_update_group"]
    broadcasts.end.release()


def test_a_bucket_under_way_is_answered_before_the_group_goes(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that hears of a bucket of a group it has left would end (SGLang asserts)."""
    server = Server()
    broadcasts = Broadcasts(monkeypatch)
    to = joined([server], student_dir)
    to._send(bucket(0))
    leaving = in_thread(to._detach_transport())
    leaving.join(MOMENT_S)
    assert server.asked in ([], ["tensor-0"])
    broadcasts.end.release()
    server.answer.release()
    leaving.join(PATIENCE_S)
    assert server.asked == ["tensor-0", "/destroy_weights_update_group"]


def test_a_server_whose_answer_timed_out_is_not_asked_to_leave_the_group(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still come to the bucket, and would end of it. Control: the test of a refusal above,
    which differs in this alone.
    """
    server = Server()
    broadcasts = Broadcasts(monkeypatch)
    server.refuses = EngineError
    to = joined([server], student_dir)
    to._send(bucket(0))
    server.answer.release()
    with pytest.raises(EngineError, match="not today"):
        to._send(bucket(1))
    to._detach_transport()()
    assert server.asked == ["tensor-0"]
    broadcasts.end.release()


def test_a_silent_server_is_not_asked_to_leave_the_group(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears nothing in a broadcast; the end of the connection frees it, so nothing may keep the
    group alive.
    """
    server = Server()
    monkeypatch.setattr(distributed, "_CLOSING_TIMEOUT_S", MOMENT_S)
    broadcasts = Broadcasts(monkeypatch)
    to = joined([server], student_dir)
    group = to._group
    to._send(bucket(0))
    to._detach_transport()()
    assert "/destroy_weights_update_group" not in server.asked
    assert group == []
    broadcasts.end.release()


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [
        # The chunks have about 100, 200 and 400 bytes.
        (
            (50, 50, 50, 60, 90, 90, 90, 90, 80, 75),
            ["01", "234", "56789"],
        ),
        ((60, 45, 50, 1), ["01", "23"]),
        ((60, 45, 40, 1), ["0123"]),  # the rest would be less than half a chunk
        ((40, 60, 1, 500, 90, 120), ["01", "2", "3", "45"]),  # a large tensor is a chunk of its own
        ((10, 20, 30), ["012"]),
        ((0, 0), ["01"]),
    ],
)
def test_a_bucket_goes_through_shared_memory_in_chunks_of_whole_tensors(
    sizes: tuple[int, ...], chunks: list[str]
) -> None:
    named = [(str(index), torch.zeros(size, dtype=torch.uint8)) for index, size in enumerate(sizes)]
    assert [
        "".join(name for name, _ in chunk)
        for chunk in tensor._chunks(named, iter((100, 200, 400, 400)))
    ] == chunks


def test_chunks_grow_over_the_buckets_of_a_sync() -> None:
    assert [size // 2**20 for size, _ in zip(tensor._chunk_sizes(), range(4), strict=False)] == [
        64,
        128,
        256,
        256,
    ]


def test_two_shared_buffers_are_used_in_turns(
    student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor, "_FIRST_CHUNK_BYTES", 512)
    monkeypatch.setattr(tensor, "_MAX_CHUNK_BYTES", 512)
    server = Server()
    to: Any = receiver("tensor", server, tmp_path, student_dir)  # type: ignore[arg-type]
    to._session._infos = [{"tp_size": 1}]
    posted: dict[int, Named] = {}  # by the value of their elements
    came, done = ([threading.Event() for _ in range(4)] for _ in range(2))

    def post(engine: Any, ranks: int, shared: Named) -> None:
        index = int(shared[0][1][0])
        posted[index] = shared
        came[index].set()
        assert done[index].wait(PATIENCE_S)

    to._post = post
    sending = in_thread(
        lambda: to._send(
            [(str(index), torch.full((512,), index, dtype=torch.uint8)) for index in range(4)]
        )
    )
    assert came[0].wait(PATIENCE_S)
    for index in range(1, 4):
        assert came[index].wait(PATIENCE_S)  # while the one before is being read
        assert index == 3 or not came[index + 1].wait(MOMENT_S)
        assert int(posted[index - 1][0][1][0]) == index - 1  # and not written again before it was
        done[index - 1].set()
    done[3].set()
    sending.join(PATIENCE_S)
    to._await_sent()
    assert len({shared[0][1].data_ptr() for shared in posted.values()}) == 2
    assert to.report.extra_bytes == 1024


@pytest.mark.parametrize("ours", [True, False])
def test_memory_is_shared_also_where_the_temporary_folder_has_too_long_a_path_for_a_socket(
    ours: bool, tmp_path: Path
) -> None:
    place = tmp_path / ("long" * 30)
    place.mkdir()
    make = (
        "tensor._shared_buffer(4, torch.device('cpu'))"
        if ours
        else "torch.UntypedStorage._new_shared(4, device='cpu')"
    )
    code = (
        "import torch; from sglang_rollout.weight_sync import tensor; "
        f"torch.multiprocessing.set_sharing_strategy('file_system'); {make}"
    )
    environment = {**os.environ, "TMPDIR": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (done.returncode == 0) == ours, done.stderr
