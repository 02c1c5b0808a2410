"""Make the student: the teacher without some of its layers.

    python examples/real_model/prune.py TEACHER STUDENT --drop 10 14 18 22

Removing layers is a known way to make a model smaller and faster. The model that is left is
damaged, and distillation from the whole model heals it. Only tensors are renamed and left out; no
value changes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def prune(teacher: Path, student: Path, drop: set[int]) -> None:
    """Write the folder of a model without the layers whose numbers are in drop."""
    config = json.loads((teacher / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    if not drop <= set(range(num_layers)):
        raise SystemExit(f"--drop: the teacher has the layers 0 to {num_layers - 1}")
    kept = [number for number in range(num_layers) if number not in drop]
    new_number = {old: new for new, old in enumerate(kept)}
    tensors = {}
    for name, tensor in load_file(teacher / "model.safetensors").items():
        match = _LAYER.match(name)
        if match is None:
            tensors[name] = tensor
        elif int(match[1]) not in drop:
            tensors[f"model.layers.{new_number[int(match[1])]}.{name[match.end() :]}"] = tensor
    student.mkdir(parents=True)
    for path in teacher.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copyfile(path, student / path.name)
    config["num_hidden_layers"] = len(kept)
    (student / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="Hugging Face folder of the whole model")
    parser.add_argument("student", type=Path, help="where the smaller model goes")
    parser.add_argument("--drop", type=int, nargs="+", required=True, help="numbers of layers")
    options = parser.parse_args()
    if (options.student / "model.safetensors").exists():
        return
    partial = options.student.with_name(f"{options.student.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    prune(options.teacher, partial, set(options.drop))
    partial.rename(options.student)
    print(f"student: {options.student}, {len(options.drop)} layers fewer")


if __name__ == "__main__":
    main()
