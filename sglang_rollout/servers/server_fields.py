"""The fields of the installed ServerArgs of SGLang: their types, choices and other names.

SGLang's source is read, not imported. An import takes seconds and needs a server's environment. Up
to 0.5.19 the fields stand in class ServerArgs. From 0.5.20 on they stand in the classes of
sglang/srt/arg_groups/fields.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lopd.errors import EngineError

# The types in the words of TOML, for a reader who does not know Python.
_IN_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text in quotes",
    "dict": "a table",
    "list": "a list",
}
# Annotation -> the type that a TOML value has. TOML has one kind of table and one kind of list.
_AS_IN_TOML = {
    "Dict": "dict",
    "Mapping": "dict",
    "List": "list",
    "Sequence": "list",
    "set": "list",
    "Tuple": "list",
    "tuple": "list",
}


@dataclass(frozen=True, slots=True)
class ServerFields:
    """The fields of ServerArgs in one version of SGLang.

    Attributes:
        types: The annotation of each field, as a syntax tree.
        choices: The values that a field accepts, for the fields that have a fixed list of them.
        other_names: The other names of a field on SGLang's command line.
    """

    types: Mapping[str, ast.expr] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)


def known_fields() -> tuple[str, ...]:
    """Return the names of all fields of the installed SGLang's ServerArgs."""
    return tuple(installed_fields().types)


# The files are large, and every stage checks the arguments.
@cache
def installed_fields() -> ServerFields:
    """Return the fields of the installed SGLang.

    Raises:
        EngineError: SGLang is not installed, or the reader does not understand its version.
    """
    # This finds the folder of the package without importing it.
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        raise EngineError(
            "SGLang is not installed", remedy="install requirements/cpu.lock, or the gpu extra"
        )
    return read_fields(Path(package.origin).parent / "srt")


def read_fields(source: Path) -> ServerFields:
    """Read the fields from SGLang's source.

    Args:
        source: The folder sglang/srt.

    Raises:
        EngineError: The fields are in none of the known places.
    """
    # Newer versions spread the fields over a folder of files. Both forms are read, so that one lopd
    # serves several versions.
    main = source / "server_args.py"
    parts = sorted((source / "arg_groups" / "fields").glob("*.py"))
    types: dict[str, ast.expr] = {}
    choices: dict[str, tuple[Any, ...]] = {}
    other_names: dict[str, str] = {}
    constants: dict[str, tuple[Any, ...]] = {}
    # choices.py comes first: the annotations of later files name its constants.
    for path in (source / "arg_groups" / "choices.py", *parts, main):
        # Up to 0.5.19 there is server_args.py alone.
        if not path.is_file():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants.update(_constants(tree))
        # Names that SGLang has given up are still flags of its command line.
        other_names.update(_deprecated_flags(tree))
        # server_args.py has other classes as well. In the folder fields/ every class holds fields.
        for name, annotation in _annotated(tree, only="ServerArgs" if path == main else None):
            types[name], keywords = _split(annotation)
            # The choices stand in the annotation, or it names a constant of one of the files.
            given = keywords.get("choices")
            found = constants.get(given.id) if isinstance(given, ast.Name) else _literal(given)
            if found:
                choices[name] = found
            for alias in _literal(keywords.get("aliases")) or ():
                other_names[_as_field_name(alias)] = name
    # Every version has this field. Without it, the fields have moved, and an empty table would
    # refuse every argument as unknown.
    if "model_path" not in types:
        raise EngineError(
            "the fields of ServerArgs were not found in the source of SGLang",
            where=str(source),
            remedy="use a supported SGLang version (0.5.17 to 0.5.23)",
        )
    # A name that is a field itself is not another name of some field.
    aliases = {name: target for name, target in other_names.items() if name not in types}
    return ServerFields(types, choices, aliases)


def _as_field_name(flag: str) -> str:
    """Return the field name that a flag such as --tp-size stands for."""
    return flag.lstrip("-").replace("-", "_")


def _annotated(tree: ast.Module, only: str | None) -> Iterator[tuple[str, ast.expr]]:
    """Yield each annotated public name in the classes of a file, or in one class of it."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or only not in (None, node.name):
            continue
        for item in node.body:
            # A field of a dataclass is a name with an annotation. Methods and constants have none.
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            if not item.target.id.startswith("_"):
                yield item.target.id, item.annotation


def _split(annotation: ast.expr) -> tuple[ast.expr, dict[str, ast.expr]]:
    """Return the type and the keywords of ``A[type, Arg(choices=..., aliases=...)]``.

    Every other annotation is a type without keywords.
    """
    if (
        isinstance(annotation, ast.Subscript)
        and ast.unparse(annotation.value) in ("A", "Annotated")
        and isinstance(annotation.slice, ast.Tuple)
    ):
        # The form of 0.5.20 and later, where A stands for typing.Annotated.
        kind, *rest = annotation.slice.elts
        calls = [call for call in rest if isinstance(call, ast.Call)]
        keywords = {
            keyword.arg: keyword.value for call in calls for keyword in call.keywords if keyword.arg
        }
        return kind, keywords
    return annotation, {}


def _constants(tree: ast.Module) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield each list, tuple or set of constants that a file assigns to a name."""
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        values = _literal(node.value)
        if values:
            yield node.targets[0].id, values


def _deprecated_flags(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (old name, field) of calls such as
    ``add_argument("--cuda-graph-bs", dest="cuda_graph_bs_decode")``.
    """
    # These calls stand inside of a method, so the whole tree is searched.
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr != "add_argument":
            continue
        keywords = {
            keyword.arg: keyword.value.value
            for keyword in node.keywords
            if isinstance(keyword.value, ast.Constant)
        }
        # Without `dest` the flag and the field have one name.
        if isinstance(keywords.get("dest"), str):
            for one in node.args:
                if isinstance(one, ast.Constant) and isinstance(one.value, str):
                    yield _as_field_name(one.value), str(keywords["dest"])


def _literal(node: ast.expr | None) -> tuple[Any, ...] | None:
    """Return the values of a list, tuple or set of constants."""
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        # With an item that is no constant the list is not known as a whole. A check against the
        # rest would refuse good values.
        constants = [item for item in node.elts if isinstance(item, ast.Constant)]
        if len(constants) == len(node.elts):
            return tuple(item.value for item in constants)
    return None


def accepts(annotation: ast.expr, value: Any) -> bool:
    """Return whether a TOML value has this type.

    A type that this function does not know accepts every value: SGLang then decides itself.
    """
    if isinstance(annotation, ast.Constant):
        # A quoted annotation is not followed. None is no value that TOML can hold.
        return annotation.value is not None
    if isinstance(annotation, ast.BinOp):
        # The syntax tree of `int | None`.
        return accepts(annotation.left, value) or accepts(annotation.right, value)
    if isinstance(annotation, ast.Subscript):
        return _subscript_accepts(annotation, value)
    match _toml_type(_last_name(annotation)):
        # Python counts True as an int, but TOML and SGLang's command line do not.
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
        # No TOML value is a function.
        case "Callable":
            return False
    return True


def _subscript_accepts(annotation: ast.Subscript, value: Any) -> bool:
    outer = _last_name(annotation.value)
    inner = _parameters(annotation)
    if outer in ("Optional", "Union"):
        return any(accepts(one, value) for one in inner)
    if outer == "Literal":
        # The type is compared too, because 1 == True.
        typed = (type(value), value)
        constants = [one.value for one in inner if isinstance(one, ast.Constant)]
        return any((type(one), one) == typed for one in constants)
    if _toml_type(outer) == "list":
        return isinstance(value, list) and all(accepts(inner[0], item) for item in value)
    return isinstance(value, dict) if _toml_type(outer) == "dict" else True


def type_in_words(annotation: ast.expr) -> str:
    """Return a type in the words of an error message."""
    if isinstance(annotation, ast.BinOp):
        # A TOML file cannot hold None, so a message does not offer it.
        sides = [
            one
            for one in (annotation.left, annotation.right)
            if not (isinstance(one, ast.Constant) and one.value is None)
        ]
        return " or ".join(type_in_words(one) for one in sides)
    if isinstance(annotation, ast.Subscript):
        outer = _last_name(annotation.value)
        inner = _parameters(annotation)
        if outer in ("Optional", "Union"):
            return " or ".join(dict.fromkeys(type_in_words(one) for one in inner))
        if outer == "Literal":
            return f"one of {', '.join(ast.unparse(one).strip(chr(39)) for one in inner)}"
        if _toml_type(outer) == "list":
            return f"a list of {type_in_words(inner[0])}"
        annotation = annotation.value
    name = _last_name(annotation)
    if name == "Callable":
        return "nothing that a TOML file can hold"
    return _IN_WORDS.get(_toml_type(name), name)


def _last_name(annotation: ast.expr) -> str:
    """Return Optional for typing.Optional."""
    return ast.unparse(annotation).rpartition(".")[2]


def _parameters(annotation: ast.Subscript) -> list[ast.expr]:
    inside = annotation.slice
    return inside.elts if isinstance(inside, ast.Tuple) else [inside]


def _toml_type(name: str) -> str:
    return _AS_IN_TOML.get(name, name)
