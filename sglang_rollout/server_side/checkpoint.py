"""The tensors of a checkpoint folder, from the headers of its files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lopd.errors import EngineError


def tensor_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Hugging Face folder, by name.

    Raises:
        EngineError: The folder has no safetensors, or a file cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        try:
            # Only the header is read. A checkpoint of 60 GB takes no longer than a small one.
            with safe_open(path, framework="pt") as file:
                # The open file is no mapping, so it has no items().
                names = file.keys()
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in names})
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the file cannot be read ({error})",
                where=str(path),
                remedy="copy the file again from its source",
            ) from None
    if not shapes:
        raise EngineError(
            "the folder has no safetensors files",
            where=str(model_dir),
            remedy="give the folder of a Hugging Face checkpoint",
        )
    return shapes


def check_same_tensors(expected: dict[str, tuple[int, ...]], model_dir: Path) -> None:
    """Check that a folder has exactly these tensors.

    Raises:
        EngineError: A tensor is missing, comes in addition, or has another shape.
    """
    # SGLang 0.5.17 does not check this. An update with experts of another width answers "success"
    # and the server then serves garbage. A missing tensor keeps its old values.
    found = tensor_shapes(model_dir)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise EngineError(
                f"tensor {name} has shape {_shape(found.get(name))}, but in the served "
                f"model {_shape(expected.get(name))}",
                where=str(model_dir),
                remedy="start another server for this model: a server accepts only weights of "
                "its own architecture",
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (it is not there)" if shape is None else str(list(shape))
