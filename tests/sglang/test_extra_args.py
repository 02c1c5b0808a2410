"""sglang.extra_args against what the installed SGLang knows, and against the two ways in which its
versions write it down.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lopd.errors import ConfigError, EngineError
from sglang_rollout.servers import extra_args, server_fields
from sglang_rollout.servers.extra_args import check_extra_args
from sglang_rollout.servers.server_fields import installed_fields, read_fields


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        # a value of another type
        (
            "chunked_prefill_size",
            "4096",
            "chunked_prefill_size = '4096' has a wrong type; limit: a whole number",
        ),
        (
            "chunked_prefill_size",
            4096.5,
            "chunked_prefill_size = 4096.5 has a wrong type; limit: a whole number",
        ),
        (
            "chunked_prefill_size",
            True,
            "chunked_prefill_size = true has a wrong type; limit: a whole number",
        ),
        (
            "disable_radix_cache",
            1,
            "disable_radix_cache = 1 has a wrong type; limit: true or false",
        ),
        ("schedule_conservativeness", "high", "limit: a number"),
        ("cuda_graph_bs_decode", [1, "a"], "limit: a list of a whole number"),
        ("custom_sigquit_handler", "f", "limit: nothing that a TOML file can hold"),
        # none of the choices
        (
            "attention_backend",
            "abacus",
            "attention_backend = 'abacus' is not allowed; limit: one of triton, torch_native, ",
        ),
        ("schedule_policy", "lmp", "limit: one of lpm, random, fcfs"),
        ("moe_a2a_backend", "deep", "limit: one of none, deepep"),
        # what lopd sets itself, under any of its names
        (
            "tp_size",
            2,
            (
                "tp_size is set by lopd; remedy: remove this argument; lopd takes its value "
                "from sglang.tensor"
            ),
        ),
        ("tensor_parallel_size", 2, "tensor_parallel_size (tp_size) is set by lopd"),
        ("--tp-size", 2, "--tp-size (tp_size) is set by lopd"),
        ("tp", 2, "tp (tp_size) is set by lopd"),
        ("model", "x", "model (model_path) is set by lopd"),
        ("device", "cuda", "device is set by lopd"),
        # names that are none any more, or none as ServerArgs has them
        (
            "cuda_graph_bs",
            [1],
            (
                "unknown SGLang argument cuda_graph_bs; remedy: the nearest known argument is "
                "cuda_graph_bs_decode"
            ),
        ),
        ("schedule-policy", "lpm", "the nearest known argument is schedule_policy"),
        # what breaks a server of ours
        ("nnodes", 2, "nnodes = 2 cannot be used: lopd starts a server on one machine"),
        ("ssl_keyfile", "key.pem", "lopd sends requests to its own servers over http"),
        ("load_format", "dummy", "the weights would be random numbers"),
        (
            "delete_ckpt_after_loading",
            True,
            (
                "delete_ckpt_after_loading = true cannot be used: it deletes the model's folder; "
                "remedy: remove this argument"
            ),
        ),
    ],
)
def test_what_no_server_would_take_is_refused_in_one_line(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_extra_args({"schedule_conservativeness": 1, name: value})
    assert str(caught.value).startswith("sglang.extra_args: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {
            "chunked_prefill_size": 4096,
            "disable_radix_cache": True,
            "schedule_conservativeness": 1,
            "cuda_graph_bs_decode": [1, 2],
        },
        {"attention_backend": "triton", "schedule_policy": "lpm", "moe_a2a_backend": "deepep"},
        {"json_model_override_args": '{"a": 1}', "model_loader_extra_config": {"a": 1}},
        {
            "nnodes": 1,
            "disaggregation_mode": "null",
            "load_format": "safetensors",
            "delete_ckpt_after_loading": False,
        },
        {},
    ],
    ids=str,
)
def test_what_a_server_takes_passes(extra: dict[str, Any]) -> None:
    check_extra_args(extra)


def test_choices_that_a_plugin_of_others_may_have_added_are_let_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extra_args, "_has_foreign_plugins", lambda: True)
    check_extra_args({"attention_backend": "abacus"})
    with pytest.raises(ConfigError, match="limit: text in quotes"):
        check_extra_args({"attention_backend": 5})


OF_0_5_22 = {
    "server_args.py": """
class ServerArgs:
    def __post_init__(self): ...
""",
    "arg_groups/choices.py": 'POLICIES = ["lpm", "hrrn"]\n',
    "arg_groups/fields/model.py": """
class Model(msgspec.Struct):
    _NS_PATH = "model"
    model_path: A[str, Arg(help="where", aliases=["--model"])]
    _is_explicit: A[bool, Arg(no_cli=True)] = False
""",
    "arg_groups/fields/schedule.py": """
class Schedule(msgspec.Struct):
    schedule_policy: A[str, Arg(help="which", choices=POLICIES)] = "lpm"
    tp_size: A[int, Arg(aliases=["--tensor-parallel-size"])] = 1
    page_size: A[int | None, "so many"] = None
    hicache: sglang.Mode = None
    enable_watermark: A[bool, "mark text"] = False
""",
}


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    for name, text in OF_0_5_22.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_fields_are_found_where_sglang_0_5_22_has_them(newer: Path) -> None:
    fields = read_fields(newer)
    assert set(fields.types) == {
        "model_path",
        "schedule_policy",
        "tp_size",
        "page_size",
        "hicache",
        "enable_watermark",
    }
    check_extra_args({"schedule_policy": "hrrn", "page_size": 16, "hicache": "whatever"}, fields)
    check_extra_args({"enable_watermark": False}, fields)
    for extra, said in (
        ({"schedule_policy": "fcfs"}, "limit: one of lpm, hrrn"),
        ({"page_size": "16"}, "page_size = '16' has a wrong type; limit: a whole number; remedy"),
        ({"tensor_parallel_size": 2}, "is set by lopd"),
        (
            {"torchao_config": "int4wo"},
            "unknown SGLang argument torchao_config; remedy: the nearest known argument is ",
        ),
        ({"enable_watermark": True}, "enable_watermark = true cannot be used: a server that marks"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_extra_args(extra, fields)
        assert said in str(caught.value)


def test_a_version_that_has_them_nowhere_is_an_error_and_no_traceback(newer: Path) -> None:
    (newer / "arg_groups" / "fields" / "model.py").unlink()
    with pytest.raises(
        EngineError, match="the fields of ServerArgs were not found in the source of SGLang"
    ):
        read_fields(newer)


def test_every_argument_that_lopd_speaks_of_exists() -> None:
    """Else a rule would hold for a name that nobody has. One name is newer than 0.5.17."""
    known = installed_fields().types
    spoken_of = {*extra_args._SET_BY_LOPD, *extra_args._ONLY_VALUE}
    assert spoken_of - set(known) <= {"enable_watermark"}
    assert server_fields.accepts(known["load_format"], "dummy")


def test_plugins_that_sglang_brings_are_not_a_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image has SGLang's gRPC servicer, which is a plugin and adds no choices; with a user's
    own plugin choices are SGLang's matter.
    """
    ours = SimpleNamespace(value="sglang_rollout.cpu.plugin:activate")
    servicer = SimpleNamespace(value="smg_grpc_servicer.sglang.plugin:register")
    monkeypatch.setattr(extra_args, "entry_points", lambda group: [ours, servicer])
    assert not extra_args._has_foreign_plugins()
    monkeypatch.setattr(
        extra_args,
        "entry_points",
        lambda group: [ours, servicer, SimpleNamespace(value="their_backend:register")],
    )
    assert extra_args._has_foreign_plugins()
