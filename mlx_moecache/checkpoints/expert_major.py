"""The expert-major format: a model folder in which all tensors of an expert lie side by side.

`experts-00001-of-0000N.safetensors` hold tensors `{switch_path}.{expert}.{component}`, one expert after the other. Each
expert begins at a multiple of 4096 bytes of its file; since safetensors allow no holes, what fills the gap is a named
U8 tensor. Within an expert, wide elements come first, so that every tensor is aligned to its elements. The other
tensors stay in `model*.safetensors`. The manifest says what the original was and has the hash of every file.

Knows files and JSON; which bytes are an expert's, and how they get there, is for others to know.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FORMAT = "mlx_moecache.experts"
VERSION = 1
MANIFEST_NAME = "experts.safetensors.index.json"
ALIGNMENT = 4096  # bytes: a page, and a block of nearly every file system and disk
PARTIAL_SUFFIX = ".partial"  # of files that are being written

_SHARD_NAME = re.compile(r"(?:experts|model)(?:-\d{5}-of-\d{5})?\.safetensors")
_AGAIN = "delete this folder and repack the model again"


@dataclass(frozen=True)
class FileRecord:
    """A file of the folder: its size in bytes, and the SHA-256 of its content once it is written."""

    nbytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What `experts.safetensors.index.json` says."""

    source: str  # name of the original model
    fingerprint: str  # of the original's files
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # its expert tensors: name -> (safetensors dtype, shape)
    files: Mapping[str, FileRecord]  # safetensors files of this folder, by name

    @property
    def is_complete(self) -> bool:
        """True if every file is written."""
        return all(record.sha256 is not None for record in self.files.values())

    @property
    def expert_files(self) -> list[str]:
        """Names of the files that hold experts."""
        return [name for name in self.files if name.startswith("experts-")]

    def with_file(self, name: str, record: FileRecord) -> Manifest:
        return replace(self, files={**self.files, name: record})


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a repacked `folder`, finished or not; None if it is another folder.

    Raises CheckpointError for a manifest that is damaged, or of a version that is not known.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return None
    if raw.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has version {raw.get('version')!r} of the format, this mlx_moecache knows {VERSION}; "
            "upgrade mlx_moecache or repack the model again"
        )
    try:
        return _parse(raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__}: {error}); {_AGAIN}") from error


def _parse(raw: Mapping[str, Any]) -> Manifest:
    files: dict[str, FileRecord] = {}
    for name, entry in raw["files"].items():
        nbytes, sha256 = entry["bytes"], entry["sha256"]
        # Names from a file must not lead out of the folder.
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"the file name {name!r}")
        if type(nbytes) is not int or not (sha256 is None or isinstance(sha256, str)):
            raise ValueError(f"the entry of {name!r}")
        files[name] = FileRecord(nbytes, sha256)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in raw["tensors"].items():
        dtype, shape = entry["dtype"], entry["shape"]
        if not isinstance(dtype, str) or any(type(axis) is not int or axis < 0 for axis in shape):
            raise ValueError(f"the tensor {name!r}")
        tensors[name] = dtype, tuple(shape)
    return Manifest(str(raw["source"]["name"]), str(raw["source"]["fingerprint"]), tensors, files)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; an earlier one is replaced in one step."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "source": {"name": manifest.source, "fingerprint": manifest.fingerprint},
        "files": {name: {"bytes": r.nbytes, "sha256": r.sha256} for name, r in manifest.files.items()},
        "tensors": {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in manifest.tensors.items()},
    }
    save_text(folder / MANIFEST_NAME, json.dumps(content, indent=1))


def save_text(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, whatever happens."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def expert_shard_names(folder: Path, entries: Iterable[str]) -> list[str]:
    """Names of the expert shards of a repacked folder, whose directory holds `entries`; none for another folder.

    Raises CheckpointError if the folder is unfinished or a shard is missing.
    """
    present = set(entries)
    manifest = read_manifest(folder) if MANIFEST_NAME in present else None
    if manifest is None:
        return []
    if not manifest.is_complete:
        raise CheckpointError(
            f"{folder}: is an unfinished copy, its repacking was interrupted; run the same mlx_moecache repack command "
            "again, it goes on where it stopped"
        )
    for name in manifest.files:
        if name not in present:
            raise CheckpointError(f"{folder}: {name} is missing; repack the model again, files that are there are kept")
    return manifest.expert_files
