"""What may be a secret stands in nothing that is written for others to read: artifacts, exports,
jobs, scripts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lopd.artifacts import publish_json
from lopd.config import Config, load_config
from lopd.config.secrets import HIDDEN, holds_secret, scrubbed, scrubbed_inputs
from lopd.errors import ConfigError
from lopd.launching import bridge, make_plan
from lopd.pipeline import config_record, report_changes
from lopd.stages.training import TrainingJob
from sglang_rollout.servers.extra_args import check_extra_args

EXAMPLES = Path(__file__).parents[1] / "examples"
STORAGE = "hicache_storage_backend_extra_config"
SECRET = "hunter2"
EXTRA = {STORAGE: json.dumps({"token": SECRET, "pool": 4}), "schedule_policy": "fcfs"}


def config_of(folder: Path, extra: dict[str, Any]) -> Config:
    config = load_config(EXAMPLES / "tiny_moe.toml", [f"run.dir={folder}"])
    return config.model_copy(
        update={"sglang": config.sglang.model_copy(update={"extra_args": extra})}
    )


@pytest.mark.parametrize(
    "argument",
    [
        {"ssl_keyfile_password": SECRET},
        {"api_key": SECRET},
        {"accessKey": SECRET},
        {"secretAccessKey": SECRET},
        {"AWS_ACCESS_KEY_ID": SECRET},
        {"HF_TOKEN": SECRET},
        {"passphrase": SECRET},
        {"password": 12345},
        {"Authorization": f"Bearer {SECRET}"},
        {"storage": {"deep": [{"auth-token": SECRET}]}},
        {"storage": json.dumps({"deep": {"token": SECRET}})},
        {"storage": f' [{{"inner": "{{\\"secret\\": \\"{SECRET}\\"}}"}}]'},
        {"storage": f"redis://user:{SECRET}@host:6379/0"},
        {"keys": [SECRET, SECRET]},
    ],
)
def test_a_secret_is_hidden_wherever_it_is(argument: dict[str, Any]) -> None:
    hidden = json.dumps(scrubbed({"tp_size": 4, **argument}))
    assert holds_secret(argument)
    assert SECRET not in hidden
    assert "12345" not in hidden
    assert HIDDEN in hidden
    assert scrubbed({"tp_size": 4, **argument})["tp_size"] == 4


@pytest.mark.parametrize(
    "argument",
    [
        {
            "max_total_tokens": 8192,
            "tokenizer_path": "/models/a",
            "speculative_token_map": "/maps/b",
            "keyboard": "x",
        },
        {"ssl_keyfile": "/etc/key.pem", "api_key": None, "hf_token": "", "use_key": True},
        {
            "storage": '{"pool" : 4,  "names": ["a"]}',
            "broken": '{"pool": ',
            "url": "http://host:1/a@b",
            "mail": "user@host",
        },
        {"nested": {"a": [1, 2.5, None]}},
    ],
)
def test_what_is_none_stays_to_the_letter(argument: dict[str, Any]) -> None:
    assert scrubbed(argument) == argument
    assert not holds_secret(argument)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_no_knob_has_a_name_that_would_be_hidden(path: Path) -> None:
    dumped = load_config(path).model_dump(mode="json")
    assert scrubbed(dumped) == dumped


def test_inputs_of_a_manifest_hide_arguments_of_servers_and_tell_options_of_a_task_apart() -> None:
    inputs = {"sglang.extra_args": EXTRA, "task.options": {"answer_key": "a"}, "run.seed": 1}
    hidden = scrubbed_inputs(inputs)
    assert SECRET not in json.dumps(hidden)
    assert {**hidden, "sglang.extra_args": EXTRA} == inputs
    assert scrubbed_inputs({"run.seed": 1}) == {"run.seed": 1}


def test_ranks_get_no_secret_of_the_servers_and_their_file_is_the_owners(tmp_path: Path) -> None:
    config = config_of(tmp_path, EXTRA)
    config = config.model_copy(
        update={"launch": config.launch.model_copy(update={"env": {"HF_TOKEN": SECRET}})}
    )
    assert SECRET in json.dumps(config.model_dump(mode="json"))
    job = TrainingJob("sft", config, tmp_path, tmp_path, tmp_path, "checkpoint", 1, 0)
    raw = job.to_json()
    assert SECRET not in json.dumps(raw)
    again = TrainingJob.from_json(json.loads(json.dumps(raw)))
    assert again.config.sglang.extra_args["schedule_policy"] == "fcfs"
    assert json.loads(again.config.sglang.extra_args[STORAGE]) == {"token": HIDDEN, "pool": 4}
    for private in (True, False):
        publish_json(tmp_path / "job.json", raw, private=private)
        assert bool((tmp_path / "job.json").stat().st_mode & 0o044) is not private


def test_neither_the_runs_config_nor_what_is_said_of_changes_tells_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, EXTRA)
    assert SECRET not in json.dumps(config_record(config))
    publish_json(tmp_path / "config.json", config_record(config_of(tmp_path, {})))
    report_changes(config)
    said = capsys.readouterr().out
    assert "sglang.extra_args" in said
    assert "fcfs" in said
    assert SECRET not in said + (tmp_path / "log.txt").read_text()


def test_a_refused_argument_is_named_without_its_value() -> None:
    with pytest.raises(ConfigError, match=r"ssl_keyfile_password = .\*\*\*") as caught:
        check_extra_args({"ssl_keyfile_password": [SECRET]})
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match=r"schedule_policy = .*fcfs"):
        check_extra_args({"schedule_policy": ["fcfs"]})


# ---- jobs of a cluster ----


@pytest.mark.parametrize(
    "override",
    [
        f"launch.env.HF_TOKEN={SECRET}",
        f"sglang.extra_args.ssl_keyfile_password={SECRET}",
        f"sglang.extra_args={{api_token = '{SECRET}'}}",
    ],
)
def test_an_override_with_a_secret_is_refused_where_it_would_stand_in_scripts(
    override: str,
) -> None:
    config = load_config(EXAMPLES / "tiny_moe.toml")
    assert make_plan(
        config,
        "local",
        config_file=EXAMPLES / "tiny_moe.toml",
        overrides=["sglang.tensor=1", "sft.num_steps=2"],
    ).jobs
    with pytest.raises(
        ConfigError, match="lopd writes the arguments of a launch into the scripts of the jobs"
    ) as caught:
        make_plan(
            config,
            "local",
            config_file=EXAMPLES / "tiny_moe.toml",
            overrides=["sglang.tensor=1", override],
        )
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("env", "mode"), [({"HF_TOKEN": SECRET}, 0o700), ({"HF_HOME": "/data"}, None)]
)
def test_the_folder_of_scripts_with_a_secret_is_the_owners(
    tmp_path: Path, env: dict[str, str], mode: int | None
) -> None:
    config = config_of(tmp_path, {})
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"env": env})})
    plan = make_plan(config, "local", config_file=EXAMPLES / "tiny_moe.toml")
    (tmp_path / "usual").mkdir()
    bridge._make_folder(tmp_path / "launch", plan)
    assert (tmp_path / "launch").stat().st_mode & 0o777 == (
        mode or (tmp_path / "usual").stat().st_mode & 0o777
    )
