"""What we call of megatron-core, Transformer Engine and SGLang, and the signatures of what we call.

    python -m tests.image.signatures
        prints what the installed packages have, as JSON
    python -m tests.image.signatures --record
        writes it into signatures.json, under the packages' versions

The calls are found in our sources: each name imported from one of the packages, at the top or in a
function, and each place that calls it. signatures.json holds the signatures of the supported
versions, so that a call which one of them would refuse is noticed without that version.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_rollout.cpu import stand_ins

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).with_name("signatures.json")
SOURCES = ("lopd", "sglang_rollout", "megatron_patches", "examples/extend_megatron")
PACKAGES = {
    "megatron.core": "megatron-core",
    "transformer_engine": "transformer-engine",
    "sglang": "sglang",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a name of a package.

    Attributes:
        name: The full name, such as megatron.core.dist_checkpointing.load.
        where: file:line.
        num_positional: How many positional arguments are given.
        keywords: The names of the keyword arguments that are given.
        open_ended: *args or **kwargs are given too, so arguments may be missing from these.
    """

    name: str
    where: str
    num_positional: int
    keywords: tuple[str, ...]
    open_ended: bool


def package_of(name: str) -> str | None:
    """The distribution that a module or a name belongs to; None: none of PACKAGES."""
    for prefix, distribution in PACKAGES.items():
        if name == prefix or name.startswith(f"{prefix}."):
            return distribution
    return None


def imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> full name, of everything that a file imports from the packages."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and package_of(node.module):
            found |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                each.asname: each.name
                for each in node.names
                if each.asname and package_of(each.name)
            }
    return found


def calls() -> list[Call]:
    """Every call in our sources of a name of the packages."""
    found: list[Call] = []
    for path in source_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := _full_name(node.func, names)):
                starred = any(isinstance(each, ast.Starred) for each in node.args)
                keywords = tuple(each.arg for each in node.keywords if each.arg)
                open_ended = starred or any(each.arg is None for each in node.keywords)
                count = sum(not isinstance(each, ast.Starred) for each in node.args)
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                found.append(Call(name, where, count, keywords, open_ended))
    return found


def source_files() -> Iterator[Path]:
    for folder in SOURCES:
        yield from sorted((ROOT / folder).rglob("*.py"))


def names() -> set[str]:
    """Every name that our sources import from the packages or call."""
    found = {call.name for call in calls()}
    for path in source_files():
        found |= set(imported(ast.parse(path.read_text(encoding="utf-8"))).values())
    return found


def _full_name(function: ast.expr, names: dict[str, str]) -> str | None:
    """The full name of what is called: a name that was imported, or an attribute of one."""
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name) or function.id not in names:
        return None
    return ".".join([names[function.id], *reversed(parts)])


# ---- what a package has ----


def resolve(name: str) -> Any:
    """The object of this full name. Raises ImportError or AttributeError if it is not there."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def described(name: str) -> list[list[Any]] | str:
    """The parameters as [name, kind, has a default]; a word where it is not there or has no
    signature.
    """
    try:
        found = resolve(name)
    except (ImportError, AttributeError):
        return "absent"
    if inspect.ismodule(found) or not callable(found):
        return "no function"
    try:
        parameters = inspect.signature(found).parameters.values()
    except (ValueError, TypeError):
        return "no signature"
    return [[each.name, each.kind.name, each.default is not each.empty] for each in parameters]


def problem(call: Call, parameters: Any) -> str | None:
    """Why this signature refuses the call; None: it takes it."""
    if parameters == "absent":
        return f"{call.where}: {call.name} does not exist"
    if isinstance(parameters, str):
        return None
    kinds = [
        inspect.Parameter(
            name,
            inspect._ParameterKind[kind],
            default=None if optional else inspect.Parameter.empty,
        )
        for name, kind, optional in parameters
    ]
    signature = inspect.Signature(kinds)
    bind = signature.bind_partial if call.open_ended else signature.bind
    try:
        bind(*[None] * call.num_positional, **dict.fromkeys(call.keywords))
    except TypeError as error:
        return f"{call.where}: {call.name}: {error}"
    return None


def installed(*distributions: str) -> dict[str, dict[str, Any]]:
    """Distribution and version -> name -> signature, of those distributions that are installed."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(names()):
        distribution = package_of(name)
        if distribution not in distributions:
            continue
        try:
            version = importlib.metadata.version(distribution).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        found.setdefault(f"{distribution} {version}", {})[name] = described(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--record", action="store_true", help="write signatures.json")
    options = parser.parse_args()
    stand_ins.install()  # SGLang imports packages that need a GPU
    found = installed(*PACKAGES.values())
    if options.record:
        known = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
        lines = [
            f"  {json.dumps(package)}: {{\n"
            + ",\n".join(
                f"    {json.dumps(name)}: {json.dumps(value)}"
                for name, value in sorted(entries.items())
            )
            + "\n  }"
            for package, entries in sorted({**known, **found}.items())
        ]
        DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
