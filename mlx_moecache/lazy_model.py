"""A checkpoint as mlx-lm's lazy model: every tensor named, none read until `read_weights`."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from .checkpoints.expert_major import read_manifest
from .checkpoints.skeleton import write_sparse
from .errors import CheckpointError, MoeCacheError, ReadError, UnsupportedModelError, UsageError
from .footprint import model_arrays

READ_TOGETHER = 256 * 1024  # bytes: norms and biases need not be waited for one by one


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


def read_weights(model: nn.Module, folder: Path) -> None:
    """Read all arrays that `model` holds from the shards in `folder`, a few at a time.

    What a weight is made from may be much larger than the weight, as all experts are than one of them, or a dequantised
    matrix than a quantised one. In one graph for all, MLX would hold a dozen of these at once. Raises ReadError.
    """
    together: list[mx.array] = []
    nbytes = 0
    for array in model_arrays(model):
        together.append(array)
        nbytes += array.nbytes
        if nbytes >= READ_TOGETHER:
            _read(together, folder)
            together, nbytes = [], 0
    _read(together, folder)


def _read(arrays: list[mx.array], folder: Path) -> None:
    try:
        mx.eval(arrays)
    except RuntimeError as e:
        if "[read]" not in str(e):
            raise
        raise ReadError(
            f"cannot read the weights in {folder} ({one_line(e)}): a shard became shorter or the disk fails; check the "
            "disk, or download the model again"
        ) from e
    mx.clear_cache()


@contextmanager
def _as_mlx_lm_expects(folder: Path) -> Iterator[Path]:
    """`folder`, or a temporary folder of links to its files if mlx-lm could not load it as it is.

    That is a repacked one, in which a hole stands for the original's experts: mlx-lm infers much from the presence of
    expert tensors. They are replaced before anything is evaluated. And one whose path mlx-lm would take as a pattern.
    What else was opened there stays open when the temporary folder is gone.
    """
    manifest = read_manifest(folder)
    if manifest is None and glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx_moecache-") as name:
        links = Path(name)
        if manifest is not None:
            # Before the links: a link of this name would be written through.
            write_sparse(links / "model-experts.safetensors", manifest.tensors)
        for file in folder.resolve().iterdir():
            (links / file.name).symlink_to(file)
        yield links


def one_line(error: BaseException) -> str:
    """The message of somebody else's error, fit for one of ours."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
