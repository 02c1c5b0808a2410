"""Make the pages of the documentation site that are not files of docs/. mkdocs calls this hook.

- Some pages of the repository stand outside of docs/, such as README.md. They become pages of the
  site, and links between files of the repository become links between pages of the site.
- The reference of the configuration comes from the fields of ``lopd.config``, the reference of the
  command line from the commands of ``lopd.cli``, and the reference of the Python interface from
  docstrings, which mkdocstrings reads from the sources.

Nothing here imports torch, Megatron-Core or SGLang.
"""

from __future__ import annotations

import inspect
import json
import posixpath
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
# mkdocs loads this file by its path, so the project need not be installed.
sys.path.insert(0, str(ROOT))

from lopd.cli import app  # noqa: E402
from lopd.config import Config  # noqa: E402
from lopd.report.knobs import describe_knob  # noqa: E402

# Page of the site -> file of the repository that it is made from.
PAGES_FROM = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "findings.md": "findings/README.md",
    "extend_megatron.md": "examples/extend_megatron/README.md",
}

# Page of the Python reference -> its title and the modules that it shows.
PYTHON: dict[str, tuple[str, Sequence[str]]] = {
    "cache": ("Teacher cache", ["lopd.cache", "lopd.cache.reader", "lopd.artifacts"]),
    "records": ("Records and errors", ["lopd.records", "lopd.manifests", "lopd.errors"]),
    "batching": ("Batching", ["lopd.batching", "lopd.batching.context"]),
    "objective": ("Objectives", ["lopd.objective"]),
    "tasks": (
        "Tasks",
        [
            "lopd.tasks.interface",
            "lopd.tasks.prompts",
            "lopd.tasks.rendering",
            "lopd.tasks.verdicts",
            "lopd.tasks.accuracy",
        ],
    ),
    "megatron": (
        "Megatron-Core",
        [
            "lopd.megatron.weights.architecture",
            "lopd.megatron.weights.transfer",
            "lopd.megatron.training.trainer",
            "megatron_patches",
            "megatron_patches.layer_spec",
        ],
    ),
    "sglang": (
        "SGLang",
        [
            "sglang_rollout.requests.fleet",
            "sglang_rollout.requests.client",
            "sglang_rollout.requests.sampling",
            "sglang_rollout.requests.scoring",
            "sglang_rollout.weight_sync",
            "sglang_rollout.weight_sync.interface",
        ],
    ),
}

_FENCE = re.compile(r"(^[ ]*```.*?^[ ]*```[ ]*$)", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the files of docs/."""
    pages = {page: (ROOT / file).read_text(encoding="utf-8") for page, file in PAGES_FROM.items()}
    pages["reference/configuration.md"] = "\n".join(_configuration())
    pages["reference/command_line.md"] = "\n".join(_command_line())
    pages["reference/python/index.md"] = "\n".join(_python_overview())
    for name, (title, modules) in PYTHON.items():
        blocks = "\n".join(f"::: {module}\n" for module in modules)
        pages[f"reference/python/{name}.md"] = f"# {title}\n\n{blocks}"
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    parts = _FENCE.split(markdown)
    # The odd parts are code blocks, in which nothing is a link.
    parts[::2] = [_LINK.sub(lambda match: _place(match, here), part) for part in parts[::2]]
    return "".join(parts)


def _place(match: re.Match[str], here: str) -> str:
    source = PAGES_FROM.get(here, f"docs/{here}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
    page = {file: page for page, file in PAGES_FROM.items()}.get(target)
    if page is None and target.startswith("docs/"):
        page = target.removeprefix("docs/")
    if page is None:
        # Not on the site: mkdocs then says that the link leads nowhere.
        return match[0]
    return posixpath.relpath(page, posixpath.dirname(here) or ".") + (match["anchor"] or "")


# ---- configuration -------------------------------------------------------------------------------


def _configuration() -> Iterator[str]:
    yield "# Configuration"
    yield ""
    yield (
        "This page is made from the fields of `lopd.config`. `lopd knobs` prints the same. A knob "
        'marked "speed only" changes how fast or where a stage runs and not what it produces: to '
        "change it runs no stage again."
    )
    for title, section in _tables("", Config):
        yield from ["", f"## {title}", ""]
        about = inspect.cleandoc(section.__doc__ or "") if "__doc__" in vars(section) else ""
        if about:
            yield from [about, ""]
        yield from ["| knob | type | default | bound | meaning |", "|---|---|---|---|---|"]
        for name, field in section.model_fields.items():
            if _section_of(field) is None:
                yield _knob_row(name, field)


def _tables(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    if any(_section_of(field) is None for field in section.model_fields.values()):
        yield f"`[{prefix}]`", section
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            yield from _tables(f"{prefix}.{name}".lstrip("."), inner)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _knob_row(name: str, field: FieldInfo) -> str:
    knob = describe_knob(field)
    default = "absent" if knob.default is None else f"`{json.dumps(knob.default, default=str)}`"
    if knob.required:
        default = "required"
    meaning = f"{knob.meaning} *Speed only.*" if knob.speed_only else knob.meaning
    cells = [f"`{name}`", knob.kind, default, ", ".join(knob.bounds), meaning]
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---- command line --------------------------------------------------------------------------------


def _command_line() -> Iterator[str]:
    yield "# Command line"
    yield ""
    yield (
        "This page is made from the commands of `lopd.cli`. `lopd VERB --help` prints the same. A "
        "mistake of the user is one line on screen and exit code 2."
    )
    yield from _command("lopd", typer.main.get_command(app), skip_self=True)


def _command(name: str, command: Any, *, skip_self: bool = False) -> Iterator[str]:
    if not skip_self:
        yield from ["", f"## {name}", ""]
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        options = [one for one in command.params if one.param_type_name == "option"]
        words = [_usage(one) for one in arguments] + (["[OPTIONS]"] if options else [])
        if not hasattr(command, "commands"):
            yield from ["```text", " ".join([name, *words]), "```", ""]
        yield from inspect.cleandoc(command.help or "").splitlines()
        if arguments or options:
            yield from ["", "| argument or option | meaning |", "|---|---|"]
            yield from (f"| `{_usage(one)}` | {_cell(one.help or '')} |" for one in arguments)
            yield from (f"| {_option(one)} | {_cell(one.help or '')} |" for one in options)
        if command.epilog:
            yield from ["", _cell(command.epilog)]
    for word, inner in getattr(command, "commands", {}).items():
        yield from _command(f"{name} {word}", inner)


def _usage(argument: Any) -> str:
    word = argument.metavar or argument.name.upper()
    shown = f"{word}..." if argument.nargs == -1 else word
    return shown if argument.required else f"[{shown}]"


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} `{option.metavar or option.name.upper()}`"


# ---- Python --------------------------------------------------------------------------------------


def _python_overview() -> Iterator[str]:
    yield "# Python reference"
    yield ""
    yield (
        "These pages are made from the docstrings of the modules. [The library](../../library.md) "
        "says which names are the public interface for other code."
    )
    yield from ["", "| page | modules |", "|---|---|"]
    for name, (title, modules) in PYTHON.items():
        yield f"| [{title}]({name}.md) | {', '.join(f'`{module}`' for module in modules)} |"
