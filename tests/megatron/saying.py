"""A rank that says which values some environment variables have, and then fails."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    for name in sys.argv[1:]:
        sys.stdout.write(f"{name}={os.environ.get(name)}\n")
    sys.stdout.flush()
    sys.exit(3)
