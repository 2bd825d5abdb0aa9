"""What our own Python costs as models grow: a token by experts, slots and policy, and opening by number of tensors.

A token of a partly resident layer plans its loads, publishes them and touches what it used; that is timed here, without
reads and without MLX. Half of the experts have a slot. Each token misses none, one or half of its experts; those that
are there are drawn at random from the residents. Sizes take turns, so that they see the same machine.

Opening reads the headers of a checkpoint with a tensor for each expert, component and layer (its data are holes, so it
takes hardly any disk), and locates every expert.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

from common import environment, positive, run
from tqdm import tqdm

from mlx_moecache.checkpoints.checkpoint import read_index
from mlx_moecache.checkpoints.expert_layout import ComponentSpec, locate_experts
from mlx_moecache.checkpoints.skeleton import Tensors, write_sparse
from mlx_moecache.eviction import EVICTION
from mlx_moecache.residents import Residents

K = 8  # experts per token
EXPERTS = (16, 32, 64, 128, 256, 512)
MISSES = (0, 1, K // 2)
TOKENS = 100  # per timed run: short, so that some run is undisturbed on a busy machine
OPENINGS = ((7, 240), (61, 273))  # layers, experts: 10 and 100 thousand tensors
COMPONENTS = tuple(
    ComponentSpec(f"{projection}.{tensor}", dtype, shape)
    for projection in ("gate_proj", "up_proj", "down_proj")
    for tensor, dtype, shape in (("weight", "uint32", (64, 16)), ("scales", "uint8", (64, 4)))
)
DTYPES = {"uint32": "U32", "uint8": "U8"}
TARGET = 2.0  # cost with the most experts / with 32


@dataclass(frozen=True)
class TokenCost:
    policy: str
    misses: int  # per token
    microseconds: dict[int, float]  # by number of experts: of one token in one layer, fastest run
    median: dict[int, float]  # the same, median of the runs

    @property
    def growth(self) -> float:
        """Cost with the most experts against that with 32."""
        return self.microseconds[EXPERTS[-1]] / self.microseconds[32]


@dataclass(frozen=True)
class OpeningCost:
    tensors: int
    shards: int
    read_index_seconds: float  # fastest run
    locate_seconds: float
    bytes_per_tensor: float  # that the index holds


class Layer:
    """Residents of one layer in the steady state."""

    def __init__(self, experts: int, policy: str) -> None:
        self.residents = Residents(experts, experts // 2, policy)
        self.residents.seed(range(experts // 2))
        self._random = random.Random(0)
        self.run(4 * experts, 1)

    def run(self, tokens: int, misses: int) -> float:
        """Seconds per token, only our own work counted, of tokens that miss so many of their K experts."""
        residents, seconds = self.residents, 0.0
        for _ in range(tokens):
            inside = self._random.sample(sorted(residents.experts), K - misses)
            outside = [e for e in range(residents.num_experts) if e not in residents]
            needed = inside + self._random.sample(outside, misses)
            uses = [(expert, 1) for expert in needed]
            began = time.perf_counter()
            loads = residents.plan(needed)
            if loads:
                residents.publish(loads)
            residents.touch(uses)
            seconds += time.perf_counter() - began
        return seconds / tokens


def measure_tokens(policy: str, rounds: int) -> list[TokenCost]:
    layers = {experts: Layer(experts, policy) for experts in EXPERTS}
    costs = []
    gc.disable()
    try:
        for misses in MISSES:
            runs = [{e: layer.run(TOKENS, misses) * 1e6 for e, layer in layers.items()} for _ in range(rounds)]
            fastest = {e: round(min(run[e] for run in runs), 2) for e in EXPERTS}
            middle = {e: round(statistics.median(run[e] for run in runs), 2) for e in EXPERTS}
            costs.append(TokenCost(policy, misses, fastest, middle))
    finally:
        gc.enable()
    return costs


def make_checkpoint(folder: Path, layers: int, experts: int) -> int:
    """Write one shard per layer and return the number of tensors."""
    for layer in range(layers):
        tensors: Tensors = {
            f"model.layers.{layer}.mlp.experts.{expert}.{c.name}": (DTYPES[c.dtype], c.shape)
            for expert in range(experts)
            for c in COMPONENTS
        }
        write_sparse(folder / f"model-{layer + 1:05d}-of-{layers:05d}.safetensors", tensors)
    return layers * experts * len(COMPONENTS)


def measure_opening(layers: int, experts: int, rounds: int) -> OpeningCost:
    with tempfile.TemporaryDirectory(prefix="mlx_moecache-") as name:
        folder = Path(name)
        tensors = make_checkpoint(folder, layers, experts)
        reading, locating = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            index = read_index(folder)
            read = time.perf_counter()
            for layer in range(layers):
                locate_experts(index, f"model.layers.{layer}.mlp.switch_mlp", COMPONENTS, experts)
            reading.append(read - began)
            locating.append(time.perf_counter() - read)
        del index
        tracemalloc.start()
        index = read_index(folder)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return OpeningCost(
            len(index.tensors), layers, round(min(reading), 4), round(min(locating), 4), round(held / tensors, 1)
        )


def describe(tokens: list[TokenCost], openings: list[OpeningCost]) -> str:
    lines = [
        f"microseconds of our own work per token and partly resident layer, top-{K}, half of E in slots, fastest run",
        f"  {'policy':<8}{'misses':>7}" + "".join(f"{f'E={e}':>9}" for e in EXPERTS) + f"{f'{EXPERTS[-1]}/32':>9}",
    ]
    for cost in tokens:
        figures = "".join(f"{cost.microseconds[e]:>9.1f}" for e in EXPERTS)
        lines.append(f"  {cost.policy:<8}{cost.misses:>7}{figures}{cost.growth:>9.2f}")
    lines.append("opening a checkpoint with a tensor per expert, component and layer")
    for o in openings:
        lines.append(
            f"  {o.tensors:>7,} tensors in {o.shards} shards: headers {o.read_index_seconds:.2f} s, locating experts "
            f"{o.locate_seconds:.2f} s, {o.tensors * o.bytes_per_tensor / 1e6:.0f} MB held"
        )
    return "\n".join(lines)


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What our own Python costs as models grow.")
    parser.add_argument("--rounds", type=positive, default=25, help="interleaved runs of each size (default: 25)")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    where = environment()
    tokens: list[TokenCost] = []
    for policy in tqdm(EVICTION, desc="policies", disable=None):
        tokens += measure_tokens(policy, args.rounds)
    openings = [measure_opening(layers, experts, min(args.rounds, 3)) for layers, experts in OPENINGS]
    if not args.json:
        print(describe(tokens, openings))
    record = {
        "benchmark": "scale",
        "environment": where,
        "rounds": args.rounds,
        "k": K,
        "target_growth": TARGET,
        "largest_growth": round(max(cost.growth for cost in tokens), 3),
        "tokens": [asdict(cost) for cost in tokens],
        "openings": [asdict(cost) for cost in openings],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    raise SystemExit(run(main))
