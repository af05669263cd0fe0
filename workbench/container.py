"""The one file format of packed models and checkpoints: safetensors with a JSON text about the tensors and a SHA-256 over
both (safetensors alone does not notice a flipped bit), written whole or not at all, the same bytes for the same content."""

import hashlib
import json
import os
import uuid
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

ENTRY = "workbench"  # the only entry of the file's metadata: safetensors would write several in random order


def write_tensors(path, tensors: dict[str, np.ndarray], *, who: str, what: str, version: int, about: dict) -> Path:
    """what: kind of file, for example "packed model"; about: plain JSON data. who: the caller, named in errors."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{who} needs an existing directory, got {path.parent}")
    if path.is_dir():
        raise ValueError(f"{who} needs the path of a file, got {path}, a directory")
    text = json.dumps({"format": what, "version": version, "about": about})
    header = {ENTRY: json.dumps({"text": text, "sha256": _digest(text, tensors)})}
    temporary = path.with_name(f"{path.name}.tmp{uuid.uuid4().hex}")  # processes of several machines may share the folder
    try:
        safetensors.numpy.save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_tensors(path, *, who: str, what: str, version: int, older=()) -> tuple[dict, dict[str, np.ndarray]]:
    """(about, tensors). older: versions that are read too. A missing, truncated, damaged or foreign file raises ValueError
    that says which."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{who} needs a {what} file, got {path}, which is no file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own and, for exotic dtypes, other errors
        raise ValueError(f"{who} needs a whole safetensors file, got {path}: {error}") from error
    if ENTRY not in metadata:
        raise ValueError(f"{who} needs a {what}, got {path}, a safetensors file of another origin")
    try:
        header = json.loads(metadata[ENTRY])
        intact = header["sha256"] == _digest(header["text"], tensors)
        content = json.loads(header["text"]) if intact else {}
        intact = intact and content.keys() >= {"format", "version", "about"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{who} found damage in {path}: its content does not have the SHA-256 written with it")
    if content["format"] != what:
        raise ValueError(f"{who} needs a {what}, got {path}, a {content['format']}")
    if content["version"] not in (version, *older):
        raise ValueError(f"{who} reads version {version} of a {what}, got version {content['version']} in {path}")
    return content["about"], tensors


def _digest(text, tensors) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name}\0{tensors[name].dtype}\0{tensors[name].shape}\0".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
