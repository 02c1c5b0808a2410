"""Names on the hub become folders of this machine, and lopd fetch fills them; a stand-in takes the
place of huggingface_hub's download.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lopd.config import Config, load_config
from lopd.config.hub import hub_name, local_path
from lopd.errors import ConfigError, LopdError
from lopd.machine import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = """
[run]
dir = "run"
[models]
teacher = "hf://Qwen/Qwen3-32B@v1"
student = "local/student"
[task]
name = "math"
[prompts]
sft = { file = "hf://datasets/open-thoughts/OpenThoughts3-1.2M@main/data" }
opd = { file = "hf://datasets/open-thoughts/OpenThoughts3-1.2M@main/data" }
eval = { file = "eval.jsonl" }
"""


@pytest.fixture(autouse=True)
def hub_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOPD_HUB", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(TEXT)
    return load_config(path)


class Downloads:
    """As huggingface_hub.snapshot_download: files into local_dir, and a note of the commit beside
    each. calls: what was asked.
    """

    def __init__(self, fail: str = "") -> None:
        self.calls: list[dict[str, Any]] = []
        self._fail = fail

    def __call__(self, **asked: Any) -> str:
        self.calls.append(asked)
        folder = Path(asked["local_dir"])
        names = (
            ["data/train-00000.parquet"]
            if asked["repo_type"] == "dataset"
            else ["config.json", "model.safetensors"]
        )
        for name in names:
            note = folder / ".cache/huggingface/download" / f"{name}.metadata"
            for path, text in ((folder / name, "content"), (note, f"{COMMIT}\netag\n0\n")):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            if self._fail:
                raise ConnectionError(self._fail)
        return str(folder)


def test_names_become_paths_and_paths_names(hub_here: Path) -> None:
    assert local_path("hf://Qwen/Qwen3-8B-Base") == hub_here / "models/Qwen--Qwen3-8B-Base@main"
    path = local_path("hf://datasets/a-b/c.d@49e3418/data/x.parquet")
    assert path == hub_here / "datasets/a-b--c.d@49e3418/data/x.parquet"
    name = hub_name(path)
    assert name is not None
    assert (name.repository, name.revision, name.dataset, name.is_pinned) == (
        "a-b/c.d",
        "49e3418",
        True,
        True,
    )
    assert hub_name(Path("/somewhere/models/a--b@main")) is None


@pytest.mark.parametrize(
    "text",
    [
        "hf://Qwen",
        "hf://a/../b",
        "hf://datasets/x/y@m/../../etc",
        "hf://a/b@",
        "hf://a--b/c",
        "hf://a/b@x/y@z/..",
        "hf://a b/c",
    ],
)
def test_what_is_no_name_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a name on the hub"):
        local_path(text)
    path = tmp_path / "config.toml"
    path.write_text(TEXT.replace("hf://Qwen/Qwen3-32B@v1", text))
    with pytest.raises(ConfigError, match=r"models\.teacher"):
        load_config(path)


def test_a_configuration_names_what_it_wants(config: Config, hub_here: Path) -> None:
    assert config.models.teacher == hub_here / "models/Qwen--Qwen3-32B@v1"
    assert [item.key for item in hub.wanted(config)] == [
        "models.teacher",
        "prompts.sft.file",
        "prompts.opd.file",
    ]


def test_each_repository_is_fetched_once_and_only_data(config: Config) -> None:
    downloads = Downloads()
    lines = []
    rows = hub.fetch(hub.wanted(config), lines.append, snapshot=downloads)
    assert [(call["repo_id"], call["repo_type"], call["revision"]) for call in downloads.calls] == [
        ("Qwen/Qwen3-32B", "model", "v1"),
        ("open-thoughts/OpenThoughts3-1.2M", "dataset", "main"),
    ]
    for call in downloads.calls:
        assert not any(
            pattern.endswith(("py", "bin", "pt", "pkl", "*")) for pattern in call["allow_patterns"]
        ), "neither code nor pickles"
    assert [row["commit"] for row in rows] == [COMMIT, COMMIT]
    assert any(f"write hf://Qwen/Qwen3-32B@{COMMIT}" in line for line in lines), "how to pin it"
    assert (config.models.teacher / "model.safetensors").is_file()
    assert json.loads((config.models.teacher / hub.NOTE).read_text())["commit"] == COMMIT
    again = Downloads()
    assert all(
        row["was_there"] for row in hub.fetch(hub.wanted(config), lines.append, snapshot=again)
    )
    assert again.calls == []


def test_a_broken_download_is_no_model_and_goes_on(config: Config) -> None:
    with pytest.raises(LopdError, match=r"models\.teacher: cannot fetch .*lost the connection"):
        hub.fetch(
            hub.wanted(config), lambda line: None, snapshot=Downloads(fail="lost the connection")
        )
    assert not config.models.teacher.exists()
    partial = config.models.teacher.with_name(config.models.teacher.name + ".partial")
    assert (partial / "config.json").is_file()
    downloads = Downloads()
    hub.fetch(hub.wanted(config), lambda line: None, snapshot=downloads)
    assert downloads.calls[0]["local_dir"] == str(partial), "what has come is not fetched again"
    assert not partial.exists()


def test_a_file_that_the_repository_does_not_have(config: Config) -> None:
    item = hub.named("hf://datasets/open-thoughts/OpenThoughts3-1.2M@main/date")
    with pytest.raises(
        ConfigError,
        match=r"has no file date; remedy: choose one of its files: data/train-00000\.parquet",
    ):
        hub.fetch([item], lambda line: None, snapshot=Downloads())


def test_offline_is_heeded(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LopdError, match="HF_HUB_OFFLINE forbids"):
        hub.fetch(hub.wanted(config), lambda line: None)


def test_a_foreign_folder_in_the_way_stays(config: Config) -> None:
    config.models.teacher.mkdir(parents=True)
    (config.models.teacher / "mine.txt").write_text("mine")
    with pytest.raises(LopdError, match="this folder exists, and lopd did not fetch it"):
        hub.fetch(hub.wanted(config), lambda line: None, snapshot=Downloads())
    assert (config.models.teacher / "mine.txt").read_text() == "mine"
