"""Skeletons: shards that are a header and a hole tell the same as the real ones, and take no space."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Layout, tiny_config, write_checkpoint

from mlx_moecache.checkpoints.checkpoint import DTYPES, CheckpointIndex, read_index
from mlx_moecache.checkpoints.skeleton import Tensors, skeleton, write_sparse
from mlx_moecache.errors import CheckpointError
from mlx_moecache.loading import MemoryOptions, OpenedModel

SHARD = "model.safetensors"
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
WHOLE_BYTES = [name for name, (bits, _) in DTYPES.items() if bits % 8 == 0]
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(WHOLE_BYTES), SHAPES),
    min_size=1,
    max_size=6,
)


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def shards_of(index: CheckpointIndex) -> dict[str, Tensors]:
    shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {path.name: {} for path in index.shards}
    for record in index.tensors.values():
        shards[index.shards[record.shard].name][record.name] = record.dtype, record.shape
    return dict(shards)


@given(tensors=TENSORS)
def test_a_sparse_file_has_exactly_the_tensors_that_it_was_given(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sparse")
    write_sparse(folder / SHARD, tensors)
    index = read_index(folder)
    assert {name: (r.dtype, r.shape) for name, r in index.tensors.items()} == dict(tensors)
    assert all(r.nbytes == math.prod(r.shape) * DTYPES[r.dtype][0] // 8 for r in index.tensors.values())
    begin = min(r.offset for r in index.tensors.values())
    assert begin % 8 == 0
    assert (folder / SHARD).stat().st_size == begin + sum(r.nbytes for r in index.tensors.values())


def test_other_readers_open_a_sparse_file_and_see_zeros(tmp_path: Path) -> None:
    path = tmp_path / SHARD
    write_sparse(path, {"a": ("F32", (3, 5)), "b": ("U32", (7,)), "c": ("BF16", (2, 2, 2)), "d": ("F32", ())})
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    assert {name: (str(a.dtype), a.shape) for name, a in loaded.items()} == {
        "a": ("mlx.core.float32", (3, 5)),
        "b": ("mlx.core.uint32", (7,)),
        "c": ("mlx.core.bfloat16", (2, 2, 2)),
        "d": ("mlx.core.float32", ()),
    }
    assert not np.array(loaded["a"]).any()
    with safetensors.safe_open(str(path), "numpy") as file:
        assert sorted(file.keys()) == ["a", "b", "c", "d"]
        assert file.get_tensor("b").tolist() == [0] * 7


@pytest.mark.parametrize("place", ["here", "/dev/shm"])
def test_a_hole_of_gigabytes_takes_no_space(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if place != "here":
        if not os.path.isdir(place):
            pytest.skip(f"no {place} on this system")
        monkeypatch.setattr("tempfile.tempdir", place)
    with skeleton([], {SHARD: {"experts": ("U32", (128, 4096, 4096))}}) as folder:
        path = folder / SHARD
        assert path.stat().st_size > 8_000_000_000
        assert on_disk(path) < 100_000
        assert read_index(folder).tensors["experts"].nbytes == 128 * 4096 * 4096 * 4


@pytest.mark.parametrize(("dtype", "shape"), [("F17", (2,)), ("", (2,)), ("F4", (3,))])
def test_a_dtype_that_cannot_be_written_is_refused(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor 'a'"):
        write_sparse(tmp_path / SHARD, {"a": (dtype, shape)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "..", ""])
def test_a_shard_cannot_leave_the_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CheckpointError, match="no name of a shard"), skeleton([], {name: {"a": ("F32", (2,))}}):
        pytest.fail("was made")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_gone_at_the_end_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    config = tmp_path / "config.json"
    config.write_text('{"a": 1}')
    shards = {SHARD: {"a": ("F32", (2,))}}
    with skeleton([config], shards) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", SHARD]
        (folder / "config.json").write_text("changed")
    with pytest.raises(ZeroDivisionError), skeleton([config], shards):
        raise ZeroDivisionError
    assert not list((tmp_path / "temporary").iterdir())
    assert json.loads(config.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        ("qwen2_moe", "4bit"),
        ("deepseek_v2", "float32"),
        ("deepseek_v2", "raw"),
        ("mixtral", "raw"),
        ("gpt_oss", "mxfp4"),
    ],
)
def test_a_skeleton_opens_as_the_model_itself(model_type: str, layout: Layout, tmp_path: Path) -> None:
    real = write_checkpoint(tmp_path / "model", tiny_config(model_type), layout)
    expected = OpenedModel(real)
    with skeleton([real / "config.json"], shards_of(expected.index)) as folder:
        opened = OpenedModel(folder)
        assert sum(on_disk(path) for path in folder.glob("*.safetensors")) < 100_000
    # The folder is gone, and planning still needs no byte of it.
    assert opened.resident == expected.resident
    assert opened.layer_shapes == expected.layer_shapes
    assert [b.components for b in opened.blocks] == [b.components for b in expected.blocks]
    assert [e.nbytes for e in opened.extents] == [e.nbytes for e in expected.extents]
    for options in (MemoryOptions(slots=5, max_context=300), MemoryOptions(memory="10MB", max_context=64)):
        assert opened.plan(options) == expected.plan(options)
