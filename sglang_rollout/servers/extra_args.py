"""The check of sglang.extra_args: arguments that a user adds to the servers that lopd starts.

ServerArgs itself checks neither types nor choices. Only SGLang's command line does, and lopd does
not use it. Without this check a wrong value would be found when a server has loaded for a minute
and then dies, or never.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from lopd.config.secrets import scrubbed
from lopd.errors import ConfigError
from sglang_rollout.servers.server_fields import (
    ServerFields,
    accepts,
    installed_fields,
    type_in_words,
)

_WHERE = "sglang.extra_args"
_RANDOM_KEY = "nothing: a random key is made for each server"
# Field of ServerArgs -> the key of the configuration that sets it.
_SET_BY_LOPD = {
    "model_path": "models.teacher and models.student",
    "tokenizer_path": "models.teacher and models.student",
    "host": "sglang.host",
    "port": "sglang.port",
    "api_key": _RANDOM_KEY,
    "admin_api_key": _RANDOM_KEY,
    "trust_remote_code": "nothing: code shipped inside a checkpoint is never run",
    "skip_tokenizer_init": "nothing: prompts and responses are token ids",
    "dtype": "sglang.dtype",
    "tp_size": "sglang.tensor",
    "ep_size": "sglang.expert",
    "dp_size": "sglang.data",
    "base_gpu_id": "sglang.replicas: each server takes the next GPUs",
    "weight_version": "nothing: the stage that loads the weights names them",
    "context_length": "sglang.context_length",
    "max_running_requests": "sglang.max_running_requests",
    "max_total_tokens": "sglang.max_total_tokens",
    "mem_fraction_static": "sglang.mem_fraction",
    "enable_deterministic_inference": "sglang.deterministic",
    "device": "this machine: a GPU if it has one, otherwise the CPU",
    "skip_server_warmup": "nothing: the first request of lopd is the warm-up",
}
_NO_ANSWERS = "such a server answers no prompt"
_ONE_MACHINE = (
    "lopd starts a server on one machine; start one over several machines yourself and name it in "
    "sglang.teacher_urls"
)
_PLAIN_HTTP = "lopd sends requests to its own servers over http"
# Field of ServerArgs -> the only value that works with lopd, and the reason.
_ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "is_embedding": (False, _NO_ANSWERS),
    "encoder_only": (False, _NO_ANSWERS),
    "disaggregation_mode": ("null", "such a server computes only a part of an answer"),
    "nnodes": (1, _ONE_MACHINE),
    "node_rank": (0, _ONE_MACHINE),
    "pp_size": (
        1,
        "the GPUs of further pipeline stages are not counted and their weights are not verified; "
        "sglang.tensor splits a model too",
    ),
    "ssl_certfile": (None, _PLAIN_HTTP),
    "ssl_keyfile": (None, _PLAIN_HTTP),
    "smg_grpc_mode": (False, _PLAIN_HTTP),
    "grpc_mode": (False, _PLAIN_HTTP),
    "preferred_sampling_params": (
        None,
        "the sections demonstrate, rollout and evaluate set the sampling, and their manifests "
        "record it",
    ),
    "checkpoint_engine_wait_weights_before_ready": (
        False,
        "the server would wait for weights that nobody sends",
    ),
    "delete_ckpt_after_loading": (False, "it deletes the model's folder"),
    # Since 0.5.22. Without it SGLang refuses watermark_config.
    "enable_watermark": (
        False,
        "a server that marks its text chooses tokens by a key, so its responses are no independent "
        "samples of the model",
    ),
}
_PLUGINS = "sglang.srt.plugins"
# SGLang parses JSON text for these fields, so a table is as good as text.
_JSON_ENDINGS = ("_config", "_args", "_kwargs")
_MAX_SHOWN = 80


def check_extra_args(extra: Mapping[str, Any], fields: ServerFields | None = None) -> None:
    """Check the arguments that a user adds to a server.

    Args:
        extra: The table sglang.extra_args: field of ServerArgs -> value.
        fields: The fields to check against. The default is those of the installed SGLang.

    Raises:
        ConfigError: A name is no field of ServerArgs (the message gives the nearest field), lopd
            sets the field itself, a value has another type or is none of the choices, or the value
            would break a server of lopd.
    """
    # Without extra arguments SGLang's source is not read: `lopd check` stays fast.
    if not extra:
        return
    known = fields or installed_fields()
    for name, value in extra.items():
        # The name comes first, because only a known name has a type. What lopd cannot work with
        # comes before the type: its message says more.
        _check_name(name, known)
        # The value may be a secret, and an error message ends on the screen and in logs.
        shown = _shown(scrubbed({name: value})[name])
        _check_value(name, value, shown)
        _check_type(name, value, shown, known)


def _check_name(name: str, known: ServerFields) -> None:
    true_name = _true_name(name, known)
    # This comes before the test for an unknown name. A user who writes "tp" must read that lopd
    # sets tp_size, and not that the nearest name is tp_size.
    if true_name in _SET_BY_LOPD:
        also = f" ({true_name})" if true_name != name else ""
        raise ConfigError(
            f"{name}{also} is set by lopd",
            where=_WHERE,
            remedy=f"remove this argument; lopd takes its value from {_SET_BY_LOPD[true_name]}",
        )
    if name in known.types:
        return
    if true_name in known.types:
        nearest = true_name
    else:
        # With this cutoff there is always a nearest name.
        nearest = difflib.get_close_matches(name, known.types, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"unknown SGLang argument {name}",
        where=_WHERE,
        remedy=f"the nearest known argument is {nearest}",
    )


def _check_value(name: str, value: Any, shown: str) -> None:
    """Refuse what SGLang accepts and lopd cannot work with."""
    # The one value that works may be given. It changes nothing.
    if name in _ONLY_VALUE and value != _ONLY_VALUE[name][0]:
        raise ConfigError(
            f"{name} = {shown} cannot be used: {_ONLY_VALUE[name][1]}",
            where=_WHERE,
            remedy="remove this argument",
        )
    # This is one of SGLang's choices, so the check of the choices would let it pass.
    if (name, value) == ("load_format", "dummy"):
        raise ConfigError(
            'load_format = "dummy" cannot be used: the weights would be random numbers',
            where=_WHERE,
            remedy="remove this argument",
        )


def _check_type(name: str, value: Any, shown: str, known: ServerFields) -> None:
    is_json = isinstance(value, dict) and name.endswith(_JSON_ENDINGS)
    if not accepts(known.types[name], value) and not is_json:
        raise ConfigError(
            f"{name} = {shown} has a wrong type",
            where=_WHERE,
            limit=type_in_words(known.types[name]),
            remedy=f"change the value of {name}: see this argument in the documentation of SGLang",
        )
    choices = known.choices.get(name, ())
    # A field with a list of values has the same choices for each of them.
    values = value if isinstance(value, list) else [value]
    # A plugin can add choices when a server starts, and the source does not show them.
    if choices and any(one not in choices for one in values) and not _has_foreign_plugins():
        raise ConfigError(
            f"{name} = {shown} is not allowed",
            where=_WHERE,
            limit=f"one of {', '.join(map(str, choices))}",
            remedy="choose one of these values, or remove this argument",
        )


def _true_name(name: str, known: ServerFields) -> str:
    """Return the field that a name of SGLang's command line means: --tp-size, tp, and so on."""
    # Users copy arguments from a command line, where a field has dashes.
    bare = name.lstrip("-").replace("-", "_")
    # The field itself, another name that SGLang has for it, or the short name of a size.
    candidates = (bare, known.other_names.get(bare, bare), f"{bare}_size")
    return next((one for one in candidates if one in known.types), name)


def _shown(value: Any) -> str:
    """Return a value as TOML has it, cut to the length that a message has room for."""
    # TOML writes true and false in small letters, and Python does not.
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _has_foreign_plugins() -> bool:
    """Return whether a plugin is installed that may add choices.

    Our own plugin adds none, and neither does SGLang's gRPC servicer, which the image has.
    """
    return any(
        not one.value.startswith(("sglang_rollout.", "smg_grpc_servicer."))
        for one in entry_points(group=_PLUGINS)
    )
