"""What does `mlx_moecache repack` gain? Random experts read from stock shards and from a repacked copy of them.

The checkpoint has the expert shapes of Qwen1.5-MoE-A2.7B in 4-bit affine quantisation: one expert is 4.87 MB, in nine
extents of 88 KiB to 1.4 MiB that lie far apart in stock shards, and in one piece in the copy. The same experts are
brought into the same slots from both, one run after the other, who is first changes from round to round, and a ratio
compares the two runs of a round.

"direct" reads past the page cache, "cold" reads through it after the files were dropped from it (what `generate` does
with a model larger than memory), "warm" reads from it. The operating system's count of bytes fetched from the device
says whether that is what happened (Linux only; a hypervisor or a disk may still have a cache of its own).

MLX's CPU allocator puts arrays 24 bytes behind the start of a page. From an expert that begins on a page, AMD's Zen
processors copy to such an address at about half their speed (their "rep movsb" does not like distances of 1 to 63
bytes modulo 4096). Metal's buffers begin on a page; `--aligned-slots` shows reads into slots that do.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from common import environment, positive, run
from expert_reads import (
    EXPERTS,
    SLOTS,
    Sample,
    Stopwatch,
    Summary,
    components,
    drop_page_cache,
    make_checkpoint,
    rotated,
    summarise,
    switch_path,
)
from tqdm import tqdm

from mlx_moecache.checkpoints.checkpoint import CheckpointIndex, read_index
from mlx_moecache.checkpoints.expert_layout import LayerExtents, locate_experts
from mlx_moecache.checkpoints.reader import ExpertReader, ReadRequest
from mlx_moecache.checkpoints.repack_plan import ExpertLayer, plan_repack
from mlx_moecache.checkpoints.repacking import Repacker
from mlx_moecache.slots import SlotPool

LAYOUTS = ("stock", "repacked")
TEMPERATURES = ("direct", "cold", "warm")
BATCHES = {"one": 1, "decode": 4, "prefill": 30}  # experts per read() call
MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
EXPERTS_PER_RUN = 60  # 0.29 GB
Call = tuple[int, list[tuple[int, int]]]  # number of the layer, and (expert, slot) of what one read() call brings


@dataclass(frozen=True)
class BatchResult:
    name: str
    experts_per_call: int
    reads_per_expert: dict[str, float]  # read system calls, by layout
    gb_s: dict[str, Summary]
    ratio: Summary  # repacked / stock in GB/s, from the runs of one round
    device_share: tuple[float, float] | None  # bytes fetched per byte wanted: smallest and largest of all runs


@dataclass(frozen=True)
class Result:
    temperature: str
    io_mode: str
    io_note: str | None
    batches: list[BatchResult]


class AlignedSlots:
    """Slots that begin on a page, which are no MLX arrays."""

    def __init__(self) -> None:
        self._nbytes = [c.nbytes for c in components()]
        self._views = [memoryview(mmap.mmap(-1, SLOTS * n, flags=MAP_FLAGS)) for n in self._nbytes]
        for view in self._views:
            view[:] = bytes(len(view))  # touched, as MLX's are

    def view(self, component: int, slot: int) -> memoryview:
        n = self._nbytes[component]
        return self._views[component][slot * n : (slot + 1) * n]


class Side:
    """One of the two layouts, opened for reading."""

    def __init__(self, index: CheckpointIndex, pool: SlotPool | AlignedSlots, *, direct: bool, threads: int) -> None:
        self.index, self.pool = index, pool
        self.layers = layers_of(index)
        self.reader = ExpertReader(index.shards, threads=threads, direct_io=direct)

    def read(self, layer: int, placed: Sequence[tuple[int, int]]) -> None:
        """Bring each (expert, slot) of `placed` from one layer into its slot."""
        x = self.layers[layer]
        self.reader.read(
            [
                ReadRequest(x.shards[c][expert], x.offsets[c][expert], self.pool.view(c, slot))
                for expert, slot in placed
                for c in range(len(x.nbytes))
            ]
        )

    def drop(self) -> None:
        for path in self.index.shards:
            drop_page_cache(path)


def layers_of(index: CheckpointIndex) -> list[LayerExtents]:
    layers: list[LayerExtents] = []
    first = components()[0].name
    while not index.tensors.keys().isdisjoint(
        (f"{switch_path(len(layers))}.{first}", f"{switch_path(len(layers))}.0.{first}")
    ):
        layers.append(locate_experts(index, switch_path(len(layers)), components(), EXPERTS))
    return layers


def repacked(stock: CheckpointIndex) -> CheckpointIndex:
    """The copy beside the stock folder, made unless it is there already."""
    layers = [ExpertLayer(switch_path(i), components(), x) for i, x in enumerate(layers_of(stock))]
    out = stock.folder.with_name(f"{stock.folder.name}-repacked")
    repacker = Repacker(plan_repack(stock, layers, stock.folder.name), out)
    repacker.check_space()
    total = 2 * sum(f.nbytes for f in repacker.pending)
    with tqdm(total=total, desc="repacking", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        repacker.run(lambda done: bar.update(done) and None)
    return read_index(out)


def measure(
    indexes: dict[str, CheckpointIndex],
    pool: SlotPool | AlignedSlots,
    temperature: str,
    *,
    threads: int,
    rounds: int,
) -> Result:
    direct = temperature == "direct"
    chance = random.Random(0)
    with ExitStack() as stack:
        sides = {name: Side(index, pool, direct=direct, threads=threads) for name, index in indexes.items()}
        for side in sides.values():
            stack.enter_context(side.reader)
            side.drop()
            if temperature == "warm":
                for layer in range(len(side.layers)):
                    for expert in range(EXPERTS):
                        side.read(layer, [(expert, 0)])
        samples: dict[tuple[str, str], list[Sample]] = {(b, s): [] for b in BATCHES for s in sides}
        for number in tqdm(range(rounds), desc=temperature, unit="round", leave=False, disable=None):
            for batch, per_call in BATCHES.items():
                calls = draw(chance, len(sides["stock"].layers), per_call, EXPERTS_PER_RUN // per_call)
                # No side always comes first, when the device may be asleep.
                for name in rotated(LAYOUTS, number):
                    side = sides[name]
                    if temperature == "cold":
                        side.drop()
                    with Stopwatch() as watch:
                        for layer, placed in calls:
                            side.read(layer, placed)
                    nbytes = len(calls) * per_call * side.layers[0].bytes_per_expert
                    samples[batch, name].append(watch.sample(nbytes))
        reader = sides["stock"].reader
        batches = []
        for batch, per_call in BATCHES.items():
            speed = {name: [s.gb_per_second for s in samples[batch, name]] for name in LAYOUTS}
            shares = [s.device_share for name in LAYOUTS for s in samples[batch, name] if s.device_share is not None]
            batches.append(
                BatchResult(
                    batch,
                    per_call,
                    {name: count_reads(side, chance, per_call) for name, side in sides.items()},
                    {name: summarise(speed[name]) for name in LAYOUTS},
                    summarise([b / a for a, b in zip(speed["stock"], speed["repacked"], strict=True)]),
                    (round(min(shares), 3), round(max(shares), 3)) if shares else None,
                )
            )
        return Result(temperature, reader.io_mode, reader.io_note, batches)


def draw(chance: random.Random, layers: int, per_call: int, calls: int) -> list[Call]:
    """Random experts of random layers; none comes twice, since the second time it would not be cold."""
    groups = [
        (layer, experts[start : start + per_call])
        for layer in range(layers)
        for experts in [chance.sample(range(EXPERTS), EXPERTS)]
        for start in range(0, EXPERTS - per_call + 1, per_call)
    ]
    chosen = chance.sample(groups, min(calls, len(groups)))
    return [
        (layer, list(zip(experts, chance.sample(range(SLOTS), per_call), strict=True))) for layer, experts in chosen
    ]


def count_reads(side: Side, chance: random.Random, per_call: int) -> float:
    """Read system calls per expert, of one call of `ExpertReader`."""
    real, calls = os.preadv, []

    def counting(*arguments: object) -> int:
        calls.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    os.preadv = counting  # type: ignore[assignment]
    try:
        side.read(*draw(chance, len(side.layers), per_call, 1)[0])
    finally:
        os.preadv = real
    return round(len(calls) / per_call, 2)


def describe(result: Result) -> str:
    lines = [f"{result.temperature} (io mode: {result.io_mode})"]
    if result.io_note:
        lines.append(f"  {result.io_note}")
    lines.append(f"  {'experts per call':<20}{'reads each':<14}{'stock GB/s':<38}{'repacked GB/s':<38}ratio")
    for b in result.batches:
        reads = f"{b.reads_per_expert['stock']:g} -> {b.reads_per_expert['repacked']:g}"
        speeds = "".join(f"{b.gb_s[name]!s:<38}" for name in LAYOUTS)
        lines.append(f"  {f'{b.name}: {b.experts_per_call}':<20}{reads:<14}{speeds}{b.ratio}{doubt(result, b)}")
    return "\n".join(lines)


def doubt(result: Result, batch: BatchResult) -> str:
    """Says so if the bytes did not come from where they should."""
    if batch.device_share is None:
        return ""
    low, high = batch.device_share
    fits = high <= 0.05 if result.temperature == "warm" else low >= 0.95
    return "" if fits else f"  NOT {result.temperature}: the device delivered {low:.2f} to {high:.2f} of the bytes"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Random experts from stock shards against a repacked copy.")
    parser.add_argument(
        "--folder", type=Path, help="where the two checkpoints are made and kept (default: under the temp folder)"
    )
    parser.add_argument("--gb", type=float, default=1.2, help="size of each checkpoint, 10^9 bytes (default: 1.2)")
    parser.add_argument("--rounds", type=positive, default=15, help="interleaved rounds per row (default: 15)")
    parser.add_argument("--threads", type=positive, default=4, help="threads of the reader (default: 4)")
    parser.add_argument(
        "--aligned-slots", action="store_true", help="read into slots that begin on a page (default: MLX arrays)"
    )
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    facts = environment()
    folder = args.folder or Path(tempfile.gettempdir()) / "mlx_moecache_benchmark"
    stock = make_checkpoint(folder, args.gb)
    indexes = dict(zip(LAYOUTS, (stock, repacked(stock)), strict=True))
    pool = AlignedSlots() if args.aligned_slots else SlotPool(components(), SLOTS)
    results = [measure(indexes, pool, t, threads=args.threads, rounds=args.rounds) for t in TEMPERATURES]
    if not args.json:
        for name, index in indexes.items():
            size = sum(path.stat().st_size for path in index.shards)
            print(f"{name}: {index.folder}, {size / 1e9:.2f} GB; delete it when done")
        size = sum(c.nbytes for c in components())
        where = "slots that begin on a page" if args.aligned_slots else "slots in MLX arrays"
        print(f"expert: 9 extents, {size / 1e6:.2f} MB; {args.threads} threads; {args.rounds} rounds; {where}")
        print("figures: median [quartiles] (min .. max)")
        for result in results:
            print(describe(result))
    record = {
        "benchmark": "repacked_reads",
        **facts,
        "threads": args.threads,
        "rounds": args.rounds,
        "aligned_slots": args.aligned_slots,
        "results": [asdict(result) for result in results],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main))
