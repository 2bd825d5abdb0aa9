"""What is a warm start worth? The first reply after a start, with the last run's experts read before it and without.

A first run answers one prompt and ends; the next one begins with an empty cache ("cold"), or reads a warm set first:

resident  what was in memory at the end of the first run (what `--warm-start` does)
used      as many, but those that the first run selected most often, counted per layer
stopped   as resident, but the prompt comes at once, so that reading stops after the first layer

"typed" ratios are for a person who writes the prompt meanwhile, or a server that has no request yet: the time of the
warm read is not counted. "waiting" ratios are for a prompt that is there already: it is. Stories are written by the
model itself (exact, sampled); prompts are their beginnings, and the first run had another story. Reads are slowed down
to an emulated flash, since a small model's experts are nothing to a real disk. All variants answer the same prompt one
after the other, who is first changes, and a ratio compares sums over the same prompts. Another round is no new prompt:
intervals are over stories, the rounds of each being summed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import Array, Estimate, add_model_argument, bootstrap, environment, model_folder, positive, run
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from mlx_moecache.checkpoints.reader import EmulatedFlash
from mlx_moecache.console.arguments import duration, flash_speed
from mlx_moecache.errors import UsageError
from mlx_moecache.generation import stream_generate
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.observer import RoutedCall
from mlx_moecache.warm_start import Experts, Warming, warm_set

OPENINGS = (
    "Once upon a time there was a fox",
    "Tell me a story about a little robot and a garden.",
    "Lily and Tom went to the park.",
    "The sun was shining and the birds were singing.",
    "One day a cat found a red ball under the bed.",
    "Tim wanted to fly like a bird, but he had no wings.",
    "There was a small boat on a big blue lake.",
    "Mom made a cake for the party, and everybody came.",
)
VARIANTS = ("cold", "resident", "used", "stopped")
RUN_PROMPT, RUN_REPLY = 16, 100  # tokens of the run whose experts are kept


@dataclass(frozen=True)
class Sample:
    """One first reply."""

    warm_seconds: float  # of the warm read
    first_seconds: float  # from the prompt to the first token
    reply_seconds: float  # from the prompt to the last token
    warm_bytes: int
    prefill_bytes: int
    decode_bytes: int
    prefill_hits: int
    prefill_selections: int
    decode_hits: int
    decode_selections: int
    swapped: int


@dataclass(frozen=True)
class Row:
    """One variant at one prompt length and number of slots; ratios are to cold, with 95 % intervals over stories."""

    slots: int
    prompt_tokens: int
    variant: str
    first_typed: Estimate
    first_waiting: Estimate
    reply_typed: Estimate
    reply_waiting: Estimate
    all_bytes: Estimate  # the warm read included
    seconds: dict[str, float]  # means: warm, first, reply
    megabytes: dict[str, float]  # means: warm, prefill, decode
    prefill_hit_rate: float
    decode_hit_rate: float
    swapped_share: float


class Uses:
    """Counts selections per layer."""

    def __init__(self, layers: int) -> None:
        self.counts = [Counter[int]() for _ in range(layers)]

    def observe(self, call: RoutedCall) -> None:
        self.counts[call.layer].update(call.used.ravel().tolist())

    def most(self, sizes: Sequence[int]) -> Experts:
        """Per layer the most selected ones, the most often last."""
        return tuple(tuple(e for e, _ in reversed(c.most_common(n))) for c, n in zip(self.counts, sizes, strict=True))


class Bench:
    """One loaded model with slow reads."""

    def __init__(self, folder: Path, slots: int, routing: str, flash: EmulatedFlash, context: int) -> None:
        opened = OpenedModel(folder)
        self.tokenizer = opened.tokenizer()
        self.model = opened.load(
            MemoryOptions(slots=slots, max_context=context), CacheOptions(routing=routing, flash=flash)
        )
        self.cache = self.model.expert_cache

    def reply(self, prompt: Sequence[int], tokens: int, sampler: Any = None) -> tuple[float, float, list[int]]:
        """Seconds to the first token and to the last, and the tokens."""
        started, first, written = time.perf_counter(), 0.0, []
        for r in stream_generate(self.model, self.tokenizer, list(prompt), max_tokens=tokens, sampler=sampler):
            written.append(r.token)
            first = first or time.perf_counter() - started
        return first, time.perf_counter() - started, written

    def first_run(self, prompt: Sequence[int]) -> dict[str, Experts | None]:
        """The warm sets that a run with this prompt leaves, by variant."""
        self.cache.reset()
        uses = Uses(len(self.cache.layers))
        with self.cache.observed_by(uses):
            self.reply(prompt[:RUN_PROMPT], RUN_REPLY)
        resident = warm_set(self.cache)
        return {
            "cold": None,
            "resident": resident,
            "used": uses.most([len(x.residents) for x in self.cache.layers]),
            "stopped": resident,
        }

    def sample(self, prompt: Sequence[int], tokens: int, variant: str, experts: Experts | None) -> Sample:
        self.cache.reset()
        started, before = time.perf_counter(), self.cache.reader.bytes_read
        if experts is not None and variant == "stopped":
            Warming(self.cache, experts).finish()
        elif experts is not None:
            self.cache.warm(experts)
        warm_seconds, warm_bytes = time.perf_counter() - started, self.cache.reader.bytes_read - before
        first, whole, _ = self.reply(prompt, tokens)
        p, d = self.cache.stats.prefill, self.cache.stats.decode
        return Sample(
            warm_seconds, first, whole, warm_bytes, p.bytes_read, d.bytes_read,
            p.hits, p.selections, d.hits, d.selections, d.swapped,
        )  # fmt: skip


def write_stories(folder: Path, length: int, openings: Sequence[str]) -> list[list[int]]:
    """Token ids of stories of at least `length` tokens that the model writes from the openings."""
    opened = OpenedModel(folder)
    everything = max(x.num_experts for x in opened.layer_shapes)
    writer = Bench(folder, everything, "original", EmulatedFlash(1e12), length + 64)
    stories = []
    for seed, opening in enumerate(openings):
        mx.random.seed(seed)
        tokens: list[int] = writer.tokenizer.encode(opening)
        while len(tokens) < length:  # a story may end early; the next one follows
            tokens += writer.reply(tokens, length - len(tokens), make_sampler(0.8))[2]
        stories.append(tokens)
    writer.cache.close()
    return stories


def measure(bench: Bench, stories: Sequence[Sequence[int]], args: argparse.Namespace, bar: Any) -> list[Row]:
    rows = []
    sets = [bench.first_run(story) for story in stories]
    bench.sample(stories[0], 4, "cold", None)  # warms up
    for length in args.lengths:
        samples: dict[str, list[Sample]] = {v: [] for v in VARIANTS}
        for number in range(args.rounds):
            for i, story in enumerate(stories):
                kept = sets[(i + 1 + number) % len(stories)]  # of another story, another one in each round
                start = (i + number) % len(VARIANTS)
                for variant in (*VARIANTS[start:], *VARIANTS[:start]):
                    samples[variant].append(bench.sample(story[:length], args.tokens, variant, kept[variant]))
                bar.update()
        rows += [summarise(bench, length, v, samples["cold"], samples[v], args.rounds) for v in VARIANTS]
    return rows


def ratio_of_sums(cold: Sequence[float], warm: Sequence[float], rounds: int) -> Estimate:
    """sum(warm) / sum(cold), its interval over stories. Both hold `rounds` times the same stories in the same order."""
    per_story = [np.asarray(x, float).reshape(rounds, -1).sum(axis=0) for x in (warm, cold)]

    def of_sums(rows: Array) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    return bootstrap(np.stack(per_story, axis=1), of_sums)


def summarise(
    bench: Bench, length: int, variant: str, cold: Sequence[Sample], warm: Sequence[Sample], rounds: int
) -> Row:
    """`cold` and `warm` hold `rounds` times the same stories in the same order."""

    def ratio(cold_value: Sequence[float], warm_value: Sequence[float]) -> Estimate:
        return ratio_of_sums(cold_value, warm_value, rounds)

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    def read(s: Sample) -> int:
        return s.warm_bytes + s.prefill_bytes + s.decode_bytes

    return Row(
        slots=bench.cache.slots_per_layer[0],
        prompt_tokens=length,
        variant=variant,
        first_typed=ratio([s.first_seconds for s in cold], [s.first_seconds for s in warm]),
        first_waiting=ratio([s.first_seconds for s in cold], [s.warm_seconds + s.first_seconds for s in warm]),
        reply_typed=ratio([s.reply_seconds for s in cold], [s.reply_seconds for s in warm]),
        reply_waiting=ratio([s.reply_seconds for s in cold], [s.warm_seconds + s.reply_seconds for s in warm]),
        all_bytes=ratio([read(s) for s in cold], [read(s) for s in warm]),
        seconds={
            "warm": mean([s.warm_seconds for s in warm]),
            "first": mean([s.first_seconds for s in warm]),
            "reply": mean([s.reply_seconds for s in warm]),
        },
        megabytes={
            "warm": mean([s.warm_bytes / 1e6 for s in warm]),
            "prefill": mean([s.prefill_bytes / 1e6 for s in warm]),
            "decode": mean([s.decode_bytes / 1e6 for s in warm]),
        },
        prefill_hit_rate=sum(s.prefill_hits for s in warm) / max(1, sum(s.prefill_selections for s in warm)),
        decode_hit_rate=sum(s.decode_hits for s in warm) / max(1, sum(s.decode_selections for s in warm)),
        swapped_share=sum(s.swapped for s in warm) / max(1, sum(s.decode_selections for s in warm)),
    )


def describe(rows: Sequence[Row]) -> str:
    titles = ["slots", "prompt", "variant", "first token, typed", "... waiting", "reply, typed", "... waiting"]
    titles += ["bytes", "hit %: prefill", "decode", "swapped %", "MB: warm + prefill + decode"]
    widths = [5, 6, 8, 19, 19, 19, 19, 19, 14, 6, 9, 1]
    lines = ["  ".join(f"{t:<{w}}" for t, w in zip(titles, widths, strict=True)).rstrip()]
    for r in rows:
        ratios = (r.first_typed, r.first_waiting, r.reply_typed, r.reply_waiting, r.all_bytes)
        shown = ["1" if r.variant == "cold" else e.format(2) for e in ratios]
        shares = (r.prefill_hit_rate, r.decode_hit_rate, r.swapped_share)
        m = r.megabytes
        cells = [str(r.slots), str(r.prompt_tokens), r.variant, *shown, *(f"{100 * x:.1f}" for x in shares)]
        cells.append(f"{m['warm']:.2f} + {m['prefill']:.2f} + {m['decode']:.2f}")
        lines.append("  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip())
    return "\n".join(lines)


def numbers(text: str) -> tuple[int, ...]:
    """ "15,30" -> (15, 30)."""
    return tuple(positive(part) for part in text.split(","))


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The first reply after a start, warm against cold.")
    add_model_argument(parser)
    parser.add_argument("--slots", type=numbers, help="per layer (default: a quarter, half, three quarters)")
    parser.add_argument("--lengths", type=numbers, default=(4, 16, 64, 256), help="of prompts (default: 4,16,64,256)")
    parser.add_argument("--tokens", type=positive, default=40, help="of a reply (default: 40)")
    parser.add_argument("--rounds", type=positive, default=3, help="over all prompts (default: 3)")
    parser.add_argument("--prompts", type=positive, default=len(OPENINGS), help="(default: all eight)")
    parser.add_argument("--routing", default="cache-prior", help="(default: cache-prior)")
    parser.add_argument("--flash", type=flash_speed, default=20_000_000, help="emulated (default: 20MB/s)")
    parser.add_argument("--flash-latency", type=duration, default=1e-4, help="of a layer's read (default: 100us)")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = setup_arg_parser().parse_args(argv)
    facts = environment()
    folder, name = model_folder(args.model)
    experts = min(x.num_experts for x in OpenedModel(folder).layer_shapes)
    slots = args.slots or tuple(experts * i // 4 for i in (1, 2, 3))
    if max(slots) >= experts:
        raise UsageError(f"--slots must be below the {experts} experts of a layer: else nothing is ever read")
    longest = max(*args.lengths, RUN_PROMPT)
    stories = write_stories(folder, longest, OPENINGS[: args.prompts])
    flash = EmulatedFlash(args.flash, args.flash_latency)
    rows: list[Row] = []
    total = len(slots) * len(args.lengths) * args.rounds * len(stories)
    with tqdm(total=total, unit="prompt", leave=False, disable=None) as bar:
        for s in slots:
            bench = Bench(folder, s, args.routing, flash, longest + max(args.tokens, RUN_REPLY))
            rows += measure(bench, stories, args, bar)
            bench.cache.close()
    if not args.json:
        print(f"{name}: {len(stories)} prompts x {args.rounds} rounds, replies of {args.tokens} tokens, {args.routing}")
        print(f"emulated flash {args.flash / 1e6:g} MB/s + {args.flash_latency * 1e6:g} us; ratios to cold [95 %]")
        print(describe(rows))
    record = {
        "benchmark": "warm_start",
        **facts,
        "model": name,
        "routing": args.routing,
        "flash_bytes_per_second": args.flash,
        "flash_latency_seconds": args.flash_latency,
        "prompts": len(stories),
        "rounds": args.rounds,
        "reply_tokens": args.tokens,
        "rows": [asdict(r) for r in rows],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main))
