"""Arguments that a user adds to a server (sglang.extra_args), held against the installed SGLang's
ServerArgs before anything starts.

SGLang's source is read, not imported: importing it takes seconds and needs a server's environment.
Up to 0.5.19 the fields stand in class ServerArgs, from 0.5.20 on in the classes of
sglang/srt/arg_groups/fields. ServerArgs itself checks neither types nor choices, only its command
line does: a wrong value would be noticed when a server has loaded for a minute and dies, or never.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lopd.config.secrets import scrubbed
from lopd.errors import ConfigError, EngineError

_OURS = {  # field of ServerArgs -> the key of ours that sets it
    "model_path": "models.teacher and models.student",
    "tokenizer_path": "models.teacher and models.student",
    "host": "sglang.host",
    "port": "sglang.port",
    "api_key": "nothing: a random key is made for each server",
    "admin_api_key": "nothing: a random key is made for each server",
    "trust_remote_code": "nothing: code shipped inside a checkpoint is never run",
    "skip_tokenizer_init": "nothing: prompts and responses are token ids",
    "dtype": "sglang.dtype",
    "tp_size": "sglang.tensor",
    "ep_size": "sglang.expert",
    "dp_size": "sglang.data",
    "base_gpu_id": "sglang.replicas: each server takes the next GPUs",
    "weight_version": "nothing: the stage that puts weights in names them",
    "context_length": "sglang.context_length",
    "max_running_requests": "sglang.max_running_requests",
    "max_total_tokens": "sglang.max_total_tokens",
    "mem_fraction_static": "sglang.mem_fraction",
    "enable_deterministic_inference": "sglang.deterministic",
    "device": "this machine: a GPU where there is one, else the CPU",
    "skip_server_warmup": "nothing: the first request of lopd is the warm-up",
}
_NEVER: dict[str, tuple[Any, str]] = {  # field -> the only value that works here, and why
    "is_embedding": (False, "such a server answers no prompt"),
    "encoder_only": (False, "such a server answers no prompt"),
    "disaggregation_mode": ("null", "such a server computes a part of an answer only"),
    "nnodes": (
        1,
        "lopd starts a server on one machine; one over several is yours: sglang.teacher_urls",
    ),
    "node_rank": (
        0,
        "lopd starts a server on one machine; one over several is yours: sglang.teacher_urls",
    ),
    "pp_size": (
        1,
        "GPUs of further pipeline stages are not counted, nor their weights verified; sglang.tensor splits a model too",
    ),
    "ssl_certfile": (None, "lopd asks its own servers over http"),
    "ssl_keyfile": (None, "lopd asks its own servers over http"),
    "smg_grpc_mode": (False, "lopd asks its servers over http"),
    "grpc_mode": (False, "lopd asks its servers over http"),
    "preferred_sampling_params": (
        None,
        "how to sample is said by demonstrate, rollout and evaluate, and stands in their manifests",
    ),
    "checkpoint_engine_wait_weights_before_ready": (
        False,
        "nobody would send the weights that the server waits for",
    ),
    "delete_ckpt_after_loading": (False, "it deletes the model's folder"),
}
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text in quotes",
    "dict": "a table",
    "list": "a list",
}
_NAMES = {
    "Dict": "dict",
    "Mapping": "dict",
    "List": "list",
    "Sequence": "list",
    "set": "list",
    "Tuple": "list",
    "tuple": "list",
}
_PLUGINS = "sglang.srt.plugins"


@dataclass(frozen=True, slots=True)
class ServerFields:
    """Of one SGLang. types: field -> its annotation. choices: where it has some. other_names: of
    flags, as a user may write them -> the field.
    """

    types: Mapping[str, ast.expr] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)


def check_extra_args(extra: Mapping[str, Any], fields: ServerFields | None = None) -> None:
    """ConfigError for a name that is no field of ServerArgs (with the nearest one), one that lopd
    sets itself, a value of another type or none of the choices, and what would break a server of
    ours. fields: of the installed SGLang, if absent.
    """
    if not extra:
        return
    known = fields or installed_fields()
    for name, value in extra.items():
        where, true_name = "sglang.extra_args", _true_name(name, known)
        shown = _shown(scrubbed({name: value})[name])
        if true_name in _OURS:
            also = f" ({true_name})" if true_name != name else ""
            raise ConfigError(
                f"{name}{also} is set by lopd",
                where=where,
                remedy=f"leave it out; it follows {_OURS[true_name]}",
            )
        if name not in known.types:
            nearest = (
                true_name
                if true_name in known.types
                else difflib.get_close_matches(name, known.types, n=1, cutoff=0.0)[0]
            )
            raise ConfigError(
                f"unknown SGLang argument {name}",
                where=where,
                remedy=f"the nearest one is {nearest}",
            )
        if name in _NEVER and value != _NEVER[name][0]:
            raise ConfigError(
                f"{name} = {shown}", where=where, limit=_NEVER[name][1], remedy="leave it out"
            )
        if (name, value) == ("load_format", "dummy"):
            raise ConfigError(
                'load_format = "dummy"',
                where=where,
                limit="the weights would be random numbers",
                remedy="leave it out",
            )
        if not _admits(known.types[name], value) and not (
            isinstance(value, dict) and name.endswith(("_config", "_args", "_kwargs"))
        ):  # taken as JSON too
            raise ConfigError(
                f"{name} = {shown}",
                where=where,
                limit=_said(known.types[name]),
                remedy=f"change it, or see SGLang's {name}",
            )
        chosen = known.choices.get(name, ())
        if (
            chosen
            and any(one not in chosen for one in (value if isinstance(value, list) else [value]))
            and not _others_plugins()
        ):
            limit = f"one of {', '.join(map(str, chosen))}"
            raise ConfigError(
                f"{name} = {shown}",
                where=where,
                limit=limit,
                remedy="choose one of these, or leave it out",
            )


def _true_name(name: str, known: ServerFields) -> str:
    """The field that is meant by a name as SGLang's command line has it: --tp-size, tp,
    tensor_parallel_size.
    """
    bare = name.lstrip("-").replace("-", "_")
    meant = (bare, known.other_names.get(bare, bare), f"{bare}_size")
    return next((one for one in meant if one in known.types), name)


def known_fields() -> tuple[str, ...]:
    """Names of the fields of the installed SGLang's ServerArgs."""
    return tuple(installed_fields().types)


@cache
def installed_fields() -> ServerFields:
    """EngineError: SGLang is not installed, or is none of the versions that can be read."""
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        raise EngineError(
            "SGLang is not installed", remedy="install requirements/cpu.lock or the gpu extra"
        )
    return read_fields(Path(package.origin).parent / "srt")


def read_fields(source: Path) -> ServerFields:
    """source: the folder sglang/srt. EngineError: the fields are nowhere there."""
    main, parts = source / "server_args.py", sorted((source / "arg_groups" / "fields").glob("*.py"))
    types: dict[str, ast.expr] = {}
    choices: dict[str, tuple[Any, ...]] = {}
    other_names: dict[str, str] = {}
    constants: dict[str, tuple[Any, ...]] = {}
    for path in (source / "arg_groups" / "choices.py", *parts, main):
        if not path.is_file():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants.update(_constants(tree))
        other_names.update(_deprecated_flags(tree))
        for name, annotation in _annotated(tree, only="ServerArgs" if path == main else None):
            types[name], about = _split(annotation)
            given = about.get("choices")
            found = constants.get(given.id) if isinstance(given, ast.Name) else _literal(given)
            if found:
                choices[name] = found
            other_names.update(
                {
                    alias.lstrip("-").replace("-", "_"): name
                    for alias in _literal(about.get("aliases")) or ()
                }
            )
    if "model_path" not in types:
        raise EngineError(
            "the fields of ServerArgs are not where they were",
            where=str(source),
            remedy="use a supported SGLang version (0.5.17 to 0.5.23)",
        )
    return ServerFields(
        types, choices, {name: target for name, target in other_names.items() if name not in types}
    )


# ---- reading SGLang's source ----------------------------------------------------------------------------------------------------------------------


def _annotated(tree: ast.Module, only: str | None) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and only in (None, node.name):
            for item in node.body:
                if (
                    isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and not item.target.id.startswith("_")
                ):
                    yield item.target.id, item.annotation


def _split(annotation: ast.expr) -> tuple[ast.expr, dict[str, ast.expr]]:
    """``A[type, Arg(choices=..., aliases=...)]`` as the type and the keywords; another annotation
    is the type.
    """
    if (
        isinstance(annotation, ast.Subscript)
        and ast.unparse(annotation.value) in ("A", "Annotated")
        and isinstance(annotation.slice, ast.Tuple)
    ):
        kind, *rest = annotation.slice.elts
        return kind, {
            word.arg: word.value
            for call in rest
            if isinstance(call, ast.Call)
            for word in call.keywords
            if word.arg
        }
    return annotation, {}


def _constants(tree: ast.Module) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and (values := _literal(node.value))
        ):
            yield node.targets[0].id, values


def _deprecated_flags(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """``add_argument("--cuda-graph-bs", dest="cuda_graph_bs_decode")``: the old name of a field."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
        ):
            named = {
                word.arg: word.value.value
                for word in node.keywords
                if isinstance(word.value, ast.Constant)
            }
            flags = [
                one.value
                for one in node.args
                if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
            if isinstance(named.get("dest"), str):
                yield from (
                    (flag.lstrip("-").replace("-", "_"), str(named["dest"])) for flag in flags
                )


def _literal(node: ast.expr | None) -> tuple[Any, ...] | None:
    """A list, tuple or set of constants."""
    if isinstance(node, ast.List | ast.Tuple | ast.Set) and all(
        isinstance(item, ast.Constant) for item in node.elts
    ):
        return tuple(item.value for item in node.elts if isinstance(item, ast.Constant))
    return None


# ---- values against annotations ---------------------------------------------------------------------------------------------------------------------


def _admits(kind: ast.expr, value: Any) -> bool:
    """Whether a value as TOML has it is of this type; true for a type that is not known here."""
    if isinstance(kind, ast.Constant):
        return kind.value is not None
    if isinstance(kind, ast.BinOp):
        return _admits(kind.left, value) or _admits(kind.right, value)
    if isinstance(kind, ast.Subscript):
        outer, inner = (
            ast.unparse(kind.value).rpartition(".")[2],
            kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice],
        )
        if outer in ("Optional", "Union"):
            return any(_admits(one, value) for one in inner)
        if outer == "Literal":
            return any(
                isinstance(one, ast.Constant)
                and (type(one.value), one.value) == (type(value), value)
                for one in inner
            )
        if _NAMES.get(outer, outer) == "list":
            return isinstance(value, list) and all(_admits(inner[0], item) for item in value)
        return isinstance(value, dict) if _NAMES.get(outer, outer) == "dict" else True
    name = ast.unparse(kind).rpartition(".")[2]
    match _NAMES.get(name, name):
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "dict" | "list" as container:
            return type(value).__name__ == container
        case "Callable":
            return False
    return True


def _said(kind: ast.expr) -> str:
    """A type in words."""
    if isinstance(kind, ast.BinOp):
        return " or ".join(
            _said(one)
            for one in (kind.left, kind.right)
            if not (isinstance(one, ast.Constant) and one.value is None)
        )
    if isinstance(kind, ast.Subscript):
        outer, inner = (
            ast.unparse(kind.value).rpartition(".")[2],
            kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice],
        )
        if outer in ("Optional", "Union"):
            return " or ".join(dict.fromkeys(_said(one) for one in inner))
        if outer == "Literal":
            return f"one of {', '.join(ast.unparse(one).strip(chr(39)) for one in inner)}"
        if _NAMES.get(outer, outer) == "list":
            return f"a list of {_said(inner[0])}"
        kind = kind.value
    name = ast.unparse(kind).rpartition(".")[2]
    return (
        "nothing that a TOML file can hold"
        if name == "Callable"
        else _WORDS.get(_NAMES.get(name, name), name)
    )


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _others_plugins() -> bool:
    """Whether plugins are installed that may add choices: not ours, and none that SGLang itself
    brings (its gRPC servicer, which the image has).
    """
    return any(
        not one.value.startswith(("sglang_rollout.", "smg_grpc_servicer."))
        for one in entry_points(group=_PLUGINS)
    )
