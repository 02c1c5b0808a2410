"""lopd doctor judges machines that do not exist: each fact that is wrong is one finding, and none
hides another.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from lopd import checks
from lopd.config import Config, load_config
from lopd.config.hub import hub_folder, hub_name, local_path
from lopd.errors import LopdError, NotFetched
from lopd.machine import doctor, hub, versions
from lopd.machine.facts import Facts, GpuFact, parse_gpus
from lopd.planning.hardware import gpu_of_device

ROOT = Path(__file__).resolve().parents[1]
H100 = GpuFact("NVIDIA H100 80GB HBM3", 81559 * 2**20, 4 * 2**20, "580.82.07")
TIB = 2**40


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("LOPD_HUB", str(tmp_path / "hub"))
    return load_config(ROOT / "examples/run_qwen3_30b_a3b.toml", [f"run.dir={tmp_path / 'run'}"])


def facts_of(config: Config, tmp_path: Path, **changes: Any) -> Facts:
    """A node of 8 x H100 that has everything, models and prompts on the hub."""
    hubs = {item.name: None for item in hub.wanted(config)}
    node = Facts(
        gpus=(H100,) * 8,
        host_memory=2 * TIB,
        shm=TIB,
        disks=dict.fromkeys((config.run.dir, hub_folder()), (1, 20 * TIB)),
        versions={**versions.NEEDED, **versions.NEEDED_ON_GPU},
        cuda="13.0",
        hub=hubs,
        locked_memory=-1,
    )
    return dataclasses.replace(node, **changes)


def wrong(config: Config, facts: Facts) -> list[tuple[str, str]]:
    return [
        (name, str(finding))
        for name, finding in doctor.findings(config, facts)
        if isinstance(finding, LopdError) and not isinstance(finding, NotFetched)
    ]


def to_fetch(config: Config, facts: Facts) -> list[str]:
    return [
        str(finding)
        for _, finding in doctor.findings(config, facts)
        if isinstance(finding, NotFetched)
    ]


def test_a_node_that_has_everything(config: Config, tmp_path: Path) -> None:
    assert wrong(config, facts_of(config, tmp_path)) == []
    fitting = {
        **versions.NEEDED,
        **versions.NEEDED_ON_GPU,
        "nvidia-cublas": "13.2.0.9",
        "megatron-core": "0.18.2",
    }
    assert wrong(config, facts_of(config, tmp_path, versions=fitting)) == []


def test_a_trial_on_a_cpu_asks_for_no_gpu(config: Config, tmp_path: Path) -> None:
    """It is asked for by launch.device; on a machine with GPUs nothing changes."""
    bare = facts_of(
        config,
        tmp_path,
        gpus=(),
        gpus_problem="none",
        host_memory=24 * 2**30,
        shm=2**30,
        cuda=None,
        locked_memory=0,
    )
    assert {name for name, _ in wrong(config, bare)} >= {"GPUs", "memory", "driver", "limits"}
    trial = config.model_copy(update={"launch": config.launch.model_copy(update={"device": "cpu"})})
    assert wrong(trial, bare) == []
    with_gpus = facts_of(config, tmp_path, gpus=(H100,) * 7)
    assert [name for name, _ in wrong(trial, with_gpus)] == ["GPUs"]


def test_what_is_not_downloaded_yet_is_not_wrong(config: Config, tmp_path: Path) -> None:
    """The hub has everything, or may not be asked: both are no mistake, and both are said."""
    has_all = to_fetch(config, facts_of(config, tmp_path))
    assert has_all
    assert all("the hub has it; remedy: lopd fetch CONFIG" in line for line in has_all)
    switched_off = facts_of(config, tmp_path, hub={})
    assert wrong(config, switched_off) == []
    assert all("downloads are switched off" in line for line in to_fetch(config, switched_off))
    # The control: the hub was asked and does not have it.
    unknown = dict.fromkeys(facts_of(config, tmp_path).hub, "404")
    assert {name for name, _ in wrong(config, facts_of(config, tmp_path, hub=unknown))} == {
        "sources"
    }


def test_check_and_doctor_have_one_judge_of_the_disks(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the models on the hub still, both count them, and both say the same words."""
    for free in (20 * TIB, TIB):
        disks = dict.fromkeys((config.run.dir, hub_folder()), (1, free))
        facts = facts_of(config, tmp_path, disks=disks)
        (seen,) = [text for name, text in doctor.findings(config, facts) if name == "disk"]
        monkeypatch.setattr(sys.modules["lopd.checks.folders"], "disk_of", disks.__getitem__)
        (checked,) = [text for name, text in checks.check(config) if name == "disk"]
        assert str(seen) == str(checked)
        assert isinstance(seen, LopdError) == (free == TIB), "the control: it depends on the disk"
    assert f"{config.run.dir} and {hub_folder()}" in str(seen)


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        (
            {"gpus": (), "gpus_problem": "nvidia-smi is not installed"},
            "GPUs",
            "this machine has only 0 GPUs (nvidia-smi is not installed); limit: at least 8",
        ),
        ({"gpus": (H100,) * 7}, "GPUs", "this machine has only 7 GPUs; limit: at least 8"),
        ({"gpus": (*(H100,) * 7, dataclasses.replace(H100, mig=True))}, "GPUs", "MIG"),
        (
            {"gpus": (*(H100,) * 7, dataclasses.replace(H100, used=9 * 2**30))},
            "GPUs",
            "other programs use memory of the GPUs 7",
        ),
        (
            {"gpus": (*(H100,) * 7, dataclasses.replace(H100, name="NVIDIA H200"))},
            "GPUs",
            "several kinds",
        ),
        ({"gpus": (dataclasses.replace(H100, memory=24 * 2**30),) * 8}, "memory", "does not fit"),
        ({"host_memory": TIB // 4}, "memory", "largest term: optimizer"),
        ({"disks": {}}, "disk", "0 MiB free"),
        ({"cuda": None}, "driver", "has no CUDA"),
        (
            {"gpus": (dataclasses.replace(H100, driver="550.54.15"),) * 8},
            "driver",
            "550.54.15 is too old; limit: at least 580 for CUDA 13.0",
        ),
        ({"shm": 64 * 2**20}, "limits", "--ipc=host"),
        ({"open_files": 1024}, "limits", "a process may open only 1024 files"),
        ({"locked_memory": 64 * 2**10}, "limits", "memlock=-1"),
        ({"ports_taken": (30000,)}, "ports", "port 30000 is taken"),
        (
            {"versions": {**versions.NEEDED, **versions.NEEDED_ON_GPU, "transformer-engine": None}},
            "versions",
            "transformer-engine is not installed",
        ),
        (
            {"versions": {**versions.NEEDED, **versions.NEEDED_ON_GPU, "sglang": "0.5.9"}},
            "versions",
            "sglang 0.5.9 is too old; limit: at least 0.5.17",
        ),
        (
            {"versions": {**versions.NEEDED, **versions.NEEDED_ON_GPU, "megatron-core": "0.19.0"}},
            "versions",
            "megatron-core 0.19.0 is newer than the tested versions; limit: below 0.19",
        ),
        (
            {
                "versions": {
                    **versions.NEEDED,
                    **versions.NEEDED_ON_GPU,
                    "nvidia-cublas": "13.1.0.3",
                }
            },
            "versions",
            (
                "transformer-engine 2.16 does not work with nvidia-cublas 13.1.0.3: its library "
                "does not load, and neither does megatron-core; limit: nvidia-cublas at least "
                "13.2.0.9"
            ),
        ),
    ],
)
def test_each_thing_that_is_wrong(
    config: Config, tmp_path: Path, changes: dict[str, Any], name: str, expected: str
) -> None:
    found = wrong(config, facts_of(config, tmp_path, **changes))
    assert {each for each, _ in found} == {name}
    assert any(expected in text for _, text in found), found


def test_all_that_is_wrong_is_told_at_once(config: Config, tmp_path: Path) -> None:
    names = [
        name
        for name, _ in wrong(
            config, Facts(gpus_problem="nvidia-smi is not installed", locked_memory=1)
        )
    ]
    assert {"GPUs", "memory", "disk", "driver", "limits", "versions"} <= set(names)


def test_run_and_downloads_may_share_a_disk(config: Config, tmp_path: Path) -> None:
    shared = facts_of(
        config,
        tmp_path,
        disks={folder: (1, int(1.82 * TIB)) for folder in (config.run.dir, hub_folder())},
    )
    apart = facts_of(
        config,
        tmp_path,
        disks={config.run.dir: (1, int(1.82 * TIB)), hub_folder(): (2, int(0.12 * TIB))},
    )
    assert [name for name, _ in wrong(config, shared)] == ["disk"], (
        "1.80 TiB of the run and 0.11 of the models"
    )
    assert wrong(config, apart) == []


def test_what_the_hub_does_not_have(config: Config, tmp_path: Path) -> None:
    name = hub_name(config.models.teacher)
    assert name is not None
    facts = facts_of(config, tmp_path)
    (only,) = wrong(config, dataclasses.replace(facts, hub={**facts.hub, name: "404 Not Found"}))
    assert "models.teacher" in only[1]
    assert "404 Not Found" in only[1]


def test_what_is_here_is_not_asked_for(config: Config, tmp_path: Path) -> None:
    facts = facts_of(config, tmp_path, hub={})
    before = len(to_fetch(config, facts))
    local_path("hf://Qwen/Qwen3-30B-A3B-Base@main").mkdir(parents=True)
    assert len(to_fetch(config, facts)) == before - 1


def test_nvidia_smis_lines() -> None:
    (gpu,) = parse_gpus("NVIDIA H100 80GB HBM3, 81559, 4, 580.82.07, Disabled\n")
    assert gpu == H100
    (a10,) = parse_gpus("NVIDIA A10G, 23028, 0, 535.1.2, [N/A]\n")
    assert not a10.mig


@pytest.mark.parametrize(
    ("device", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ],
)
def test_devices_by_their_names(device: str, known: str) -> None:
    assert gpu_of_device(device).name == known
