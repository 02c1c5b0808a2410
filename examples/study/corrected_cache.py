"""Corrects a cache for the style of its teacher, with the defaults of ``lopd cache residualise``.

python -m examples.study.corrected_cache CACHE OUT

After a kill the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lopd.cache.residualise import residualise
from lopd.cache.style import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    manifest = residualise(options.cache, options.out, Settings())
    print(f"{options.out}: {manifest.rows} corrected rows")


if __name__ == "__main__":
    main()
