"""Makes the report of the README's example, and its pictures, from a run of the example.

    bash examples/run_tiny_moe.sh
    python docs/example_report.py runs/tiny_moe

It writes docs/report_example.html, docs/learning_curve.png (as ``lopd report --png`` draws it) and
docs/report.png, the first screen of the page in a headless Chromium. ``--screens FOLDER`` keeps the
whole page in light, in dark and as wide as a phone, to be looked at. ``--again`` in place of the
run writes the page anew from the data in it, after a change of its scripts or styles.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# The first screen of a small laptop.
_WIDTH = 1180
_HEIGHT = 820
_PHONE = 360


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--screens", type=Path)
    arguments = parser.parse_args()
    page = DOCS / "report_example.html"
    # A script finds only its own folder by itself.
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.again:
            _again(page)
        else:
            _from_run(arguments.run, page, folder)
        _screens(page, folder / "chromium", arguments.screens)


def _again(page: Path) -> None:
    from lopd.report.html.page import render

    found = re.search(rb'id="data"[^>]*>([A-Za-z0-9+/=]+)<', page.read_bytes())
    assert found is not None
    data = json.loads(gzip.decompress(base64.b64decode(found[1])))
    page.write_bytes(render(data, data["docs"]))


def _from_run(run: Path, page: Path, folder: Path) -> None:
    options = ["--out", page, "--png", folder, "--docs", "."]
    command = [sys.executable, "-m", "lopd.cli", "report", run.resolve(), *options]
    subprocess.run([*map(str, command)], check=True, cwd=ROOT)
    shutil.copyfile(folder / "learning_curve.png", DOCS / "learning_curve.png")


def _screens(page: Path, profile: Path, screens: Path | None) -> None:
    # The driver of the tests.
    from tests.report.chromium import Chromium

    with Chromium(profile) as browser:
        browser.look(_WIDTH, _HEIGHT)
        browser.open(page)
        browser.screenshot(DOCS / "report.png")
        if screens is None:
            return
        screens.mkdir(parents=True, exist_ok=True)
        sizes = (("light", 1280, False), ("dark", 1280, True), ("phone", _PHONE, False))
        for name, width, dark in sizes:
            browser.look(width, dark=dark)
            browser.open(page)
            # Charts that are out of view are drawn when they come into view.
            browser.js("lopd.charts.forEach((one) => { if (one.plot.clientWidth) one.draw(); })")
            browser.screenshot(screens / f"{name}.png", whole=True)


if __name__ == "__main__":
    main()
