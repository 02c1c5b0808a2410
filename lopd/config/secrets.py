"""Which names of settings tell that their values are nobody's business."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"(?:^|_)(?:key|token|secret|password)$")


def scrubbed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what may be a secret hidden, for a manifest: a user's sglang.extra_args can hold one."""
    return {name: "***" if value is not None and _SECRET.search(name) else value for name, value in arguments.items()}
