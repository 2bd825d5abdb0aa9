"""Repacked models: what is in the files, the same logits, one read per expert, and runs that stop half-way."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model
from raw_layouts import raw_experts
from safetensors import safe_open
from tiny_models import Layout, Shelf, model_weights, random_tokens, run_model, same_bits, tiny_config, write_weights

from mlx_moecache.checkpoints import repacking
from mlx_moecache.checkpoints.checkpoint import DTYPES, CheckpointIndex, read_index
from mlx_moecache.checkpoints.expert_layout import ComponentSpec, LayerExtents, locate_experts
from mlx_moecache.checkpoints.expert_major import ALIGNMENT, MANIFEST_NAME, read_manifest
from mlx_moecache.checkpoints.reader import ExpertReader, ReadRequest
from mlx_moecache.checkpoints.repack_plan import ExpertLayer, RepackPlan, plan_repack
from mlx_moecache.checkpoints.repacking import Repacker, hash_file, verify
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import CheckpointError, MoeCacheError, UsageError
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

LENGTHS = [40, 13, *[1] * 6]
TOKENS = random_tokens(1, sum(LENGTHS), seed=3)
EXPERTS = "experts-00001-of-00001.safetensors"


def nothing(done: int) -> None:
    pass


def plan_of(folder: Path, **sizes: int) -> RepackPlan:
    opened = OpenedModel(folder)
    layers = [ExpertLayer(b.path, b.components, x) for b, x in zip(opened.blocks, opened.extents, strict=True)]
    return plan_repack(opened.index, layers, folder.name, **sizes)


def repack(folder: Path, out: Path, **sizes: int) -> Repacker:
    repacker = Repacker(plan_of(folder, **sizes), out)
    repacker.run(nothing)
    return repacker


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def demo_plan() -> RepackPlan:
    return plan_of(DEMO_MODEL, shard_bytes=4_000_000)


@pytest.fixture(scope="module")
def demo_copy(tmp_path_factory: pytest.TempPathFactory, demo_plan: RepackPlan) -> Path:
    """The demo model in several shards. Do not change it: it is shared."""
    out = tmp_path_factory.mktemp("repacked") / "demo"
    Repacker(demo_plan, out).run(nothing)
    return out


# ---- the model ----


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        ("qwen2_moe", "float32"),
        ("qwen3_moe", "4bit"),
        ("gpt_oss", "mxfp4"),
        ("mixtral", "raw"),
        ("deepseek_v2", "raw"),
        ("olmoe", "raw"),
    ],
)
def test_a_repacked_model_gives_the_logits_of_the_original(
    model_type: str, layout: Layout, shelf: Shelf, tmp_path: Path
) -> None:
    path = shelf.checkpoint(model_type, layout)
    before = content(path)
    repack(path, tmp_path / "out", shard_bytes=100_000)
    opened = OpenedModel(tmp_path / "out")
    assert all(opened.index.shards[s].name.startswith("experts-") for x in opened.extents for s in x.shards[0])
    assert opened.tokenizer().eos_token_ids
    model = opened.load(MemoryOptions(slots=max(b.k for b in opened.blocks)), CacheOptions(routing="original"))
    assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(shelf.stock(path), TOKENS, LENGTHS))
    assert model.expert_cache.stats.decode.loads > 0
    assert content(path) == before


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "granitemoe", "nemotron_h", "kimi_k3"])
def test_published_layouts_are_repacked_under_their_own_names(model_type: str, shelf: Shelf, tmp_path: Path) -> None:
    config = tiny_config(model_type)
    write_weights(tmp_path / "raw", config, raw_experts(model_type, model_weights(config)))
    repack(tmp_path / "raw", tmp_path / "out")
    opened = OpenedModel(tmp_path / "out")
    assert all(opened.index.shards[s].name == EXPERTS for x in opened.extents for shards in x.shards for s in shards)
    model = opened.load(MemoryOptions(slots=max(b.k for b in opened.blocks)), CacheOptions(routing="original"))
    lengths = [20, 1, 1]
    tokens = random_tokens(1, sum(lengths))
    assert same_bits(run_model(model, tokens, lengths), run_model(shelf.stock(tmp_path / "raw"), tokens, lengths))


def test_opening_a_copy_leaves_no_temporary_folder_behind(
    demo_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    OpenedModel(demo_copy).load(MemoryOptions(slots=20), CacheOptions())
    assert not list(tmp_path.iterdir())


def test_a_file_named_as_the_stand_in_is_not_written_through(demo_copy: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(demo_copy, tmp_path / "out"))
    shutil.copy(out / "model.safetensors", out / "model-experts.safetensors")
    (out / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError):
        OpenedModel(out)
    assert (out / "model-experts.safetensors").read_bytes() == (demo_copy / "model.safetensors").read_bytes()


def test_mlx_lm_itself_refuses_a_copy_instead_of_running_it_with_wrong_weights(demo_copy: Path) -> None:
    with pytest.raises(ValueError, match="Missing"):
        load_model(demo_copy)


def test_a_copy_is_not_repacked_again(demo_copy: Path) -> None:
    with pytest.raises(UsageError, match="is a repacked copy already"):
        plan_of(demo_copy)


def expert_bytes(opened: OpenedModel, layer: int, expert: int) -> bytes:
    x = opened.extents[layer]
    parts = []
    for shards, offsets, nbytes in zip(x.shards, x.offsets, x.nbytes, strict=True):
        with open(opened.index.shards[shards[expert]], "rb") as file:
            file.seek(offsets[expert])
            parts.append(file.read(nbytes))
    return b"".join(parts)


# ---- the files ----


def test_the_safetensors_package_opens_every_file_and_finds_every_tensor(demo_copy: Path) -> None:
    original: dict[str, Any] = {}
    for path in DEMO_MODEL.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            original |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    found: dict[str, Any] = {}
    for path in demo_copy.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if path.name.startswith("experts"):
            assert metadata == {"format": "mlx_moecache.experts", "version": "1"}
        else:
            assert not any("switch" in name for name in tensors)
        assert not found.keys() & tensors.keys()
        found |= tensors
    paddings = [found.pop(name) for name in list(found) if name.startswith("padding.")]
    assert all(p.dtype == np.uint8 and not p.any() and p.size < ALIGNMENT for p in paddings)
    for name, tensor in original.items():
        path, _, component = name.partition(".switch_mlp.")
        if component:
            for e, expected in enumerate(tensor):
                one = found.pop(f"{path}.switch_mlp.{e}.{component}")
                assert one.dtype == expected.dtype and np.array_equal(one, expected)
        else:
            assert np.array_equal(found.pop(name), tensor)
    assert not found


def test_an_expert_begins_on_a_page_and_its_tensors_lie_side_by_side(demo_copy: Path) -> None:
    opened = OpenedModel(demo_copy)
    starts = set()
    for x in opened.extents:
        for e in range(60):
            parts = sorted((x.offsets[c][e], x.nbytes[c], x.shards[c][e]) for c in range(len(x.nbytes)))
            assert parts[0][0] % ALIGNMENT == 0
            assert len({shard for _, _, shard in parts}) == 1
            for (offset, nbytes, _), (after, _, _) in itertools.pairwise(parts):
                assert offset + nbytes == after
            starts.add((parts[0][2], parts[0][0]))
    assert len(starts) == 360


@pytest.mark.parametrize("direct", [False, True])
def test_one_expert_is_one_read_call(direct: bool, demo_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.preadv

    def counting(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(descriptor, views, offset)

    counts = []
    for folder in (DEMO_MODEL, demo_copy):
        opened = OpenedModel(folder)
        x = opened.extents[3]
        targets = [bytearray(n) for n in x.nbytes]
        with ExpertReader(opened.index.shards, direct_io=direct) as reader, monkeypatch.context() as patch:
            patch.setattr(os, "preadv", counting)
            calls.clear()
            reader.read([ReadRequest(x.shards[c][17], x.offsets[c][17], memoryview(t)) for c, t in enumerate(targets)])
        counts.append(len(calls))
        assert b"".join(map(bytes, targets)) == expert_bytes(OpenedModel(DEMO_MODEL), 3, 17)
    assert counts == [len(x.nbytes), 1]


def test_the_manifest_names_the_original_and_has_the_hash_of_every_file(demo_copy: Path, demo_plan: RepackPlan) -> None:
    raw = json.loads((demo_copy / MANIFEST_NAME).read_text())
    assert (raw["format"], raw["version"], raw["source"]["name"]) == ("mlx_moecache.experts", 1, "demo_model")
    assert raw["tensors"]["model.layers.0.mlp.switch_mlp.down_proj.weight"]["shape"][0] == 60
    weights = {path.name for path in demo_copy.glob("*.safetensors")}
    assert weights == raw["files"].keys() and len(weights) == len(demo_plan.files) > 3
    for name, entry in raw["files"].items():
        assert entry == {"bytes": (demo_copy / name).stat().st_size, "sha256": hash_file(demo_copy / name, nothing)}
        assert entry["bytes"] < 4_000_000 + 200_000  # tensors and header
    assert str(DEMO_MODEL.parent) not in (demo_copy / MANIFEST_NAME).read_text()


def test_several_resident_files_have_an_index_and_the_small_files_come_along(shelf: Shelf, tmp_path: Path) -> None:
    path = shelf.checkpoint("qwen2_moe", "4bit")
    repack(path, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    OpenedModel(tmp_path / "out")


def write_random(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], seed: int) -> CheckpointIndex:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + int(np.prod(shape)) * DTYPES[dtype][0] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    folder.mkdir()
    data = len(raw).to_bytes(8, "little") + raw + random.Random(seed).randbytes(end)
    (folder / "model.safetensors").write_bytes(data)
    return read_index(folder)


dtypes = st.sampled_from(["U8", "BF16", "F16", "F32", "U32", "F8_E4M3"])
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple)


@settings(max_examples=40)
@given(
    parts=st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=5),
    rest=st.lists(st.tuples(dtypes, shapes), max_size=4),
    experts=st.integers(1, 7),
    shard_bytes=st.integers(1, 40_000),
    seed=st.integers(0, 99),
)
def test_any_mixture_of_dtypes_and_sizes_is_aligned_within_the_limits_and_complete(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[str, tuple[int, ...]]],
    rest: list[tuple[str, tuple[int, ...]]],
    experts: int,
    shard_bytes: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    stacked = {f"m.{i}.weight": (dtype, (experts, *shape)) for i, (dtype, shape) in enumerate(parts)}
    other = {f"r.{i}": spec for i, spec in enumerate(rest)}
    index = write_random(folder / "in", {**other, **stacked}, seed)
    specs = [ComponentSpec(f"{i}.weight", str(DTYPES[dtype][1]), shape) for i, (dtype, shape) in enumerate(parts)]
    extents = locate_experts(index, "m", specs, experts)
    plan = plan_repack(index, [ExpertLayer("m", specs, extents)], "any", shard_bytes=shard_bytes)
    Repacker(plan, folder / "out").run(nothing)

    again = read_index(folder / "out")
    for record in again.tensors.values():
        assert record.offset % (DTYPES[record.dtype][0] // 8) == 0
    moved = locate_experts(again, "m", specs, experts)
    old, new = (folder / "in" / "model.safetensors").read_bytes(), [p.read_bytes() for p in again.shards]
    for i, nbytes in enumerate(extents.nbytes):
        for e in range(experts):
            at, start = moved.offsets[i][e], extents.offsets[i][e]
            assert new[moved.shards[i][e]][at : at + nbytes] == old[start : start + nbytes]
    for name in other:
        a, b = index.tensors[name], again.tensors[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert new[b.shard][b.offset : b.offset + b.nbytes] == old[a.offset : a.offset + a.nbytes]
    one = sum(extents.nbytes) + ALIGNMENT
    for path in again.shards:
        with safe_open(path, "numpy") as file:
            assert len(list(file.keys())) <= len(again.tensors)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header <= max(shard_bytes, one) and header % ALIGNMENT == 0
    assert not verify(folder / "out", read_manifest(folder / "out") or pytest.fail("no manifest"), nothing)


def test_a_tensor_that_holds_more_than_experts_stays_a_resident_one_too(tmp_path: Path) -> None:
    index = write_random(tmp_path / "in", {"m.weight": ("F32", (5, 3)), "n.weight": ("F32", (4, 3))}, 1)
    spec = [ComponentSpec("weight", "float32", (3,))]
    four = [
        LayerExtents((12,), ((0,) * 4,), (tuple(index.tensors[name].offset + 12 * e for e in range(4)),))
        for name in ("m.weight", "n.weight")
    ]
    plan = plan_repack(index, [ExpertLayer("m", spec, four[0]), ExpertLayer("n", spec, four[1])], "more")
    Repacker(plan, tmp_path / "out").run(nothing)
    again = read_index(tmp_path / "out")
    assert again.tensors["m.weight"].shape == (5, 3) and "n.weight" not in again.tensors
    assert {"m.0.weight", "m.3.weight", "n.3.weight"} <= again.tensors.keys() and "m.4.weight" not in again.tensors
    assert plan.manifest.tensors == {"n.weight": ("F32", (4, 3))}


# ---- runs that stop half-way ----


def stop_at(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the flush of file `number` (from 0, manifest and index included) fail."""
    real, calls = os.fsync, itertools.count()

    def fsync(descriptor: int) -> None:
        if next(calls) == number:
            raise error
        real(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
@pytest.mark.parametrize("number", range(0, 9, 2))
def test_a_stopped_run_is_continued_with_the_finished_files(
    number: int,
    error: BaseException,
    demo_plan: RepackPlan,
    demo_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, number, error)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MoeCacheError) as caught:
            Repacker(demo_plan, out).run(nothing)
    if isinstance(error, OSError):
        assert "the disk is full" in str(caught.value) and "run the same command again" in str(caught.value)
        assert str(out) in str(caught.value)
    assert not list(out.glob("*.partial"))
    if number:
        with pytest.raises(CheckpointError, match="unfinished"):
            OpenedModel(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    again = Repacker(demo_plan, out)
    finished = again.recorded
    assert finished == [f.name for f in demo_plan.files][: len(finished)] and len(finished) == max(0, number - 1) // 2
    assert again.check_recorded(nothing) == []
    again.run(nothing)
    assert all((out / name).stat().st_mtime_ns == times[name] for name in finished)
    assert content(out) == content(demo_copy)


def test_what_a_killed_run_left_is_removed(demo_plan: RepackPlan, demo_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{MANIFEST_NAME}.partial").write_text("{")
    (out / f"{EXPERTS}.partial").write_bytes(b"x" * 100)
    Repacker(demo_plan, out).run(nothing)
    assert content(out) == content(demo_copy)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [damage, Path.unlink, lambda path: os.truncate(path, 4096)])
def test_a_damaged_file_is_found_and_only_it_is_written_anew(
    harm: Callable[[Path], None], demo_plan: RepackPlan, demo_copy: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(demo_copy, tmp_path / "out"))
    (out / "config.json").write_text("{}")  # edited by its owner, who keeps it
    name = demo_plan.experts[1].name
    harm(out / name)
    manifest = read_manifest(out)
    assert manifest is not None and verify(out, manifest, nothing) == [name]
    again = Repacker(demo_plan, out)
    assert again.check_recorded(nothing) == [name]
    assert [f.name for f in again.pending] == [name]
    again.run(nothing)
    assert content(out) == {**content(demo_copy), "config.json": b"{}"}


def test_a_disk_that_gives_back_other_bytes_is_noticed(
    demo_plan: RepackPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def corrupting(descriptor: int) -> None:
        real(descriptor)
        if os.fstat(descriptor).st_size > 1_000_000:
            os.pwrite(descriptor, b"\xff\x00\xff\x00", 500_000)

    monkeypatch.setattr(os, "fsync", corrupting)
    with pytest.raises(MoeCacheError, match="other bytes than were written"):
        Repacker(demo_plan, tmp_path / "out").run(nothing)
    assert (
        not list((tmp_path / "out").glob("*.safetensors*.partial"))
        and not Repacker(demo_plan, tmp_path / "out").recorded
    )


def test_an_original_that_becomes_shorter_is_an_error_that_names_it(tmp_path: Path) -> None:
    source = Path(shutil.copytree(DEMO_MODEL, tmp_path / "in"))
    plan = plan_of(source)
    os.truncate(source / "model.safetensors", 3_000_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: became shorter"):
        Repacker(plan, tmp_path / "out").run(nothing)
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        Repacker(plan, tmp_path / "out").run(nothing)


def test_a_second_run_into_the_same_folder_is_refused(demo_plan: RepackPlan, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(MoeCacheError, match="another mlx_moecache repack is writing there"):
            Repacker(demo_plan, tmp_path).run(nothing)
    finally:
        os.close(descriptor)
    assert not list(tmp_path.iterdir())


# ---- refused ----


def test_too_little_space_is_told_with_both_figures_before_anything_is_written(
    demo_plan: RepackPlan, demo_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(repacking.shutil, "disk_usage", lambda place: usage._replace(free=12_000_000))
    with pytest.raises(UsageError, match=r"needs 61\.\d MB, but only 12\.0 MB are free"):
        Repacker(demo_plan, tmp_path / "new" / "out").check_space()
    assert not list(tmp_path.iterdir())
    Repacker(demo_plan, demo_copy).check_space()  # nothing is left to write


def test_folders_that_are_not_ours_are_refused(demo_plan: RepackPlan, demo_copy: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(DEMO_MODEL)
    for same in (DEMO_MODEL, link):
        with pytest.raises(UsageError, match="is the model itself"):
            Repacker(demo_plan, same)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        Repacker(demo_plan, tmp_path)
    with pytest.raises(UsageError, match="cannot be used as a folder"):
        Repacker(demo_plan, tmp_path / "notes.txt")
    with pytest.raises(UsageError, match=r"another model \(demo_model\), or of other files"):
        Repacker(plan_of(DEMO_MODEL), demo_copy)  # the same model in shards of another size


def test_a_model_of_the_same_shape_is_told_apart(demo_copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(DEMO_MODEL, tmp_path / "tuned"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[4_000_000:6_000_000] = bytes(2_000_000)
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="a copy of another model"):
        Repacker(plan_of(other, shard_bytes=4_000_000), demo_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version 2 of the format, this mlx_moecache knows 1"),
        (lambda m: m.pop("files"), "damaged"),
        (lambda m: m.pop("tensors"), "damaged"),
        (lambda m: m.update(files=[]), "damaged"),
        (lambda m: m["files"].update({"../model.safetensors": {"bytes": 1, "sha256": "0"}}), "damaged"),
        (lambda m: m["files"][EXPERTS.replace("001.", "003.")].update(sha256=None), "unfinished"),
        (lambda m: m["tensors"].update(x={"dtype": "F99", "shape": [1]}), "unknown dtype"),
    ],
)
def test_a_damaged_or_newer_manifest_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, demo_copy: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(demo_copy, tmp_path / "out"))
    raw = json.loads((out / MANIFEST_NAME).read_text())
    change(raw)
    (out / MANIFEST_NAME).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        OpenedModel(out)


def test_a_missing_shard_is_named(demo_copy: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(demo_copy, tmp_path / "out"))
    name = next(p.name for p in out.glob("experts-00002*.safetensors"))
    (out / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        OpenedModel(out)


def test_a_foreign_file_of_the_manifests_name_is_ignored(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "in"))
    (folder / MANIFEST_NAME).write_text('{"weight_map": {}}')
    OpenedModel(folder)
