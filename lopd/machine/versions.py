"""Versions of packages: which a run needs, which are too new, and which do not fit together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lopd.errors import ConfigError, LopdError

# The oldest versions that a run accepts. requirements/ pins the exact ones.
NEEDED = {
    "torch": "2.11",
    "megatron-core": "0.16.1",
    "sglang": "0.5.17",
    "transformers": "5.12",
    "pyarrow": "20",
}
# What the layers on a GPU need besides. Without a GPU, local layers in plain torch run.
NEEDED_ON_GPU = {"transformer-engine": "2.16", "triton": "3.6"}
# The first versions that nobody has tried. Patches and calls may not fit them.
TOO_NEW = {"megatron-core": "0.19", "sglang": "0.6", "transformers": "6"}
# By CUDA's major version, the oldest major version of the NVIDIA driver that runs it. NVIDIA's
# notes on CUDA compatibility have the table.
MIN_DRIVER = {13: 580, 12: 525}
# All packages whose versions are looked up. cuBLAS is in a rule of MISFITS alone.
PACKAGES = (*NEEDED, *NEEDED_ON_GPU, "nvidia-cublas")
_USE_THE_IMAGE = "use the image (docker/)"


@dataclass(frozen=True, slots=True)
class Misfit:
    """Two packages that do not fit: one from a version on, another below a version.

    Attributes:
        name: The package that needs something.
        since: The first version of the package that needs it.
        other: The package that must have it.
        below: The first version of the other package that has it.
        why: The error that occurs otherwise, as a clause.
    """

    name: str
    since: str
    other: str
    below: str
    why: str


# Pairs that have failed together. New ones belong here as they are met.
MISFITS = (
    Misfit(
        "transformer-engine",
        "2.13",
        "nvidia-cublas",
        "13.2.0.9",
        "its library does not load, and neither does megatron-core",
    ),
    Misfit("megatron-core", "0.17", "triton", "3.6", "its import fails"),
)


def judge_versions(
    versions: Mapping[str, str | None], *, has_gpus: bool
) -> Iterator[str | LopdError]:
    """Yield what is wrong with the installed versions, and a line with all of them.

    Args:
        versions: Version by package. None if it is not installed.
        has_gpus: Whether the machine has GPUs.
    """
    needed = {**NEEDED, **(NEEDED_ON_GPU if has_gpus else {})}
    # All wrong versions are named at once: a new image is built once.
    for name, oldest in needed.items():
        version = versions.get(name)
        if version is None or numbers_of(version) < numbers_of(oldest):
            yield ConfigError(
                f"{name} {version} is too old" if version else f"{name} is not installed",
                where="python environment",
                limit=f"at least {oldest}",
                remedy=_USE_THE_IMAGE,
            )
        # A newer version may work. It is refused, because a wrong figure costs more than a new
        # image.
        elif name in TOO_NEW and numbers_of(version) >= numbers_of(TOO_NEW[name]):
            yield ConfigError(
                f"{name} {version} is newer than the tested versions",
                where="python environment",
                limit=f"below {TOO_NEW[name]}",
                remedy=_USE_THE_IMAGE,
            )
    yield from _judge_pairs(versions)
    yield ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _judge_pairs(versions: Mapping[str, str | None]) -> Iterator[LopdError]:
    """Yield packages that are each right and do not fit together."""
    for rule in MISFITS:
        version = versions.get(rule.name)
        other = versions.get(rule.other)
        # That a package is missing is said above, or is no mistake.
        if version is None or other is None:
            continue
        is_concerned = numbers_of(version) >= numbers_of(rule.since)
        if is_concerned and numbers_of(other) < numbers_of(rule.below):
            yield ConfigError(
                f"{rule.name} {version} does not work with {rule.other} {other}: {rule.why}",
                where="python environment",
                limit=f"{rule.other} at least {rule.below}",
                remedy=f"run pip install '{rule.other}>={rule.below}', or {_USE_THE_IMAGE}",
            )


def numbers_of(version: str) -> tuple[int, ...]:
    """Return the first four numbers of a version, for comparisons."""
    # What follows a plus names a build, such as 2.11.0+cpu, and no order.
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4])
