"""requirements/install.sh: it says what it is doing, and a failed one is not taken for done."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A Python that makes an environment whose pip installs nothing, and fails where it is told to.
PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> "$PIP_CALLS"\\n[ ! -e "$PIP_FAILS" ]\\n' > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


def test_it_says_each_step_and_installs_once(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "requirements").mkdir(parents=True)
    for name in ("install.sh", "cpu.lock"):
        shutil.copy(ROOT / "requirements" / name, checkout / "requirements" / name)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    fails = tmp_path / "fails"
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": str(python),
        "PIP_CALLS": str(tmp_path / "calls"),
        "PIP_FAILS": str(fails),
    }

    def install() -> tuple[int, list[str]]:
        script = str(checkout / "requirements/install.sh")
        done = subprocess.run(
            ["bash", script], env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr.splitlines()

    fails.touch()
    code, lines = install()
    assert code != 0
    assert lines[-1].startswith("lopd: 2 of 4: torch"), "the step that failed is the last one named"
    fails.unlink()
    code, lines = install()
    assert code == 0
    steps = [line for line in lines if " of 4: " in line]
    assert [line.split()[1] for line in steps] == ["1", "2", "3", "4"]
    assert "2.6 GB" in lines[0]
    # The stamp is there, so nothing is installed or said again.
    calls = (tmp_path / "calls").read_text()
    assert install() == (0, [])
    assert (tmp_path / "calls").read_text() == calls
