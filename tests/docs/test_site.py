"""The documentation site: it builds without a warning, lists every knob and verb, is offline."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lopd.cli import app
from lopd.config import Section, known_keys

ROOT = Path(__file__).parents[2]
# tests/run.sh installs these packages before the tests run.
mkdocs_build: Any = pytest.importorskip("mkdocs.commands.build", reason="bash docs/build.sh first")


def build(docs: Path, site: Path) -> None:
    """Build the site of a folder of pages as docs/build.sh does."""
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(site))
    assert config.strict
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs_build.build(config)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(ROOT / "docs", folder)
    return folder


def page(site: Path, name: str) -> str:
    return html.unescape((site / name).read_text(encoding="utf-8"))


def test_every_page_of_the_repository_is_on_the_site(site: Path) -> None:
    for source in (ROOT / "docs").glob("*.md"):
        assert (site / source.with_suffix(".html").name).exists(), source.name
    for name in ("index", "contributing", "changelog", "findings", "extend_megatron"):
        assert (site / f"{name}.html").exists(), name


def test_the_reference_has_every_knob(site: Path) -> None:
    text = page(site, "reference/configuration.html")
    knobs = [key for key, field in known_keys().items() if not is_section(field.annotation)]
    assert len(knobs) > 100
    for key in knobs:
        table, _, name = key.rpartition(".")
        assert f"<code>[{table}]</code>" in text, table
        assert f"<code>{name}</code>" in text, key


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def test_the_reference_has_every_verb(site: Path) -> None:
    text = page(site, "reference/command_line.html")
    for name in verbs("lopd", typer.main.get_command(app)):
        assert re.search(rf">{name}<", text), name


def verbs(name: str, command: Any) -> Iterator[str]:
    for word, inner in getattr(command, "commands", {}).items():
        yield f"{name} {word}"
        yield from verbs(f"{name} {word}", inner)


def test_the_reference_has_signatures_and_docstrings(site: Path) -> None:
    text = page(site, "reference/python/objective.html")
    assert "lopd.objective.Lightning" in text
    assert "advantage_clip" in text


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(https?:)?//")
    for file in site.rglob("*.html"):
        assert not loaded.search(file.read_text(encoding="utf-8")), file.name


def test_links_that_lead_nowhere_end_the_build(tmp_path: Path) -> None:
    from mkdocs.exceptions import Abort

    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs/start.md").open("a", encoding="utf-8") as file:
        # A page that does not exist, and a heading that does not exist.
        file.write("\n[x](no_such_page.md) [x](training.md#no-such-heading)\n")
    with pytest.raises(Abort, match="2 warnings"):
        build(tmp_path / "docs", tmp_path / "site")
