"""Is a checkpoint folder what its config.json and its index say? Headers alone are read.

An index and the files that it names are written apart and copied apart, so each of them can be of
another checkpoint. Readers disagree about what is then right: transformers prefers
model.safetensors to an index, SGLang takes every file where there is no index. So everything that
they could read in two ways is refused.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lopd.errors import ArtifactError
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.headers import WIDTHS, TensorHeader, read_header, read_rows
from lopd.megatron.weights.hf_mapping import hf_shapes

# The names of transformers, which every reader of such a folder expects.
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# Buffers that old checkpoints carry. They follow from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
# Tensors beside a quantised weight, by the end of their names, and who writes them.
_QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".scales": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_scale_inv": "FP8",
    ".input_scale": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
}
_QUANTISED_DTYPES = ("F8_", "F4", "F6_", "I", "U")
_UNQUANTISED = (
    "give the checkpoint in bfloat16, float16 or float32; a quantised one can be dequantised first"
)
# Rows of a matrix that are compared with those of another. Two matrices that were trained apart
# differ in every row.
_COMPARED_ROWS = 1024


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The tensors of a folder.

    Attributes:
        file_of: The file of each tensor, by the name of the tensor.
        tensors: What the headers say of each tensor.
        problems: Everything that is wrong, one line for each kind of fault of a file.
    """

    file_of: Mapping[str, str]
    tensors: Mapping[str, TensorHeader]
    problems: tuple[ArtifactError, ...]


def inspect_checkpoint(folder: Path, arch: Architecture) -> CheckpointFiles:
    """Read the index and all headers of a folder, and hold them against each other.

    No weight is read, but for some rows of the output layer where it must equal the embedding.

    Args:
        folder: A Hugging Face checkpoint folder.
        arch: The architecture that its config.json describes.
    """
    problems: list[ArtifactError] = []
    listed: Mapping[str, Any] | None = None
    total: Any = None
    try:
        listed, total = _read_index(folder)
    except ArtifactError as error:
        problems.append(error)
    # The files of the folder, and those that the index wants. They should be the same.
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    named = [SINGLE] if listed is None else sorted(set(listed.values()))
    # Without a readable index nobody knows which files should be there.
    if not problems:
        problems += _file_problems(folder, present, named, has_index=listed is not None)
    headers: dict[str, dict[str, TensorHeader]] = {}
    for name in present:
        try:
            headers[name] = read_header(folder / name)
        except ArtifactError as error:
            problems.append(error)
    # Tensors cannot be missed in a file that cannot be read, so what follows would only repeat it.
    if problems:
        return CheckpointFiles({}, {}, tuple(problems))
    if listed is not None:
        problems += _index_problems(folder, listed, total, headers)
    file_of = {tensor: name for name, tensors in headers.items() for tensor in tensors}
    tensors = {name: headers[file][name] for name, file in file_of.items()}
    problems += _tensor_problems(folder, arch, tensors, file_of)
    return CheckpointFiles(file_of, tensors, tuple(problems))


def _read_index(folder: Path) -> tuple[dict[str, str] | None, Any]:
    """Return the file of each tensor and the total of bytes; None and None without an index."""
    path = folder / INDEX
    # Small checkpoints are one file and have no index.
    if not path.is_file():
        return None, None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        listed = dict(table["weight_map"])
        total = (table.get("metadata") or {}).get("total_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"the file cannot be read ({type(error).__name__}: {error})",
            where=str(path),
            remedy="copy the file again from its source",
        ) from None
    for tensor, file in listed.items():
        # A name with a folder could lead out of the checkpoint.
        if not isinstance(file, str) or PurePosixPath(file).name != file:
            raise ArtifactError(
                f"the index says that {tensor} is in {file!r}",
                where=str(path),
                limit="exactly the name of a file beside the index",
                remedy="correct the index",
            )
    if not listed:
        raise ArtifactError(
            "the index names no tensor",
            where=str(path),
            remedy="copy the file again from its source",
        )
    return listed, total


def _file_problems(
    folder: Path, present: list[str], named: list[str], *, has_index: bool
) -> Iterator[ArtifactError]:
    """Yield files that are missing, and files that nothing names."""
    missing = [name for name in named if name not in present]
    extra = [name for name in present if name not in named]
    if missing and not has_index:
        yield _no_weights(folder, present)
        return
    if missing:
        yield ArtifactError(
            f"the folder lacks {_some(missing, 'file')} of the index",
            where=str(folder),
            limit=f"exactly the {len(named)} files that {INDEX} names",
            remedy="download the checkpoint again, or copy the rest of it",
        )
    if extra:
        # SGLang reads all files where there is no index, and transformers prefers
        # model.safetensors to an index.
        owner = INDEX if has_index else SINGLE
        yield ArtifactError(
            f"the folder has {_some(extra, 'file')} beside {owner}",
            where=str(folder),
            limit="exactly the files of one checkpoint: engines differ in which others they read",
            remedy="move them out of this folder, or correct the index",
        )


def _no_weights(folder: Path, present: list[str]) -> ArtifactError:
    """Return the error for a folder with neither an index nor model.safetensors."""
    where = str(folder / SINGLE)
    if present:
        return ArtifactError(
            f"no such file, and there is no {INDEX} for {_some(present, 'file')}",
            where=where,
            remedy="copy the index of the checkpoint as well",
        )
    remedy = "give the folder of a Hugging Face checkpoint with safetensors"
    # The other forms in which weights are published.
    others = [
        path.name for kind in ("*.gguf", "*.bin", "*.pt", "*.pth") for path in folder.glob(kind)
    ]
    if others:
        quantised = ", which may be quantised" if others[0].endswith(".gguf") else ""
        remedy = f"convert {others[0]}{quantised}, to safetensors first"
    return ArtifactError("no such file", where=where, remedy=remedy)


def _index_problems(
    folder: Path,
    listed: Mapping[str, str],
    total: Any,
    headers: Mapping[str, Mapping[str, TensorHeader]],
) -> Iterator[ArtifactError]:
    """Yield where the index and the headers of its files contradict each other."""
    where = str(folder / INDEX)
    remedy = "copy index and files again from one source"
    # The files that hold each tensor, by its name. There should be exactly one.
    files: dict[str, list[str]] = {}
    for file, tensors in headers.items():
        for tensor in tensors:
            files.setdefault(tensor, []).append(file)
    twice = [tensor for tensor, found in files.items() if len(found) > 1]
    absent = [tensor for tensor in listed if tensor not in files]
    unlisted = [tensor for tensor in files if tensor not in listed]
    moved = [tensor for tensor, file in listed.items() if file not in files.get(tensor, [file])]
    # The name and where it is, of every tensor that has the fault.
    faults = {
        "are in several files": {name: " and ".join(files[name]) for name in twice},
        "of the index are in no file": {name: f"not in {listed[name]}" for name in absent},
        "are not in the index": {name: f"in {files[name][0]}" for name in unlisted},
        "are in another file than the index says": {
            name: f"in {files[name][0]}, not in {listed[name]}" for name in moved
        },
    }
    for what, places in faults.items():
        for name, place in itertools.islice(places.items(), 1):
            yield ArtifactError(
                f"{len(places)} tensors {what}, for example {name} ({place})",
                where=where,
                remedy=remedy,
            )
    found = sum(one.stop - one.start for held in headers.values() for one in held.values())
    # Some writers count a tied output layer that they did not write, or leave the total out. A
    # contradiction of names is the better message, so the total comes last.
    if total is not None and total != found and not any(faults.values()):
        yield ArtifactError(
            f"total_size = {total!r} is wrong",
            where=where,
            limit=f"exactly {found}, the bytes of the tensors in the files",
            remedy=f"copy the checkpoint again; if it is right, set total_size to {found}",
        )


def _tensor_problems(
    folder: Path,
    arch: Architecture,
    tensors: Mapping[str, TensorHeader],
    file_of: Mapping[str, str],
) -> Iterator[ArtifactError]:
    """Yield where the tensors are not those of config.json, or not plain floating-point numbers."""
    wanted = hf_shapes(arch)
    quantised = _quantised(folder, tensors, wanted)
    if quantised is not None:
        # Names and shapes of a quantised checkpoint are others as well, for this reason alone.
        yield quantised
        return
    yield from _name_problems(folder, arch, tensors, wanted)
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            yield ArtifactError(
                f"{name} has shape {tensors[name].shape}, but config.json gives {shape}",
                where=str(folder),
                remedy="copy config.json and the weights again from one source",
            )
            # One example is enough: with a wrong width every tensor is another.
            break
    if arch.tied_embeddings and LM_HEAD in tensors and EMBEDDING in tensors:
        yield from _tied_problems(folder, tensors, file_of)


def _quantised(
    folder: Path,
    tensors: Mapping[str, TensorHeader],
    wanted: Mapping[str, tuple[int, ...]],
) -> ArtifactError | None:
    """Return the error for weights that are no floating-point numbers of at least 16 bits."""
    # Names first: a quantised file has tensors beside each weight, which say more than a dtype.
    for name in tensors:
        for suffix, method in _QUANTISED.items():
            if name.endswith(suffix):
                return ArtifactError(
                    f"the weights are quantised by {method}: there is {name}",
                    where=str(folder),
                    remedy=_UNQUANTISED,
                )
    by_dtype: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if name in wanted and tensor.dtype not in WIDTHS:
            by_dtype.setdefault(tensor.dtype, []).append(name)
    for dtype, names in by_dtype.items():
        is_quantised = dtype.startswith(_QUANTISED_DTYPES)
        meaning = "the weights are quantised: " if is_quantised else ""
        return ArtifactError(
            f"{meaning}{len(names)} tensors have dtype {dtype}, for example {names[0]}",
            where=str(folder),
            limit=f"one of {', '.join(WIDTHS)}",
            remedy=_UNQUANTISED,
        )
    return None


def _name_problems(
    folder: Path,
    arch: Architecture,
    tensors: Mapping[str, TensorHeader],
    wanted: Mapping[str, tuple[int, ...]],
) -> Iterator[ArtifactError]:
    missing = [name for name in wanted if name not in tensors]
    unknown = [
        name for name in tensors if name not in wanted and not name.endswith(IGNORED_SUFFIXES)
    ]
    # Some checkpoints with tied embeddings store the shared tensor twice.
    if arch.tied_embeddings:
        unknown = [name for name in unknown if name != LM_HEAD]
    problems = [
        f"{len(names)} tensors are {verb}, for example {names[0]}"
        for names, verb in ((missing, "missing"), (unknown, "unknown"))
        if names
    ]
    remedy = f"give a complete {arch.family} checkpoint that fits its config.json"
    # This one tensor is missing where the config.json of a tied model says that it is not tied.
    if missing == [LM_HEAD]:
        problems[0] += " (config.json has tie_word_embeddings = false)"
        remedy = (
            "set tie_word_embeddings to true if the model was trained with one matrix for input "
            "and output, else give the file with the output layer"
        )
    if problems:
        # One example of each is enough: a wrong folder lacks hundreds.
        yield ArtifactError("; ".join(problems), where=str(folder), remedy=remedy)


def _tied_problems(
    folder: Path, tensors: Mapping[str, TensorHeader], file_of: Mapping[str, str]
) -> Iterator[ArtifactError]:
    """Yield an output layer that is not the embedding, where config.json says that it is."""
    head = tensors[LM_HEAD]
    embedding = tensors[EMBEDDING]
    # By form first, which is in the headers. Only equal forms are compared by their values.
    is_same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if is_same:
        count = embedding.shape[0]
        # Spread over the whole matrix. The last row, which a longer vocabulary adds, is among them.
        rows = range(count - 1, -1, -max(1, count // _COMPARED_ROWS))
        is_same = read_rows(folder / file_of[LM_HEAD], head, rows) == read_rows(
            folder / file_of[EMBEDDING], embedding, rows
        )
    if not is_same:
        yield ArtifactError(
            f"tie_word_embeddings = true, but {LM_HEAD} is not {EMBEDDING}: engines differ in "
            "which of the two they use",
            where=str(folder),
            remedy="set tie_word_embeddings to false in config.json if the output layer was "
            f"trained by itself, else remove {LM_HEAD} from the file",
        )


def _some(names: list[str], what: str) -> str:
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} {what}{plural} ({names[0]}{', ...' if len(names) > 1 else ''})"
