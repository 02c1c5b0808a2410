"""Finds the tokenizer of an artifact whose texts somebody wants to read."""

from __future__ import annotations

from pathlib import Path

from lopd.artifacts import MANIFEST, read_manifest


def tokenizer_folder(folder: Path, named: Path | None) -> Path | None:
    """Return a folder with the tokenizer of an artifact, or None.

    Args:
        folder: The artifact.
        named: The folder that the user names. It must be right, so it is returned as it is, and
            load_tokenizer reports its mistakes.
    """
    if named is not None:
        return named
    # The rows have the student's tokens. Only a teacher may have others, so it comes last. Parts of
    # an evaluation name no model, so the manifests around them are asked too.
    around = [folder, folder.parent, *(path.parent for path in folder.parent.glob(f"*/{MANIFEST}"))]
    models = [
        (role.startswith("teacher"), identity.path)
        for one in around
        if (one / MANIFEST).is_file()
        for role, identity in read_manifest(one).models.items()
    ]
    students = [Path(path) for is_teacher, path in models if not is_teacher]
    teachers = [Path(path) for is_teacher, path in models if is_teacher]
    # The folders in a manifest may be on another machine. The run has a student of its own.
    runs = (folder.parent, folder.parent.parent)
    trained = [run / stage / "model" for run in runs for stage in ("sft", "distill")]
    candidates = [*students, *trained, *teachers]
    return next((path for path in candidates if (path / "tokenizer.json").is_file()), None)
