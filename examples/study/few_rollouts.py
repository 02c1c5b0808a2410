"""A part of a teacher cache, by prompt: what fewer rollouts would have given.

    python -m examples.study.few_rollouts CACHE OUT PARTS

cuts it as `lopd cache split` does, into OUT/part-00, OUT/part-01 and so on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lopd.cache.splitting import split


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", type=int)
    options = parser.parse_args()
    split(options.cache, options.out, options.parts)


if __name__ == "__main__":
    main()
