"""What a checkpoint folder holds, from the headers of its files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lopd.errors import EngineError


def tensor_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face folder, from the headers of its safetensors.
    EngineError: none, or not readable.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()  # the file itself is no mapping
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in names})
        except (OSError, SafetensorError) as error:
            raise EngineError(f"cannot be read ({error})", where=str(path)) from None
    if not shapes:
        raise EngineError(
            "no safetensors there", where=str(model_dir), remedy="give a Hugging Face folder"
        )
    return shapes


def check_same_tensors(expected: dict[str, tuple[int, ...]], model_dir: Path) -> None:
    """EngineError unless model_dir has exactly these tensors.

    SGLang 0.5.17 does not look: an update with experts of another width answers "success" and
    serves garbage, and a missing tensor keeps its old values.
    """
    found = tensor_shapes(model_dir)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise EngineError(
                f"tensor {name} has shape {_shape(found.get(name))}, in the served model {_shape(expected.get(name))}",
                where=str(model_dir),
                remedy="only weights of the served architecture can be exchanged; start another server for this model",
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (it is not there)" if shape is None else str(list(shape))
