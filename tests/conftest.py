"""Settings of the whole suite."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# The same examples in every run, and no deadline for one of them or for their making: a busy
# machine must not fail a test that is right.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


# The longest folders come first, so that two workers end at about the same time.
_FIRST = ("tests/pipeline", "tests/sglang", "tests/megatron")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and os.environ.get("LOPD_SLOW") != "1":
            item.add_marker(pytest.mark.skip(reason="slow; LOPD_SLOW=1 runs it"))
    order = {name: index for index, name in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(_folder(item.nodeid), len(order)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads of a small model wait for each other longer than they work, on a busy machine
    many times longer; and sums depend on their number.
    """
    import torch

    torch.set_num_threads(1)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _FolderScheduling(config, log)


class _FolderScheduling(LoadScopeScheduling):
    """Each folder of tests goes to one worker, which then starts the folder's servers and makes its
    runs once.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _folder(nodeid)


def _folder(nodeid: str) -> str:
    """tests/sglang/test_client.py::test_x -> tests/sglang; of a file in tests/ itself, the file."""
    file = nodeid.split("::")[0]
    return file if file.count("/") == 1 else file.rpartition("/")[0]
