"""Run by test_server_arguments.py in a process of its own: one server's arguments, resolved by the
image's SGLang as on a node of H100s.

    python -m tests.image.server_arguments JSON

JSON is {"model": folder, "arguments": fields of ServerArgs}. The program prints what these fields
become.

A driver is not there. The process is given an empty one, and torch's answers about the GPUs, so
that SGLang decides as on the node; nothing is computed.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import torch

MEMORY = 85_520_809_984  # of an H100 of 80 GB
SHOWN = (
    "attention_backend",
    "sampling_backend",
    "grammar_backend",
    "chunked_prefill_size",
    "mem_fraction_static",
    "disable_custom_all_reduce",
    "disable_radix_cache",
    "enable_deterministic_inference",
    "enable_memory_saver",
    "max_running_requests",
    "context_length",
    "tp_size",
    "ep_size",
    "dtype",
)


def as_on_a_node() -> None:
    properties = SimpleNamespace(
        total_memory=MEMORY,
        multi_processor_count=132,
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: properties.name
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.mem_get_info = lambda device=None: (MEMORY, MEMORY)


def main() -> None:
    as_on_a_node()
    from sglang.srt.server_args import ServerArgs

    from sglang_rollout.servers.launch import CONTEXT_MARGIN, _check_context

    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    found = []
    for arguments in json.loads(sys.argv[1]):
        asked = dict(arguments)
        context_length = asked.pop("context_length")
        resolved = ServerArgs(
            **asked, context_length=context_length + CONTEXT_MARGIN, api_key="a key"
        )
        _check_context(resolved, context_length)
        found.append({name: getattr(resolved, name) for name in SHOWN})
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
