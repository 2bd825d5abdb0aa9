"""A checkpoint as mlx-lm's lazy model: every tensor named, none read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model

from .checkpoints.expert_major import read_manifest
from .checkpoints.skeleton import write_sparse
from .errors import CheckpointError, MoeCacheError, UnsupportedModelError, UsageError


def build_lazily(folder: Path, *, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model for the checkpoint in `folder`, nothing of it evaluated, and its config.

    Raises CheckpointError, UnsupportedModelError, or UsageError for code that was not trusted.
    """
    try:
        with _as_mlx_lm_expects(folder) as files:
            model, config = load_model(files, lazy=True, trust_remote_code=trust_remote_code)
    except MoeCacheError:
        raise
    except ValueError as e:
        text = one_line(e)
        if "trust_remote_code" in text:
            raise UsageError(f"{folder} brings its own model code; add --trust-remote-code if you trust it") from e
        if "not supported" in text:
            raise UnsupportedModelError(
                f"mlx-lm cannot build this model: {text}; upgrade mlx-lm or choose another"
            ) from e
        raise CheckpointError(f"the weights in {folder} do not fit its config.json: {text}") from e
    except Exception as e:  # a config that lacks keys makes model code raise KeyError, TypeError and others
        raise CheckpointError(f"mlx-lm cannot build the model in {folder}: {type(e).__name__}: {one_line(e)}") from e
    return model, config


@contextmanager
def _as_mlx_lm_expects(folder: Path) -> Iterator[Path]:
    """`folder`, or for a repacked one a temporary folder of links, in which a hole stands for the original's experts.

    mlx-lm infers much from the presence of expert tensors. They are replaced before anything is evaluated; what else
    was opened there stays open when the folder is gone.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx_moecache-") as name:
        links = Path(name)
        # Before the links: a link of this name would be written through.
        write_sparse(links / "model-experts.safetensors", manifest.tensors)
        for file in folder.resolve().iterdir():
            (links / file.name).symlink_to(file)
        yield links


def one_line(error: BaseException) -> str:
    """The message of somebody else's error, fit for one of ours."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
