"""From a TOML file and dotted overrides (``distill.optimizer.lr=1e-4``) to one frozen ``Config``.

Unknown keys are refused with the nearest right one. Relative paths are relative to the TOML file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pydantic
from pydantic import BaseModel

from lopd.config.base import Contradiction
from lopd.config.sections import Config
from lopd.errors import ConfigError


class InvalidConfig(ConfigError):
    """Several mistakes of one configuration: its line is the first's and names the others."""

    def __init__(self, mistakes: Sequence[ConfigError], keys: Sequence[str]) -> None:
        first, self.mistakes = mistakes[0], tuple(mistakes)
        more = (
            f" (and {len(mistakes) - 1} more: {', '.join(keys[1:6])}; lopd check tells all)"
            if len(mistakes) > 1
            else ""
        )
        super().__init__(
            first.what + more, where=first.where, limit=first.limit, remedy=first.remedy
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Config from a TOML file and ``section.key=value`` overrides (values in TOML syntax; a bare
    word is a string).

    ConfigError: missing file, syntax. InvalidConfig: unknown keys (with the nearest right ones),
    wrong types, out of bounds.
    """
    return config_from(_read_toml(path), overrides, where=str(path), base=path)


def config_from(
    table: dict[str, Any], overrides: Sequence[str], *, where: str, base: Path
) -> Config:
    """Config from a table as in TOML. Relative paths are relative to the folder of ``base``, a
    file. Errors: see load_config; where: what they name.
    """
    overridden = {_apply_override(table, override) for override in overrides}
    try:
        config = Config.model_validate(table)
    except pydantic.ValidationError as error:
        found = error.errors()
        keys = [".".join(str(part) for part in problem["loc"]) for problem in found]
        places = [
            "command line"
            if any(f"{name}.".startswith(f"{key}.") for name in overridden)
            else where
            for key in keys
        ]
        raise InvalidConfig(
            [_explain(*about) for about in zip(found, keys, places, strict=True)], keys
        ) from None
    try:
        folder = base.resolve().parent
    except OSError as error:
        raise ConfigError(
            f"the current folder is gone ({error.strerror})",
            where=where,
            remedy="go to a folder that exists",
        ) from None
    return cast(Config, _absolute(config, folder))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if "=" in path.name:
            remedy = (
                "the TOML file comes first, overrides after it: lopd VERB CONFIG section.key=value"
            )
            raise ConfigError(
                f"{str(path)!r} is an override, where a TOML file is needed",
                where="command line",
                remedy=remedy,
            ) from None
        raise ConfigError(
            "no such file",
            where=str(path),
            remedy="give the path of a TOML file, for example examples/tiny_moe.toml",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text (byte {error.start})", where=str(path), remedy="save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not TOML, or a path with a null byte
        what = (
            f"cannot be read ({error.strerror})"
            if isinstance(error, OSError)
            else f"not valid TOML: {error}"
        )
        raise ConfigError(
            what, where=str(path), remedy="give a TOML file, for example examples/tiny_moe.toml"
        ) from None


def _apply_override(table: dict[str, Any], override: str) -> str:
    """Puts the value into the table and returns its key."""
    key, equals, text = override.partition("=")
    *sections, last = parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(
            f"override {override!r:.120} is not section.key=value",
            where="command line",
            remedy="write for example distill.num_steps=8",
        )
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"{key.strip()}: {section} is a value, not a section",
                where="command line",
                remedy=f"see: lopd knobs {sections[0]}",
            )
    table[last] = value
    return ".".join(parts)


def known_keys(
    model: type[BaseModel] = Config, prefix: str = ""
) -> dict[str, pydantic.fields.FieldInfo]:
    """Every dotted key with its field, depth first."""
    keys: dict[str, pydantic.fields.FieldInfo] = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.update(known_keys(field.annotation, f"{prefix}{name}."))
    return keys


_ELSEWHERE = {  # what other programs call it -> name of the knob
    "tp": "tensor", "tp_size": "tensor", "tensor_parallel_size": "tensor", "pp": "pipeline", "pipeline_parallel_size": "pipeline", "ep": "expert",
    "ep_size": "expert", "expert_parallel_size": "expert", "dp": "data", "dp_size": "data", "cp": "context", "urls": "student_urls", "url": "student_urls",
    "teacher_url": "teacher_urls", "student_url": "student_urls", "mem_fraction_static": "mem_fraction", "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens", "n": "samples_per_prompt", "num_samples": "samples_per_prompt", "learning_rate": "lr", "max_model_len": "context_length",
    "max_seq_len": "context_length", "steps": "num_steps", "backend": "transport", "method": "transport",
}  # fmt: skip


def nearest_key(key: str) -> str:
    """The known key that was probably meant: what another program calls so, one of the same name in
    another section, else a like one of the same section, else the most like.
    """
    section, _, name = key.rpartition(".")
    known = [*known_keys()]
    if (meant := f"{section}.{_ELSEWHERE.get(name, '')}") in known:
        return meant
    namesakes = [other for other in known if other.rpartition(".")[2] == name]
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    for candidates, likeness in ((namesakes, 0.0), (siblings, 0.5), (known, 0.0)):
        found = difflib.get_close_matches(key, candidates, n=1, cutoff=likeness)
        if found:
            return found[0]
    raise AssertionError("the last candidates always match")


_NEEDED = {  # pydantic's name of a wrong type -> what is needed
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "string_type": "text in quotes", "path_type": "a path in quotes", "dict_type": "a table { key = value }",
    "list_type": 'a list ["...", "..."]',
}  # fmt: skip
_BOUNDS = {
    "greater_than_equal": (">=", "ge"),
    "greater_than": (">", "gt"),
    "less_than_equal": ("<=", "le"),
    "less_than": ("<", "lt"),
}


def _explain(problem: Mapping[str, Any], key: str, where: str) -> ConfigError:
    """One of pydantic's findings as a line of ours."""
    kind, context, value = problem["type"], problem.get("ctx", {}), _shown(problem["input"])
    if kind == "extra_forbidden":
        return ConfigError(
            f"unknown key {key}", where=where, remedy=f"the nearest known key is {nearest_key(key)}"
        )
    cause = context.get("error")
    if isinstance(cause, Contradiction):
        return ConfigError(
            f"{key}.{cause.what}", where=where, limit=cause.limit, remedy=cause.remedy
        )
    known, knob = known_keys(), key
    while knob not in known:  # an item of a list or a table: models.teachers.math
        knob = knob.rpartition(".")[0]
    field = known[knob]
    meaning = field.description or f"a section with the keys {', '.join(_children(key))}"
    if kind == "missing":
        return ConfigError(f"{key} is missing", where=where, remedy=f"add it: {meaning}")
    if kind == "model_type":
        remedy = f"set its keys one by one, for example {key}.{_children(key)[0]}"
        return ConfigError(
            f"{key} = {value} is no section", where=where, limit=meaning, remedy=remedy
        )
    if kind in _BOUNDS:
        sign, bound = _BOUNDS[kind]
        limit = f"{sign} {context[bound]:g}"
    else:
        limit = _NEEDED.get(kind) or str(
            context.get("expected") or context.get("error") or problem["msg"]
        ).replace("False", "false")
    refused = "is not allowed" if kind == "value_error" else ""
    return ConfigError(
        f"{key} = {value} {refused}".rstrip(),
        where=where,
        limit=f"not {limit}" if refused else limit,
        remedy=f"change it ({meaning})",
    )


def _shown(value: Any) -> str:
    """A value as in TOML, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _children(section: str) -> list[str]:
    return [name.rpartition(".")[2] for name in known_keys() if name.rpartition(".")[0] == section]


def _absolute(model: BaseModel, base: Path) -> BaseModel:
    update: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            update[name] = _absolute(value, base)
        elif isinstance(value, Path):
            update[name] = value if value.is_absolute() else (base / value).resolve()
        elif isinstance(value, dict) and any(isinstance(inner, Path) for inner in value.values()):
            update[name] = {key: (base / inner).resolve() for key, inner in value.items()}
    return model.model_copy(update=update)


def result_keys(config: BaseModel, sections: Sequence[str]) -> dict[str, Any]:
    """The knobs under these dotted sections that decide a result (speed_only ones left out), flat,
    as JSON values.
    """
    flat: dict[str, Any] = {}
    fields = known_keys()
    dumped = config.model_dump(mode="json")

    def visit(value: Any, key: str) -> None:
        field = fields.get(key)
        extra = field.json_schema_extra if field is not None else None
        if isinstance(extra, Mapping) and extra.get("speed_only"):
            return
        if isinstance(value, Mapping) and (
            field is None or not key.endswith(("options", "extra_args"))
        ):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}")
        else:
            flat[key] = value

    for section in sections:
        value: Any = dumped
        for part in section.split("."):
            value = value[part]
        visit(value, section)
    return flat
