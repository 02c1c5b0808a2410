"""The short form of the soak: kills in all three phases, and nothing lost, twice, wrong, stale or
hung. The long one: ``python -m tests.soak.soak``.
"""

from __future__ import annotations

from pathlib import Path

from tests.soak.soak import FAULTS, Counts, Soak


def test_nothing_is_lost_while_servers_are_killed(tmp_path: Path) -> None:
    """Kills that a server notices by itself: what only a time-out tells of (the scheduler, a stop)
    a slow machine would tell of too.
    """
    limits = {"spare_starts": True, "kills_of_a_phase": 1, "hang_timeout_s": 100.0}
    soak = Soak(
        tmp_path,
        responses=200,
        replicas=1,
        seed=3,
        every_s=1.0,
        kinds=("server", "main process"),
        syncs=2,
        **limits,
    )
    found = soak.run(seconds=4, restarts=1)
    assert 1 <= found["num_kills"] <= 3 * found["rounds"], found
    assert found["restarts"] >= 1, found
    assert found["responses"] == 400 * found["rounds"] or found["stopped"], found
    assert {name: found[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)


def test_the_counts_see_what_they_are_for() -> None:
    counts = Counts()
    counts.compare([("a", 1), ("b", 2), ("b", 2), ("c", 9)], {"a": 1, "b": 2, "c": 3, "d": 4})
    assert {name: counts.wrong[name] for name in ("lost", "duplicated", "wrong")} == {
        "lost": 1,
        "duplicated": 1,
        "wrong": 1,
    }
