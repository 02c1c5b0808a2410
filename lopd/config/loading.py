"""Makes one frozen ``Config`` from a TOML file and overrides (``distill.optimizer.lr=1e-4``).

An unknown key is refused, and the message names the nearest known one. A relative path is relative
to the TOML file.
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
    """One or more mistakes of one configuration.

    Its line is that of the first mistake, and it names the keys of the others.

    Args:
        mistakes: At least one mistake, in the order of the sections.
        keys: The dotted key of each mistake.
    """

    def __init__(self, mistakes: Sequence[ConfigError], keys: Sequence[str]) -> None:
        # The first in the order of the sections, which is the order in which a user reads the file.
        first = mistakes[0]
        self.mistakes = tuple(mistakes)
        more = ""
        if len(mistakes) > 1:
            # Five further keys are enough for one line on a screen.
            others = ", ".join(keys[1:6])
            more = f" (and {len(mistakes) - 1} more: {others}; lopd check shows all)"
        super().__init__(
            first.what + more, where=first.where, limit=first.limit, remedy=first.remedy
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply the overrides.

    Args:
        path: The TOML file.
        overrides: Texts ``section.key=value``. A value has TOML syntax; a bare word is a string.

    Raises:
        ConfigError: The file is missing, or a syntax is wrong.
        InvalidConfig: A key is unknown, or a value has the wrong type or is out of bounds.
    """
    path = Path(path)
    return config_from(_read_toml(path), overrides, where=str(path), base=path)


def config_from(
    table: dict[str, Any], overrides: Sequence[str], *, where: str, base: Path
) -> Config:
    """Make the configuration from a table, as TOML gives it. The table is changed.

    Args:
        table: Nested tables of the values.
        overrides: See load_config.
        where: The name of the source, for messages.
        base: A file. Relative paths are relative to its folder.

    Raises:
        ConfigError: See load_config.
    """
    # Overrides change the table before it is checked, so that file and command line have the same
    # rules.
    overridden = {_apply_override(table, override) for override in overrides}
    try:
        config = Config.model_validate(table)
    except pydantic.ValidationError as error:
        # All mistakes at once: a user who has five of them should not need five runs.
        found = error.errors()
        keys = [".".join(str(part) for part in problem["loc"]) for problem in found]
        mistakes = []
        for problem, key in zip(found, keys, strict=True):
            # A mistake in an override stands on the command line, not in the file.
            is_override = any(f"{name}.".startswith(f"{key}.") for name in overridden)
            mistakes.append(_explain(problem, key, "command line" if is_override else where))
        raise InvalidConfig(mistakes, keys) from None
    try:
        folder = base.resolve().parent
    except OSError as error:
        # resolve() of a relative path asks for the current folder, which may have been removed.
        raise ConfigError(
            f"the current folder does not exist any more ({error.strerror})",
            where=where,
            remedy="change to a folder that exists, then run the command again",
        ) from None
    # Absolute from here on: ranks and workers may run in other folders.
    return cast(Config, _absolute(config, folder))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # utf-8-sig: some editors on Windows write a byte order mark, which TOML does not allow.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if "=" in path.name:
            remedy = "give the TOML file first, then the overrides"
            raise ConfigError(
                f"{str(path)!r} is an override, but a TOML file is needed here",
                where="command line",
                remedy=f"{remedy}: lopd VERB CONFIG section.key=value",
            ) from None
        raise ConfigError(
            "no such file",
            where=str(path),
            remedy="give the path of a TOML file, for example examples/tiny_moe.toml",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the file is not UTF-8 text (byte {error.start})",
            where=str(path),
            remedy="save the file as UTF-8",
        ) from None
    except (OSError, ValueError) as error:
        # A ValueError means that the text is not TOML, or that the path has a null byte.
        what = f"the file is not valid TOML: {error}"
        if isinstance(error, OSError):
            what = f"cannot be read ({error.strerror})"
        raise ConfigError(
            what,
            where=str(path),
            remedy="correct the file, or give another one, for example examples/tiny_moe.toml",
        ) from None


def _apply_override(table: dict[str, Any], override: str) -> str:
    """Put the value into the table, and return its key."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    *sections, last = parts
    # "a..b=1" has an empty part.
    if not equals or not all(parts):
        raise ConfigError(
            f"the override {override!r:.120} is not of the form section.key=value",
            where="command line",
            remedy="write for example distill.num_steps=8",
        )
    try:
        # Text with a line break could hold further keys. Then it is no value, but a string.
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        # A section that the file does not have may be made by an override.
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
    """Return every dotted key with its field, depth first.

    Args:
        model: The section whose keys are listed.
        prefix: The text before each key, for example "distill.".
    """
    keys: dict[str, pydantic.fields.FieldInfo] = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = field
        # A section of its own, whose knobs have longer keys.
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.update(known_keys(field.annotation, f"{prefix}{name}."))
    return keys


# What other programs call a knob -> the knob's name here. difflib alone would not find it, because
# the words have few letters in common.
_ELSEWHERE = {
    # sizes of a layout
    "tp": "tensor", "tp_size": "tensor", "tensor_parallel_size": "tensor",
    "pp": "pipeline", "pipeline_parallel_size": "pipeline",
    "ep": "expert", "ep_size": "expert", "expert_parallel_size": "expert",
    "dp": "data", "dp_size": "data", "cp": "context",
    # servers
    "urls": "student_urls", "url": "student_urls", "student_url": "student_urls",
    "teacher_url": "teacher_urls", "mem_fraction_static": "mem_fraction",
    "max_model_len": "context_length", "max_seq_len": "context_length",
    # sampling
    "max_tokens": "max_new_tokens", "max_length": "max_new_tokens",
    "n": "samples_per_prompt", "num_samples": "samples_per_prompt",
    # training and weight sync
    "learning_rate": "lr", "steps": "num_steps", "backend": "transport", "method": "transport",
}  # fmt: skip


def nearest_key(key: str) -> str:
    """Return the known key that a user probably meant.

    It is, in this order: the knob that another program calls so; a knob of the same name in another
    section; a similar knob of the same section; the most similar of all knobs.
    """
    section, _, name = key.rpartition(".")
    known = [*known_keys()]
    if (meant := f"{section}.{_ELSEWHERE.get(name, '')}") in known:
        return meant
    namesakes = [other for other in known if other.rpartition(".")[2] == name]
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    # The number is the least likeness, from 0 to 1. At 0 anything matches, so the loop always
    # finds a key.
    for candidates, likeness in ((namesakes, 0.0), (siblings, 0.5), (known, 0.0)):
        found = difflib.get_close_matches(key, candidates, n=1, cutoff=likeness)
        if found:
            return found[0]
    raise AssertionError("the last candidates always match")


# Pydantic's name of a wrong type -> what is needed, in words of TOML.
_NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "path_type": "a path in quotes",
    "dict_type": "a table { key = value }",
    "list_type": 'a list ["...", "..."]',
}
# Pydantic's name of a crossed bound -> the words for it, and where the error holds the bound.
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def _explain(problem: Mapping[str, Any], key: str, where: str) -> ConfigError:
    """Turn one finding of pydantic into an error with what, where, limit and remedy."""
    kind = problem["type"]
    context = problem.get("ctx", {})
    value = _shown(problem["input"])
    if kind == "extra_forbidden":
        return ConfigError(
            f"unknown key {key}", where=where, remedy=f"the nearest known key is {nearest_key(key)}"
        )
    # A validator of a section has said what is wrong, and what to do.
    cause = context.get("error")
    if isinstance(cause, Contradiction):
        # What is wrong between sections has no section of its own.
        what = f"{key}.{cause.what}" if key else cause.what
        return ConfigError(what, where=where, limit=cause.limit, remedy=cause.remedy)
    known = known_keys()
    knob = key
    # The key may name an item of a list or a table (models.teachers.math). The table itself has
    # the description.
    while knob not in known:
        knob = knob.rpartition(".")[0]
    field = known[knob]
    meaning = (field.description or "").removesuffix(".")
    meaning = meaning or f"a section with the keys {', '.join(_children(key))}"
    if kind == "missing":
        return ConfigError(f"{key} is missing", where=where, remedy=f"add this key: {meaning}")
    # A value stands where a section is needed, for example sft.optimizer = 3.
    if kind == "model_type":
        remedy = f"set its keys one by one, for example {key}.{_children(key)[0]}"
        return ConfigError(
            f"{key} = {value} is not a section", where=where, limit=meaning, remedy=remedy
        )
    remedy = f"change {key} ({meaning})"
    # A validator of one knob says what is wrong ("the path is empty"), not what is right.
    if kind == "value_error":
        what = f"{key} = {value} is not allowed: {context['error']}"
        return ConfigError(what, where=where, remedy=remedy)
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        limit = f"{words} {context[bound]:g}"
    else:
        # "expected" lists the choices of a Literal. TOML writes false in small letters.
        told = str(context.get("expected") or context.get("error") or problem["msg"])
        limit = _NEEDED.get(kind) or told.replace("False", "false")
    what = f"{key} = {value} is not allowed"
    return ConfigError(what, where=where, limit=limit, remedy=remedy)


def _shown(value: Any) -> str:
    """Return a value as TOML writes it, cut if it is long."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _children(section: str) -> list[str]:
    return [name.rpartition(".")[2] for name in known_keys() if name.rpartition(".")[0] == section]


def _absolute(model: BaseModel, base: Path) -> BaseModel:
    """Return a copy whose relative paths are relative to ``base``."""
    update: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            update[name] = _absolute(value, base)
        elif isinstance(value, Path):
            # resolve() also removes "..", so that two spellings of one folder are equal in
            # manifests.
            update[name] = value if value.is_absolute() else (base / value).resolve()
        elif isinstance(value, dict) and any(isinstance(inner, Path) for inner in value.values()):
            update[name] = {key: (base / inner).resolve() for key, inner in value.items()}
    return model.model_copy(update=update)


def result_keys(config: BaseModel, sections: Sequence[str]) -> dict[str, Any]:
    """Return the knobs that decide a result, as one flat table of JSON values.

    A stage's manifest keeps this table; a stage is reused while it stays equal. Knobs that are
    marked SPEED_ONLY are left out.

    Args:
        config: The whole configuration.
        sections: Dotted names of sections, for example "distill.optimizer".
    """
    flat: dict[str, Any] = {}
    fields = known_keys()
    # As JSON, because the manifest that it is compared with was read from JSON.
    dumped = config.model_dump(mode="json")

    def visit(value: Any, key: str) -> None:
        field = fields.get(key)
        extra = field.json_schema_extra if field is not None else None
        # Such a knob changes no result, so a change of it must not make a stage run again.
        if isinstance(extra, Mapping) and extra.get("speed_only"):
            return
        # Keys inside task.options and sglang.extra_args are no knobs: such a table is one value.
        is_one_value = field is not None and key.endswith(("options", "extra_args"))
        if isinstance(value, Mapping) and not is_one_value:
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
