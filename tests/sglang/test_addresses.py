"""Where the ranks of a broadcast meet: on loopback unless another address is asked for. Machines
for real: tests/launching/test_three_machines.py.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lopd.config import SGLangSection, SyncSection
from lopd.errors import ConfigError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.addresses import check_reach, interface_of, meeting_address
from sglang_rollout.servers.arguments import check_settings
from sglang_rollout.weight_sync import DistributedWeightReceiver, build_receiver

HERE = "http://127.0.0.1:30000"
THERE = "http://192.0.2.7:30000"


@pytest.mark.parametrize(
    ("fields", "url", "expected"),
    [
        ({"transport": "distributed"}, THERE, r"192\.0\.2\.7.*sync\.host"),
        (
            {"transport": "distributed", "host": "127.0.0.2"},
            THERE,
            r"sync\.host must not be 127\.0\.0\.2",
        ),
        ({"transport": "tensor", "host": "auto"}, THERE, "shares memory"),
        ({"transport": "distributed", "host": "192.0.2.1"}, THERE, None),
        ({"transport": "distributed", "host": "auto"}, THERE, None),
        ({"transport": "distributed"}, HERE, None),
        ({"transport": "distributed"}, "http://localhost:30000", None),
        ({"transport": "distributed"}, "http://[::1]:30000", None),
        ({"transport": "tensor"}, HERE, None),
        ({"transport": "disk"}, THERE, None),
    ],
)
def test_servers_of_other_machines(fields: dict[str, Any], url: str, expected: str | None) -> None:
    sync = SyncSection(**fields)
    if expected is None:
        check_reach(sync, [HERE, url])
        return
    with pytest.raises(ConfigError, match=expected):
        check_reach(sync, [HERE, url])
    with pytest.raises(ConfigError, match=expected):
        check_settings(SGLangSection(student_urls=[HERE, url]), sync)


def test_auto_is_loopback_for_servers_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meeting_address("auto", [HERE]) == "127.0.0.1"
    assert meeting_address("192.0.2.1", [HERE]) == "192.0.2.1"
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket.socket, "getsockname", lambda _: ("192.0.2.1", 50000))
    assert meeting_address("auto", [HERE, THERE]) == "192.0.2.1"
    assert asked == [("192.0.2.7", 30000)]


@pytest.mark.parametrize("host", ["0.0.0.0", "node-1", "", "::1"])
def test_an_address_that_says_nothing_to_servers_is_refused(host: str) -> None:
    with pytest.raises(ValidationError, match="is not an IPv4 address"):
        SyncSection(host=host)


def test_an_address_of_another_machine_is_refused_before_any_server_is_asked(
    student_dir: Path, tmp_path: Path
) -> None:
    assert interface_of("127.0.0.1") == "lo"
    # Nothing listens there: any request would raise an EngineError.
    engine = SGLangEngine("http://127.0.0.1:9", "key", SGLangSection())
    receiver = build_receiver(
        SyncSection(transport="distributed", host="192.0.2.1"),
        [engine],
        folder=tmp_path,
        template_dir=student_dir,
    )
    assert isinstance(receiver, DistributedWeightReceiver)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1: no network interface"):
        receiver.begin("v1")
