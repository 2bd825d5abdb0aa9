"""How fast do scattered experts reach their slots, compared with one thread reading the file in order?

A synthetic checkpoint has the expert shapes of Qwen1.5-MoE-A2.7B in 4-bit affine quantisation (group size
64), stacked as mlx-lm writes them: one expert is nine extents of 88 KiB to 1.4 MiB, far apart in the file.
`ExpertReader` brings randomly chosen experts into the slots of a `SlotPool`. The yardstick is one thread that
reads as many bytes in file order, in 8 MiB blocks, from a descriptor opened the same way, into a buffer as large
as the pool: a smaller one would stay in the CPU's cache. It is measured twice, with the buffer in ordinary memory
(as MLX's arrays are) and in huge pages, which direct reads like and the reader's own bounce buffers have.

Rounds are interleaved, and a ratio compares the runs of one round. "direct" bypasses the page cache, "warm"
reads from it; the operating system's count of bytes fetched from the device says whether that is what happened
(Linux only; a hypervisor or a disk may still have a cache of its own).
"""

import argparse
import json
import mmap
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from mlx_moecache.checkpoints.checkpoint import CheckpointIndex, read_index
from mlx_moecache.checkpoints.direct_io import open_shards
from mlx_moecache.checkpoints.expert_layout import ComponentSpec, LayerExtents, locate_experts
from mlx_moecache.checkpoints.reader import ExpertReader, ReadRequest
from mlx_moecache.slots import SlotPool

HIDDEN, INTERMEDIATE, EXPERTS, GROUP = 2048, 1408, 60, 64
SLOTS = 30
BLOCK = 8 * 1024 * 1024
BATCHES = {"decode": 4, "prefill": 30}  # experts per read() call: the misses of one token, one wave
DIRECT_EXPERTS, WARM_EXPERTS = 60, 120  # experts per timed run: 0.29 and 0.58 GB
YARDSTICKS = ("ordinary memory", "huge pages")
TARGET = 0.9  # reader / in order, direct


@dataclass(frozen=True)
class Sample:
    """One timed run of one side."""

    gb_per_second: float
    device_share: float | None  # bytes fetched from the device per byte wanted; None where it is not known


@dataclass(frozen=True)
class Summary:
    median: float
    q1: float
    q3: float
    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.q1:.2f} {self.q3:.2f}] ({self.min:.2f} .. {self.max:.2f})"


@dataclass(frozen=True)
class BatchResult:
    name: str
    experts_per_call: int
    gb_s: Summary
    ratios: dict[str, Summary]  # scattered / in order per yardstick, from the runs of one round


@dataclass(frozen=True)
class Result:
    temperature: str  # "direct" | "warm"
    io_mode: str
    io_note: str | None
    device_share: tuple[float, float] | None  # smallest and largest of all runs
    in_order_gb_s: dict[str, Summary]
    batches: list[BatchResult]


def components() -> list[ComponentSpec]:
    """The nine tensors of one expert."""
    specs = []
    for name, rows, columns in (
        ("gate_proj", INTERMEDIATE, HIDDEN),
        ("up_proj", INTERMEDIATE, HIDDEN),
        ("down_proj", HIDDEN, INTERMEDIATE),
    ):
        specs.append(ComponentSpec(f"{name}.weight", "uint32", (rows, columns // 8)))
        specs.append(ComponentSpec(f"{name}.scales", "float16", (rows, columns // GROUP)))
        specs.append(ComponentSpec(f"{name}.biases", "float16", (rows, columns // GROUP)))
    return specs


def switch_path(layer: int) -> str:
    return f"model.layers.{layer}.mlp.switch_mlp"


def make_checkpoint(folder: Path, gigabytes: float) -> CheckpointIndex:
    """Write the checkpoint unless it is there already, and return its index."""
    specs = components()
    layers = max(1, int(gigabytes * 1e9 / (EXPERTS * sum(spec.nbytes for spec in specs))))
    path = folder / f"qwen1.5-moe-experts-{layers}-layers" / "model.safetensors"
    if not path.exists():
        write_shard(path, specs, layers)
    return read_index(path.parent)


def write_shard(path: Path, specs: Sequence[ComponentSpec], layers: int) -> None:
    names = {"uint32": "U32", "float16": "F16"}
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    total = 0
    for layer in range(layers):
        for spec in specs:
            end = total + EXPERTS * spec.nbytes
            header[f"{switch_path(layer)}.{spec.name}"] = {
                "dtype": names[spec.dtype],
                "shape": [EXPERTS, *spec.shape],
                "data_offsets": [total, end],
            }
            total = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < total * 1.05:
        raise SystemExit(f"error: {path.parent} has {free / 1e9:.1f} GB free, {total / 1e9:.1f} GB are needed")
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file, tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, total, BLOCK):
            bar.update(file.write(os.urandom(min(BLOCK, total - start))))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def device_bytes() -> int | None:
    """Bytes that this process has caused to be fetched from storage devices so far."""
    try:
        with open("/proc/self/io") as file:
            fields = dict(line.split(": ") for line in file)
        return int(fields["read_bytes"])
    except (OSError, KeyError, ValueError):
        return None


def drop_page_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Stopwatch:
    """Times a block and notes what the device delivered meanwhile."""

    def __enter__(self) -> "Stopwatch":
        self._device = device_bytes()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._started

    def sample(self, nbytes: int) -> Sample:
        before, after = self._device, device_bytes()
        share = None if before is None or after is None else (after - before) / nbytes
        return Sample(nbytes / self._seconds / 1e9, share)


def block_buffer(nbytes: int, *, huge: bool) -> list[memoryview]:
    """About `nbytes` of touched, page-aligned memory as blocks."""
    blocks = max(1, nbytes // BLOCK)
    mapping = mmap.mmap(-1, blocks * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(mapping)
    for start in range(0, len(view), mmap.PAGESIZE):
        view[start] = 1
    return [view[block * BLOCK : (block + 1) * BLOCK] for block in range(blocks)]


class Bench:
    """The two sides on one checkpoint, opened either past the page cache or through it."""

    def __init__(self, index: CheckpointIndex, *, direct: bool, threads: int) -> None:
        self.path = index.shards[0]
        self.layers: list[LayerExtents] = []
        while f"{switch_path(len(self.layers))}.gate_proj.weight" in index.tensors:
            self.layers.append(locate_experts(index, switch_path(len(self.layers)), components(), EXPERTS))
        self.pool = SlotPool(components(), SLOTS)
        self.reader = ExpertReader(index.shards, threads=threads, direct_io=direct)
        self._descriptor = open_shards(index.shards, direct=direct).descriptors[0]
        self._buffers = {name: block_buffer(self.pool.nbytes, huge=name == "huge pages") for name in YARDSTICKS}
        self._random = random.Random(0)

    @property
    def expert_bytes(self) -> int:
        return self.layers[0].bytes_per_expert

    def scattered(self, per_call: int, calls: int) -> Sample:
        """Bring `calls` times `per_call` different experts of one random layer into random slots."""
        batches = []
        for _ in range(calls):
            layer = self._random.choice(self.layers)
            experts = self._random.sample(range(EXPERTS), per_call)
            slots = self._random.sample(range(SLOTS), per_call)
            batches.append((layer, list(zip(experts, slots, strict=True))))
        with Stopwatch() as watch:
            for layer, placed in batches:
                self.reader.read(
                    [
                        ReadRequest(layer.shards[c][expert], layer.offsets[c][expert], self.pool.view(c, slot))
                        for expert, slot in placed
                        for c in range(len(layer.nbytes))
                    ]
                )
        return watch.sample(calls * per_call * self.expert_bytes)

    def in_order(self, nbytes: int, yardstick: str) -> Sample:
        """Read `nbytes` from a random block on, one block after the other, on this thread."""
        whole_blocks = self.path.stat().st_size // BLOCK
        blocks = min(nbytes // BLOCK, whole_blocks)
        first = self._random.randrange(whole_blocks - blocks + 1)
        buffers = self._buffers[yardstick]
        with Stopwatch() as watch:
            for block in range(first, first + blocks):
                if os.preadv(self._descriptor, [buffers[block % len(buffers)]], block * BLOCK) != BLOCK:
                    raise SystemExit(f"error: short read from {self.path}; delete it and run again")
        return watch.sample(blocks * BLOCK)

    def close(self) -> None:
        self.reader.close()
        os.close(self._descriptor)


def measure(index: CheckpointIndex, *, direct: bool, threads: int, rounds: int) -> Result:
    """Both sides at one temperature, interleaved: each batch size has its own run in file order beside it."""
    bench = Bench(index, direct=direct, threads=threads)
    experts = DIRECT_EXPERTS if direct else WARM_EXPERTS
    sides = (*YARDSTICKS, "scattered")
    runs: dict[tuple[str, str], list[Sample]] = {(name, side): [] for name in BATCHES for side in sides}
    try:
        if direct:
            drop_page_cache(bench.path)
        else:
            bench.in_order(bench.path.stat().st_size, YARDSTICKS[0])
        for number in tqdm(range(rounds), desc="direct" if direct else "warm", unit="round", disable=None):
            for name, per_call in BATCHES.items():
                # No side always comes first, when the device may be asleep.
                for side in rotated(sides, number):
                    if side == "scattered":
                        sample = bench.scattered(per_call, experts // per_call)
                    else:
                        sample = bench.in_order(experts * bench.expert_bytes, side)
                    runs[name, side].append(sample)
    finally:
        bench.close()
    shares = [sample.device_share for samples in runs.values() for sample in samples]
    known = [share for share in shares if share is not None]
    speeds = {key: [sample.gb_per_second for sample in samples] for key, samples in runs.items()}
    return Result(
        temperature="direct" if direct else "warm",
        io_mode=bench.reader.io_mode,
        io_note=bench.reader.io_note,
        device_share=(round(min(known), 3), round(max(known), 3)) if known else None,
        in_order_gb_s={
            yardstick: summarise([speed for name in BATCHES for speed in speeds[name, yardstick]])
            for yardstick in YARDSTICKS
        },
        batches=[
            BatchResult(
                name,
                per_call,
                summarise(speeds[name, "scattered"]),
                {
                    yardstick: summarise(
                        [a / b for a, b in zip(speeds[name, "scattered"], speeds[name, yardstick], strict=True)]
                    )
                    for yardstick in YARDSTICKS
                },
            )
            for name, per_call in BATCHES.items()
        ],
    )


def rotated(sides: Sequence[str], by: int) -> list[str]:
    start = by % len(sides)
    return [*sides[start:], *sides[:start]]


def summarise(values: Sequence[float]) -> Summary:
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(*(round(v, 3) for v in (statistics.median(values), low, high, min(values), max(values))))


def describe(result: Result, expert_bytes: int) -> str:
    """The result as lines of text."""
    lines = [f"{result.temperature} (io mode: {result.io_mode}; {check_temperature(result)})"]
    if result.io_note:
        lines.append(f"  {result.io_note}")
    for yardstick in YARDSTICKS:
        lines.append(f"  {f'in order, {yardstick}':<40}{result.in_order_gb_s[yardstick]}  GB/s")
    for batch in result.batches:
        size = batch.experts_per_call * expert_bytes / 1e6
        title = f"{batch.name}: {batch.experts_per_call} experts ({size:.0f} MB) per read"
        lines.append(f"  {title:<40}{batch.gb_s}  GB/s")
        for yardstick in YARDSTICKS:
            lines.append(f"  {f'  ratio to in order, {yardstick}':<40}{batch.ratios[yardstick]}")
    return "\n".join(lines)


def check_temperature(result: Result) -> str:
    """Whether the bytes came from where they should."""
    if result.device_share is None:
        return "this system does not say whether the device was read"
    low, high = result.device_share
    confirmed = low >= 0.95 if result.temperature == "direct" else high <= 0.05
    verdict = "" if confirmed else f"NOT {result.temperature}: "
    return f"{verdict}the device delivered {low:.2f} to {high:.2f} of the bytes wanted"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Reading scattered experts against reading the file in order.")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is made and kept (default: under the temp folder)"
    )
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint, 10^9 bytes (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds per temperature (default: 7)")
    parser.add_argument("--threads", type=int, default=4, help="threads of the reader (default: 4)")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    folder = args.folder or Path(tempfile.gettempdir()) / "mlx_moecache_benchmark"
    index = make_checkpoint(folder, args.gb)
    results = [measure(index, direct=direct, threads=args.threads, rounds=args.rounds) for direct in (True, False)]
    if not args.json:
        expert_bytes = sum(spec.nbytes for spec in components())
        print(f"checkpoint {index.shards[0]}, {index.shards[0].stat().st_size / 1e9:.2f} GB; delete it when done")
        print(f"expert: 9 extents, {expert_bytes / 1e6:.2f} MB; {args.threads} threads; {args.rounds} rounds")
        print("figures: median [quartiles] (min .. max)")
        for result in results:
            print(describe(result, expert_bytes))
    record = {
        "benchmark": "expert_reads",
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": args.threads,
        "rounds": args.rounds,
        "target_direct_ratio": TARGET,
        "results": [asdict(result) for result in results],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
