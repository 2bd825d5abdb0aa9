"""Byte ranges of tensors and experts, and one clear error for each way a file can be wrong."""

from __future__ import annotations

import json
import math
import os
import shlex
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_moecache.checkpoints import checkpoint
from mlx_moecache.checkpoints.checkpoint import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    CheckpointIndex,
    TensorRecord,
    explain_missing,
    read_index,
)
from mlx_moecache.checkpoints.expert_layout import ComponentSpec, locate_experts
from mlx_moecache.errors import CheckpointError, UnsupportedModelError

Tensor = tuple[str, tuple[int, ...], bytes]  # safetensors dtype, shape, data

ITEM_BYTES = {
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "U32": 4,
    "U8": 1,
    "I32": 4,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I64": 8,
}
SWITCH = "model.layers.3.mlp.switch_mlp"
BLOCK = "model.layers.3.mlp"


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    data = np.random.default_rng(seed).bytes(math.prod(shape) * ITEM_BYTES[dtype])
    return dtype, shape, data


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        span = [position, position + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        position += len(data)
    return header


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_shard(path: Path, tensors: Mapping[str, Tensor], header: object = None) -> None:
    """A safetensors file of `tensors`; `header` replaces the true one."""
    text = json.dumps(header_of(tensors) if header is None else header)
    write_raw(path, text.encode(), b"".join(data for _, _, data in tensors.values()))


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bytes_at(index: CheckpointIndex, shard: int, offset: int, nbytes: int) -> bytes:
    with open(index.shards[shard], "rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def refused(folder: Path, *parts: str) -> None:
    """`read_index` must raise one line that holds all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Reading headers


def test_single_file_without_index_is_read(tmp_path: Path) -> None:
    tensors = {"a": tensor("F32", (2, 3), 1), "b": tensor("U8", (5,), 2), "scalar": tensor("BF16", (), 3)}
    write_shard(tmp_path / "model.safetensors", tensors)
    index = read_index(tmp_path)
    assert index.folder == tmp_path
    assert index.shards == (tmp_path / "model.safetensors",)
    assert set(index.tensors) == {"a", "b", "scalar"}  # __metadata__ is no tensor
    for name, (dtype, shape, data) in tensors.items():
        record = index.tensors[name]
        assert (record.name, record.dtype, record.shape, record.nbytes) == (name, dtype, shape, len(data))
        assert bytes_at(index, record.shard, record.offset, record.nbytes) == data


def test_every_model_file_counts_without_index_and_other_files_do_not(tmp_path: Path) -> None:
    write_shard(tmp_path / "model-00001-of-00002.safetensors", {"a": tensor("F32", (2,), 1)})
    write_shard(tmp_path / "model-00002-of-00002.safetensors", {"b": tensor("F32", (3,), 2)})
    write_shard(tmp_path / "consolidated.safetensors", {"c": tensor("F32", (3,), 3)})
    index = read_index(tmp_path)
    assert set(index.tensors) == {"a", "b"}
    assert index.shards[index.tensors["b"].shard].name == "model-00002-of-00002.safetensors"


def test_sharded_index_finds_each_tensor_in_its_shard(tmp_path: Path) -> None:
    parts = {
        "model-00001-of-00002.safetensors": {"a": tensor("F32", (4,), 1), "b": tensor("U32", (2, 2), 2)},
        "model-00002-of-00002.safetensors": {"c": tensor("F16", (7,), 3)},
    }
    for shard, tensors in parts.items():
        write_shard(tmp_path / shard, tensors)
    write_index(tmp_path, {name: shard for shard, tensors in parts.items() for name in tensors})
    index = read_index(tmp_path)
    for shard, tensors in parts.items():
        for name, (_, _, data) in tensors.items():
            record = index.tensors[name]
            assert index.shards[record.shard].name == shard
            assert bytes_at(index, record.shard, record.offset, record.nbytes) == data


def test_file_written_by_mlx_is_read_byte_for_byte(tmp_path: Path) -> None:
    arrays = {
        "odd": mx.arange(3, dtype=mx.uint8),
        "weight": mx.random.normal((3, 5)).astype(mx.bfloat16),
        "packed": mx.arange(12, dtype=mx.uint32).reshape(3, 4),
        "bias": mx.random.normal((3,)).astype(mx.float16),
        "flag": mx.array([True, False]),
    }
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    index = read_index(tmp_path)
    assert set(index.tensors) == set(arrays)
    for name, array in arrays.items():
        record = index.tensors[name]
        assert record.shape == tuple(array.shape)
        found = bytes_at(index, record.shard, record.offset, record.nbytes)
        assert found == bytes(memoryview(array).cast("B"))  # type: ignore[arg-type]


def test_shards_linked_into_a_blob_store_are_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    data = tensor("F32", (6,), 4)
    write_shard(blobs / "f00d", {"a": data})
    write_index(blobs, {"a": "model-00001-of-00001.safetensors"})
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/f00d")
    (snapshot / INDEX_NAME).symlink_to(Path("../../blobs") / INDEX_NAME)
    index = read_index(snapshot)
    record = index.tensors["a"]
    assert bytes_at(index, record.shard, record.offset, record.nbytes) == data[2]


def test_folder_names_with_pattern_characters_are_taken_literally(tmp_path: Path) -> None:
    folder = tmp_path / "model [v1]*"
    folder.mkdir()
    write_shard(folder / "model.safetensors", {"a": tensor("F32", (1,))})
    assert set(read_index(folder).tensors) == {"a"}


def test_empty_tensors_and_gaps_between_tensors_are_allowed(tmp_path: Path) -> None:
    header = {
        "none": {"dtype": "F32", "shape": [0, 8], "data_offsets": [4, 4]},
        "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [10, 12]},
    }
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode() + b"   ", bytes(12))
    index = read_index(tmp_path)
    assert [index.tensors[name].nbytes for name in ("none", "a", "b")] == [0, 8, 2]


def test_dtypes_that_mlx_cannot_load_are_still_indexed(tmp_path: Path) -> None:
    header = {
        "half_bytes": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]},
        "wide": {"dtype": "F64", "shape": [2], "data_offsets": [6, 22]},
    }
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), bytes(22))
    index = read_index(tmp_path)
    assert (index.tensors["half_bytes"].nbytes, index.tensors["wide"].nbytes) == (6, 16)


@st.composite
def shard_contents(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, min_size=1, max_size=6))
    contents = {}
    for seed, name in enumerate(n for n in names if n != "__metadata__"):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        contents[name] = tensor(dtype, shape, seed)
    return contents


@settings(max_examples=60, deadline=None)
@given(contents=shard_contents(), padding=st.integers(0, 9))
def test_bytes_at_the_recorded_offset_are_the_tensors(contents: dict[str, Tensor], padding: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        header = json.dumps(header_of(contents)).encode() + b" " * padding
        write_raw(folder / "model.safetensors", header, b"".join(data for _, _, data in contents.values()))
        index = read_index(folder)
        assert set(index.tensors) == set(contents)
        for key, (dtype, shape, data) in contents.items():
            record = index.tensors[key]
            assert (record.dtype, record.shape) == (dtype, shape)
            assert bytes_at(index, record.shard, record.offset, record.nbytes) == data


@settings(max_examples=150, deadline=None)
@given(damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), cut=st.integers(0, 60))
def test_a_damaged_file_is_refused_or_read_within_its_bounds(damage: list[tuple[int, int]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        write_shard(path, {"a": tensor("F32", (2, 3), 1), "b": tensor("BF16", (5,), 2)})
        raw = bytearray(path.read_bytes())
        for position, value in damage:
            raw[position % len(raw)] = value
        size = max(len(raw) - cut, 0)
        path.write_bytes(bytes(raw[:size]))
        try:
            index = read_index(Path(name))
        except CheckpointError:
            return
        for record in index.tensors.values():
            assert 8 <= record.offset <= record.offset + record.nbytes <= size


# Damaged or misleading files


def test_missing_folder_and_file_in_place_of_a_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "No such file")
    (tmp_path / "plain").write_text("x")
    refused(tmp_path / "plain", "plain", "Not a directory")


def test_folder_without_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, str(tmp_path), "model*.safetensors")


def test_shards_without_any_tensor_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {})
    refused(tmp_path, "no tensors")


@pytest.mark.parametrize("size", [0, 5])
def test_file_shorter_than_its_length_field_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    refused(tmp_path, "model.safetensors", f"{size} bytes", "download")


def test_header_length_above_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    refused(tmp_path, str(MAX_HEADER_BYTES + 1), "no safetensors file")


def test_file_that_ends_inside_its_header_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, b"{" + b" " * 99)
    path.write_bytes(path.read_bytes()[:-30])
    refused(tmp_path, "model.safetensors", "30 bytes are missing", "download")


def test_truncated_shard_says_how_many_bytes_are_missing(tmp_path: Path) -> None:
    good, path = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    write_shard(good, {"first": tensor("F32", (8,))})
    write_shard(path, {"second": tensor("F32", (8,)), "third": tensor("F32", (8,))})
    path.write_bytes(path.read_bytes()[:-13])
    refused(tmp_path, "model-2.safetensors", "'third'", "13 bytes are missing", "download this file again")


def test_one_missing_byte_is_noticed_and_none_is_not(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, {"a": tensor("U8", (9,))})
    whole = path.read_bytes()
    assert read_index(tmp_path).tensors["a"].nbytes == 9
    path.write_bytes(whole[:-1])
    refused(tmp_path, "1 bytes are missing")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": {}, "a": {}}', "'a' appears twice"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_header_that_is_not_one_json_object_is_refused(tmp_path: Path, header: bytes, part: str) -> None:
    write_raw(tmp_path / "model.safetensors", header)
    refused(tmp_path, "model.safetensors", part)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"dtype": "F99"}, "'F99'"),
        ({"dtype": None}, "dtype None"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"shape": [-2, -2]}, "[-2, -2]"),
        ({"shape": [4.0]}, "[4.0]"),
        ({"shape": [True, 4]}, "[True, 4]"),
        ({"shape": "4"}, "shape '4'"),
        ({"shape": None}, "shape None"),
        ({"data_offsets": None}, "data_offsets None"),
        ({"data_offsets": [0]}, "[0]"),
        ({"data_offsets": [0, 16, 32]}, "not two integers"),
        ({"data_offsets": [False, 16]}, "not two integers"),
        ({"data_offsets": [0, 16.0]}, "not two integers"),
        ({"data_offsets": [-16, 0]}, "must rise"),
        ({"data_offsets": [32, 16]}, "must rise"),
        ({"data_offsets": [0, 10**4299]}, "must rise"),
        ({"data_offsets": [0, 15]}, "15 bytes, which is not the size of F32 [4]"),
        ({"shape": [5]}, "16 bytes, which is not the size of F32 [5]"),
        ({"dtype": "F16"}, "16 bytes, which is not the size of F16 [4]"),
        ({"shape": [2**40, 2**40]}, "not the size"),
    ],
)
def test_tensor_entry_that_cannot_be_true_is_refused(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **change}
    write_raw(tmp_path / "model.safetensors", json.dumps({"some.weight": entry}).encode(), bytes(64))
    refused(tmp_path, "model.safetensors", "'some.weight'", part)


def test_tensor_entry_that_is_no_object_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", b'{"some.weight": [1, 2]}')
    refused(tmp_path, "'some.weight'", "not an object")


def test_deeply_nested_entry_is_refused_without_a_crash(tmp_path: Path) -> None:
    nested = b'{"w": {"dtype": "F32", "shape": ' + b"[" * 300 + b"]" * 300 + b"}}"
    write_raw(tmp_path / "model.safetensors", nested)
    refused(tmp_path, "'w'", "shape")


@pytest.mark.parametrize("second", [[0, 8], [4, 12], [7, 15], [2, 6]])
def test_overlapping_tensors_are_refused(tmp_path: Path, second: list[int]) -> None:
    header = {
        "one": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "two": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
    }
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), bytes(16))
    refused(tmp_path, "'one'", "'two'", "overlap")


def test_tensor_in_two_shards_is_refused_even_if_the_index_names_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "model-1.safetensors", {"a": tensor("F32", (2,))})
    write_shard(tmp_path / "model-2.safetensors", {"a": tensor("F32", (2,))})
    parts = ("'a'", "model-1.safetensors", "model-2.safetensors", "remove")
    refused(tmp_path, *parts)
    write_index(tmp_path, {"a": "model-1.safetensors"})
    refused(tmp_path, *parts)


def test_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4294967296\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    refused(tmp_path, "model.safetensors", "git-lfs pointer", "git lfs pull")


def test_link_to_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    refused(tmp_path, "model.safetensors", "gone", "download")


def test_link_that_points_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    refused(tmp_path, "model.safetensors", "cannot be read")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_shard_that_is_no_regular_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors", "not a regular file")


def test_unreadable_shard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": tensor("F32", (2,))})

    def denied(path: Path, mode: str) -> BinaryIO:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "open", denied, raising=False)
    refused(tmp_path, "model.safetensors", "Permission denied")


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, {"a": tensor("F32", (2,))})
    parse_length = checkpoint._read_range

    def shrinking(at: Path, offset: int, length: int) -> bytes:
        if offset == 8:
            os.truncate(path, 20)
        return parse_length(at, offset, length)

    monkeypatch.setattr(checkpoint, "_read_range", shrinking)
    refused(tmp_path, "model.safetensors", "shorter")


# The shard index, which mlx-lm never reads: it explains what is missing, and nothing else

LACKS = CheckpointError("the model lacks tensors")
OUTSIDE = [
    "/etc/model.safetensors",
    "../model.safetensors",
    "..",
    "sub/../../model.safetensors",
    "model-a/../../model.safetensors",
]
NOT_LOADED = [
    "weights.safetensors",
    "sub/model.safetensors",
    "model-a/b.safetensors",
    "./model.safetensors",
    "model.bin",
    "",
]


def explained(folder: Path, *parts: str) -> None:
    """The folder is read all the same; what is said of a model that cannot be built is one line with all `parts`."""
    message = str(explain_missing(read_index(folder), LACKS))
    assert "\n" not in message and str(LACKS) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("shard", [*OUTSIDE, *NOT_LOADED, "model-2.safetensors", "model\0.safetensors"])
def test_where_the_index_says_that_a_tensor_is_does_not_matter(
    tmp_path: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, opened = tmp_path / "model", []
    (folder / "sub").mkdir(parents=True)
    (folder / "model-a").mkdir()
    data = tensor("F32", (2,), 1)
    write_shard(folder / "model.safetensors", {"a": data})
    for other in ("../model", "weights", "sub/model", "model-a/b"):
        write_shard(folder / f"{other}.safetensors", {"a": tensor("F32", (2,), 2), "b": tensor("F32", (3,))})
    write_index(folder, {"a": shard, "b": shard})
    really_open = open
    monkeypatch.setattr(
        checkpoint, "open", lambda path, mode: opened.append(path) or really_open(path, mode), raising=False
    )
    index = read_index(folder)
    assert set(index.tensors) == {"a"} and index.shards == (folder / "model.safetensors",)
    assert bytes_at(index, 0, index.tensors["a"].offset, 8) == data[2]
    explain_missing(index, LACKS)
    assert set(opened) == {folder / "model.safetensors", folder / INDEX_NAME}


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_lost_tensor_in_a_shard_outside_of_the_folder_is_explained(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_shard(tmp_path / "model.safetensors", {"a": tensor("F32", (2,))})
    write_shard(folder / "model.safetensors", {"b": tensor("F32", (2,))})
    write_index(folder, {"a": shard})
    explained(folder, INDEX_NAME, repr(shard), "'a'", "leaves the model's folder")


@pytest.mark.parametrize("shard", NOT_LOADED)
def test_a_lost_tensor_in_a_shard_that_mlx_lm_does_not_load_is_explained(tmp_path: Path, shard: str) -> None:
    write_shard(tmp_path / "model.safetensors", {"b": tensor("F32", (2,))})
    write_index(tmp_path, {"a": shard})
    explained(tmp_path, INDEX_NAME, repr(shard), "'a'", "mlx-lm would not find", "model*.safetensors")


@pytest.mark.parametrize("others", [True, False])
def test_a_missing_shard_is_named_before_other_lost_tensors(tmp_path: Path, others: bool) -> None:
    write_index(tmp_path, {"a": "mtp.safetensors", "b": "model-2.safetensors"})
    parts = (INDEX_NAME, "model-2.safetensors", "'b'", "missing", "download")
    if others:
        write_shard(tmp_path / "model-1.safetensors", {"c": tensor("F32", (2,))})
        explained(tmp_path, *parts)
    else:
        refused(tmp_path, *parts)


def test_a_tensor_that_is_in_no_file_is_explained(tmp_path: Path) -> None:
    write_shard(tmp_path / "model-1.safetensors", {"b": tensor("F32", (2,))})
    write_index(tmp_path, {"ghost": "model-1.safetensors"})
    explained(tmp_path, INDEX_NAME, "'ghost'", "in no file", "model-1.safetensors")


def test_an_index_that_knows_of_nothing_missing_explains_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / "model-1.safetensors", {"b": tensor("F32", (2,))})
    assert explain_missing(read_index(tmp_path), LACKS) is LACKS
    write_index(tmp_path, {"b": "model-00001-of-00005.safetensors"})
    assert explain_missing(read_index(tmp_path), LACKS) is LACKS


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no 'weight_map'"),
        ('{"weight_map": []}', "no 'weight_map'"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "'a'"),
        ('{"weight_map": {"a": null}}', "not a file name"),
        ('{"weight_map": {"a": "model.safetensors", "a": "model-2.safetensors"}}', "appears twice"),
        ('{"weight_map": {"b": "model\\u0000.safetensors"}}', "missing"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4294967296\n", "git lfs pull"),
    ],
)
def test_an_index_file_that_makes_no_sense_is_said_to_when_something_is_missing(
    tmp_path: Path, text: str, part: str
) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": tensor("F32", (2,))})
    (tmp_path / INDEX_NAME).write_text(text)
    explained(tmp_path, INDEX_NAME, part)


def test_so_is_a_link_to_an_index_that_is_gone(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": tensor("F32", (2,))})
    (tmp_path / INDEX_NAME).symlink_to("gone.json")
    explained(tmp_path, INDEX_NAME, "gone")


# Locating experts

EXPERTS = 5
COMPONENTS = (
    ComponentSpec("gate_proj.weight", "uint32", (3, 2)),
    ComponentSpec("gate_proj.scales", "bfloat16", (3, 1)),
    ComponentSpec("up_proj.weight", "uint32", (3, 2)),
    ComponentSpec("up_proj.scales", "bfloat16", (3, 1)),
    ComponentSpec("down_proj.weight", "float32", (2, 3)),
    ComponentSpec("down_proj.bias", "float32", (2,)),
)
STORED = {
    "uint32": "U32",
    "bfloat16": "BF16",
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
    "int32": "I32",
}
W_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def expert_data(component: ComponentSpec, expert: int) -> bytes:
    seed = COMPONENTS.index(component) * EXPERTS + expert
    return tensor(STORED[component.dtype], component.shape, seed)[2]


def stacked(component: ComponentSpec, switch: str = SWITCH) -> dict[str, Tensor]:
    data = b"".join(expert_data(component, expert) for expert in range(EXPERTS))
    return {f"{switch}.{component.name}": (STORED[component.dtype], (EXPERTS, *component.shape), data)}


def per_expert(component: ComponentSpec, *, w_names: bool = False, block: str = BLOCK) -> dict[str, Tensor]:
    projection, suffix = component.name.split(".")
    name = W_NAMES[projection] if w_names else projection
    return {
        f"{block}.experts.{expert}.{name}.{suffix}": (
            STORED[component.dtype],
            component.shape,
            expert_data(component, expert),
        )
        for expert in range(EXPERTS)
    }


def layout(kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"model.norm.weight": tensor("F32", (3,))}
    for position, component in enumerate(COMPONENTS):
        form = ("stacked", "P1", "P2")[position % 3] if kind == "mixed" else kind
        if form == "stacked":
            tensors |= stacked(component)
        else:
            tensors |= per_expert(component, w_names=form == "P2")
    return tensors


def spread(folder: Path, tensors: dict[str, Tensor], shards: int) -> CheckpointIndex:
    """Deal the tensors over `shards` files, so that one expert's parts lie in several."""
    names = list(tensors)
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        write_shard(folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors", part)
    return read_index(folder)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["stacked", "P1", "P2", "mixed"])
def test_every_layout_gives_each_experts_bytes(tmp_path: Path, kind: str, shards: int) -> None:
    index = spread(tmp_path, layout(kind), shards)
    extents = locate_experts(index, SWITCH, COMPONENTS, EXPERTS)
    assert extents.nbytes == (24, 6, 24, 6, 24, 8)
    assert extents.bytes_per_expert == 92
    for c, component in enumerate(COMPONENTS):
        assert len(extents.shards[c]) == len(extents.offsets[c]) == EXPERTS
        for e in range(EXPERTS):
            found = bytes_at(index, extents.shards[c][e], extents.offsets[c][e], extents.nbytes[c])
            assert found == expert_data(component, e), (component.name, e)


@pytest.mark.parametrize("form", ["stacked", "per expert"])
def test_switch_that_is_itself_called_experts_is_found(tmp_path: Path, form: str) -> None:
    switch = f"{BLOCK}.experts"
    tensors: dict[str, Tensor] = {}
    for component in COMPONENTS:
        tensors |= stacked(component, switch) if form == "stacked" else per_expert(component)
    index = spread(tmp_path, tensors, 2)
    extents = locate_experts(index, switch, COMPONENTS, EXPERTS)
    for c, component in enumerate(COMPONENTS):
        last = bytes_at(index, extents.shards[c][-1], extents.offsets[c][-1], extents.nbytes[c])
        assert last == expert_data(component, EXPERTS - 1)


def test_switch_at_the_top_of_a_model_is_found(tmp_path: Path) -> None:
    tensors = {name.removeprefix("x."): entry for name, entry in per_expert(COMPONENTS[0], block="x").items()}
    index = spread(tmp_path, tensors, 1)
    assert len(locate_experts(index, "switch_mlp", COMPONENTS[:1], EXPERTS).offsets[0]) == EXPERTS


def test_two_projection_switches_are_found_when_stacked(tmp_path: Path) -> None:
    data = tensor("F16", (2, 3, 4))
    write_shard(tmp_path / "model.safetensors", {f"{SWITCH}.fc1.weight": data})
    spec = ComponentSpec("fc1.weight", "float16", (3, 4))
    extents = locate_experts(read_index(tmp_path), SWITCH, [spec], 2)
    assert extents.offsets[0][1] - extents.offsets[0][0] == spec.nbytes == 24


def test_stacked_tensor_is_preferred_to_per_expert_tensors(tmp_path: Path) -> None:
    component = COMPONENTS[0]
    index = spread(tmp_path, stacked(component) | per_expert(component), 1)
    extents = locate_experts(index, SWITCH, [component], EXPERTS)
    first = index.tensors[f"{SWITCH}.{component.name}"].offset
    assert extents.offsets[0] == tuple(first + e * component.nbytes for e in range(EXPERTS))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("F8_E4M3", "uint8"), ("F8_E8M0", "uint8"), ("U8", "uint8"), ("I32", "int32"), ("F16", "float16")],
)
def test_stored_dtypes_match_what_mlx_makes_of_them(tmp_path: Path, stored: str, wanted: str) -> None:
    write_shard(tmp_path / "model.safetensors", {f"{SWITCH}.up_proj.scales": tensor(stored, (2, 3))})
    spec = ComponentSpec("up_proj.scales", wanted, (3,))
    extents = locate_experts(read_index(tmp_path), SWITCH, [spec], 2)
    assert extents.nbytes == (3 * ITEM_BYTES[stored],)
    loaded = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(loaded, dict)
    assert str(loaded[f"{SWITCH}.up_proj.scales"].dtype) == f"mlx.core.{wanted}"


def test_one_value_per_expert_is_found(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {f"{SWITCH}.up_proj.global_scale": tensor("F32", (4,))})
    spec = ComponentSpec("up_proj.global_scale", "float32", ())
    extents = locate_experts(read_index(tmp_path), SWITCH, [spec], 4)
    assert extents.nbytes == (4,)
    assert [offset - extents.offsets[0][0] for offset in extents.offsets[0]] == [0, 4, 8, 12]


@pytest.mark.parametrize("w_names", [False, True])
@pytest.mark.parametrize("missing", [0, 3, EXPERTS - 1])
def test_missing_expert_is_named(tmp_path: Path, missing: int, w_names: bool) -> None:
    tensors = per_expert(COMPONENTS[4], w_names=w_names)
    gone = f"{BLOCK}.experts.{missing}.{'w2' if w_names else 'down_proj'}.weight"
    del tensors[gone]
    index = spread(tmp_path, tensors, 1)
    with pytest.raises(CheckpointError) as caught:
        locate_experts(index, SWITCH, [COMPONENTS[4]], EXPERTS)
    assert repr(gone) in str(caught.value)
    assert f"4 of {EXPERTS}" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def unsupported(index: CheckpointIndex, switch: str, component: ComponentSpec, experts: int, *parts: str) -> None:
    """`locate_experts` must refuse with one line that holds all `parts` and the command that helps."""
    with pytest.raises(UnsupportedModelError) as caught:
        locate_experts(index, switch, [component], experts)
    message = str(caught.value)
    assert "\n" not in message
    command = f"mlx_lm.convert --hf-path {shlex.quote(str(index.folder))} --mlx-path mlx_model"
    for part in (*parts, command):
        assert part in message


@pytest.mark.parametrize(
    ("stored", "shape", "wanted"),
    [
        ("F16", (EXPERTS, 3, 2), "bfloat16"),
        ("F8_E4M3", (EXPERTS, 3, 2), "bfloat16"),
        ("I32", (EXPERTS, 3, 2), "uint32"),
        ("BF16", (EXPERTS, 2, 3), "bfloat16"),
        ("BF16", (EXPERTS + 1, 3, 2), "bfloat16"),
        ("BF16", (EXPERTS * 3, 2), "bfloat16"),
    ],
)
def test_stacked_tensor_of_other_dtype_or_shape_is_refused(
    tmp_path: Path, stored: str, shape: tuple[int, ...], wanted: str
) -> None:
    name = f"{SWITCH}.up_proj.weight"
    write_shard(tmp_path / "model.safetensors", {name: tensor(stored, shape)})
    spec = ComponentSpec("up_proj.weight", wanted, (3, 2))
    parts = (repr(name), "model.safetensors", f"{stored} {list(shape)}", f"{wanted} {[EXPERTS, 3, 2]}")
    unsupported(read_index(tmp_path), SWITCH, spec, EXPERTS, *parts)


@pytest.mark.parametrize(("stored", "shape"), [("F16", (3, 2)), ("F32", (2, 3)), ("F32", (6,))])
def test_one_expert_of_other_dtype_or_shape_is_refused(tmp_path: Path, stored: str, shape: tuple[int, ...]) -> None:
    spec = ComponentSpec("up_proj.weight", "float32", (3, 2))
    tensors = {f"{BLOCK}.experts.{e}.up_proj.weight": tensor("F32", (3, 2)) for e in range(3)}
    odd = f"{BLOCK}.experts.2.up_proj.weight"
    tensors[odd] = tensor(stored, shape)
    write_shard(tmp_path / "model.safetensors", tensors)
    unsupported(read_index(tmp_path), SWITCH, spec, 3, repr(odd), f"{stored} {list(shape)}")


@pytest.mark.parametrize(
    ("switch", "there"),
    [
        ("model.layers.0.mlp.experts", "model.layers.0.mlp.experts.gate_up_proj_blocks"),
        ("language_model.model.layers.1.feed_forward.experts", None),
        ("model.layers.3.mlp.switch_mlp", "model.layers.3.mlp.experts.gate_up_proj"),
        ("transformer.h.0.ffn.experts", "transformer.h.0.ffn.experts.mlp.w1"),
    ],
)
def test_layout_that_is_not_contiguous_is_refused_with_the_command(
    tmp_path: Path, switch: str, there: str | None
) -> None:
    folder = tmp_path / "a model's folder"
    folder.mkdir()
    tensors = {"other.experts.0.gate_proj.weight": tensor("U8", (4,))}
    if there:
        tensors[there] = tensor("U8", (4,))
    write_shard(folder / "model.safetensors", tensors)
    spec = ComponentSpec("gate_proj.weight", "uint8", (4,))
    found = f"it holds {there!r} instead" if there else "it holds no experts under"
    parts = (str(folder), f"{switch}.gate_proj.weight", "not contiguous per expert", found)
    unsupported(read_index(folder), switch, spec, 4, *parts)


def test_component_of_a_dtype_that_no_shard_can_hold_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="float64"):
        _ = ComponentSpec("up_proj.weight", "float64", (2,)).nbytes


def test_a_hundred_thousand_tensors_take_no_quadratic_time(tmp_path: Path) -> None:
    layers, experts = 80, 416
    names = [
        f"model.layers.{layer}.mlp.experts.{e}.{projection}.weight"
        for layer in range(layers)
        for e in range(experts)
        for projection in ("gate_proj", "up_proj", "down_proj")
    ]
    header = {name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * i, 2 * i + 2]} for i, name in enumerate(names)}
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), bytes(2 * len(names)))
    write_index(tmp_path, dict.fromkeys(names, "model.safetensors"))
    specs = [ComponentSpec(f"{projection}.weight", "uint8", (2,)) for projection in W_NAMES]
    start = time.process_time()
    index = read_index(tmp_path)
    for layer in range(layers):
        extents = locate_experts(index, f"model.layers.{layer}.mlp.switch_mlp", specs, experts)
    seconds = time.process_time() - start
    assert index.tensors[names[-1]] == TensorRecord(
        names[-1], 0, extents.offsets[list(W_NAMES).index("down_proj")][-1], 2, "U8", (2,)
    )
    assert seconds < 10  # about 1 s; any scan of all tensors per expert would take hours
